"""Data: on disk (`format.py`), in order (`sampler.py`), decoded (`dataset.py`), in batches (`loader.py`), and where it comes from
(`sources.py`)."""
