"""llm-foundry, if it is installed: our components under its names (`published`), its components under ours (`lookup`)."""
