"""What a model predicts of masked patches: a module for each target, and the table of them in ``targets.py``."""
