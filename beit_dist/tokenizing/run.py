"""The steps of the job as a user starts them: freeze, work (one worker alone does everything), finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from beit_dist.images.listing import expand_sources
from beit_dist.shards.manifest import Manifest
from beit_dist.tokenizing.describing import Planned, aligned
from beit_dist.tokenizing.encoders import make_in_processes
from beit_dist.tokenizing.finish import finish
from beit_dist.tokenizing.freeze import check_same_sources, freeze
from beit_dist.tokenizing.job import record_job
from beit_dist.tokenizing.parts import parts_of
from beit_dist.tokenizing.rejected import Rejected
from beit_dist.tokenizing.sources import SourceList, read_header
from beit_dist.tokenizing.starting import Options, make, prepare


@dataclass(frozen=True)
class Outcome:
    """How :func:`work` ended, held-out images included; ``manifest`` is None until the job is finished."""

    index: int
    count: int
    made: int
    kept: int
    images: int
    rejected: tuple[Rejected, ...]
    manifest: Manifest | None


def work(options: Options, environment: Mapping[str, str]) -> Outcome:
    """Be one worker of the job, or all those of this host. One host alone also freezes the list and finishes.

    Raises:
        UserError: see the parts; nothing is written before the settings are known to be valid.
    """
    out = options.out
    prepared = prepare(options, environment)
    index, count, job, manifest = prepared.index, prepared.count, prepared.job, prepared.manifest
    _freeze_or_check(options, count)
    sources = SourceList(out, options.shard_samples)
    parts = parts_of(out, replace(job, images=sources.sha256), sources)
    if manifest is not None:
        return Outcome(index, count, 0, sum(part.sources.shards for part in parts), 0, (), manifest)
    header = sources.header
    for part in reversed(parts):  # of the folder itself first: if it is another job's, that is what to say
        record_job(part.out, part.job)
    planned = Planned(out, job, options.images, options.tokenizer, header.entries, header.held_out)
    print("\n".join(aligned(planned.rows())), flush=True)
    if options.encoders > 1:
        report = make_in_processes(options, prepared)
    else:
        report = make(options, prepared, parts, header.entries)
    if count == 1 and options.finish:
        manifest = finish(out, asdict(parts[-1].job), options.max_rejected)
    return Outcome(index, count, *report, manifest)


def _freeze_or_check(options: Options, count: int) -> None:
    """One worker freezes; several only read, since two of them would freeze a changing folder differently."""
    if count == 1:
        freeze(
            options.images,
            options.out,
            options.seed,
            options.access,
            sniff=options.sniff,
            held_out=options.held_out,
        )
    else:
        header = read_header(options.out)
        sources = expand_sources(options.images, options.access)
        check_same_sources(header, sources, options.seed, options.out, held_out=options.held_out)
