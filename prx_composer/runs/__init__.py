"""A run on disk: its folder, checkpoints and weights, and how they are opened again."""
