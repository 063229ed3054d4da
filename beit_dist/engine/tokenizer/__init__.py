"""Training of the tokenizer: its own loop, made of the parts that pre-training is made of."""
