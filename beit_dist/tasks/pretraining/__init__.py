"""Masked image modelling: predict what is in the masked patches of an image."""
