"""Our weights under the names and shapes of Hugging Face, timm and unilm, and back.

Parameters here have unilm's names already, those of its fine-tuned models too. What differs is the patch
embedding, a convolution everywhere else; Hugging Face's names and its separate query, key and value; and timm,
which has a relative position table in each block and neither a mask token nor a head over visual tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.errors import WeightsError
from beit_dist.models.heads.targets import HEADS, head_of
from beit_dist.models.positions import relative_position_index
from beit_dist.weights.resampling import resample_positions, resample_table

Weights = dict[str, Tensor]

TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.{}.attn.relative_position_bias_table"
_BLOCK_TABLE = re.compile(r"blocks\.\d+\.attn\.relative_position_bias_table")
PATCHES = "patch_embed.proj.weight"
_QKV_PART = re.compile(r"(.*attn\.)qkv\.(?:query|key|value)\.weight")
_EXTRA = re.compile(r"(?:beit\.)?(?:pooler|fpn\d?|neck)\.|(?:head|fc_norm|decode_head|auxiliary_head)\.")
"""What fine-tuning adds behind the backbone: classifiers, the norm of pooled features, necks and heads."""
CLASS_LAYERS = ("head.", "decode_head.conv_seg.", "auxiliary_head.conv_seg.")
"""What has a row for each class."""
_TABLE, _BUFFER = "relative_position_bias_table", "relative_position_index"
_NO_WEIGHTS = (_BUFFER, "num_batches_tracked")

_HF_NAMES = [
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "beit.embeddings.patch_embeddings.projection."),
    (TABLE, "beit.encoder.relative_position_bias.relative_position_bias_table"),
    ("norm.", "layernorm."),
    ("lm_head.", "lm_head."),
    ("fc_norm.", "beit.pooler.layernorm."),
    ("head.", "classifier."),
    ("decode_head.conv_seg.", "decode_head.classifier."),
    ("auxiliary_head.conv_seg.", "auxiliary_head.classifier."),
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


def is_pretraining_only(name: str, model: ModelConfig) -> bool:
    """Whether only models of masked image modelling have a parameter, the mask token or the head of ``model``.

    A new run that starts from another model starts these anew.
    """
    return name == "mask_token" or name.startswith(f"{head_of(model).name}.")


def is_of_pretraining(name: str) -> bool:
    """Whether fine-tuning drops a parameter: the mask token, a head over patches, and the last norm."""
    return is_of_masking(name) or name.startswith("norm.")


def is_of_masking(name: str) -> bool:
    """Whether only models of masked image modelling have a parameter: the mask token, and heads over patches."""
    return name == "mask_token" or name.startswith(tuple(f"{head.name}." for head in HEADS.values()))


def is_of_another_head(name: str, model: ModelConfig) -> bool:
    """Whether a parameter is of another target's head than ``model`` has."""
    return name.startswith(tuple(f"{head.name}." for head in HEADS.values() if head is not head_of(model)))


def to_unilm(weights: Mapping[str, Tensor], config: BackboneConfig) -> Weights:
    """The state of unilm's models for pre-training and for fine-tuning, with the index buffers that they save."""
    found = {name: tensor for name, tensor in weights.items() if name != PATCHES}
    found[PATCHES] = _convolution(weights[PATCHES], config)
    for name in weights:
        if name.endswith(_TABLE):
            found[name.removesuffix(_TABLE) + _BUFFER] = relative_position_index(config.grid)
    return found


def to_timm(weights: Mapping[str, Tensor], config: BackboneConfig) -> Weights:
    """The state of timm's ``Beit``, of pre-training with ``global_pool="token"`` or ``""``, else ``"avg"``."""
    found = {n: t for n, t in to_unilm(weights, config).items() if not (is_of_masking(n) or n.endswith(_BUFFER))}
    table = found.pop(TABLE, None)
    if table is not None:
        found |= {BLOCK_TABLE.format(block): table.clone() for block in range(config.depth)}
    return found


def to_hf(weights: Mapping[str, Tensor], config: BackboneConfig) -> Weights:
    """The tensors of a file of Hugging Face's ``BeitForMaskedImageModeling`` or ``BeitForImageClassification``."""
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


def is_extra(name: str) -> bool:
    """Whether a tensor is of what fine-tuning adds behind the backbone."""
    return bool(_EXTRA.match(name))


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
                "two norms one after the other; ours has one"
            )
        found[ours] = tensor
    for start in dict.fromkeys(match[1] for name in found if (match := _QKV_PART.match(name))):
        parts = [found.pop(f"{start}qkv.{part}.weight", None) for part in ("query", "key", "value")]
        whole = [part for part in parts if part is not None]
        if len(whole) != 3:
            raise WeightsError(f"got only a part of {start}qkv, expected query, key and value weights")
        found[f"{start}qkv.weight"] = torch.cat(whole)
        for part in ("query", "value"):
            if (bias := found.pop(f"{start}qkv.{part}.bias", None)) is not None:
                found[f"{start}{part[0]}_bias"] = bias
    return found


def from_unilm(tensors: Mapping[str, Tensor], config: BackboneConfig) -> Weights:
    """Our weights from those under unilm's or timm's names, for a model of ``config``; fp32.

    Raises:
        WeightsError: as :func:`as_ours` and :func:`fitted`.
    """
    return fitted(as_ours(tensors), config)


