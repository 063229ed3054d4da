"""Batches of labelled images are the same for any number of workers and ranks, and from any position on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_dist.config.labelled import (
    AugmentationConfig,
    LabelledLoaderConfig,
    LabelMapsConfig,
    SegmentationViewConfig,
)
from beit_dist.config.model import BackboneConfig
from beit_dist.draws import Purpose, permutation, uniforms, words
from beit_dist.errors import DataError, SampleError, SpaceError
from beit_dist.images.decoding import unpatchify
from beit_dist.images.labelled.images import LabelledImages, find_labelled
from beit_dist.images.labelled.label_maps import LabelMaps, find_label_maps
from beit_dist.images.labelled.views import ClassificationView, SegmentationView
from beit_dist.storage.access import Access
from beit_dist.stream import shared_memory
from beit_dist.stream.labelled.batches import LabelledBatch, LabelledBatches, shared_memory_bytes
from beit_dist.stream.labelled.held_out import held_out_batches, held_out_images, measured

ACCESS = Access()
MODEL = BackboneConfig(size="tiny", image_size=16, patch_size=8)
VIEW = ClassificationView(MODEL, AugmentationConfig())
MAP_VIEW = SegmentationView(MODEL, SegmentationViewConfig())
RATES = (0.0, 0.3, 0.6)
SEED = 5
FIELDS = ("patches", "labels", "samples", "epochs", "keeps")
COUNT = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return find_labelled(str(root), ACCESS)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> LabelMaps:
    root, rng = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    for folder, shape in (("images", (30, 24, 3)), ("labels", (30, 24))):
        (root / folder).mkdir()
        for number in range(5):
            pixels = rng.integers(0, 256 if folder == "images" else 4, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return find_label_maps(str(root), ACCESS, LabelMapsConfig(ids=(0, 3)))


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def batches(
    images: Any, view: Any = VIEW, *, rows: range = range(8), samples: int = 0, pin: bool = False, **loader: Any
) -> LabelledBatches[Any]:
    return LabelledBatches(
        images,
        view,
        rows=rows,
        global_batch=8,
        samples=samples,
        seed=SEED,
        drop_path_rates=RATES,
        loader=LabelledLoaderConfig(**{"workers": 0, **loader}),
        access=ACCESS,
        pin=pin,
    )


Copied = dict[str, Any]


def copied(batch: LabelledBatch) -> Copied:
    found = {name: getattr(batch, name) for name in FIELDS}
    return {name: tensor.numpy().copy() for name, tensor in found.items() if tensor is not None}


def take(images: Any, count: int, view: Any = VIEW, **more: Any) -> list[Copied]:
    with closing(batches(images, view, **more)) as made:
        return [copied(next(made)) for _ in range(count)]


def advance(made: LabelledBatches[Any], steps: int) -> None:
    for _ in range(steps):
        next(made)


def assert_equal(got: list[Copied], expected: list[Copied], rows: slice = slice(None)) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for name in FIELDS:
            assert np.array_equal(one[name], other[name][rows]), name


# -------------------------------------------------------------------------------------------------- training


def test_each_row_is_the_view_of_its_image_in_the_order_of_its_epoch(images: LabelledImages) -> None:
    for step, batch in enumerate(take(images, 4)):
        for row in range(8):
            epoch, place = divmod(8 * step + row, COUNT)
            sample = int(permutation(SEED, Purpose.LABELLED_ORDER, (epoch,), COUNT)[place])
            made = VIEW.training(images, sample, ACCESS, SEED, epoch)
            assert (batch["samples"][row], batch["epochs"][row]) == (sample, epoch)
            assert batch["labels"][row] == images.labels[sample]
            assert np.array_equal(unpatchify(batch["patches"][row], 8), made.pixels)
            drawn = uniforms(words(SEED, Purpose.DROP_PATH, (epoch, sample), 6)).reshape(3, 2)
            assert np.array_equal(batch["keeps"][row], drawn >= np.array(RATES)[:, None])
        assert batch["patches"].dtype == np.uint8
        assert batch["labels"].dtype == np.int64


def test_every_image_comes_once_per_epoch_in_another_order(images: LabelledImages) -> None:
    samples = np.concatenate([batch["samples"] for batch in take(images, 11)]).reshape(8, COUNT)
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in samples.tolist())
    assert len({tuple(epoch) for epoch in samples.tolist()}) == 8


def test_ranks_divide_the_same_batches(images: LabelledImages) -> None:
    whole = take(images, 4)
    for rank in range(4):
        rows = range(2 * rank, 2 * rank + 2)
        assert_equal(take(images, 4, rows=rows), whole, slice(rows.start, rows.stop))


def test_a_start_at_any_position_continues_the_same_batches(images: LabelledImages) -> None:
    whole = take(images, 6)
    for step in (1, 3, 5):
        assert_equal(take(images, 6 - step, samples=8 * step), whole[step:])


def test_a_batch_larger_than_the_data_holds_several_epochs(images: LabelledImages) -> None:
    few = LabelledImages(images.files[:3], images.labels[:3], images.classes, "")
    (batch,) = take(few, 1)
    assert batch["epochs"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_digests_of_ranks_add_up_to_that_of_the_whole_and_tell_positions_apart(images: LabelledImages) -> None:
    def digest(rows: range, samples: int = 0) -> int:
        with closing(batches(images, rows=rows, samples=samples)) as made:
            return next(made).digest

    whole = digest(range(8))
    assert (digest(range(3)) + digest(range(3, 8))) % 2**64 == whole
    assert digest(range(8), 8) != whole


def test_without_drop_path_there_are_no_keeps(images: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RATES", (0.0, 0.0))
    assert "keeps" not in take(images, 1)[0]


def test_workers_make_the_same_batches_of_classes_and_of_maps(images: LabelledImages, maps: LabelMaps) -> None:
    assert_equal(take(images, 6, workers=2), take(images, 6))
    rows = range(2, 5)
    with_workers = take(maps, 5, MAP_VIEW, rows=rows, workers=2, prefetch=1)
    assert_equal(with_workers, take(maps, 5, MAP_VIEW), slice(2, 5))
    assert (with_workers[0]["labels"].shape, with_workers[0]["labels"].dtype) == ((3, 16, 16), np.uint8)


def test_a_killed_worker_is_an_error_and_not_a_hang(images: LabelledImages) -> None:
    with closing(batches(images, workers=1)) as made:
        next(made)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        with pytest.raises(SampleError, match="a loader worker was killed"):
            advance(made, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_training_at_its_name(tmp_path: Path, workers: int) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.effect_noise((20, 20), 50).save(tmp_path / name / "1.png")
    images = find_labelled(str(tmp_path), ACCESS)
    (tmp_path / "b/1.png").write_bytes((tmp_path / "b/1.png").read_bytes()[:-40] + bytes(40))
    with pytest.raises(DataError, match=r"b/1\.png: "):
        take(images, 1, workers=workers)


def test_a_stop_ends_the_wait_for_a_batch(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.effect_noise((20, 20), 50).save(tmp_path / name / "1.png")
    images = find_labelled(str(tmp_path), ACCESS)
    size = (tmp_path / "b/1.png").stat().st_size
    (tmp_path / "b/1.png").unlink()
    os.mkfifo(tmp_path / "b/1.png")  # opening it waits for a writer
    made = batches(images)
    assert made.next_unless(lambda: True) is None
    raw = os.open(tmp_path / "b/1.png", os.O_RDWR)  # lets the thread go on
    os.write(raw, bytes(size))
    os.close(raw)
    made.close()
    assert made.next_unless(lambda: False) is None


def test_workers_hold_no_more_shared_memory_than_is_said(
    images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = LabelledLoaderConfig(workers=2, prefetch=4)
    said = shared_memory_bytes(VIEW, 8, loader, len(RATES))
    assert shared_memory_bytes(VIEW, 8, LabelledLoaderConfig(workers=0), len(RATES)) == 0
    monkeypatch.setattr(shared_memory, "room", lambda ranks: said * 3 // 5)
    made = batches(images, workers=2, prefetch=4)
    made.close()
    assert made.prefetch == 2
    monkeypatch.setattr(shared_memory, "room", lambda ranks: said // 5)
    with pytest.raises(SpaceError):
        batches(images, workers=2, prefetch=4)


# -------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", [None, 5, 999])
def test_ranks_share_the_held_out_images_and_run_as_many_batches(
    images: LabelledImages, world: int, samples: int | None
) -> None:
    loader, seen, numbers = LabelledLoaderConfig(), {}, set()
    for rank in range(world):
        made = list(
            held_out_batches(
                images, VIEW, rank=rank, world=world, samples=samples, batch=2, loader=loader, access=ACCESS
            )
        )
        numbers.add(len(made))
        for batch in made:
            assert batch.patches.shape == (2, 4, 192)
            for row, sample in enumerate(batch.samples.tolist()):
                if sample < 0:
                    assert batch.labels[row] == -1
                    continue
                assert sample not in seen
                seen[sample] = unpatchify(batch.patches[row].numpy(), 8)
                assert batch.labels[row] == images.labels[sample]
    assert len(numbers) == 1
    assert sorted(seen) == measured(COUNT, samples)
    for sample, pixels in seen.items():
        assert np.array_equal(pixels, VIEW.held_out(images, sample, ACCESS).pixels)


def test_some_held_out_images_are_spread_over_the_list() -> None:
    assert measured(1000, 4) == [0, 250, 500, 750]
    assert measured(3, None) == measured(3, 8) == [0, 1, 2]


def test_ranks_take_turns_with_whole_images_and_their_maps(maps: LabelMaps) -> None:
    turns = [
        list(
            held_out_images(
                maps,
                MAP_VIEW,
                rank=rank,
                world=2,
                samples=None,
                loader=LabelledLoaderConfig(),
                access=ACCESS,
            )
        )
        for rank in range(2)
    ]
    assert [[image and image.sample for image in turn] for turn in turns] == [[0, 2, 4], [1, 3, None]]
    first = turns[0][1]
    assert first is not None
    pixels, labels = maps.read(2, ACCESS)
    assert np.array_equal(first.pixels, pixels)
    assert np.array_equal(first.labels, labels)


def test_a_broken_held_out_image_is_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2000))
    images = find_labelled(str(tmp_path), ACCESS)
    with pytest.raises(DataError, match=r"a/1\.png: "):
        next(
            held_out_batches(
                images,
                VIEW,
                rank=0,
                world=1,
                samples=None,
                batch=2,
                loader=LabelledLoaderConfig(workers=0),
                access=ACCESS,
            )
        )
