"""The sources of images: one module for each kind, and the table of them."""
