"""A plan as text of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from beit_dist.engine.durations import counted, duration
from beit_dist.engine.memory import in_words
from beit_dist.planning.devices import GB, GIB
from beit_dist.planning.limits import Limit
from beit_dist.planning.memory import AnyTask
from beit_dist.planning.plan import Choice, Plan, Stage

WIDTH = 80
_NAME = 12
DECODED = 680
"""Images that a core decodes, crops and resizes in a second (docs/performance.md)."""
_STATE = ("weights", "gradients", "optimizer", "activations", "logits", "attention")
_HEADS = ("weights", "grads", "optim", "activ", "logits", "attn")


def lines(task: AnyTask, plan: Plan, breaking: Sequence[Limit]) -> list[str]:
    """All of a plan."""
    found = [*_heading(task, plan), "", *_memory(plan), ""]
    if plan.best is None:
        return [*found, *_row("fits", "nothing: use more GPUs, a lower micro_batch, or GPUs with more memory")]
    found += [*_choice(task, plan, plan.best), *_time(plan, plan.best), *_traffic(plan, plan.best), *_length(plan)]
    return [*found, "", *_limits(plan, breaking), "", *_sources(plan, plan.best)]


def sweep_lines(task: AnyTask, plans: Sequence[tuple[int, Plan | str]]) -> list[str]:
    """A line for each number of GPUs."""
    heading = (
        f"{'GPUs':>6} {'batch of each':>14} {'stage':>5} {'step':>9} {'images/s':>10} {'exposed':>8} "
        f"{'reads':>10} {'run takes':>10}"
    )
    found = [heading]
    for gpus, plan in plans:
        if isinstance(plan, str):
            found += textwrap.wrap(f"{gpus:>6,} {plan}", WIDTH, subsequent_indent=" " * 8)
            continue
        if plan.best is None:
            found.append(f"{gpus:>6,} no micro-batch fits")
            continue
        best, resolved = plan.best, plan.best.resolved
        batch = f"{resolved.accumulation} × {resolved.micro_batch}"
        whole = "?" if plan.seconds is None else duration(plan.seconds)
        found.append(
            f"{gpus:>6,} {batch:>14} {resolved.stage:>5} {_seconds(best.step):>9} "
            f"{task.config.global_batch / best.step:>10,.0f} {best.exposed_share:>8.1%} "
            f"{best.reading.store / GB:>5.3g} GB/s {whole:>10}"
        )
    return found


def _heading(task: AnyTask, plan: Plan) -> Iterator[str]:
    question, config = plan.question, task.config
    nodes = -(-question.gpus // question.per_node)
    title = f"{task.kind}, {plan.parameters:,} parameters, {6 * plan.multiply_adds / 1e9:.4g} GFLOP an image"
    yield from _row("run", title)
    where = "ranks on a CPU" if question.device.is_cpu else f"{question.device.name} GPUs"
    yield from _row(
        "on",
        f"{question.gpus:,} {where}, {counted(nodes, 'node')} of up to {question.per_node}; compile="
        f"{str(config.compile).lower()}",
    )


def _memory(plan: Plan) -> Iterator[str]:
    device = plan.question.device
    yield (
        f"GiB of each {'rank' if device.is_cpu else 'GPU'}, of {device.usable / GIB:.0f} that may be filled "
        f"({device.memory / GIB:.0f} in all)"
    )
    yield f"stage type micro {' '.join(f'{head:>7}' for head in _HEADS)}   other   total"
    for stage in plan.stages:
        if stage.choice is None:
            yield from textwrap.wrap(f"{stage.stage:>5} {stage.refused}", WIDTH, subsequent_indent=" " * 6)
            continue
        parts = stage.choice.memory.parts
        shown = " ".join(f"{parts.get(name, 0) / GIB:>7.2f}" for name in _STATE)
        other = sum(size for name, size in parts.items() if name not in _STATE)
        resolved = stage.choice.resolved
        mark = "" if stage.choice.fits else " !"
        yield (
            f"{stage.stage:>5} {resolved.precision:<4} {resolved.micro_batch:>5} {shown} {other / GIB:>7.2f} "
            f"{stage.choice.memory.total / GIB:>7.2f}{mark}"
        )
    listed = [f"stage {stage.stage}: {_most(stage)}" for stage in plan.stages if stage.choice is not None]
    yield from textwrap.wrap(
        f"Largest micro-batch that fits, up to the recipe's (recomputing): {'; '.join(listed)}", WIDTH
    )


def _most(stage: Stage) -> str:
    plain = "none" if stage.most is None else str(stage.most)
    again = "none" if stage.most_recomputed is None else str(stage.most_recomputed)
    return f"{plain} ({again})"


def _choice(task: AnyTask, plan: Plan, best: Choice) -> Iterator[str]:
    resolved = best.resolved
    recompute = ", activation_checkpointing=true" if best.recompute else ""
    yield from _row(
        "recommended",
        f"--ds_config zero{resolved.stage}, micro_batch={resolved.micro_batch}{recompute}: "
        f"{in_words(best.memory.total)} a rank",
    )
    yield from _row(
        "batch",
        f"{task.config.global_batch:,} = {plan.question.gpus:,} × "
        f"{counted(resolved.accumulation, 'micro-batch', 'micro-batches')} of {resolved.micro_batch}; "
        f"optimizer.lr={task.config.optimizer.lr:g}, which nothing scales",
    )


def _time(plan: Plan, best: Choice) -> Iterator[str]:
    yield from _row(
        "step",
        f"{_seconds(best.step)}: compute {_seconds(best.compute)}, exposed exchange {_seconds(best.exposed)} "
        f"({best.exposed_share:.1%}); {_images(plan, best):,.0f} images/s",
    )
    sent = sum(each.sent(plan.question.gpus) for each in best.exchanges)
    if sent:
        beside = best.communication - best.exposed
        hidden = f"{_seconds(beside) if beside > 0 else 'none'} beside the backward pass"
        yield from _row("exchange", f"{in_words(sent)} pass each rank in {_seconds(best.communication)}, {hidden}")


def _images(plan: Plan, best: Choice) -> float:
    return best.resolved.rank_batch * plan.question.gpus / best.step


def _traffic(plan: Plan, best: Choice) -> Iterator[str]:
    yield from _row("data", _data(plan, best))
    if (saved := plan.checkpoint) is not None:
        every = f", every {duration(saved.every)}" if saved.every else ""
        stall, write = _seconds(saved.stall), _seconds(saved.write)
        yield from _row("checkpoint", f"{in_words(saved.size)}: stall {stall}, written in {write}{every}")
    if plan.views is not None:
        views = counted(plan.question.views, "view")
        yield from _row("views", f"{views} of {plan.question.samples:,} samples: {plan.views / 1e12:.3g} TB")


def _data(plan: Plan, best: Choice) -> str:
    read, store = best.reading, plan.question.store
    if not read.sample:
        node = _images(plan, best) / plan.question.gpus * plan.question.neighbours
        return (
            f"{_images(plan, best):,.0f} images/s to decode, {node:,.0f} a node: {node / DECODED:,.0f} cores at "
            f"{DECODED:.0f} a second (measured with 500×375 JPEGs)"
        )
    of_the_store = "" if store is None else f" of the store's {store.value / GB:g}"
    rates = f"{read.gpu / 1e6:,.0f} MB/s a GPU, {read.node / GB:.3g} GB/s a node"
    return f"{rates}, {read.store / GB:.3g} GB/s in all{of_the_store}"


def _length(plan: Plan) -> Iterator[str]:
    if plan.seconds is None or plan.steps is None:
        yield from _row("run takes", "not known: give --samples, or data=")
        return
    hours = plan.seconds * plan.question.gpus / 3600
    text = f"{duration(plan.seconds)} for {plan.steps:,} steps; {hours:,.0f} GPU-hours"
    if plan.question.price is not None:
        text += f", {hours * plan.question.price:,.0f} at {plan.question.price:g} an hour"
        if plan.question.device.watts:
            text += f", up to {hours * plan.question.device.watts / 1000:,.0f} kWh in the GPUs"
    yield from _row("run takes", text)


def _limits(plan: Plan, breaking: Sequence[Limit]) -> Iterator[str]:
    yield "What breaks as this recipe gets more GPUs, first things first:"
    for limit in breaking:
        now = "*" if limit.gpus <= plan.question.gpus else " "
        text = f"{now}{limit.gpus:>6,}  {limit.what}: {limit.instead}"
        yield from textwrap.wrap(text, WIDTH, subsequent_indent=" " * 9, break_on_hyphens=False)
    if not breaking:
        yield "  nothing up to 16,384"
    elif any(limit.gpus <= plan.question.gpus for limit in breaking):
        yield "(* with this number of GPUs already)"


def _sources(plan: Plan, best: Choice) -> Iterator[str]:
    yield from _row("MFU", f"{best.mfu.value:.3f}, {best.mfu.source}")
    yield from _row("device", plan.question.device.source)
    yield from _row("assumed", "links reach 0.8 of their rate, a kernel starts every 10 µs: docs/scaling.md")


def _row(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{name:<{_NAME}}{text}",
        WIDTH,
        subsequent_indent=" " * _NAME,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _seconds(seconds: float) -> str:
    """Three significant digits, in milliseconds below a second."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
