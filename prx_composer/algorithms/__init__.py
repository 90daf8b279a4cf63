"""Composer algorithms that fill the model's seams; one file each, with its card in README.md."""
