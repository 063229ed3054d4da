"""Images to training views: decoding whatever Pillow reads, BEiT's augmentation keyed by image and view, patches.

The recipe is that of the released code (unilm ``datasets.py``, ``DataAugmentationForBEiT``): colour jitter on
the whole image, mirroring, and one random crop that is resized twice, bicubic for the backbone and Lanczos for
the tokenizer. Order and ranges are torchvision's; the draws are ours, keyed by (seed, sample id, view).
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageStat, UnidentifiedImageError

from beit_dist.draws import Purpose, Words, below, uniforms, words
from beit_dist.images.damage import check_whole
from beit_dist.images.file_kinds import HEAD, by_content, format_of
from beit_dist.images.heif import heif_version
from beit_dist.images.jpeg_decoders import Decoder, can_shrink, load
from beit_dist.images.left_out import Kind
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.images.to_rgb import Samples, samples, to_rgb

Augment = Literal["random", "center"]
JitterName = Literal["brightness", "contrast", "saturation"]
Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485
"""Pillow's own limit for a warning (a quarter gigabyte of RGB); larger files are likelier bombs than pictures."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "DIB")
"""Formats that are read, whatever a file is called. Pillow knows more, and runs Ghostscript for EPS."""
MIN_SIDE = 8
"""Shortest side in pixels: below the 8 pixels of one visual token there is nothing to predict."""

JITTER = 0.4
"""Brightness, contrast and saturation factors lie in [1 - 0.4, 1 + 0.4] (unilm ``--color_jitter 0.4``)."""
_JITTERS: tuple[JitterName, ...] = ("brightness", "contrast", "saturation")
CROP_AREA = (0.08, 1.0)
"""Share of the image's area (torchvision ``RandomResizedCrop``'s default, as unilm uses it)."""
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
CROP_WORDS = 4 * CROP_ATTEMPTS

_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
"""TIFF 6.0, section 15."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the operation that undoes it (EXIF 2.32, tag 274)."""
_ON_THEIR_SIDE = {operation for orientation, operation in _UPRIGHT.items() if orientation >= 5}
"""Operations that swap width and height."""


class View(NamedTuple):
    """One augmented version of an image."""

    image: Pixels
    """For the backbone: uint8 (image_size, image_size, 3)."""
    token_image: Pixels
    """The same crop for the tokenizer: uint8 (token_size, token_size, 3)."""
    box: Box
    """(left, top, right, bottom) in pixels of the upright source image."""
    flip: bool
    """Whether the crop was then mirrored left to right."""


class Picture(NamedTuple):
    """A decoded image, which may be smaller than its file says."""

    loaded: Image.Image | Pixels
    """Upright RGB, in whichever form the decoder made it."""
    width: int
    """Of the upright image in the file."""
    height: int
    scale: int
    """By how much ``loaded`` is smaller."""

    @property
    def image(self) -> Image.Image:
        """As an image."""
        return self.loaded if isinstance(self.loaded, Image.Image) else Image.fromarray(self.loaded)

    @property
    def pixels(self) -> Pixels:
        """As an array (height, width, 3)."""
        return np.asarray(self.loaded)


