"""Images with labels: a class for each image, or a map of classes for its pixels."""
