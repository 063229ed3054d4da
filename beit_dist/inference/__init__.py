"""Trained models for who has images: features, predictions, reconstructions, attention."""
