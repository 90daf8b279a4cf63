"""What generated images are worth: features, distances and scores."""
