"""Batches of labelled images: their order, the processes that make them, and held-out ones."""
