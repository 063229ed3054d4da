"""The offline job: from a corpus of images to shards of patches and tokens."""
