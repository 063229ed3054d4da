"""What a file is: by its name where that is a usual one, else by its first bytes."""

from __future__ import annotations

import os
import re
from typing import Literal

from beit_dist.images.heif import heif_version
from beit_dist.images.left_out import Kind

IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif",
    ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf",
    ".jpx", ".avif", ".avifs",
))  # fmt: skip
"""Usual names of the formats that are decoded; upper case too."""
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif", ".heics", ".heifs"))

HEAD = 64
"""First bytes of a file that tell what it is."""
POINTER_BYTES = 1024
"""Pointers of Git LFS and git-annex, which lie where the images should, are smaller (git-lfs's specification)."""

Named = Literal["image", "unknown"]
Verdict = Named | Kind
"""What a name tells: an image, nothing, or why the file is left out."""

_PIP = "pip install pillow-heif"
_CONVERT = "convert them to JPEG or PNG"
_NAME = "name each as a source of its own: 'a-{000..009}.tar' 'b/*.zip'"
_WRITE_OUT = "write their images into files or tars"
_GROUPS = {
    _CONVERT: (
        # Camera raw too: their first bytes are a TIFF's, in which there is a thumbnail.
        ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 "
        ".rwl .sr2 .srf .srw .x3f .jxl .jxr .wdp .hdp .psd .psb .xcf .svg .svgz .eps .ai .ico .tga .exr .hdr .dds "
        ".pcx .dcm"
    ),
    _NAME: ".tar .zip .parquet",
    "unpack them": ".7z .rar .gz .tgz .bz2 .tbz2 .xz .txz .zst .lz4",
    _WRITE_OUT: ".arrow .feather .tfrecord .tfrecords .lmdb .mdb",
    "finish their downloads": ".part .partial .crdownload .download .filepart",
    "": (
        ".txt .json .jsonl .ndjson .geojson .xml .csv .tsv .yaml .yml .toml .ini .cfg .md .rst .html .htm .css "
        ".js .log .pdf .doc .docx .xls .xlsx .py .ipynb .sh .c .h .cpp .npy .npz .mat .pkl .pickle .pt .pth .ckpt "
        ".onnx .safetensors .h5 .hdf5 .db .sqlite .cls .lst .idx .index .xmp .aae .thm .lrv .mp4 .mov .m4v .avi "
        ".mkv .webm .mpg .mpeg .wmv .3gp .mts .wav .mp3 .m4a .flac .srt .vtt .md5 .sha1 .sha256 .url .lnk .exe "
        ".dll"
    ),
}
_OTHERS = {suffix: Kind(suffix, suffix, way_out) for way_out, group in _GROUPS.items() for suffix in group.split()}
"""Usual names of what is no image, or none that is read; taken at their word: there can be one for each image."""

_UNUSUAL = Kind("file without a usual suffix", "files without a usual suffix")
_HIDDEN_FILE = Kind("hidden file", "hidden files")
_HIDDEN_FOLDER = Kind("hidden folder", "hidden folders")
_LFS = Kind("Git LFS pointer", "Git LFS pointers", "fetch the files themselves: git lfs pull")
_ANNEX = Kind("git-annex pointer", "git-annex pointers", "fetch the files themselves: git annex get")
_SYSTEM_FOLDERS = {
    name.lower(): Kind(f"{name} folder", f"{name} folders")
    for name in (
        *("@eaDir", "#recycle", "#snapshot", "@tmp"),  # Synology
        *("@Recycle", "@Recently-Snapshot", "@__thumb"),  # QNAP
        *("~snapshot", "lost+found"),  # NetApp; what fsck finds, which only root may list
        *("$RECYCLE.BIN", "RECYCLER", "System Volume Information"),  # Windows
        *("__MACOSX", "Network Trash Folder", "Temporary Items"),  # macOS
    )
}
"""What file servers and systems keep in any folder: thumbnails, deleted files, copies; by lower-case name."""

