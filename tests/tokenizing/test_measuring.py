"""What limits a job is what is slow: told by rates, with a stage that is made slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from beit_dist.errors import DataError
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing import measuring
from beit_dist.tokenizing.measuring import Measured, Stage, measure_stages

SLOW = 0.2
"""Seconds; a stage of these small images takes about a hundredth of it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.05)


def measured(bench: Any, encoder: Any = None, **changes: Any) -> Measured:
    out = bench.root / "out"
    job, sources = bench.job(out, device="cuda", **changes)  # so that the encoder takes none of the cores
    return measure_stages(
        job,
        sources.read(0),
        encoder or bench.encoder,
        LocalPlace(out),
        decoders=1,
        encoders=1,
        access=Access(),
    )


def slowed(work: Any) -> Any:
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(SLOW)
        return work(*arguments, **named)

    return slow


def test_a_slow_encoder_is_the_limit_and_its_rate_what_is_expected(bench: Any) -> None:
    found = measured(bench, slowed(bench.encoder))
    assert found.limit.name == "encode"
    assert found.limit.seconds >= SLOW * 2 / 3, "two views of an image, three images a batch"
    assert found.looked_at == 4
    assert found.rejected == 0


def test_slow_decoding_is_the_limit(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "decode_listed", slowed(measuring.decode_listed))
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda _: set(range(64)))
    found = measured(bench)
    assert found.limit.name == "decode"
    assert found.limit.seconds >= SLOW


def test_slow_writing_is_the_limit(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.ShardWriter, "write", slowed(measuring.ShardWriter.write))
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda _: set(range(64)))
    found = measured(bench)
    assert found.limit.name == "write"
    assert found.limit.seconds >= 2 * SLOW


def test_processes_that_share_too_few_cores_are_limited_by_them() -> None:
    stages = tuple(
        Stage(*one) for one in (("decode", 2.0, 4), ("encode", 0.1, 1), ("write", 1.0, 1), ("cores", 3.0, 2))
    )
    assert [stage.rate for stage in stages] == [2.0, 10.0, 1.0, pytest.approx(2 / 3)]
    assert Measured(stages, 1, 0).limit.name == "cores"


def test_on_a_cpu_the_encoder_takes_cores_too(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda _: {0})
    found = {}
    for device in ("cpu", "cuda"):
        job, sources = bench.job(bench.root / device, device=device)
        place = LocalPlace(bench.root / device)
        stages = measure_stages(
            job, sources.read(0), slowed(bench.encoder), place, decoders=1, encoders=1, access=Access()
        ).stages
        found[device] = {stage.name: stage.seconds for stage in stages}
        assert {stage.name: stage.processes for stage in stages}["cores"] == 1
    assert found["cpu"]["cores"] == pytest.approx(
        sum(found["cpu"][name] for name in ("decode", "encode", "write"))
    )
    assert found["cuda"]["cores"] == pytest.approx(found["cuda"]["decode"] + found["cuda"]["write"])


def test_the_probe_is_removed_when_writing_fails(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    bench.job(bench.root / "out", device="cuda")
    before = sorted(Path(bench.root).rglob("*"))
    monkeypatch.setattr(measuring.Tally, "add", full)
    with pytest.raises(OSError, match="No space left"):
        measured(bench)
    assert sorted(Path(bench.root).rglob("*")) == before


def test_images_none_of_which_can_be_used_are_told(bench: Any) -> None:
    for path in bench.images.rglob("*.png"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match="none of 4 images can be used"):
        measured(bench)


def test_the_encoder_gets_the_jobs_batch_of_real_views(bench: Any) -> None:
    seen: list[NDArray[np.uint8]] = []

    def noted(images: NDArray[np.uint8]) -> NDArray[np.int16]:
        seen.append(images)
        made: NDArray[np.int16] = bench.encoder(images)
        return made

    measured(bench, noted)
    assert {one.shape for one in seen} == {(3, 32, 32, 3)}
    assert seen[0].std() > 10
