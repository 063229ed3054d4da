"""The format of a checkpoint's files, and how they are read."""
