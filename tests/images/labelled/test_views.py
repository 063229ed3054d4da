"""Views of labelled images: the recipe's operations, drawn by key alone."""

from __future__ import annotations

import importlib.util
import io
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit_dist.config.labelled import (
    AugmentationConfig,
    LabelMapsConfig,
    RandAugmentConfig,
    SegmentationViewConfig,
)
from beit_dist.config.model import BackboneConfig
from beit_dist.draws import Purpose, words
from beit_dist.errors import ConfigError, DataError
from beit_dist.images.decoding import Pixels
from beit_dist.images.labelled.images import find_labelled
from beit_dist.images.labelled.label_maps import find_label_maps
from beit_dist.images.labelled.pixel_noise import PHOTOMETRIC_WORDS, erase, photometric
from beit_dist.images.labelled.rand_augment import OPERATIONS, WORDS, rand_augment
from beit_dist.images.labelled.views import ClassificationView, SegmentationView
from beit_dist.storage.access import Access

ACCESS = Access()
PLAIN = {"rand_augment": None, "color_jitter": 0, "erasing": 0}
BICUBIC = Image.Resampling.BICUBIC
GREY = (128, 128, 128)


def model(size: int = 32, **settings: Any) -> BackboneConfig:
    return BackboneConfig(size="tiny", image_size=size, patch_size=8, **settings)


