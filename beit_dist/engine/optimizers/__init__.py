"""The optimizers that ``optimizer.name`` can choose: one module each, and a line in ``table.py``."""
