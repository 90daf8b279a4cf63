"""llm-foundry: its components in our recipes, ours in its trainer."""
