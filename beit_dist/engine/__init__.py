"""The training engine: ranks, optimizer, loop, checkpoints, metrics."""
