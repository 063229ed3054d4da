"""The order of samples, their masks, and the stream that feeds the trainer."""