def decode(raw: bytes, decoder: Decoder = "pillow") -> Image.Image:
    """The image in ``raw``, upright and in RGB; of an animation the first frame.

    Transparent pixels show white, 12-bit and 16-bit grey is scaled to 8 bit, palettes and CMYK are converted.

    Args:
        decoder: of JPEGs.

    Raises:
        ImageRejectedError: not an image, damaged, cut short, too large or too small, or of unknown white.
        MemoryError: this machine cannot hold the image.
    """
    return decode_picture(raw, None, decoder).image


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened or made, upright and in RGB, as :func:`decode` gives that of its file.

    Raises:
        ImageRejectedError, MemoryError: as :func:`decode`.
    """
    try:
        _check_size(*image.size)
        said = samples(image, b"") if image.format == "TIFF" else Samples(16 if image.mode.startswith("I") else 8)
        image.load()
        turn, upright = _turn(image), to_rgb(image, b"", said)
        return upright if turn is None else upright.transpose(turn)
    except (ImageRejectedError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers let errors of any type through for damaged files
        raise ImageRejectedError(f"{type(error).__name__}: {str(error)[:200]}", "damaged") from None


def decode_picture(raw: bytes, scale_of: Callable[[int, int], int] | None, decoder: Decoder = "pillow") -> Picture:
    """The same, and a JPEG smaller where that is enough.

    Args:
        scale_of: asked, with width and height of the upright image, by how much it may be shrunk: 1, or one of
            :data:`beit_dist.images.jpeg_decoders.SCALES`. None never shrinks.

    Raises:
        ImageRejectedError, MemoryError: as :func:`decode`.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=_formats()) as image:
            _check_size(*image.size)
            _check_tiles(image)
            said = samples(image, raw)
            scale = 1
            if scale_of is not None and can_shrink(image):
                scale = scale_of(*_upright_size(image, image.size))
            size = image.size
            pixels = load(image, raw, scale, decoder)
            check_whole(image, raw, pixels, scale)
            loaded = to_rgb(image, raw, said) if pixels is None else pixels
            picture = Picture(loaded, *_upright_size(image, size), scale)
            turn = _turn(image)
            return picture if turn is None else picture._replace(loaded=picture.image.transpose(turn))
    except ImageRejectedError:
        raise
    except UnidentifiedImageError:  # its message holds a memory address
        raise ImageRejectedError(_unread(raw), "not_an_image") from None
    except Image.DecompressionBombError:
        raise ImageRejectedError(f"more than {MAX_PIXELS:,} pixels", "too_large") from None
    except MemoryError:
        raise  # of this machine, not of the image: elsewhere it would not be rejected
    except Exception as error:  # Pillow's readers let errors of any type through for damaged files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ImageRejectedError(reason, "damaged") from None


def _unread(raw: bytes) -> str:
    """Why Pillow reads no such file: it knows only some kinds of each format, and does not say which."""
    none, head = "not an image that Pillow reads", bytes(raw[:HEAD])
    kind = by_content(head)
    if isinstance(kind, Kind):
        return ": ".join(part for part in (none, kind.one, kind.way_out) if part)
    name = format_of(head)
    if name is None:
        return none
    if name not in _formats():
        return f"{none}: it is {name}, which this build of Pillow lacks; pip install --upgrade pillow"
    return f"{none}: {name} with a damaged header or an unusual number of bits; convert it to 8 bits"


@functools.cache
def _formats() -> list[str]:
    """What of :data:`FORMATS` this Pillow reads, and HEIC where pillow-heif is installed."""
    Image.init()
    heif = ["HEIF"] if heif_version() else []
    return [name for name in FORMATS if name in Image.OPEN] + heif


def make_view(
    image: Image.Image,
    *,
    image_size: int,
    token_size: int,
    augment: Augment,
    seed: int,
    sample_id: int,
    view: int,
    crop_area: float = CROP_AREA[0],
) -> View:
    """One view of an image, a pure function of the arguments.

    Args:
        image: upright RGB, from :func:`decode`.
        image_size: side of the backbone's view in pixels.
        token_size: side of the tokenizer's view in pixels: 8 for each visual token.
        augment: ``random`` is BEiT's recipe; ``center`` the largest centred square, nothing else.
        crop_area: smallest share of the image's area that a random crop takes.
    """
    key = (sample_id, view)
    if augment == "center":
        box, flip = centred_square(image.width, image.height), False
        crop = image.crop(box)
    else:
        box, flip = crop_box(image.width, image.height, seed, key, crop_area), flips(seed, key)
        crop = _jittered_crop(image, box, seed, key)
    return View(
        image=_resize(crop, image_size, Image.Resampling.BICUBIC, flip),
        token_image=_resize(crop, token_size, Image.Resampling.LANCZOS, flip),
        box=box,
        flip=flip,
    )


def crop_box(width: int, height: int, seed: int, key: tuple[int, int], smallest: float = CROP_AREA[0]) -> Box:
    """A random crop: area and aspect ratio as torchvision's RandomResizedCrop draws them.

    Ten attempts at an area uniform in ``smallest`` to 100 % and a ratio log-uniform in 3/4 to 4/3 at a uniform
    place; if none fits into the image, the largest centred box whose ratio is in that range.
    """
    return box_of(width, height, words(seed, Purpose.CROP, key, CROP_WORDS), (smallest, CROP_AREA[1]), CROP_RATIO)


