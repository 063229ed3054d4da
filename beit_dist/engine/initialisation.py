"""``init_from``: a new run that starts from the weights of another, or from a file of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit_dist.checkpoints.layout import BUFFER, WEIGHT, Fragment
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.memory import state_shapes
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.engine.refusal import RefusedError, on_rank_0
from beit_dist.engine.task import Task
from beit_dist.errors import CheckpointError, ConfigError, UserError, WeightsError
from beit_dist.storage.place import is_url
from beit_dist.weights.foreign import Foreign, is_foreign
from beit_dist.weights.stored import StoredWeights, open_weights

_NAMED = 4  # differences that a message lists
AnyTask = Task[Any, Any, Any]
Shapes = Mapping[str, Sequence[int]]
Origin = StoredWeights | Foreign
"""A checkpoint of a run, to be read part by part; or weights that were read."""


def find_origin(task: AnyTask, agreement: Agreement | None = None) -> Origin:
    """The weights that ``init_from`` names, whole and for this model. Collective, unless for a process alone.

    Of a run rank 0 finds the checkpoint and verifies every byte of it. What is not read part by part, every rank
    reads.

    Args:
        task: of the new run, which has looked at its data.
        agreement: the ranks; None for a look from outside.

    Raises:
        CheckpointError: there is no whole checkpoint, or one of another kind of training.
        ConfigError: it has other parameters, or they mean something else.
        WeightsError: a file of weights cannot be used.
    """
    of_run = not is_foreign(str(task.config.init_from))
    if agreement is None:
        return _look(task, _open(task) if of_run else None, loud=True)
    stored = on_rank_0(agreement, lambda: _open(task)) if of_run else None
    return _on_every_rank(agreement, lambda: _look(task, stored, loud=agreement.ranks.rank == 0))


def initialise_from(
    task: AnyTask, shapes: Shapes, origin: Origin, state: EngineState, agreement: Agreement
) -> dict[str, Any]:
    """Set the fp32 master weights to those of ``init_from``; the optimizer starts anew. Collective.

    Args:
        task: of the new run.
        shapes: shape of each of its parameters and buffers.
        origin: what :func:`find_origin` has found.
        state: the engine's, of which the weights are filled.
        agreement: the ranks.

    Returns:
        What to record: the checkpoint's name and the digest of its weights.
    """
    source = str(task.config.init_from)
    if isinstance(origin, Foreign):
        checkpoint, digest = origin.checkpoint, origin.digest
    else:
        checkpoint, digest = origin.saved.folder.name, origin.saved.manifest["state_digests"][WEIGHT]
    for fragment in state.held_fragments():
        if fragment.role in (WEIGHT, BUFFER):
            _fill(fragment, origin)
    state.publish(updates=0)
    if agreement.ranks.rank == 0:
        named = f"{source}, {checkpoint}" if checkpoint else source
        print(f"weights of {named}; the optimizer starts from scratch", flush=True)
        if isinstance(origin, Foreign):
            _say_what_was_taken(origin, shapes)
    return {"source": source, "checkpoint": checkpoint, "weights": digest}


def _open(task: AnyTask) -> StoredWeights:
    """The newest whole checkpoint of the run that ``init_from`` names."""
    source = str(task.config.init_from)
    with _named(source):
        return open_weights(source, access=task.config.storage.access, kinds=(task.kind, *task.other_origins))


def _look(task: AnyTask, stored: StoredWeights | None, *, loud: bool) -> Origin:
    """The weights for this model."""
    source, shapes = str(task.config.init_from), state_shapes(task)
    with _named(source):
        found = task.foreign(source) if stored is None else task.from_stored(stored, loud=loud)
        if found is not None:
            check_foreign(source, shapes, found)
            return found
    assert stored is not None
    check_shapes(source, shapes, stored.shapes | stored.buffers)
    return stored


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Say of what goes wrong that it is about ``init_from``."""
    try:
        yield
    except ConfigError:
        raise
    except UserError as error:
        said = f"init_from: {error}"
        if not is_url(source) and not Path(source).exists():
            said = (
                f"init_from: got {source}, which does not exist, expected a run, or a local file or folder of "
                "weights. Download a model from a hub first"
            )
        named = WeightsError(said) if is_foreign(source) else CheckpointError(said)
        named.exit_code = error.exit_code  # a store that does not answer may do so at another start
        raise named from None


def _on_every_rank(agreement: Agreement, look: Callable[[], Origin]) -> Origin:
    """What each rank finds; refused by all if one of them refuses it, perhaps for its host only. Collective."""
    found: Origin | None = None
    fault: UserError | None = None
    try:
        found = look()
    except UserError as error:
        fault = error
    faults = agreement.gather(fault and (str(fault), fault.exit_code))
    if first := next(filter(None, faults), None):
        raise fault or RefusedError(*first)
    assert found is not None
    return found


def _fill(fragment: Fragment, origin: Origin) -> None:
    if isinstance(origin, StoredWeights):
        origin.fill(fragment)
    elif (values := origin.weights.get(fragment.parameter)) is not None:
        fragment.data.copy_(values.view(-1)[fragment.start : fragment.start + len(fragment.data)])


def _say_what_was_taken(found: Foreign, shapes: Shapes) -> None:
    if anew := [name for name in shapes if name not in found.weights]:
        print(f"init_from: not taken from there, so these start from scratch: {_grouped(anew)}", flush=True)
    if found.left_out:
        print(f"init_from: not part of this model, so left out: {_grouped(found.left_out)}", flush=True)
    for note in found.notes:
        print(f"init_from: {note}", flush=True)


def check_foreign(source: str, shapes: Shapes, found: Foreign) -> None:
    """Refuse weights of a file that are not those of this model; it may lack what its reader says.

    Raises:
        ConfigError: as :func:`check_shapes`.
    """
    theirs = {name: list(tensor.shape) for name, tensor in found.weights.items()}
    ours = {name: shape for name, shape in shapes.items() if name in theirs or name not in found.may_lack}
    check_shapes(source, ours, theirs)


def check_shapes(source: str, shapes: Shapes, theirs: Mapping[str, list[int]]) -> None:
    """Refuse weights that are not those of this model.

    Raises:
        ConfigError: names the parameters that are missing, left over or of another shape.
    """
    ours = {name: list(shape) for name, shape in shapes.items()}
    differences = [f"{name} is missing" for name in ours if name not in theirs]
    differences += [f"{name} is not a parameter of this model" for name in theirs if name not in ours]
    differences += [
        f"{name} is {theirs[name]}, not {shape}"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    if differences:
        raise ConfigError(
            "init_from",
            source,
            f"weights of the same model, but {_listed(differences)}",
            "Give this run the model settings of that one (its config.yaml), or leave init_from out.",
        )


def _grouped(names: Sequence[str]) -> str:
    """Names of parameters, those of one part of the model as one."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(
        f"{part} ({len(found)})" if len(found) > 2 else ", ".join(found) for part, found in parts.items()
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
