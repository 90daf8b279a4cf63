"""Tricks: Composer algorithms that fill the model's seams. README.md has a card for each."""
