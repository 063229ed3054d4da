"""BEiT pre-training at any scale: token shards, masked image modelling, exact resume."""

__version__ = "0.2.0"
