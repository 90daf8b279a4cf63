"""What is computed from a data set once and stored beside it (`data/columns.py`): `prx encode text|features|latents`."""
