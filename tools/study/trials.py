"""The trials of the study as data: each is one command line of ``beit``, with what it needs and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

PART_SECONDS = 2 * 2 * 3600
"""Of processor time in one part: two hours of two cores."""
IMAGES, TEST, FRAMES, PHOTOGRAPHS = 15_000, 2_000, 367, 250
"""In CIFAR-10's two folders as they are here, in CamVid's for training, and photographs."""
HELD_OUT = 0.02
"""Of the images that are pre-trained on."""
EPOCHS, VIEWS, BATCH = 24, 8, 32
"""Of a pre-training."""
CURVE = 6
"""Measurements in it, from which its curve is drawn."""
FIRST = {
    "pre-trained": ("layer_decay=0.75", "optimizer.lr=8e-3"),
    "scratch": ("layer_decay=1.0", "optimizer.lr=5e-4"),
}
"""What differs by the first weights. From random ones there is nothing to keep. The rates were best with 10 % of
the labels, on training images (docs/evidence.md)."""
RATES_TRIED = {
    "pre-trained": ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2"),
    "scratch": ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3"),
}
"""Of fine-tuning: for either until the best one was not at an end."""
CHOICES: dict[str, tuple[str, ...]] = {
    "as-it-is": (),
    "lr-2e-3": ("optimizer.lr=2e-3",),
    "lr-8e-3": ("optimizer.lr=8e-3",),
    "ratio-0.6": ("masking.ratio=0.6",),
    "batch-16": ("global_batch=16", "micro_batch=16"),
    "width-192": ("model.width=192", "model.depth=4", "model.heads=3"),
    "pixels": ("model.target=pixels",),
    "pixels-lr-2e-3": ("model.target=pixels", "optimizer.lr=2e-3"),
    "pixels-lr-8e-3": ("model.target=pixels", "optimizer.lr=8e-3"),
}
"""Settings of short pre-trainings that are compared with the recipe's."""
CHOOSING = "{work}/lists/choose.csv"
"""The tenth of the training images by which settings are chosen, never by the test images."""
PRECISION = "precision={precision}"
AT_THE_END = ("validation.every_steps=1000000",)
"""The test images are looked at once, after the last step."""
SHARES = {100: 5, 10: 30, 1: 150}
"""Per cent of the labels, and epochs of a fine-tuning: the fewer images, the more often each is seen."""
RATES = {
    "tokenizer": 44,
    "shards": 250,
    "train": 100,
    "finetune": 110,
    "probe": 300,
    "tokenizer112": 35,
    "shards112": 80,
    "train112": 20,
    "segment": 9,
}
"""Images a second of one core, measured as docs/evidence.md says: a trial's predicted cost follows from them."""


@dataclass(frozen=True)
class Trial:
    """One command.

    Args:
        name: its folder below the work folder; what compares trials reads it.
        words: the command line of ``beit``; ``{work}``, ``{data}``, ``{recipes}`` and ``{own}``, the trial's
            folder, stand for paths, ``{precision}`` for what models compute in.
        made: the file in its folder that is there once it is done, and not before.
        seconds: of processor time that it is expected to take.
        needs: trials that come before it.
        extra: whether it is one of those that are run where time is left.
    """

    name: str
    words: tuple[str, ...]
    made: str
    seconds: float
    needs: tuple[str, ...] = ()
    extra: bool = False


@dataclass(frozen=True)
class Seeds:
    """Of pre-training and of fine-tuning."""

    pretraining: tuple[int, ...] = (0, 1)
    finetuning: tuple[int, ...] = (0, 1, 2)


def study(seeds: Seeds) -> list[Trial]:
    """All trials, the most telling first."""
    return [*_must(seeds), *(replace(trial, extra=True) for trial in _extra(seeds))]


def parts(trials: Sequence[Trial], seconds: float = PART_SECONDS) -> list[list[Trial]]:
    """The trials in their order, cut into parts of at most so much processor time."""
    cut: list[list[Trial]] = []
    used = 0.0
    for trial in trials:
        if not cut or used + trial.seconds > seconds or trial.extra != cut[-1][-1].extra:
            cut.append([])
            used = 0.0
        cut[-1].append(trial)
        used += trial.seconds
    return cut


