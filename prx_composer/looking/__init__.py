"""What a data set holds: `prx data stats` counts it, `prx data view` shows it as a model sees it."""
