"""Open images with PIL as upright 8-bit RGB, the same for training, evaluation and probes. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from hive_scale.strangers import MB, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP")  # accepted formats; decoders of rarer ones are less tested
LARGEST_FILE = 256 * MB  # bytes of an encoded image; any image within the default data.max_pixels is smaller
MOST_SCANS = 500  # scans of a progressive JPEG, which usually has ten; each costs a full image's decoding time
SCAN = b"\xff\xda"
# the transpose that undoes each EXIF orientation; 1 is upright, other values are undefined
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


def read_image(path: Path) -> bytes:
    """Return the bytes of the image file `path`. Raises ValueError if it is too large, not a file, or unreadable."""
    try:
        return read_bytes(path, LARGEST_FILE)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def check_length(data: bytes) -> None:
    """Raise ValueError if an encoded image is larger than `LARGEST_FILE`."""
    if len(data) > LARGEST_FILE:
        raise ValueError(f"an image of {len(data):,} bytes, more than {LARGEST_FILE:,}")


def check_scans(data: bytes) -> None:
    """Raise ValueError if a JPEG has too many scans: a megabyte of empty ones would take hours to decode."""
    if data.startswith(b"\xff\xd8") and (scans := data.count(SCAN)) > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, more than {MOST_SCANS}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB, rotated as its EXIF says; transparency becomes white.

    16-bit grey (modes I and I;16) keeps its high byte, as Pillow does with 16-bit colours. PIL's decoders may raise
    any exception on a broken image.
    """
    turn = orientation(image)  # read before decoding, which may drop it
    rgb = _rgb(image)
    return rgb.transpose(TURNS[turn]) if turn in TURNS else rgb


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) in pixels of the image that `upright_rgb` makes; reads only the header."""
    width, height = image.size
    return (height, width) if orientation(image) in SIDEWAYS else (width, height)


def orientation(image: Image.Image) -> int:
    """Return the EXIF or XMP orientation stored before the pixels: 2 to 8, or 1 if the image is upright."""
    try:
        # the base class's method: PNG's own would decode the whole image to look for EXIF behind the pixels
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # PIL raises any exception on broken EXIF; the pixels may still be sound
        return 1
    return found if found in TURNS else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _high_byte(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8-bit. PIL's own conversion saturates: all but the darkest 1/256 would become white."""
    values = np.asarray(image)
    grey = (values.clip(0, 0xFFFF) >> 8).astype(np.uint8)
    if "transparency" in image.info:  # the grey value that marks transparent pixels
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
