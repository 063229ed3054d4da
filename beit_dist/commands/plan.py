"""``beit plan``: memory, step time, data and days of a run on so many GPUs, before any of them is used."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.commands.options import add_config, add_json, at_least, write_json
from beit_dist.commands.parsing import CommandParser
from beit_dist.commands.training import add_overrides, parse
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.engine.task import Task
    from beit_dist.planning.plan import Question

SENTENCE = "Compute what a run needs on any number of GPUs."

KINDS = ("pretraining", "finetuning", "tokenizer")

EXAMPLES = """\
  beit plan --config beit_base_22k --gpus 64 --gpu h100 --samples 14200000
  beit plan --config beit_large --gpus 256 --gpu a100 --samples 1281167 \\
      --network 25 --storage-bandwidth 5 compile=true
  beit plan --config beit_base --gpu h100 --sweep 1,8,64,1024 \\
      --samples 1281167
  beit plan --config finetune_base_in1k --gpus 8 --gpu h100 \\
      --classes 1000 --samples 1281167
  beit plan --measured runs/mine --gpu cpu
"""

MORE = """\
Nothing is started and no GPU is needed. Each figure says whether it comes from a datasheet, was measured or is
assumed. --gpu cpu measures matrix products on this machine. docs/scaling.md has the formulas, and what breaks
first on the way to 1,024 GPUs.

--measured compares the plan for a run's own settings with what the run recorded.

