"""Several workers on one host, each with an encoder and decoding processes of its own, by one command.

One encoding process takes images from its decoding processes, hashes and writes. Past some thousand images a
second one core cannot do that for a GPU, and several GPUs need a process each. They are workers like those of a
job array: the shards are the same, and what is committed is kept when they are killed. Of H hosts with N encoders
each, encoder i of host h is worker h + H · i of H · N. So the shards of a host do not depend on N, and
``--finish`` can name the hosts that have some left.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beit_dist.errors import DataError, SampleError, UserError
from beit_dist.tokenizing.parts import parts_of
from beit_dist.tokenizing.sources import SourceList
from beit_dist.tokenizing.starting import MAX_DECODERS, Options, Prepared, make, prepare
from beit_dist.tokenizing.worker import WorkerReport


class _Failed(NamedTuple):
    """How a process ended that has no report."""

    text: str
    exit_code: int | None
    """Of what the user can fix; None for anything else."""


def make_in_processes(options: Options, prepared: Prepared) -> WorkerReport:
    """Make this host's shards of a job that is recorded, with ``options.encoders`` processes.

    Raises:
        UserError: what one of them raised; the others are stopped. Another attempt keeps what is finished.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    connections: list[Connection] = []
    report = WorkerReport(0, 0, 0, ())
    try:
        for number in range(options.encoders):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, _options_of(options, prepared, number)))
            process.start()
            processes.append(process)
            theirs.close()  # so that a process that dies closes the pipe's only other end
            connections.append(ours)
        waiting = list(connections)
        while waiting:
            ended = wait(waiting)
            for connection in [one for one in waiting if one in ended]:
                report = report.plus(_result(connection))
                waiting.remove(connection)
    finally:
        for connection in connections:
            connection.close()  # which ends a process that is still at work
        for process in processes:
            process.join()
    return report


def decoders_of_encoder(wanted: int | None, encoders: int, number: int) -> int:
    """The share that encoder ``number`` has of the host's decoding processes; at least one, unless 0 are wanted.

    Args:
        wanted: for the host; None is one for each core, up to 16 for an encoder.
    """
    if wanted is None:
        wanted = min(encoders * MAX_DECODERS, len(os.sched_getaffinity(0)))
    if wanted == 0:
        return 0
    return max(1, wanted // encoders + (number < wanted % encoders))


def _options_of(options: Options, prepared: Prepared, number: int) -> Options:
    """What encoder ``number`` of this host is told."""
    device, file, port = options.device, options.metrics_textfile, options.metrics_port
    if prepared.device == torch.device("cuda"):  # no number was given
        device = f"cuda:{number % torch.cuda.device_count()}"
    return replace(
        options,
        encoders=1,
        index=prepared.index + prepared.count * number,
        count=prepared.count * options.encoders,
        device=device,
        decoders=decoders_of_encoder(options.decoders, options.encoders, number),
        compiled=prepared.job.compiled,
        finish=False,
        metrics_port=port + number if port else port,
        metrics_textfile=None if file is None else Path(file.parent, f"{file.stem}-{number}{file.suffix}"),
    )


def _result(connection: Connection) -> WorkerReport:
    try:
        result: Any = connection.recv()
    except (EOFError, ConnectionError):
        raise SampleError(
            "an encoding process died, most likely because memory ran out. Run the same command again with fewer "
            "--encoders or --decoders, or more memory: finished shards are kept"
        ) from None
    if not isinstance(result, _Failed):
        report: WorkerReport = result
        return report
    if result.exit_code is None:
        raise RuntimeError(f"in an encoding process:\n{result.text}")
    raise (DataError if result.exit_code == DataError.exit_code else SampleError)(result.text)


def _serve(connection: Connection, options: Options) -> None:
    """An encoding process: it ends when its work is done, or its parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the processes
    threading.Thread(target=_end_with_the_parent, args=(connection,), daemon=True).start()
    result: WorkerReport | _Failed
    try:
        prepared = prepare(options, {})
        sources = SourceList(options.out, options.shard_samples)
        parts = parts_of(options.out, replace(prepared.job, images=sources.sha256), sources)
        result = make(options, prepared, parts, sources.header.entries)
    except UserError as error:
        result = _Failed(str(error), error.exit_code)
    except Exception:
        result = _Failed(traceback.format_exc(), None)
    connection.send(result)


def _end_with_the_parent(connection: Connection) -> None:
    try:
        connection.recv()  # nothing is sent
    except (EOFError, ConnectionError):
        os._exit(1)  # the decoding processes end as their pipes close
