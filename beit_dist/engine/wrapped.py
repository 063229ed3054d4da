"""DeepSpeed's engine around a task's model and its optimizer."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from beit_dist.engine.compiled import keep_compiled_code, spare_compiler
from beit_dist.engine.optimizers.guarding import guard_updates
from beit_dist.engine.optimizers.table import build_optimizer
from beit_dist.engine.ranks.processors import is_left_to_us, sum_in_place
from beit_dist.engine.resolve import AUTO, Resolved
from beit_dist.engine.task import Task
from beit_dist.models.buffers import keep_in_fp32


def build_engine(task: Task[Any, Any, Any], resolved: Resolved, device: torch.device) -> Any:
    """The model, its optimizer, and DeepSpeed's engine around both."""
    config = task.config
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model = task.model()
    if task.paths is not None:
        task.paths.apply(model)
    if config.compile:
        keep_compiled_code(device)
        task.compile(model, device)
    else:
        spare_compiler()
    optimizer = build_optimizer(task.parameter_groups(model), config.optimizer)
    return initialize_engine(model, optimizer, resolved)


def initialize_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, resolved: Resolved) -> Any:
    """DeepSpeed's engine around a model and its optimizer, ready to train and guarded."""
    if resolved.precision == AUTO:
        raise ValueError("the precision is not settled, and DeepSpeed takes auto for fp32")
    settings = resolved.deepspeed
    if resolved.optimizer_is_bare:
        guard_updates(optimizer, settings["gradient_clipping"])
        settings = settings | {"gradient_clipping": 0.0}  # DeepSpeed would clip without a look at the norm
    _import_deepspeeds_muon()
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory figures that nothing turns off
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    if isinstance(engine.optimizer, BF16_Optimizer):
        if torch.distributed.get_world_size() == 1:
            # Gradients would be copied together, rounded to bf16, sent to nobody and copied apart again: 7 % of a
            # step of base with 8 images on a CPU.
            engine.enable_backward_allreduce = False
        elif torch.distributed.get_backend() == "gloo" and is_left_to_us(settings):
            sum_in_place(engine)
    keep_in_fp32(engine.module)
    engine.train()
    return engine


def _import_deepspeeds_muon() -> None:
    """Import it uncompiled: DeepSpeed does, to know its type, whatever the optimizer is; ours is another one.

    As it stands its decorators load PyTorch's compiler, which takes a quarter of the CPU time of a start.
    """
    from deepspeed.runtime import compiler

    own, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = own
