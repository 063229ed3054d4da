"""What has come of runs and data sets: pictures, and lists of them."""
