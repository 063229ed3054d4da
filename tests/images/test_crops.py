"""The tokenizer's crops: a function of seed and position, whoever makes them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.crops import CropBatches, Crops, ImagePool
from beit_dist.images.files import find_images

COUNT = 12


@pytest.fixture
def pool(tmp_path: Path) -> ImagePool:
    """Twelve images, each of one colour that no other has, with a gradient."""
    for number in range(COUNT):
        pixels = np.full((40, 48, 3), 20 * number, np.uint8)
        pixels[..., 1] += np.arange(48, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    return ImagePool(find_images(str(tmp_path)), 32, 1 << 30, 1, 1)


def next_of(batches: CropBatches) -> Crops:
    """The next batch, however long it takes."""
    made = batches.next_unless(lambda: False)
    assert made is not None
    return made


def crops(pool: ImagePool, count: int, workers: int = 1, **changes: Any) -> np.ndarray:
    """The first ``count`` batches, one after another."""
    settings: dict[str, Any] = {"batch": 6, "side": 16, "scale": (0.4, 1.0), "share": 1.0, "seed": 2}
    batches = CropBatches(pool, range(len(pool)), workers=workers, **(settings | changes))
    made = np.stack([next_of(batches).pixels for _ in range(count)])
    batches.close()
    return made


def test_they_are_the_same_whatever_the_threads(pool: ImagePool) -> None:
    assert np.array_equal(crops(pool, 5), crops(pool, 5, workers=3))
    assert not np.array_equal(crops(pool, 5), crops(pool, 5, seed=3))


def test_ranks_make_their_rows_of_the_same_batches(pool: ImagePool) -> None:
    whole = crops(pool, 5)
    for rank in range(3):
        rows = range(2 * rank, 2 * rank + 2)
        assert np.array_equal(crops(pool, 5, rows=rows), whole[:, rows.start : rows.stop])


def test_a_start_in_the_middle_goes_on_with_the_same_batches(pool: ImagePool) -> None:
    assert np.array_equal(crops(pool, 3, first=4), crops(pool, 7)[4:])


def test_every_image_comes_once_per_epoch_in_an_order_of_its_own(pool: ImagePool) -> None:
    colours = crops(pool, 6)[:, :, 0, 0, 0].reshape(3, COUNT).tolist()
    assert all(sorted(epoch) == [20 * number for number in range(COUNT)] for epoch in colours)
    assert colours[0] != colours[1]


def test_a_batch_larger_than_the_data_goes_round(pool: ImagePool) -> None:
    colours = crops(pool, 1, batch=3 * COUNT)[0, :, 0, 0, 0].tolist()
    assert sorted(colours) == sorted(3 * [20 * number for number in range(COUNT)])


def test_other_usable_images_have_another_digest(pool: ImagePool, tmp_path: Path) -> None:
    again = ImagePool(find_images(str(tmp_path)), 32, 0, 3, 1)
    assert again.digest == pool.digest
    (tmp_path / "03.png").write_bytes(b"broken")
    left = ImagePool(find_images(str(tmp_path)), 32, 1 << 30, 1, 1)
    assert (len(left), len(left.rejected)) == (COUNT - 1, 1)
    assert left.digest != pool.digest


def test_images_of_the_same_sizes_have_another_digest_if_names_or_bytes_differ(
    pool: ImagePool, tmp_path: Path
) -> None:
    def digest() -> str:
        return ImagePool(find_images(str(tmp_path)), 32, 0, 1, 1).digest

    assert digest() == pool.digest
    first, second = tmp_path / "00.png", tmp_path / "01.png"
    raw = first.read_bytes()
    middle = len(raw) // 2
    first.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    assert digest() != pool.digest
    first.write_bytes(raw)
    assert digest() == pool.digest
    second.rename(tmp_path / "01.PNG")
    assert digest() != pool.digest


def test_a_tar_and_another_place_of_the_same_images_have_the_same_digest(pool: ImagePool, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path, "./", filter=lambda member: None if member.name.endswith(".tar") else member)
    assert ImagePool(find_images(str(tmp_path / "x.tar")), 32, 0, 1, 1).digest == pool.digest


def test_the_digest_of_an_old_run_is_recognised(pool: ImagePool) -> None:
    """It was the sha256 of the sizes alone."""
    sizes = np.array([file.size for file in pool._files], dtype="<i8")
    assert pool.has_digest(hashlib.sha256(sizes.tobytes()).hexdigest())
    assert pool.has_digest(pool.digest)
    assert not pool.has_digest(hashlib.sha256(b"").hexdigest())


def test_large_images_are_kept_small(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    pool = ImagePool(find_images(str(tmp_path)), 50, 1 << 30, 1, 1)
    assert pool[0].shape == (50, 100, 3)


def test_grey_and_transparent_images_are_welcome(tmp_path: Path) -> None:
    raw = io.BytesIO()
    Image.new("LA", (40, 40), (90, 0)).save(raw, "PNG")
    (tmp_path / "x.png").write_bytes(raw.getvalue())
    assert ImagePool(find_images(str(tmp_path)), 32, 1 << 30, 1, 1)[0].tolist()[0][0] == [255, 255, 255]


def test_an_image_of_a_tar_that_cannot_be_used_is_named_by_its_place(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 40)).save(tmp_path / name)
            tar.add(tmp_path / name, name)
        tar.addfile(tarfile.TarInfo("c.png"))
    files = find_images(str(tmp_path / "x.tar"))
    assert ImagePool(files, 32, 1 << 30, 1, 1).rejected == [
        f"{tmp_path}/x.tar, the image at byte {files[2].entry.at[0]}: not an image that Pillow reads"
    ]


def test_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image found"):
        find_images(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="--images"):
        find_images(str(tmp_path / "nowhere"))
