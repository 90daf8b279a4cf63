"""A recipe: its keys (`config`), how values are checked (`checks`, `arguments`), what a resumed run may change (`resume`)."""