def box_of(
    width: int, height: int, drawn: Words, share: tuple[float, float], ratio_range: tuple[float, float]
) -> Box:
    """The same from ``CROP_WORDS`` words, for other areas and ratios."""
    raw = drawn.reshape(CROP_ATTEMPTS, 4)
    log_low, log_high = math.log(ratio_range[0]), math.log(ratio_range[1])
    for attempt, (u_area, u_ratio, _, _) in enumerate(uniforms(raw)):
        area = width * height * (share[0] + (share[1] - share[0]) * float(u_area))
        ratio = math.exp(log_low + (log_high - log_low) * float(u_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = below(int(raw[attempt, 2]), width - w + 1)
            top = below(int(raw[attempt, 3]), height - h + 1)
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ratio_range[1])))
    h = max(1, min(height, round(width / ratio_range[0])))
    return _centred(width, height, w, h)


def patchify(image: Pixels, patch_size: int) -> Pixels:
    """uint8 (H, W, 3) to (patches, 3 · patch_size²): row-major patches, (y, x, channel) inside a patch."""
    height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = image.reshape(rows, patch_size, columns, patch_size, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Pixels, patch_size: int) -> Pixels:
    """The inverse of :func:`patchify` for a square image: (patches, 3 · patch_size²) to uint8 (S, S, 3)."""
    grid = math.isqrt(len(patches))
    tiles = patches.reshape(grid, grid, patch_size, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(grid * patch_size, grid * patch_size, 3)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageRejectedError(f"{width}×{height} px: more than {MAX_PIXELS:,} pixels", "too_large")
    if min(width, height) < MIN_SIDE:
        raise ImageRejectedError(f"{width}×{height} px: a side shorter than {MIN_SIDE} px", "too_small")


def _check_tiles(image: Image.Image) -> None:
    """A TIFF may claim to be small and yet consist of one gigantic tile, which is unpacked whole."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    if width * height > MAX_PIXELS:
        raise ImageRejectedError(f"tiles of {width}×{height} px: more than {MAX_PIXELS:,} pixels", "too_large")


def _upright_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    return size[::-1] if _turn(image) in _ON_THEIR_SIDE else size


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF is no reason to lose the picture
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


class Jitter(NamedTuple):
    """What was drawn for the colours of a view."""

    brightness: float
    contrast: float
    saturation: float
    order: tuple[JitterName, ...]
    """Of the three: torchvision shuffles them."""

    def factor(self, name: JitterName) -> float:
        """Of one of the three."""
        return {"brightness": self.brightness, "contrast": self.contrast, "saturation": self.saturation}[name]


def jitter_of(seed: int, key: tuple[int, int]) -> Jitter:
    """The colour jitter of a view."""
    raw = words(seed, Purpose.JITTER, key, 6)
    brightness, contrast, saturation = (1 - JITTER + 2 * JITTER * float(u) for u in uniforms(raw[:3]))
    order = tuple(_JITTERS[number] for number in np.argsort(raw[3:], kind="stable"))
    return Jitter(brightness, contrast, saturation, order)


def _jittered_crop(image: Image.Image, box: Box, seed: int, key: tuple[int, int]) -> Image.Image:
    """Colour jitter as if on the whole image, then the crop.

    Only contrast looks at the whole image (its mean grey), the others at single pixels. So cropping right after
    that mean is taken gives the same bytes as cropping last, and saves most of the work.
    """
    jitter = jitter_of(seed, key)
    for name in jitter.order:
        if name == "brightness":
            image = ImageEnhance.Brightness(image).enhance(jitter.brightness)
        elif name == "saturation":
            image = ImageEnhance.Color(image).enhance(jitter.saturation)
        else:
            grey = int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
            crop = image.crop(box)
            image = Image.blend(Image.new("RGB", crop.size, (grey, grey, grey)), crop, jitter.contrast)
    return image


def flips(seed: int, key: tuple[int, int]) -> bool:
    """Whether a view is mirrored."""
    return bool(uniforms(words(seed, Purpose.FLIP, key, 1))[0] < 0.5)


def _resize(crop: Image.Image, side: int, filter_: Image.Resampling, flip: bool) -> Pixels:
    pixels = np.asarray(crop.resize((side, side), filter_))
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def centred_square(width: int, height: int) -> Box:
    """The largest one."""
    side = min(width, height)
    return _centred(width, height, side, side)


def _centred(width: int, height: int, w: int, h: int) -> Box:
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
