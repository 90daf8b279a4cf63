"""`prx evaluate`: draw from held-out captions or a benchmark, and score the images."""