def chosen(trials: Sequence[Trial], wanted: Iterable[Trial]) -> list[Trial]:
    """Some trials and all that they need, in the order of the study."""
    by_name = {trial.name: trial for trial in trials}
    names: set[str] = set()
    waiting = [trial.name for trial in wanted]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += by_name[name].needs
    return [trial for trial in trials if trial.name in names]


def _must(seeds: Seeds) -> Iterator[Trial]:
    """The questions that the study must answer."""
    yield from _tokens("good", VIEWS)
    yield from _untrained("random", seeds)
    yield from _pretrained("tokens-blocks", seeds)
    yield from _finetuned("tokens-blocks", 10, seeds)
    yield from _scratch("scratch", 10, seeds)
    for share in (100, 1):
        yield from _finetuned("tokens-blocks", share, seeds)
        yield from _scratch("scratch", share, seeds)
    yield from _pretrained("pixels-blocks", seeds, "model.target=pixels")
    yield from _finetuned("pixels-blocks", 10, seeds)
    for share in (10, 100, 1):
        yield from _scratch("scratch-4x", share, seeds, times=4)
    yield from _pretrained("tokens-random", seeds, "masking.mode=random")
    yield from _finetuned("tokens-random", 10, seeds)
    yield from _camvid(seeds)
    for arm in ("pixels-blocks", "tokens-random"):
        yield from _finetuned(arm, 100, seeds)


def _choices(origin: str) -> Iterator[Trial]:
    """By which settings are chosen, with training images only: short pre-trainings, and rates of fine-tuning."""
    for name, settings in CHOICES.items():
        epochs = EPOCHS // 4
        yield _pretraining(f"choose/pretrain/{name}", 0, f"shards/good-{VIEWS}", *settings, epochs=epochs)
        yield _probing(f"choose/probe/{name}", f"choose/pretrain/{name}", "{work}/lists/fit-100.csv", CHOOSING)
    for arm, first in FIRST.items():
        for rate in RATES_TRIED[arm]:
            start, needs = ((f"init_from={{work}}/{origin}",), (origin,)) if arm == "pre-trained" else ((), ())
            settings = (first[0], f"optimizer.lr={rate}", *start)
            yield _finetuning(f"choose/{arm}/10/lr-{rate}", 10, 0, 1, *settings, needs=needs)


