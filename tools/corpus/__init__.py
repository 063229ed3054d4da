"""Generated pictures with labels: something to train on where no images may be downloaded."""
