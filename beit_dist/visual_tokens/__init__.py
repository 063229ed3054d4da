"""The discrete VAE that turns an image into a grid of visual tokens."""