Exit codes: 0 done; 1 nothing fits in memory; 2 the command or the recipe is wrong.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("plan", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to plan")
    add_config(what, "beit_base", "built-in settings")
    what.add_argument(
        "--kind",
        choices=KINDS,
        help="what the recipe trains (default: by the beginning of its file's name, else pretraining)",
    )
    what.add_argument(
        "--samples",
        type=at_least("--samples", 1),
        metavar="N",
        help="samples of an epoch (default: those of data=)",
    )
    what.add_argument(
        "--views",
        type=at_least("--views", 1),
        metavar="N",
        help="views of each sample (default: those of data=, or 1)",
    )
    what.add_argument(
        "--classes",
        type=at_least("--classes", 2),
        metavar="N",
        help="classes of a fine-tuning (default: those of data=)",
    )
    add_overrides(what, "global_batch=4096 or compile=true")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--gpus", type=at_least("--gpus", 1), default=1, metavar="N", help="ranks (default: 1)")
    where.add_argument("--gpu", default="h100", metavar="NAME", help="h100, h200, a100 or cpu (default: h100)")
    where.add_argument(
        "--per-node", type=at_least("--per-node", 1), default=8, metavar="N", help="GPUs per node (default: 8)"
    )
    where.add_argument(
        "--network",
        type=_positive("--network"),
        metavar="GB/s",
        help="network bandwidth of a node, one way (default: the GPU's)",
    )
    where.add_argument(
        "--storage-bandwidth",
        type=_positive("--storage-bandwidth"),
        metavar="GB/s",
        help="bandwidth of the store (default: no limit)",
    )
    where.add_argument(
        "--mfu", type=_positive("--mfu"), metavar="X", help="share of the peak that the model reaches, 0 to 1"
    )
    where.add_argument(
        "--price-per-gpu-hour",
        type=_positive("--price-per-gpu-hour"),
        metavar="X",
        help="also print price and energy",
    )
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--sweep", metavar="N,N,...", help="a line for each of these numbers of GPUs")
    shown.add_argument("--measured", nargs="+", metavar="RUN", help="compare with what these runs recorded")
    add_json(shown)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 1 where nothing fits."""
    args = parse(_with_storage(parser()), argv)
    if args.mfu is not None and args.mfu > 1:
        raise ConfigError("--mfu", args.mfu, "a share, above 0 and up to 1")
    from beit_dist.engine.device import choose_accelerator

    choose_accelerator("cpu", 1)  # before anything of DeepSpeed is imported: a look needs no GPU
    if args.measured:
        return _compare(args)
    task, samples, views = _task(args)
    question = _question(args, samples, views)
    return _sweep(args, task, question) if args.sweep else _plan(args, task, question)


def _plan(args: argparse.Namespace, task: Task[Any, Any, Any], question: Question) -> int:
    from beit_dist.planning.facts import facts
    from beit_dist.planning.limits import limits
    from beit_dist.planning.plan import make_plan
    from beit_dist.planning.text import lines

    ds_configs = stages()
    plan = make_plan(task, ds_configs, question)
    breaking = limits(task, ds_configs, plan)
    if args.json != "-":
        print("\n".join(lines(task, plan, breaking)), flush=True)
    if args.json:
        write_json(args.json, facts(task, plan, breaking))
    return int(plan.best is None)


def _sweep(args: argparse.Namespace, task: Task[Any, Any, Any], question: Question) -> int:
    from beit_dist.planning.facts import facts
    from beit_dist.planning.plan import sweep
    from beit_dist.planning.text import sweep_lines

    plans = sweep(task, stages(), question, _numbers(args.sweep))
    if args.json != "-":
        print("\n".join(sweep_lines(task, plans)), flush=True)
    if args.json:
        write_json(
            args.json,
            [{"gpus": n, "refused": p} if isinstance(p, str) else facts(task, p, ()) for n, p in plans],
        )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from beit_dist.planning.comparison import compare, comparison_lines, recorded_run

    found = []
    for folder in args.measured:
        run = recorded_run(folder)
        task = task_of_run(run.kind, run.config)
        found.append(compare(run, task, args.gpu, args.mfu))
    if args.json != "-":
        print("\n".join(line for each in found for line in comparison_lines(each)), flush=True)
    if args.json:
        write_json(args.json, [each.facts() for each in found])
    return 0


def stages() -> dict[int, dict[str, Any]]:
    """The shipped DeepSpeed files, by stage."""
    from beit_dist.config.recipes import named
    from beit_dist.engine.resolve import read_ds_config

    return {stage: read_ds_config(named("deepspeed", f"zero{stage}")) for stage in range(4)}


def kind_of(given: str | None, config: str | None) -> str:
    """What a recipe trains: as it is said, else by the beginning of its file's name."""
    name = Path(config or "").stem
    return given or {"finetune": "finetuning", "tokenizer": "tokenizer"}.get(name.partition("_")[0], KINDS[0])


def task_from(
    kind: str, config: str | None, overrides: Sequence[str], classes: int | None = None
) -> Task[Any, Any, Any]:
    """The task of a recipe, which is not started and need not have any data.

    Args:
        kind: of ``KINDS``.
        config: name or path of the recipe.
        overrides: ``key=value``.
        classes: of a fine-tuning without data.

    Raises:
        ConfigError: the recipe is wrong, or says too little.
    """
    from beit_dist.config.reading import read_settings
    from beit_dist.config.recipes import named

    path = None if config is None else named(kind, config)
    settings = read_settings(path, overrides, defaults={"run": "run"})
    if kind != "finetuning":
        return task_of_run(kind, settings, read=False)
    task = task_of_run(kind, settings, read=False)
    if classes is not None:
        task.classes = tuple(map(str, range(classes)))  # type: ignore[attr-defined]  # of every fine-tuning
    elif task.config.data is None:
        raise ConfigError("--classes", None, "the number of classes, as no data= is given to count them in")
    return task


def task_of_run(kind: str, settings: Any, *, read: bool = True) -> Task[Any, Any, Any]:
    """The task that settings are of.

    Args:
        kind: of ``KINDS``, or as a run records it.
        read: they were read from a run, where places that they name need not exist any more.
    """
    from beit_dist.config.finetuning import FinetuningConfig
    from beit_dist.config.pretraining import PretrainingConfig
    from beit_dist.config.reading import recorded, validate
    from beit_dist.config.tokenizer import TokenizerConfig

    accept: Callable[[Any, Any], Any] = recorded if read else validate
    if kind == "pretraining":
        from beit_dist.tasks.pretraining.task import Pretraining

        return Pretraining(accept(PretrainingConfig, settings))
    if kind == "tokenizer":
        from beit_dist.tasks.tokenizer.task import TokenizerTraining

        return TokenizerTraining(accept(TokenizerConfig, settings), Path("tokenizer.safetensors"), built_in=False)
    from beit_dist.commands.finetune import task_of

    return task_of(accept(FinetuningConfig, settings))


def _task(args: argparse.Namespace) -> tuple[Task[Any, Any, Any], int | None, int]:
    """The task, the samples of an epoch, and the views of each, as far as they are known."""
    from beit_dist.engine.ranks.distributed import Ranks

    task = task_from(kind_of(args.kind, args.config), args.config, args.overrides, args.classes)
    samples, views = args.samples, args.views or 1
    if samples is None and task.config.data is not None:
        task.check(Ranks())
        samples, views = task.epoch_samples, args.views or task.views
    return task, samples, views


def _question(args: argparse.Namespace, samples: int | None, views: int) -> Question:
    from beit_dist.planning.devices import GB, Figure, device_named
    from beit_dist.planning.plan import Question

    network = None if args.network is None else args.network * GB
    given = args.storage_bandwidth
    return Question(
        gpus=args.gpus,
        per_node=args.per_node,
        device=device_named(args.gpu, min(args.per_node, args.gpus), network),
        samples=samples,
        views=views,
        store=None if given is None else Figure(given * GB, "given"),
        mfu=args.mfu,
        price=args.price_per_gpu_hour,
    )


def _numbers(text: str) -> list[int]:
    return [at_least("--sweep", 1)(word) for word in text.split(",")]


def _positive(option: str) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ConfigError(option, text, "a number above 0")
        return value

    return number


def _with_storage(parser: CommandParser) -> CommandParser:
    """:func:`parse` looks for what ``--storage`` says, which a plan does not take."""
    parser.set_defaults(storage=[])
    return parser
