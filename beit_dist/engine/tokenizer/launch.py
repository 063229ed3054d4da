"""One start of a tokenizer's training on one rank: join, build, train, write the tokenizer, leave a marker."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beit_dist.data.image_files import ImageFile, find_images
from beit_dist.data.left_out import LeftOut
from beit_dist.durable import write_whole
from beit_dist.engine.distributed import Ranks
from beit_dist.engine.launch import failures_marked, quieten
from beit_dist.engine.output import go_on_unread
from beit_dist.engine.precision import check_precision
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.process import Process, join
from beit_dist.engine.rendezvous import meeting_point
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import compare_recipes
from beit_dist.engine.run_folder import DONE, PREEMPTED, RunFolder
from beit_dist.engine.sinks import check_packages
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.tokenizer.build import FROZEN, SHOWN, NotBegun, build
from beit_dist.engine.tokenizer.quality import Quality, picture
from beit_dist.engine.tokenizer.training import TokenizerTrainer
from beit_dist.errors import TokenizerError, UserError
from beit_dist.tokenizer_config import TokenizerRecipe
from beit_dist.visual_tokens.weights import (
    beside,
    check_writable,
    save_tokenizer,
    tokenizer_digest,
    tokenizer_extra,
)

_OF_THE_HOST = {"run", "checkpoint", "storage", "logging", "watchdog", "timeouts", "workers", "cache_gib"}
"""Settings that are no part of how a tokenizer was made; some are places."""


@dataclass(frozen=True)
class Job:
    """What was asked for."""

    images: str
    """A folder of images, a tar, or a webdataset specification of tars, here or at URLs."""
    out: Path
    """The tokenizer's file; its picture lies beside it."""
    recipe: TokenizerRecipe
    """With its run folder."""
    resolved: Resolved
    built_in: bool
    """Whether DeepSpeed's settings are the built-in ones."""
    sniff: bool = False
    """Whether files at URLs are looked into where their names do not tell what they are."""

    @property
    def picture(self) -> Path:
        """Held-out images over their reconstructions."""
        return beside(self.out, ".png")


def launch(job: Job, ranks: Ranks) -> int:
    """Train on this rank; 0 when the tokenizer is written, or the run was stopped with a whole checkpoint.

    What every rank would find wrong alike is raised before the ranks join. After that a failure ends this
    process at once, without further collectives: others may be stuck in one, and follow when they notice.
    """
    since = time.time()
    quieten()
    go_on_unread()
    meeting = meeting_point(ranks)
    recipe = job.recipe
    check_precision(job.resolved.precision)
    check_packages(recipe)
    if ranks.rank == 0:
        check_writable(job.out)
    left_out = LeftOut()
    files = find_images(job.images, recipe.storage.access, sniff=job.sniff, left_out=left_out)
    if ranks.rank == 0:
        for line in left_out.lines():
            print(line, flush=True)
    run = RunFolder(str(recipe.run), recipe.storage.access)
    run.check_writable()
    # A signal during the start is a stop before the first step. Of max_minutes rank 0's clock alone decides.
    stop = StopRequest(max_minutes=recipe.max_minutes if ranks.rank == 0 else None).install()
    timeouts = Timeouts(recipe.timeouts, recipe.checkpoint.timeout_seconds)
    with failures_marked(run, ranks, timeouts, since):
        process = join(recipe, run, ranks, meeting, stop, timeouts)
        train(job, files, process)
        process.leave()
    return 0


def train(job: Job, files: list[ImageFile], process: Process) -> str:
    """Train from where the run is, and write the tokenizer if it is done; the marker that was left. Collective."""
    recipe, ranks = job.recipe, process.ranks
    run = RunFolder(str(recipe.run), recipe.storage.access)
    written = process.agreement.from_rank_0(finished(job, run) if ranks.rank == 0 else None)
    if written is not None:
        if ranks.rank == 0:
            print(f"already done: {job.out} (digest {written[:16]}), run folder {recipe.run}", flush=True)
        return DONE
    parts = build(recipe, job.resolved, job.built_in, files, process)
    if isinstance(parts, NotBegun):
        if ranks.rank == 0:
            run.mark(PREEMPTED, **asdict(parts))
            print(f"stopped on request, while images were read: step {parts.step}, run folder {recipe.run}")
        return PREEMPTED
    trainer = TokenizerTrainer(parts)
    with parts.store.unless_superseded():
        marker = trainer.run()
        if ranks.rank == 0:
            parts.store.refuse_if_superseded()
        facts = _write(job, trainer, len(files)) if marker == DONE else {"reason": trainer.reason}
    parts.close()  # not after a failure: the others shall not wait for this rank
    if ranks.rank == 0:
        run.mark(marker, attempt=parts.store.attempt, step=parts.progress.step, **facts)
        ended = "done" if marker == DONE else "stopped on request"
        print(f"{ended}: step {parts.progress.step} of {recipe.steps}, run folder {recipe.run}", flush=True)
    return marker


def finished(job: Job, run: RunFolder) -> str | None:
    """The digest of the tokenizer that this run has written, if it is done with as many steps as are asked for.

    Raises:
        CheckpointError: it is, but what is asked for is another tokenizer.
    """
    try:
        said = json.loads(run.place.read(DONE))
        if said["step"] < job.recipe.steps or tokenizer_digest(job.out) != said["digest"]:
            return None
        digest, recipe = str(said["digest"]), tokenizer_extra(job.out)["recipe"]
    except (FileNotFoundError, ValueError, KeyError, TokenizerError):
        return None
    compare_recipes(
        job.recipe, {"config": recipe}, loud=True, frozen=FROZEN, shown=SHOWN, said="not applied, as it is done"
    )
    return digest


def _write(job: Job, trainer: TokenizerTrainer, images: int) -> dict[str, Any]:
    """On rank 0: write file and picture of the last measured weights, and say how good they are."""
    parts, model, quality = trainer.parts, trainer.measured, trainer.quality
    if parts.agreement.ranks.rank != 0 or quality is None:
        return {}
    about = {
        "recipe": job.recipe.model_dump(mode="json", exclude=_OF_THE_HOST),
        "arithmetic": parts.arithmetic,
        "images": parts.images + len(parts.held_out),
        "ranks": parts.resolved.ranks,
        "steps": parts.progress.step,
        "skipped": parts.progress.skipped,
        "quality": asdict(quality),
    }
    # The file first: a picture with no tokenizer beside it would be one of the images, where it lies among them.
    digest = save_tokenizer(job.out, model, job.recipe.model, about)
    _write_picture(job.picture, picture(model, parts.held_out))
    print(f"wrote {job.out} (digest {digest[:16]}) and {job.picture}")
    _say_quality(quality, parts.progress.skipped, job.recipe.least_perplexity)
    return {"digest": digest, **asdict(quality)}


def _say_quality(quality: Quality, skipped: int, least_perplexity: float) -> None:
    print(
        f"held-out PSNR {quality.psnr:.2f} dB, tokens in use {quality.used} of {quality.vocabulary}, "
        f"perplexity {quality.perplexity:.1f}",
        flush=True,
    )
    if skipped:
        _warn(f"{skipped} steps were skipped for gradients that were not finite")
    if quality.perplexity < least_perplexity:
        _warn(
            f"the codebook has COLLAPSED: perplexity {quality.perplexity:.1f} of {quality.vocabulary} tokens, "
            f"below {least_perplexity:.1f}. Such tokens teach a model nothing. Raise usage_weight, lower "
            "kl_weight, train for more steps, or choose a smaller model.vocabulary"
        )


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _write_picture(path: Path, png: bytes) -> None:
    try:
        write_whole(path, png)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
