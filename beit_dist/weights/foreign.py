"""Weights of Hugging Face, timm and unilm for a new run. No file is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_dist.config.model import HALF, IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from beit_dist.errors import WeightsError
from beit_dist.models.vit import NORM_EPS
from beit_dist.storage.place import is_url
from beit_dist.weights.export import FILE, PICKLE
from beit_dist.weights.names import as_ours, fitted, from_hf, is_extra, is_hf, is_of_another_head
from beit_dist.weights.safe_pickle.files import read_torch_file
from beit_dist.weights.safe_pickle.machine import Inert
from beit_dist.weights.tensor_files import check_names, parse_safetensors

WEIGHTS = (FILE, "pytorch_model.bin", PICKLE)
"""Names of the file of weights in a folder."""
INDICES = tuple(f"{name}.index.json" for name in WEIGHTS)
"""Names of the files that say which files hold parts of the weights."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Of files of weights."""
_CONFIG, _PROCESSOR = SETTINGS = "config.json", "preprocessor_config.json"
_WRAPPERS = ("model", "module", "state_dict")
_FILTERS: dict[Any, str] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


@dataclass(frozen=True)
class Foreign:
    """Weights from elsewhere, as those of our model: of another project's files, or of a run of another kind.

    Attributes:
        weights: by our names, fp32; what has no name here keeps its own.
        digest: sha256 of the files, or the run's digest of its weights.
        known: what is said of settings that shapes do not show: heads, pixel_mean, pixel_std.
        left_out: names of tensors that the model has no place for.
        notes: what is computed otherwise there, in words.
        may_lack: our names of what need not be there.
        classes: names of the classes of a fine-tuned model, in the order of its outputs, where they are known.
        checkpoint: its name, of a run.
        model: of an export of ours, the settings of the run's model.
        measured: how a fine-tuned model's images are measured, as sections of a recipe, as far as files say it.
    """

    weights: dict[str, Tensor]
    digest: str
    known: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    may_lack: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    checkpoint: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


def is_foreign(source: str) -> bool:
    """Whether ``source`` is a file of weights, or a folder with one, and not a run."""
    path = Path(source)
    if is_url(source):
        return path.suffix in SUFFIXES
    if path.is_dir():  # whatever its name: what follows a dot may be part of it
        return any((path / name).is_file() for name in (_CONFIG, *WEIGHTS))
    return path.suffix in SUFFIXES


def read_foreign(source: str | Path, model: ModelConfig) -> Foreign:
    """Read weights of Hugging Face, timm or unilm, or an export of ours, for pre-training ``model``.

    They are resampled for its grid. What fine-tuning added, and the head of another target, is left out.

    Raises:
        WeightsError: as :func:`read_file`; or the model cannot hold them.
    """
    found = read_file(source)
    left_out = [name for name in found.weights if is_extra(name) or is_of_another_head(name, model)]
    kept = {name: tensor for name, tensor in found.weights.items() if name not in left_out}
    with named(source):
        return replace(found, weights=fitted(kept, model), left_out=sorted(left_out))


def read_file(source: str | Path) -> Foreign:
    """Read weights of Hugging Face, timm or unilm, or an export of ours, with all that is in the file.

    Relative position tables are those of the file, shared or not, and of its resolution.

    Raises:
        WeightsError: there is no such file, it is damaged or would run code, or holds no BEiT v1 model.
    """
    if is_url(str(source)):
        raise WeightsError(f"{source}: got a URL, expected a local file or folder. Copy it here first")
    path = Path(source)
    known: dict[str, Any] = {}
    notes: list[str] = []
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for file in _files(path):
        found, said = _read(file, digest)
        if twice := found.keys() & tensors.keys():
            raise WeightsError(f"{file}: got {min(twice)}, which another file of {path} holds too")
        tensors |= found
        known |= said
    check_names(path, tensors)
    room = sum(file.stat().st_size for file in _files(path))
    if sum(tensor.numel() for tensor in tensors.values()) > room:
        raise WeightsError(f"{path}: got tensors that share memory, with more values than the files hold")
    with named(path):
        if path.is_dir():
            known |= _settings(path, notes)
        tensors = _unwrapped(tensors)
        weights = as_ours(from_hf(tensors) if is_hf(tensors) else tensors)
    besides = {name: known.pop(name) for name in ("classes", "model", "measured") if name in known}
    return Foreign(weights, digest.hexdigest(), known, notes=notes, **besides)


@contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Name the file in what is found wrong with its tensors.

    Raises:
        WeightsError: in place of torch's errors too.
    """
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    except (ValueError, RuntimeError) as error:  # of torch, or of unpacking
        reason = " ".join(str(error).split())
        raise WeightsError(f"{source}: got tensors in shapes that no BEiT v1 model has ({reason})") from None


def _files(path: Path) -> list[Path]:
    """The files of the weights at ``path``: itself, or in a folder one, or the parts that an index names."""
    if not path.is_dir():
        return [path]
    for name, index_name in zip(WEIGHTS, INDICES, strict=True):
        index = path / index_name
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            places = _json(index).get("weight_map")
            parts = set(places.values()) if isinstance(places, dict) else set()
            if not parts or not all(isinstance(part, str) and Path(part).name == part for part in parts):
                raise WeightsError(f"{index}: got no weight_map, expected one that names files beside it")
            return [path / part for part in sorted(parts)]
    raise WeightsError(f"{path}: got no {FILE}, expected it beside {_CONFIG}")


def _read(path: Path, digest: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors, and what it says of settings; its bytes go into ``digest``."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                content = file.read()
                digest.update(content)
            else:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix != ".safetensors":
        found = read_torch_file(path)
        arguments = found.get("args") if isinstance(found, dict) else None  # the original's are a namespace
        said = _unilm_known(arguments.state if isinstance(arguments, Inert) else arguments)
        return _state(path, found), said | _mmsegmentation_known(found)
    try:
        tensors, metadata = parse_safetensors(content)
    except ValueError as error:
        raise WeightsError(f"{path}: got a damaged safetensors file ({error})") from None
    return tensors, _our_known(metadata)


def _state(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict in what a file held: by itself, or under ``model``, ``module`` or ``state_dict``."""
    for _ in _WRAPPERS:
        if isinstance(found, dict):
            found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), found)
    named = isinstance(found, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items())
    if not named or not found:
        raise WeightsError(f"{path}: got something else, expected a state dict: tensors by name")
    return dict(found)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what data-parallel training and segmentation put before them."""
    return {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in tensors.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: got {type(found).__name__}, expected a JSON object")
    return found


def _settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Heads and normalisation from a folder of Hugging Face or timm."""
    config, look = ({} if not (folder / n).is_file() else _json(folder / n) for n in (_CONFIG, _PROCESSOR))
    known: dict[str, Any] = {}
    timm, arguments = config.get("pretrained_cfg"), config.get("model_args")
    heads = config.get("num_attention_heads")
    if isinstance(arguments, dict):
        heads = arguments.get("num_heads", heads)
    if isinstance(heads, int):
        known["heads"] = heads
    if classes := _class_names(config):
        known["classes"] = classes
    if augmentation := _evaluation(timm if isinstance(timm, dict) else {}, look):
        known["measured"] = {"augmentation": augmentation}
    if isinstance(timm, dict):
        known |= _units({"pixel_mean": timm.get("mean"), "pixel_std": timm.get("std")})
    if look.get("do_normalize") is False:
        known |= {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
    else:
        known |= _units({"pixel_mean": look.get("image_mean"), "pixel_std": look.get("image_std")})
    scale = look.get("rescale_factor")
    if look.get("do_rescale") is False or (isinstance(scale, (int, float)) and abs(scale * 255 - 1) > 1e-6):
        raise WeightsError(f"{_PROCESSOR}: got pixels that are not divided by 255 (do_rescale, rescale_factor)")
    activation, eps = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", NORM_EPS)
    if activation != "gelu":
        raise WeightsError(f"{_CONFIG}: hidden_act: got {activation!r}, expected 'gelu'")
    if eps != NORM_EPS:
        notes.append(f"its config.json has layer_norm_eps {eps}; this run uses {NORM_EPS}, as the original does")
    return known


def _evaluation(timm: Mapping[str, Any], look: Mapping[str, Any]) -> dict[str, Any]:
    """How images are cropped and resized where they are measured, by timm's or Hugging Face's settings."""
    found: dict[str, Any] = {}
    share, filter_ = timm.get("crop_pct"), timm.get("interpolation", _FILTERS.get(look.get("resample")))
    size, crop = look.get("size"), look.get("crop_size")
    if look.get("do_center_crop") is True and isinstance(size, dict) and isinstance(crop, dict):
        whole, part = size.get("shortest_edge"), crop.get("height")
        if isinstance(whole, int) and isinstance(part, int) and whole > 0:
            share = part / whole
    if isinstance(share, (int, float)) and 0 < share <= 1:
        found["crop_share"] = float(share)
    if filter_ in _FILTERS.values():
        found["interpolation"] = filter_
    return found


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Hugging Face's, unless they are the made-up ones, or timm's."""
    names = config.get("label_names") or config.get("id2label")
    if isinstance(names, dict):
        if not all(str(number) in names for number in range(len(names))):
            return None
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    made_up = [f"LABEL_{number}" for number in range(len(names))]
    return None if list(names) == made_up else tuple(names)


def _unilm_known(state: Any) -> dict[str, Any]:
    """unilm's normalisation is one flag; ours writes the numbers beside it, and how many heads there are."""
    state = state if isinstance(state, dict) else {}
    if numbers := _units({name: state.get(name) for name in ("pixel_mean", "pixel_std")}):
        return numbers | ({"heads": heads} if isinstance(heads := state.get("num_heads"), int) else {})
    if "imagenet_default_mean_and_std" not in state:
        return {}
    imagenet = bool(state["imagenet_default_mean_and_std"])
    return {"pixel_mean": IMAGENET_MEAN if imagenet else HALF, "pixel_std": IMAGENET_STD if imagenet else HALF}


def _mmsegmentation_known(found: Any) -> dict[str, Any]:
    """The names of the classes, which mmsegmentation puts beside the weights."""
    meta = found.get("meta") if isinstance(found, dict) else None
    names = _class_names({"label_names": meta.get("CLASSES")}) if isinstance(meta, dict) else None
    return {} if names is None else {"classes": names}


def _our_known(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What an export of ours says in its file, whatever its names are."""
    with suppress(KeyError, ValueError, TypeError):
        model, classes = json.loads(metadata["model"]), json.loads(metadata.get("classes", "[]"))
        found = {"heads": int(model["heads"]), **_units({n: model[n] for n in ("pixel_mean", "pixel_std")})}
        if isinstance(measured := json.loads(metadata.get("measured", "{}")), dict) and measured:
            found["measured"] = measured
        names = _class_names({"label_names": classes})
        return found | {"model": dict(model)} | ({"classes": names} if names else {})
    return {}


def _units(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are three numbers, as tuples."""
    return {name: tuple(value) for name, value in given.items() if _is_unit(value)}


def _is_unit(value: Any) -> bool:
    numbers: Iterator[Any] = iter(value) if isinstance(value, (list, tuple)) else iter(())
    return sum(isinstance(number, (int, float)) for number in numbers) == 3
