"""Fine-tuning: a pre-trained backbone learns to tell classes of images, or of pixels."""
