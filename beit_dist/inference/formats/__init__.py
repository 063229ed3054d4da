"""Tables of what was found in images, in files of several formats."""
