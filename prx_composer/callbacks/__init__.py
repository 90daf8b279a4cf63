"""What watches a run: metrics, images, scores; none of it changes the training."""
