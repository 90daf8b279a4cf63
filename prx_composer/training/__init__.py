"""A recipe becomes a run: `start` checks it, `preflight` checks what it needs, `build` makes the trainer."""
