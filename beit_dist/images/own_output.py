"""What beit_dist itself has written among images: runs, data sets of shards, pictures of tokenizers.

They are known by the names beside them, whatever they are called: alike in folders, in tars and in stores. Only
weights with a picture of their name are looked into, as data sets have such pairs of their own.
"""

from __future__ import annotations

from collections.abc import Set

from beit_dist.images.left_out import Kind

RUN = Kind("run folder", "run folders")
RUN_PART = Kind("folder of a run", "folders of a run")
SHARDS = Kind("data set of shards", "data sets of shards")
TOKENIZER_PICTURE = Kind("tokenizer's picture", "tokenizers' pictures")

RUN_PARTS = frozenset(("checkpoints", "pictures", "ranks", "tensorboard", "wandb"))
"""Folders of a run: what is left out where the images lie in the run folder itself."""
MARKS = RUN_PARTS | {"config.yaml", "run.json", "manifest.json", "sources.jsonl", "job.json", "commits", "v00"}
"""Names that tell a folder of ours."""
WEIGHTS = ".safetensors"
_TOKENIZER = b'{"__metadata__":{"beit_dist.tokenizer":'
"""Behind the length of its header; the entry is :data:`beit_dist.weights.tokenizer_files.FORMAT`."""


def ours(names: Set[str]) -> Kind | None:
    """What a folder is that holds these names, if it is one of ours."""
    if {"config.yaml", "run.json"} <= names and not RUN_PARTS.isdisjoint(names):
        return RUN
    if "sources.jsonl" in names and not names.isdisjoint(("job.json", "commits", "v00")):
        return SHARDS
    return SHARDS if {"manifest.json", "v00"} <= names else None


def is_tokenizer(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a tokenizer of ours."""
    return head[8:].startswith(_TOKENIZER)
