"""Capacity on paper: memory, step time, data, checkpoints and days of a run, before a GPU-hour is spent."""