def photo(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    """Smooth, with all levels: no two operations leave it alike."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), BICUBIC)


def classification(size: int = 32, **settings: Any) -> ClassificationView:
    return ClassificationView(model(size), AugmentationConfig(**settings))


def segmentation(size: int = 32, **settings: Any) -> SegmentationView:
    return SegmentationView(model(size), SegmentationViewConfig(**settings))


def stripes(width: int = 80, height: int = 60) -> tuple[Pixels, Pixels]:
    """An image whose grey levels tell the classes of its map."""
    labels = np.add.outer(np.arange(height) // 10, np.arange(width) // 10).astype(np.uint8) % 10
    return np.repeat(20 * labels[..., None], 3, axis=2), labels


# ------------------------------------------------------------------------------------------------------ keys


def test_a_view_follows_from_its_key_alone() -> None:
    view, image = classification(), photo()
    keys = [(epoch, sample) for epoch in range(3) for sample in range(8)]
    expected = [view.augmented(image, 7, key).tobytes() for key in keys]
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda key: view.augmented(image, 7, key).tobytes(), reversed(keys)))[::-1]
    assert again == expected
    assert len(set(expected)) > len(keys) - 2
    assert view.augmented(image, 8, keys[0]).tobytes() != expected[0]


def test_nothing_is_drawn_from_generators_that_others_use() -> None:
    before = states()
    for sample in range(8):
        classification().augmented(photo(), 0, (0, sample))
        segmentation().augmented(*stripes(), 0, (0, sample))
    assert states() == before


def states() -> tuple[object, ...]:
    """Of the generators that everybody shares."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_a_segmentations_view_follows_from_its_key_alone() -> None:
    view = segmentation()
    expected = [view.augmented(*stripes(), 7, (1, sample)) for sample in range(8)]
    for sample in reversed(range(8)):
        again = view.augmented(*stripes(), 7, (1, sample))
        assert again.pixels.tobytes() == expected[sample].pixels.tobytes()
        assert again.label.tobytes() == expected[sample].label.tobytes()
    assert len({made.pixels.tobytes() for made in expected}) == 8


# -------------------------------------------------------------------------------------------- classification


def timm() -> ModuleType:
    """timm's module of operations by itself: the package needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps timm")
    path = Path(found.origin).parent / "data/auto_augment.py"
    spec = importlib.util.spec_from_file_location("timm_auto_augment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_operation_is_timms_at_every_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, image = timm(), photo(40, 40)
    names = theirs._RAND_INCREASING_TRANSFORMS
    assert len(OPERATIONS) == len(names)
    options = {"resample": BICUBIC, "fillcolor": GREY}
    for name, ours in zip(names, OPERATIONS, strict=True):
        for strength, sign in [(0.0, 1), (3.7, 1), (3.7, -1), (8.9, 1), (8.9, -1), (9.99, -1)]:
            monkeypatch.setattr(theirs.random, "random", lambda sign=sign: 0.0 if sign > 0 else 1.0)
            level = theirs.LEVEL_TO_ARG[name]
            arguments = level(strength, {}) if level else ()
            expected = theirs.NAME_TO_OP[name](image, *arguments, **options)
            assert ours(image, sign * strength / 10, BICUBIC, GREY).tobytes() == expected.tobytes(), name


def test_the_strongest_posterizing_leaves_black() -> None:
    """timm's own fails there with today's Pillow."""
    assert not np.asarray(OPERATIONS[4](photo(), 1.0, BICUBIC, GREY)).any()


def test_half_of_the_operations_are_applied_with_strengths_around_the_magnitude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []

    def note(image: Image.Image, level: float, *rest: object) -> Image.Image:
        seen.append(level)
        return image

    monkeypatch.setattr("beit_dist.images.labelled.rand_augment.OPERATIONS", (note,))
    count = 2000
    rand_augment(
        photo(),
        RandAugmentConfig(magnitude=6, layers=count),
        words(0, Purpose.AUGMENTATION, (0, 0), WORDS * count),
        BICUBIC,
        GREY,
    )
    strengths = 10 * np.abs(seen)
    assert abs(len(seen) / count - 0.5) < 0.04
    assert abs(strengths.mean() - 6) < 0.06
    assert abs(strengths.std() - 0.5) < 0.04
    assert abs(np.mean(np.sign(seen))) < 0.1


def test_every_operation_is_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = np.zeros(15)

    def choosing(number: int) -> Any:
        def note(image: Image.Image, *rest: object) -> Image.Image:
            chosen[number] += 1
            return image

        return note

    monkeypatch.setattr("beit_dist.images.labelled.rand_augment.OPERATIONS", tuple(map(choosing, range(15))))
    drawn = words(0, Purpose.AUGMENTATION, (0, 0), WORDS * 6000)
    rand_augment(photo(), RandAugmentConfig(layers=6000), drawn, BICUBIC, GREY)
    assert chosen.min() > 150
    assert chosen.max() < 260


def test_jitter_takes_the_place_of_rand_augment_only() -> None:
    image = photo()

    def made(**settings: Any) -> bytes:
        return classification(erasing=0, **settings).augmented(image, 0, (0, 1)).tobytes()

    assert made(color_jitter=0.4) == made(color_jitter=0)
    assert made(rand_augment=None, color_jitter=0.4) != made(rand_augment=None, color_jitter=0)


def test_a_plain_view_is_a_mirrored_or_upright_crop_within_the_limits() -> None:
    """Red tells the column and green the row of each pixel of the image."""
    across, down = np.meshgrid(np.arange(100), np.arange(60))
    image = Image.fromarray(np.stack([2 * across, 2 * down, 0 * down], axis=-1).astype(np.uint8))
    view = classification(scale=(0.2, 0.5), ratio=(0.8, 1.25), **PLAIN)
    mirrored, shares = 0, []
    for sample in range(200):
        made = view.augmented(image, 0, (0, sample)).astype(float)
        width, height = (made[5, -6] - made[5, 5])[0] / 2 * 32 / 21, (made[-6, 5] - made[5, 5])[1] / 2 * 32 / 21
        mirrored += width < 0
        shares.append(abs(width) * height / 6000)
        assert 0.7 < abs(width) / height < 1.43
    assert 75 < mirrored < 125
    assert 0.17 < min(shares) < 0.25
    assert 0.45 < max(shares) < 0.55


def test_erasing_covers_a_part_of_some_views_with_noise_of_the_normalisation() -> None:
    blank, mean, std = np.full((64, 64, 3), 7, np.uint8), (0.5, 0.4, 0.3), (0.1, 0.1, 0.05)
    views = [erase(blank, 0.25, mean, std, 0, (0, sample)) for sample in range(400)]
    covered = [view for view in views if (view != 7).any()]
    assert 70 < len(covered) < 130
    noise = np.concatenate([view[(view != 7).any(-1)] for view in covered])
    assert np.allclose(noise.mean(0) / 255, mean, atol=0.01)
    assert np.allclose(noise.std(0) / 255, std, atol=0.01)
    shares = [(view != 7).any(-1).mean() for view in covered]
    assert 0.015 < min(shares) < 0.08
    assert 0.25 < max(shares) < 0.35
    for view in covered[:10]:
        rows, columns = np.nonzero((view != 7).any(-1))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert box == len(rows)  # a rectangle
    assert (blank == 7).all()


@pytest.mark.parametrize("size", [(100, 60), (61, 100), (33, 33)])
def test_what_is_measured_is_the_centre_of_the_resized_image(size: tuple[int, int]) -> None:
    image = photo(*size)
    resized = {(100, 60): (60, 36), (61, 100): (36, 59), (33, 33): (36, 36)}[size]
    left, top = round((resized[0] - 32) / 2), round((resized[1] - 32) / 2)
    expected = image.resize(resized, BICUBIC).crop((left, top, left + 32, top + 32))
    assert np.array_equal(classification().centred(image), np.asarray(expected))


def test_large_images_are_measured_without_a_margin() -> None:
    image = photo(500, 384)
    expected = image.crop((58, 0, 442, 384))
    assert np.array_equal(classification(384).centred(image), np.asarray(expected))
    assert AugmentationConfig().evaluated_share(376) == 224 / 256
    assert AugmentationConfig(crop_share=0.9).evaluated_share(512) == 0.9


def test_an_image_that_cannot_be_decoded_is_refused_at_its_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photo().save(tmp_path / name / "1.png")
    raw = (tmp_path / "b/1.png").read_bytes()
    (tmp_path / "b/1.png").write_bytes(raw[:-30])
    images = find_labelled(str(tmp_path), ACCESS)
    view = classification()
    assert view.training(images, 0, ACCESS, 0, 0).label == 0
    for make in (view.held_out, lambda *of: view.training(*of, 0, 0)):
        with pytest.raises(DataError, match=r"b/1\.png: .*Mend or remove it"):
            make(images, 1, ACCESS)


# ---------------------------------------------------------------------------------------------- segmentation


def test_image_and_map_are_scaled_cropped_and_mirrored_together() -> None:
    view, (pixels, labels) = segmentation(photometric=False), stripes()
    mirrored = 0
    for sample in range(40):
        made = view.augmented(pixels, labels, 0, (0, sample))
        inside = made.label != 255
        assert made.pixels.shape == (32, 32, 3)
        told = np.rint(made.pixels[..., 0] / 20)[inside]
        assert (told == made.label[inside]).mean() > 0.6  # edges between stripes are blurred
        flat = np.ones_like(made.label, bool)
        for shift in (-2, -1, 1, 2):
            for axis in (0, 1):
                flat &= np.roll(made.label, shift, axis) == made.label
        flat[[0, 1, -2, -1]] = flat[:, [0, 1, -2, -1]] = False
        flat &= inside
        assert np.array_equal(np.rint(made.pixels[..., 0] / 20)[flat], made.label[flat])
        steps = np.sign(np.diff(made.label.astype(int), axis=1))[inside[:, 1:]]
        mirrored += bool((steps == -1).sum() > (steps == 1).sum())
    assert 10 < mirrored < 30


def test_what_lies_outside_an_image_is_grey_and_of_no_class() -> None:
    view = SegmentationView(
        model(pixel_mean=(0.2, 0.4, 0.6)), SegmentationViewConfig(base_size=20, resize_ratio=(1, 1))
    )
    pixels, labels = stripes(40, 20)
    made = view.augmented(pixels, labels, 0, (0, 0))
    assert (made.label[20:] == 255).all()
    assert (made.label[:20] < 10).all()
    assert (made.pixels[20:] == (51, 102, 153)).all()


def test_the_scale_lies_within_its_limits_and_the_longer_side_is_bounded() -> None:
    view = segmentation(base_size=50, resize_ratio=(0.5, 2.0))
    assert view.scaled(stripes(80, 40)[0]).shape == (50, 100, 3)
    assert view.scaled(stripes(100, 10)[0]).shape == (20, 200, 3)
    assert view.scaled(stripes(80, 40)[0], 1.75).shape == (88, 175, 3)


def test_no_class_fills_a_crop_if_that_can_be_had() -> None:
    labels = np.zeros((60, 400), np.uint8)
    labels[:, :60] = np.arange(60)[:, None] % 5 + 1
    pixels = np.zeros((*labels.shape, 3), np.uint8)

    def filled(most: float) -> float:
        view = segmentation(base_size=60, resize_ratio=(1, 1), cat_max_ratio=most)
        shares = [
            np.bincount(view.augmented(pixels, labels, 0, (0, sample)).label.ravel()).max() for sample in range(60)
        ]
        return float(np.mean(np.array(shares) > 0.75 * 32 * 32))

    assert filled(1.0) > 0.7
    assert filled(0.75) < 0.35


def test_colours_change_and_places_do_not() -> None:
    pixels = np.asarray(photo())
    seen = set()
    for sample in range(64):
        made = photometric(pixels, words(0, Purpose.AUGMENTATION, (0, sample), PHOTOMETRIC_WORDS))
        assert made.shape == pixels.shape
        seen.add(made.tobytes())
        if np.array_equal(made, pixels):
            continue
        flat, other = pixels.reshape(-1, 3), made.reshape(-1, 3)
        _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        assert np.array_equal(other, other[first][inverse.ravel()])  # equal pixels stay equal
    assert len(seen) > 50


def test_a_map_is_measured_whole_in_its_own_size(tmp_path: Path) -> None:
    pixels, labels = stripes(33, 21)
    save(tmp_path, {"images/a.png": pixels, "labels/a.png": labels})
    images = find_label_maps(str(tmp_path), ACCESS, LabelMapsConfig())
    made = segmentation().held_out(images, 0, ACCESS)
    assert np.array_equal(made.pixels, pixels)
    assert np.array_equal(made.label, labels)
    assert segmentation().training(images, 0, ACCESS, 0, 0).label.shape == (32, 32)


def save(root: Path, pictures: Mapping[str, Pixels]) -> None:
    for name, pixels in pictures.items():
        raw = io.BytesIO()
        Image.fromarray(pixels).save(raw, "PNG")
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(raw.getvalue())


# -------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        (AugmentationConfig, {"scale": (0.5, 0.2)}),
        (AugmentationConfig, {"scale": (0, 1)}),
        (AugmentationConfig, {"ratio": (2, 1)}),
        (SegmentationViewConfig, {"resize_ratio": (0, 1)}),
        (LabelMapsConfig, {"ids": (3, 1)}),
        (LabelMapsConfig, {"ids": (-1, 1)}),
    ],
)
def test_limits_in_the_wrong_order_are_refused(section: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        section(**settings)
