"""A plan as plain data, for ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from beit_dist.engine.task import OPERATIONS
from beit_dist.planning.limits import Limit
from beit_dist.planning.memory import AnyTask
from beit_dist.planning.plan import Choice, Plan


def facts(task: AnyTask, plan: Plan, breaking: Sequence[Limit]) -> dict[str, Any]:
    """Bytes, seconds and FLOP/s, without words but for sources and reasons."""
    question, config, best = plan.question, task.config, plan.best
    return {
        "kind": task.kind,
        "gpus": question.gpus,
        "per_node": question.per_node,
        "device": asdict(question.device),
        "parameters": plan.parameters,
        "flops_per_image": OPERATIONS * plan.multiply_adds,
        "global_batch": config.global_batch,
        "lr": config.optimizer.lr,
        "samples": question.samples,
        "store": None if question.store is None else asdict(question.store),
        "stages": [
            {
                "stage": stage.stage,
                "refused": stage.refused or None,
                "largest_micro_batch": stage.most,
                "largest_micro_batch_recomputed": stage.most_recomputed,
                **({} if stage.choice is None else _of(stage.choice, config.global_batch)),
            }
            for stage in plan.stages
        ],
        "recommended": None if best is None else _of(best, config.global_batch),
        "steps": plan.steps,
        "checkpoint": None if plan.checkpoint is None else asdict(plan.checkpoint),
        "view_bytes": plan.views,
        "seconds": plan.seconds,
        "gpu_hours": None if plan.seconds is None else plan.seconds * question.gpus / 3600,
        "limits": [asdict(limit) for limit in breaking],
    }


def _of(choice: Choice, batch: int) -> dict[str, Any]:
    resolved = choice.resolved
    return {
        "stage": resolved.stage,
        "precision": resolved.precision,
        "micro_batch": resolved.micro_batch,
        "accumulation": resolved.accumulation,
        "activation_checkpointing": choice.recompute,
        "memory": choice.memory.parts,
        "memory_total": choice.memory.total,
        "fits": choice.fits,
        "mfu": asdict(choice.mfu),
        "step_seconds": choice.step,
        "compute_seconds": choice.compute,
        "exchange_seconds": choice.communication,
        "exposed_seconds": choice.exposed,
        "data_seconds": choice.data,
        "images_per_second": batch / choice.step,
        "reading": asdict(choice.reading),
    }
