"""Optimizers and what they train."""
