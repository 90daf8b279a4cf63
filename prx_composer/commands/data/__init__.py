"""`prx data stats` and `prx data view`: look at a data set before training on it."""
