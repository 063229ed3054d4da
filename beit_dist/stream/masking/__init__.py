"""Which patches of an image are masked: a module for each way, and the table of them in ``modes.py``."""