def _extra(seeds: Seeds) -> Iterator[Trial]:
    """How settings were chosen, and questions without a published answer, with the first seed of pre-training."""
    one = replace(seeds, pretraining=seeds.pretraining[:1])
    yield from _choices(f"pretrain/tokens-blocks/{one.pretraining[0]}")
    for views in (1, 4, 16, EPOCHS):
        yield from _shards("good", views)
        yield from _pretrained(f"views-{views}", one, shards=f"shards/good-{views}")
        yield from _finetuned(f"views-{views}", 10, one)
    absolute = ("model.absolute_positions=true", "model.relative_positions=false")
    yield from _pretrained("absolute", one, *absolute)
    yield from _finetuned("absolute", 10, one, *absolute, "model.block_positions=false")
    poor = ("start=random", "steps=300", "usage_weight=20")
    collapsed = ("start=random", "steps=300", "usage_weight=0", "kl_weight=6.6", "collapse.below=null")
    for name, settings in (("poor", poor), ("collapsed", collapsed)):
        yield from _tokens(name, VIEWS, *settings)
        yield from _pretrained(f"tokenizer-{name}", one, shards=f"shards/{name}-{VIEWS}")
        yield from _finetuned(f"tokenizer-{name}", 10, one)
    for epochs in (EPOCHS // 4, EPOCHS // 2, 2 * EPOCHS):
        yield from _pretrained(f"epochs-{epochs}", one, epochs=epochs)
        yield from _finetuned(f"epochs-{epochs}", 10, one)


def _tokens(name: str, views: int, *settings: str) -> Iterator[Trial]:
    """A tokenizer, and shards of its tokens."""
    yield Trial(
        f"tokenizer/{name}",
        (
            *("tokenizer", "--images", "{data}/cifar10/train", "--out", "{own}/tokenizer.safetensors"),
            *("--run", "{own}/run", "--config", "{recipes}/tokenizer.yaml", *settings),
        ),
        "run/DONE",
        400 * 16 / RATES["tokenizer"],
    )
    yield from _shards(name, views)


def _shards(name: str, views: int) -> Iterator[Trial]:
    yield Trial(
        f"shards/{name}-{views}",
        (
            *("shards", "--images", "{data}/cifar10/train", "--out", "{own}"),
            *("--tokenizer", f"{{work}}/tokenizer/{name}/tokenizer.safetensors", "--held-out", f"{HELD_OUT:.0%}"),
            *("--image-size", "32", "--patch-size", "4", "--crop-area", "0.3", "--views", str(views)),
            *("--decoders", "0", "--max-rejected", "0"),
        ),
        "manifest.json",
        IMAGES * views / RATES["shards"],
        (f"tokenizer/{name}",),
    )


def _untrained(name: str, seeds: Seeds) -> Iterator[Trial]:
    """Backbones as they are at the first step, probed: one step is taken, at a rate that moves no weight."""
    settings = ("steps=1", "optimizer.lr=1e-12", "optimizer.min_lr=0", "validation.probe.data=null")
    for seed in seeds.pretraining:
        shards = f"shards/good-{VIEWS}"
        yield _pretraining(f"pretrain/{name}/{seed}", seed, shards, *settings, epochs=1, cost=0)
        yield _probe(name, seed)


def _pretraining(
    name: str, seed: int, shards: str, *settings: str, epochs: int, cost: float | None = None
) -> Trial:
    every = round((1 - HELD_OUT) * IMAGES) * epochs // BATCH // CURVE
    probe = ("validation.probe.data={work}/lists/train-100.csv", "validation.probe.samples=3000")
    return Trial(
        name,
        (
            *("train", "--config", "{recipes}/pretrain.yaml", "--data", f"{{work}}/{shards}", "--run", "{own}"),
            *(f"seed={seed}", f"epochs={epochs}", PRECISION, f"validation.every_steps={every}", *probe, *settings),
        ),
        "DONE",
        30 + (epochs * IMAGES / RATES["train"] + 20 * CURVE if cost is None else cost),
        (shards,),
    )


def _pretrained(
    arm: str, seeds: Seeds, *settings: str, shards: str = f"shards/good-{VIEWS}", epochs: int = EPOCHS
) -> Iterator[Trial]:
    """Pre-trainings, each probed."""
    for seed in seeds.pretraining:
        yield _pretraining(f"pretrain/{arm}/{seed}", seed, shards, *settings, epochs=epochs)
    for seed in seeds.pretraining:
        yield _probe(arm, seed)


def _probe(arm: str, seed: int) -> Trial:
    images = ("{data}/cifar10/train", "{data}/cifar10/val")
    return _probing(f"probe/{arm}/{seed}", f"pretrain/{arm}/{seed}", *images)


def _probing(name: str, run: str, data: str, test: str) -> Trial:
    return Trial(
        name,
        (
            *("probe", "--run", f"{{work}}/{run}", "--data", data, "--test", test),
            *("--out", "{own}/features", "--json", "{own}/probe.json", "--workers", "1"),
        ),
        "probe.json",
        60 + (IMAGES + TEST) / RATES["probe"],
        (run,),
    )


def _finetuned(arm: str, share: int, seeds: Seeds, *settings: str) -> Iterator[Trial]:
    """From each pre-training with each seed: order, augmentation, and which images are labelled."""
    for pre in seeds.pretraining:
        for seed in seeds.finetuning:
            origin = f"pretrain/{arm}/{pre}"
            first = (f"init_from={{work}}/{origin}", *FIRST["pre-trained"], *settings)
            yield _finetuning(f"finetune/{arm}/{share}/{pre}-{seed}", share, seed, 1, *first, needs=(origin,))


def _scratch(arm: str, share: int, seeds: Seeds, times: int = 1) -> Iterator[Trial]:
    """From random weights."""
    for seed in seeds.finetuning:
        yield _finetuning(f"finetune/{arm}/{share}/{seed}", share, seed, times, *FIRST["scratch"])


def _finetuning(
    name: str, share: int, seed: int, times: int, *settings: str, needs: tuple[str, ...] = ()
) -> Trial:
    epochs = times * SHARES[share]
    batch = {100: 64, 10: 32, 1: 16}[share]
    listed = "train-100" if share == 100 else f"train-{share}-{seed}"
    test = "test"
    if name.startswith("choose/"):  # never on the test images
        listed, test = f"fit-{share}", "choose"
    return Trial(
        name,
        (
            *("finetune", "--config", "{recipes}/finetune.yaml", "--data", f"{{work}}/lists/{listed}.csv"),
            *("--test", f"{{work}}/lists/{test}.csv", "--run", "{own}", f"seed={seed}", f"epochs={epochs}"),
            *(f"global_batch={batch}", f"micro_batch={batch}", PRECISION, *AT_THE_END, *settings),
        ),
        "DONE",
        30 + IMAGES * share / 100 * epochs / RATES["finetune"],
        needs,
    )


def _camvid(seeds: Seeds) -> Iterator[Trial]:
    """Street scenes: pre-trained on their frames without labels and on photographs."""
    images = ("{data}/camvid/images/train", "{data}/photos")
    size = ("--image-size", "112", "--patch-size", "8", "--crop-area", "0.3", "--views", str(VIEWS))
    views, epochs = FRAMES + PHOTOGRAPHS, 60
    yield Trial(
        "tokenizer/camvid",
        (
            *("tokenizer", "--images", *images, "--out", "{own}/tokenizer.safetensors", "--run", "{own}/run"),
            *("--config", "{recipes}/tokenizer.yaml", "view_size=112", "held_out=48", "model.vocabulary=512"),
            *("global_batch=8", "micro_batch=8"),
        ),
        "run/DONE",
        400 * 8 / RATES["tokenizer112"],
    )
    yield Trial(
        "shards/camvid",
        (
            *("shards", "--images", *images, "--out", "{own}", *size, "--held-out", "5%", "--decoders", "0"),
            *("--tokenizer", "{work}/tokenizer/camvid/tokenizer.safetensors"),
        ),
        "manifest.json",
        views * VIEWS / RATES["shards112"],
        ("tokenizer/camvid",),
    )
    for seed in seeds.pretraining:
        yield Trial(
            f"pretrain/camvid/{seed}",
            (
                *("train", "--config", "{recipes}/pretrain.yaml", "--data", "{work}/shards/camvid"),
                *("--run", "{own}", "model.image_size=112", "model.patch_size=8", "model.vocabulary=512"),
                *("masking.min_block=16", "global_batch=16", "micro_batch=16", PRECISION),
                *(f"seed={seed}", f"epochs={epochs}"),
            ),
            "DONE",
            30 + epochs * views / RATES["train112"],
            ("shards/camvid",),
        )
    for seed in seeds.finetuning:
        for pre in seeds.pretraining:
            origin = f"pretrain/camvid/{pre}"
            first = (f"init_from={{work}}/{origin}",)
            yield _segmentation(f"segment/pretrained/{pre}-{seed}", seed, *first, needs=(origin,))
        yield _segmentation(f"segment/scratch/{seed}", seed, "layer_decay=1.0")


def _segmentation(name: str, seed: int, *settings: str, needs: tuple[str, ...] = ()) -> Trial:
    epochs = 12
    return Trial(
        name,
        (
            *("finetune", "--config", "{recipes}/segment.yaml", "--data", "{data}/camvid/images/train"),
            *("--test", "{data}/camvid/images/val", "--run", "{own}", f"seed={seed}", f"epochs={epochs}"),
            *(PRECISION, *AT_THE_END, *settings),
        ),
        "DONE",
        60 + FRAMES * epochs / RATES["segment"],
        needs,
    )
