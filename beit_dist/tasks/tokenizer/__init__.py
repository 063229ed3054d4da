"""The tokenizer: a dVAE that turns images into grids of visual tokens."""