def as_ours(tensors: Mapping[str, Tensor]) -> Weights:
    """Our weights from those under unilm's or timm's names, fp32; at the resolution they have.

    Indices and counts that can be computed anew stay out. Other names that are not ours stay, for who compares
    them with the model's.

    Raises:
        WeightsError: values are not finite floating-point numbers, or the biases of keys are not zero.
    """
    found: Weights = {}
    for name, tensor in tensors.items():
        if name.endswith(_NO_WEIGHTS):
            continue
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise WeightsError(f"{name}: got {tensor.dtype} values that are not all finite floating-point numbers")
        if name.endswith("attn.k_bias"):
            _no_key_bias(name, tensor)
        elif name.endswith("attn.qkv.bias"):
            query, key, value = tensor.float().chunk(3)
            _no_key_bias(name, key)
            found[name[: -len("qkv.bias")] + "q_bias"], found[name[: -len("qkv.bias")] + "v_bias"] = query, value
        elif name == PATCHES and tensor.dim() == 4:
            found[name] = _flat(tensor.float())
        else:
            found[name] = tensor.float()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def fitted(weights: Mapping[str, Tensor], config: BackboneConfig) -> Weights:
    """Our weights for a model of ``config``: with its kind of relative position tables, and at its resolution.

    A shared table becomes that of each block, or tables of all blocks the shared one, which they were before
    fine-tuning. Tables and positions of another grid are resampled.

    Raises:
        WeightsError: one table is wanted and those of the blocks differ, or positions or patches are of no square
            grid or another size.
    """
    found = dict(weights)
    kernel = found.get(PATCHES)
    if kernel is not None and kernel.dim() == 2 and kernel.shape[1] != config.patch_bytes:
        side = math.isqrt(kernel.shape[1] // 3)
        got = f"patches of {side} pixels" if 3 * side**2 == kernel.shape[1] else list(kernel.shape)
        raise WeightsError(f"model.patch_size: got {config.patch_size}, but {PATCHES} is of {got}")
    if not config.block_positions:
        _share_table(found)
    elif TABLE in found:
        _one_kind_of_table(found)
        table = _resampled(found.pop(TABLE), config.grid)
        found |= {BLOCK_TABLE.format(block): table for block in range(config.depth)}
    try:
        if "pos_embed" in found:
            found["pos_embed"] = resample_positions(found["pos_embed"], config.grid)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    return {
        name: _resampled(tensor, config.grid) if name == TABLE or _BLOCK_TABLE.fullmatch(name) else tensor
        for name, tensor in found.items()
    }


def block_tables(names: Iterable[str]) -> list[str]:
    """Those of the names that are blocks' own relative position tables, in the order of the blocks."""
    return sorted(filter(_BLOCK_TABLE.fullmatch, names), key=lambda name: int(name.split(".")[1]))


def _resampled(table: Tensor, grid: int) -> Tensor:
    try:
        return resample_table(table, grid).contiguous()
    except ValueError as error:
        raise WeightsError(str(error)) from None


def _one_kind_of_table(found: Weights) -> None:
    if TABLE in found and (tables := block_tables(found)):
        raise WeightsError(
            f"got relative position tables of both kinds ({tables[0]} and {TABLE}), expected one kind"
        )


def _share_table(found: Weights) -> None:
    """The one table that all blocks have, in place of theirs."""
    _one_kind_of_table(found)
    names = block_tables(found)
    tables = {name: found.pop(name) for name in names}
    if not tables:
        return
    blocks = {name.split(".")[1] for name in found if name.startswith("blocks.")}
    first = names[0]
    different = [name for name, table in tables.items() if not torch.equal(table, tables[first])]
    if different or len(tables) != len(blocks):
        what = (
            f"{different[0]} differs from {first}"
            if different
            else f"there is {first}, and other blocks have no table"
        )
        raise WeightsError(
            f"got blocks with relative position tables of their own ({what}), expected one for all of them. "
            "Fine-tuning makes them differ. Give model.block_positions=true, or start from weights that were only "
            "pre-trained, such as unilm's beit_base_patch16_224_pt22k"
        )
    found[TABLE] = tables[first]


def _no_key_bias(name: str, bias: Tensor) -> None:
    if bias.any():
        raise WeightsError(f"{name}: got key biases that are not zero, expected none, as in any BEiT v1 model")


def _flat(kernel: Tensor) -> Tensor:
    """(C, 3, patch, patch) to (C, patch · patch · 3) in the order of a shard."""
    if kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise WeightsError(f"{PATCHES}: got shape {list(kernel.shape)}, expected square patches of 3 channels")
    return kernel.permute(0, 2, 3, 1).flatten(1)


def _convolution(weight: Tensor, config: BackboneConfig) -> Tensor:
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
        raise WeightsError(f"got the parameter {name}, which has no name in Hugging Face's model")
    return found


def _from_hf_name(name: str) -> str | None:
    name = _renamed(name, _HF_5_NAMES) or name
    block = re.fullmatch(re.escape(_HF_BLOCK) + r"(\d+)\.(.+)", name)
    if block:
        inner = _renamed(block[2], _HF_5_BLOCK_NAMES) or block[2]
        ours = _renamed(inner, [(new, old) for old, new in _HF_BLOCK_NAMES])
        return None if ours is None else f"blocks.{block[1]}.{ours}"
    return _renamed(name, [(new, old) for old, new in (*_HF_NAMES, _HF_INNER_NORM)])