_IMAGE_HEADS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),  # JPEG 2000
)
_PPM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_AVIF, _HEIF = {b"avif", b"avis"}, {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_CONTENTS = (
    (b"version https://git-lfs.github.com/spec/", _LFS),
    (b"version https://hawser.github.com/spec/", _LFS),
    (b"/annex/objects/", _ANNEX),
    (b"\xff\x0a", _OTHERS[".jxl"]),
    (b"\0\0\0\x0cJXL \r\n\x87\n", _OTHERS[".jxl"]),
    (b"8BPS", _OTHERS[".psd"]),
    (b"PK\x03\x04", _OTHERS[".zip"]),
    (b"7z\xbc\xaf\x27\x1c", _OTHERS[".7z"]),
    (b"Rar!\x1a\x07", _OTHERS[".rar"]),
    (b"\x1f\x8b", _OTHERS[".gz"]),
    (b"PAR1", _OTHERS[".parquet"]),
    (b"ARROW1", _OTHERS[".arrow"]),
    (b"%PDF-", _OTHERS[".pdf"]),
)


def by_name(name: str) -> Verdict:
    """What a file's name tells of it; a download's may end with a query (``x.jpg?w=800``)."""
    whole = name.rpartition("/")[2].lower()
    suffix = os.path.splitext(whole)[1]
    if "?" in whole and not _is_image(suffix):
        suffix = os.path.splitext(whole.partition("?")[0])[1]
    if _is_image(suffix):
        return "image"
    if suffix in HEIF_SUFFIXES:
        return Kind(suffix, suffix, _PIP)
    return _OTHERS.get(suffix, "unknown")


def by_content(head: bytes) -> Verdict:
    """What a file's first :data:`HEAD` bytes tell of it."""
    if _is_heif(head):
        return "image" if heif_version() else Kind(".heic", ".heic", _PIP)
    if _is_image_head(head):
        return "image"
    return next((kind for magic, kind in _CONTENTS if head.startswith(magic)), "unknown")


def format_of(head: bytes) -> str | None:
    """Pillow's name for the format of an image that begins with ``head``, where it is one that may go unread."""
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG2000"
    return None if _AVIF.isdisjoint(_brands(head)) else "AVIF"


def unknown(name: str, way_out: str = "") -> Kind:
    """The kind of a file of which neither its name nor its content tells what it is."""
    suffix = os.path.splitext(name.rpartition("/")[2].lower().partition("?")[0])[1]
    if re.fullmatch(r"\.[a-z][a-z0-9_]{0,9}", suffix):
        return Kind(suffix, suffix, way_out)
    return _UNUSUAL._replace(way_out=way_out)


def is_pointer(kind: Verdict) -> bool:
    """Whether it stands for an image that lies elsewhere."""
    return kind in (_LFS, _ANNEX)


def folder_kind(name: str) -> Kind | None:
    """Why a folder of that name is not searched: hidden, or of the system; None: it is."""
    if name.startswith(".") and name not in (".", ".."):
        return _HIDDEN_FOLDER
    return _SYSTEM_FOLDERS.get(name.lower())


def file_kind(name: str) -> Kind | None:
    """Why a file of that name, without folders, is not looked at: hidden; None: it is."""
    return _HIDDEN_FILE if name.startswith(".") else None


def _is_image(suffix: str) -> bool:
    return suffix in IMAGE_SUFFIXES or (suffix in HEIF_SUFFIXES and heif_version() is not None)


def _is_image_head(head: bytes) -> bool:
    if head.startswith(b"BM"):
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return (
        head.startswith(_IMAGE_HEADS)
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or not _AVIF.isdisjoint(_brands(head))
        or _PPM.match(head) is not None
    )


def _is_heif(head: bytes) -> bool:
    brands = _brands(head)
    return _AVIF.isdisjoint(brands) and not _HEIF.isdisjoint(brands)


def _brands(head: bytes) -> set[bytes]:
    """The brands of an ISO media file (ISO/IEC 14496-12, 4.3); none of any other file."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(len(head), int.from_bytes(head[:4], "big"))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
