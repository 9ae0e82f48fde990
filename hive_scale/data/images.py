"""What PIL opens, made 8-bit RGB and upright: the same for training, evaluation and probes. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from hive_scale.strangers import MB, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP")  # what is opened; rarer formats have rarer, less tested decoders
LARGEST_FILE = 256 * MB  # of an encoded image: more than any of `data.max_pixels` by default has
MOST_SCANS = 500  # of a progressive JPEG, which has ten: each costs as much time as a whole image
SCAN = b"\xff\xda"
# what undoes each EXIF orientation; 1 is upright, any other number means nothing
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
    """The bytes of the image file `path`. Raises ValueError if it is too large, no file, or cannot be read."""
    try:
        return read_bytes(path, LARGEST_FILE)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def check_length(data: bytes) -> None:
    """Raises ValueError for an encoded image that is too large to be one."""
    if len(data) > LARGEST_FILE:
        raise ValueError(f"an image of {len(data):,} bytes, more than {LARGEST_FILE:,}")


def check_scans(data: bytes) -> None:
    """Raises ValueError for a JPEG of many scans: a megabyte of empty ones would take hours."""
    if data.startswith(b"\xff\xd8") and (scans := data.count(SCAN)) > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, more than {MOST_SCANS}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any PIL mode, turned as the image's EXIF says; transparency becomes white.

    Of 16-bit grey (modes I and I;16) the high byte is kept, as Pillow itself does with 16-bit colours. Raises what
    PIL's decoders raise for what is broken.
    """
    turn = orientation(image)  # before decoding, which may forget it
    rgb = _rgb(image)
    return rgb.transpose(TURNS[turn]) if turn in TURNS else rgb


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of what `upright_rgb` makes; reads the header alone."""
    width, height = image.size
    return (height, width) if orientation(image) in SIDEWAYS else (width, height)


def orientation(image: Image.Image) -> int:
    """The orientation that EXIF, or XMP, gives before the pixels: 2 to 8, or 1 for an image that is upright."""
    try:
        # the base class's: that of PNG would decode the whole image first, to look for EXIF behind the pixels
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # PIL raises what it likes on EXIF that is broken; the pixels may be sound
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
    """8-bit grey of 16-bit grey; PIL's own conversion would make white of all but the darkest 1/256."""
    values = np.asarray(image)
    grey = (values.clip(0, 0xFFFF) >> 8).astype(np.uint8)
    if "transparency" in image.info:  # the value that stands for a transparent pixel
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
