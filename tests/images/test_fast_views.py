"""Version 2 of the pixels: the draws of version 1, nearly its values, and large JPEGs shrunk in decoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.photographs import jpeg, photo

from beit_dist.errors import ConfigError
from beit_dist.images import decoding, fast_views
from beit_dist.images.decoding import View, decode, jitter_of, make_view
from beit_dist.images.fast_views import check_resizing, make_fast_views

SIZES: dict[str, Any] = {"image_size": 64, "token_size": 32}
WANTED: dict[str, Any] = {**SIZES, "augment": "random", "seed": 3}


def fast(raw: bytes, sample_id: int, views: int = 1, **changes: Any) -> list[View]:
    return make_fast_views(raw, views=views, sample_id=sample_id, **(WANTED | changes))


def slow(raw: bytes, sample_id: int, view: int = 0, **changes: Any) -> View:
    return make_view(decode(raw), sample_id=sample_id, view=view, **(WANTED | changes))


def off(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("augment", ["random", "center"])
def test_views_are_those_of_version_1_to_rounding(augment: str) -> None:
    raw = png(photo(200, 150))
    for sample_id in range(40):
        made, expected = fast(raw, sample_id, augment=augment)[0], slow(raw, sample_id, augment=augment)
        assert (made.box, made.flip) == (expected.box, expected.flip)
        assert made.image.shape == (64, 64, 3)
        assert made.token_image.shape == (32, 32, 3)
        assert off(made.image, expected.image) < 0.5
        assert off(made.token_image, expected.token_image) < 0.5


def test_all_views_are_made_of_one_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, calls, honest = png(photo(200, 150)), 0, fast_views.decode_picture

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return honest(*arguments)

    monkeypatch.setattr(fast_views, "decode_picture", counted)
    made = fast(raw, 5, views=3)
    assert calls == 1
    assert [view.box for view in made] == [slow(raw, 5, view).box for view in range(3)]


def test_the_jitter_of_a_small_image_is_that_of_version_1() -> None:
    """All rows of it count for the mean grey; the tables and blends are Pillow's."""
    image, orders = photo(90, 60), set()
    for sample_id in range(60):
        orders.add(jitter_of(0, (sample_id, 0)).order)
        made = fast_views._jittered(np.asarray(image)[5:50, 7:80], np.asarray(image), 0, (sample_id, 0))
        expected = decoding._jittered_crop(image, (7, 5, 80, 50), 0, (sample_id, 0))
        assert np.array_equal(made, np.asarray(expected))
    assert len(orders) == 6


def test_a_large_jpeg_is_shrunk_as_far_as_every_crop_stays_twice_the_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw, seen, honest = jpeg(photo(1200, 900), quality=95), list[tuple[int, ...]](), fast_views._resize

    def noted(crop: Any, *arguments: Any) -> Any:
        seen.append(crop.shape)
        return honest(crop, *arguments)

    monkeypatch.setattr(fast_views, "_resize", noted)
    shrunk = 0
    for sample_id in range(12):
        seen.clear()
        made, expected = fast(raw, sample_id)[0], slow(raw, sample_id)
        left, top, right, bottom = made.box
        shorter = min(expected.box[2] - expected.box[0], expected.box[3] - expected.box[1])
        scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or shorter >= 2 * 64 * scale)
        assert seen[0][:2] == (-(-(bottom - top) // scale), -(-(right - left) // scale))
        assert all(edge % scale == 0 or edge in (900, 1200) for edge in made.box), "what was cropped is recorded"
        assert made.box == pytest.approx(expected.box, abs=scale / 2)
        shrunk += scale > 1
        shifted = np.roll(expected.image, 1, axis=1)
        assert off(made.image, expected.image) < off(shifted, expected.image) / 3
    assert shrunk > 6


def test_the_least_area_of_a_crop_holds_for_both_versions() -> None:
    raw = jpeg(photo(64, 48))
    sizes = {"image_size": 16, "token_size": 16, "augment": "random", "seed": 0, "sample_id": 3, "crop_area": 0.7}
    fast_box = make_fast_views(raw, views=1, **sizes)[0].box
    assert fast_box == make_view(decode(raw), view=0, **sizes).box
    assert fast_box != slow(raw, 3).box


def test_the_smallest_crop_of_all_views_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = jpeg(photo(1200, 900))
    alone = [slow(raw, 1, view) for view in range(4)]
    shortest = min(min(box[2] - box[0], box[3] - box[1]) for box in (view.box for view in alone))
    asked: list[int] = []
    honest = fast_views._scale
    monkeypatch.setattr(fast_views, "_scale", lambda *of: asked.append(honest(*of)) or asked[-1])
    fast(raw, 1, views=4)
    assert asked == [max(scale for scale in (1, 2, 4, 8) if scale == 1 or shortest >= 128 * scale)]


def test_a_pytorch_without_lanczos_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_resizing()

    def missing(*_: Any, mode: str, **__: Any) -> torch.Tensor:
        raise NotImplementedError(mode)

    monkeypatch.setattr(fast_views.F, "interpolate", missing)
    with pytest.raises(ConfigError, match=r"--pixel-version: got 2, expected 1 .*upgrade PyTorch"):
        check_resizing()
