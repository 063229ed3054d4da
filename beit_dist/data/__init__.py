"""Shards, the order of samples, masks, and the stream that feeds the trainer."""
