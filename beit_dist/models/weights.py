"""Our weights under the names and shapes of Hugging Face, timm and unilm, and back.

Parameters here have unilm's names already. What differs is the patch embedding, a convolution everywhere else;
Hugging Face's names and its separate query, key and value; and timm, which has a relative position table in each
block and neither a mask token nor a head over visual tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from beit_dist.config import ModelConfig
from beit_dist.errors import WeightsError
from beit_dist.models.resampling import resample_positions, resample_table
from beit_dist.models.vit import relative_position_index

Weights = dict[str, Tensor]

TABLE = "rel_pos_bias.relative_position_bias_table"
_BLOCK_TABLE = re.compile(r"blocks\.\d+\.attn\.relative_position_bias_table")
_PATCHES = "patch_embed.proj.weight"
_QKV_PART = re.compile(r"(.*attn\.)qkv\.(?:query|key|value)\.weight")
_EXTRA = re.compile(
    r"(?:beit\.)?(?:pooler|fpn\d?|neck)\.|(?:head|fc_norm|classifier|decode_head|auxiliary_head)\."
)
"""What fine-tuning adds behind the backbone: classifiers, the norm of pooled features, necks and heads."""
_BUFFER = "relative_position_index"

PRETRAINING_ONLY = ("mask_token", "lm_head.weight", "lm_head.bias")
"""What other models than those of masked image modelling lack; a new run starts these anew."""

_HF_NAMES = [
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "beit.embeddings.patch_embeddings.projection."),
    (TABLE, "beit.encoder.relative_position_bias.relative_position_bias_table"),
    ("norm.", "layernorm."),
    ("lm_head.", "lm_head."),
]
_HF_BLOCK_NAMES = [
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.qkv.query.", "attention.attention.query."),
    ("attn.qkv.key.", "attention.attention.key."),
    ("attn.qkv.value.", "attention.attention.value."),
    ("attn.proj.", "attention.output.dense."),
    (
        "attn.relative_position_bias_table",
        "attention.attention.relative_position_bias.relative_position_bias_table",
    ),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("gamma_1", "lambda_1"),
    ("gamma_2", "lambda_2"),
]
_HF_INNER_NORM = ("norm.", "beit.layernorm.")
"""The bare model's final norm, with ``use_mean_pooling=false``."""
_HF_5_NAMES = [  # as the parameters of transformers 5 are called; its files keep the names above
    ("beit.shared_position_bias.", "beit.encoder.relative_position_bias."),
    ("beit.layers.", "beit.encoder.layer."),
]
_HF_5_BLOCK_NAMES = [
    ("attention.q_proj.", "attention.attention.query."),
    ("attention.k_proj.", "attention.attention.key."),
    ("attention.v_proj.", "attention.attention.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("relative_position_bias.", "attention.attention.relative_position_bias."),
]
_HF_BLOCK = "beit.encoder.layer."


def to_unilm(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The state of unilm's pre-training model, with the index buffer that it saves."""
    found = {name: tensor for name, tensor in weights.items() if name != _PATCHES}
    found[_PATCHES] = _convolution(weights[_PATCHES], config)
    if TABLE in found:
        found[f"rel_pos_bias.{_BUFFER}"] = relative_position_index(config.grid)
    return found


def to_timm(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The state of timm's ``Beit`` without a classifier, with ``global_pool="token"`` or ``""``."""
    found = to_unilm({n: t for n, t in weights.items() if n not in PRETRAINING_ONLY}, config)
    found.pop(f"rel_pos_bias.{_BUFFER}", None)
    table = found.pop(TABLE, None)
    if table is not None:
        for block in range(config.depth):
            found[f"blocks.{block}.attn.relative_position_bias_table"] = table.clone()
    return found


def to_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """The tensors of a file of Hugging Face's ``BeitForMaskedImageModeling``."""
    found: Weights = {}
    for name, tensor in to_unilm(weights, config).items():
        if name.endswith("attn.qkv.weight"):
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[_hf_name(name.removesuffix("weight") + f"{part}.weight")] = piece.clone()
        elif name.endswith(("attn.q_bias", "attn.v_bias")):
            part = "query" if name.endswith("q_bias") else "value"
            found[_hf_name(name[: -len("q_bias")] + f"qkv.{part}.bias")] = tensor
        elif not name.endswith(_BUFFER):
            found[_hf_name(name)] = tensor
    return found


def is_hf(names: Iterable[str]) -> bool:
    """Whether these are Hugging Face's names: of a model with a head, or of the bare ``BeitModel``."""
    return any(name.startswith(("beit.", "embeddings.")) for name in names)


def without_extras(tensors: Mapping[str, Tensor]) -> tuple[Weights, list[str]]:
    """What may belong to the model of masked images, and the names of what fine-tuning has added to it."""
    extras = sorted(name for name in tensors if _EXTRA.match(name))
    return {name: tensor for name, tensor in tensors.items() if name not in extras}, extras


def from_hf(tensors: Mapping[str, Tensor]) -> Weights:
    """unilm's names for the tensors of any of Hugging Face's BEiT models; what has none keeps its own.

    Raises:
        WeightsError: a part of a query, key and value weight is missing, or there are two final norms.
    """
    found: Weights = {}
    bare = any(name.startswith("embeddings.") for name in tensors)
    for name, tensor in tensors.items():
        ours = _from_hf_name(f"beit.{name}" if bare else name) or name
        if ours in found:
            raise WeightsError(
                f"got two tensors for {ours}, expected one: with use_mean_pooling=false Hugging Face's model has "
                "two norms one after the other, and ours one"
            )
        found[ours] = tensor
    for start in dict.fromkeys(match[1] for name in found if (match := _QKV_PART.match(name))):
        parts = [found.pop(f"{start}qkv.{part}.weight", None) for part in ("query", "key", "value")]
        whole = [part for part in parts if part is not None]
        if len(whole) != 3:
            raise WeightsError(f"got a part of {start}qkv, expected query, key and value weights")
        found[f"{start}qkv.weight"] = torch.cat(whole)
        for part in ("query", "value"):
            if (bias := found.pop(f"{start}qkv.{part}.bias", None)) is not None:
                found[f"{start}{part[0]}_bias"] = bias
    return found


def from_unilm(tensors: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Our weights from those under unilm's or timm's names, for a model of ``config``'s resolution; fp32.

    Tables of all blocks become the shared one, which they were before fine-tuning. Tables and positions of
    another resolution are resampled. Buffers stay out; other names that are not ours stay, for who compares them
    with the model's.

    Raises:
        WeightsError: values are not finite floating-point numbers, the blocks' tables differ, the biases of keys
            are not zero, or positions or patches are of no square grid or another size.
    """
    found: Weights = {}
    for name, tensor in tensors.items():
        if name.endswith(_BUFFER):
            continue
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise WeightsError(f"{name}: got {tensor.dtype} values that are not all finite floating-point numbers")
        if name.endswith("attn.k_bias"):
            _no_key_bias(name, tensor)
        elif name.endswith("attn.qkv.bias"):
            query, key, value = tensor.float().chunk(3)
            _no_key_bias(name, key)
            found[name[: -len("qkv.bias")] + "q_bias"], found[name[: -len("qkv.bias")] + "v_bias"] = query, value
        else:
            found[name] = tensor.float()
    _share_table(found)
    try:
        if TABLE in found:
            found[TABLE] = resample_table(found[TABLE], config.grid)
        if "pos_embed" in found:
            found["pos_embed"] = resample_positions(found["pos_embed"], config.grid)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    kernel = found.get(_PATCHES)
    if kernel is not None and kernel.dim() == 4:
        if tuple(kernel.shape[1:]) != (3, config.patch_size, config.patch_size):
            raise WeightsError(
                f"model.patch_size: got {config.patch_size}, but {_PATCHES} is {list(kernel.shape)}"
            )
        found[_PATCHES] = kernel.permute(0, 2, 3, 1).flatten(1)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _share_table(found: Weights) -> None:
    """The one table that all blocks have, in place of theirs."""
    names = sorted(filter(_BLOCK_TABLE.fullmatch, found), key=lambda name: int(name.split(".")[1]))
    tables = {name: found.pop(name) for name in names}
    if not tables:
        return
    blocks = {name.split(".")[1] for name in found if name.startswith("blocks.")}
    first = names[0]
    different = [name for name, table in tables.items() if not torch.equal(table, tables[first])]
    if different or TABLE in found or len(tables) != len(blocks):
        what = (
            f"{different[0]} differs from {first}" if different else f"there are {first} and blocks that have none"
        )
        if TABLE in found:
            what = f"there are {first} and {TABLE}"
        raise WeightsError(
            f"got blocks with relative position tables of their own ({what}), expected one for all of them. "
            "Fine-tuning makes them differ: start from weights that were pre-trained only, such as unilm's "
            "beit_base_patch16_224_pt22k"
        )
    found[TABLE] = tables[first]


def _no_key_bias(name: str, bias: Tensor) -> None:
    if bias.any():
        raise WeightsError(
            f"{name}: got biases of keys that are not zero, expected a BEiT v1 model, which has none"
        )


def _convolution(weight: Tensor, config: ModelConfig) -> Tensor:
    """(C, patch · patch · 3) in the order of a shard to (C, 3, patch, patch)."""
    return weight.view(-1, config.patch_size, config.patch_size, 3).permute(0, 3, 1, 2).contiguous()


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return None


def _hf_name(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block:
        inner = _renamed(block[2], _HF_BLOCK_NAMES)
        found = None if inner is None else f"{_HF_BLOCK}{block[1]}.{inner}"
    else:
        found = _renamed(name, _HF_NAMES)
    if found is None:
        raise WeightsError(f"got the parameter {name}, for which Hugging Face has no name")
    return found


def _from_hf_name(name: str) -> str | None:
    name = _renamed(name, _HF_5_NAMES) or name
    block = re.fullmatch(re.escape(_HF_BLOCK) + r"(\d+)\.(.+)", name)
    if block:
        inner = _renamed(block[2], _HF_5_BLOCK_NAMES) or block[2]
        ours = _renamed(inner, [(new, old) for old, new in _HF_BLOCK_NAMES])
        return None if ours is None else f"blocks.{block[1]}.{ours}"
    return _renamed(name, [(new, old) for old, new in (*_HF_NAMES, _HF_INNER_NORM)])
