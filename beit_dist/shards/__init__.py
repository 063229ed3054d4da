"""The shard format: a sample, the writer, the manifest, verification."""
