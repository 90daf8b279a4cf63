"""What follows training: a trained model is opened, drawn with, exported to diffusers, and trained on from there."""
