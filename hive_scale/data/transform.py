"""Decode an image's bytes and resize it to a tensor at the model's size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from struct import Struct

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from hive_scale.batch import BLANK
from hive_scale.config import ImageMode
from hive_scale.data.images import FORMATS, check_scans, orientation, read_image, upright_rgb
from hive_scale.locate import check_is_file

VERSION = 2  # raised when the same bytes give other pixels, so that stored features are recomputed
MAX_ASPECT = 100
Colour = tuple[int, int, int]  # red, green, blue: 0 to 255
GREY: Colour = (BLANK, BLANK, BLANK)
STRIP = 2**25  # bytes of a strip of an image while it is padded
# JPEG markers: segments that may precede the frame header (tables, metadata), and frames libjpeg can decode
SEGMENTS, FRAMES = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}, {0xC0, 0xC1, 0xC2}
HEADER = Struct(">xBHBHHB")  # marker, length, bits, height, width, channels
APP1 = 0xE1  # marker of the segment with EXIF and XMP
# orientation tag (EXIF in either byte order, XMP), and the bytes that follow it if the image is upright
ORIENTATIONS = (
    (b"\x01\x12", b"\0\x03\0\0\0\x01\0\x01"),
    (b"\x12\x01", b"\x03\0\x01\0\0\0\x01\0"),
    (b"tiff:Orientation", b'="1"'),
)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ValueError if the image would take too much memory, decoded or resized."""
    if max(width, height) > MAX_ASPECT * min(width, height):  # else the longer side would explode
        raise ValueError(f"the image of {width} x {height} is more than {MAX_ASPECT} times as long as wide")
    if width * height > max_pixels:
        raise ValueError(f"the image of {width} x {height} has more than data.max_pixels={max_pixels}")


def to_pixels(data: bytes, image_size: int, mode: ImageMode, max_pixels: int, pad_colour: Colour = GREY) -> Tensor:
    """Decode `data` to uint8 (3, image_size, image_size), resized (bicubic, antialiased) as the HF processors do.

    `resize` stretches (SigLIP), `crop` takes the middle square (CLIP), `pad` adds `pad_colour` beside the shorter side
    (LLaVA). Transparency becomes white, and EXIF's orientation is undone. Raises ValueError if `data` is not a
    complete JPEG, PNG or WebP of at most `max_pixels`.
    """
    return fitted(decode(data, max_pixels), image_size, mode, pad_colour)


def read_pixels(path: Path, image_size: int, mode: ImageMode, max_pixels: int, pad_colour: Colour = GREY) -> Tensor:
    """`to_pixels` of a user's own image file. Raises ValueError, with the path and the remedy, if it is no image."""
    check_is_file(path)
    data = read_image(path)
    try:
        return to_pixels(data, image_size, mode, max_pixels, pad_colour)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: give a JPEG, PNG or WebP") from None


def decode(data: bytes, max_pixels: int) -> Tensor:
    """Decode to uint8 (3, H, W), upright. Raises ValueError if broken or too large; size is checked first."""
    with _told():
        check_scans(data)
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, max_pixels)
            if image.format != "JPEG" or image.mode != "RGB" or orientation(image) != 1:
                pixels: Tensor = vision.pil_to_tensor(upright_rgb(image))
                return pixels
        return _decode_jpeg(data)


def decode_indexed(data: bytes, size: tuple[int, int], max_pixels: int) -> Tensor:
    """Same as `decode`, for an image whose (width, height) the index holds. A JPEG's header is read 20 times as fast as
    by PIL.

    Raises ValueError if the image's size differs from `size`.
    """
    if _jpeg_size(data) == size:
        with _told():
            check_scans(data)
            return _decode_jpeg(data)
    pixels = decode(data, max_pixels)
    if pixels.shape[:0:-1] != size:
        width, height = size
        raise ValueError(f"the image is not of {width} x {height} as when it was indexed: delete the index")
    return pixels


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an upright JPEG of three channels (T.81, B.2); None if PIL must examine the file."""
    at = 2
    while data.startswith(b"\xff", at) and at + 10 <= len(data):
        marker, length, _, height, width, channels = HEADER.unpack_from(data, at)
        if marker in FRAMES:
            return (width, height) if channels == 3 else None
        if marker not in SEGMENTS or (marker == APP1 and _may_be_turned(data, at, at + 2 + length)):
            break
        at += 2 + length
    return None


def _may_be_turned(data: bytes, start: int, end: int) -> bool:
    """True if segment [start, end) of `data` contains what looks like an orientation other than upright."""
    return any(data.count(tag, start, end) != data.count(tag + one, start, end) for tag, one in ORIENTATIONS)


def _decode_jpeg(data: bytes) -> Tensor:
    """Decode to the same pixels as PIL, a quarter faster."""
    pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return pixels


@contextmanager
def _told() -> Iterator[None]:
    """Convert any exception of PIL's decoders on broken input to a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except UnidentifiedImageError:  # whose message has an address in memory
        raise ValueError("the image cannot be decoded: it is no JPEG, PNG or WebP") from None
    except Exception as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2] if str(error) else type(error).__name__
        raise ValueError(f"the image cannot be decoded: {reason}") from None


def fit_into(out: Tensor, pixels: Tensor, mode: ImageMode, pad_colour: Colour = GREY) -> Tensor:
    """Fill `out`, uint8 (3, image_size, image_size), with `pixels` resized as by `fitted`; returns `out`."""
    if mode != "resize" or pixels.shape == out.shape:
        return out.copy_(fitted(pixels, out.shape[-1], mode, pad_colour))
    # the kernel behind torchvision's resize, writing into the batch without a copy
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels[None], out.shape[1:], False, None, None, out=out[None])
    return out


def fitted(pixels: Tensor, image_size: int, mode: ImageMode, pad_colour: Colour = GREY) -> Tensor:
    """Resize uint8 (3, H, W) to (3, image_size, image_size), as `to_pixels` describes."""
    if mode == "resize":
        return _resize(pixels, [image_size, image_size])
    if mode == "crop":
        pixels = _resize(pixels, [image_size])  # the shorter side
        # round down as HF does; torchvision rounds half to even
        top, left = ((side - image_size) // 2 for side in pixels.shape[-2:])
        return pixels[:, top : top + image_size, left : left + image_size]
    return _padded(pixels, image_size, pad_colour)


def augmented(pixels: Tensor, image_size: int, *key: int) -> Tensor:
    """Training augmentation of the probes (paper, Table 4): uint8 (3, H, W) to (3, image_size, image_size).

    Crops a random 0.4 to 1 of the area with aspect ratio 3:4 to 4:3, and resizes it (bicubic); mirrors with
    probability 0.5; changes brightness, contrast and saturation by up to 0.2, in random order. A pure function of
    `key`, such as (seed, epoch, sample): the same in every process, thread and library version.
    """
    draws = _draws(*key)
    height, width = pixels.shape[-2:]
    pixels = vision.crop(pixels, *_random_part(height, width, draws))
    pixels = _resize(pixels, [image_size, image_size])
    if next(draws) < 0.5:
        pixels = vision.horizontal_flip(pixels)
    changes = [vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation]
    turns = [(next(draws), change, 0.8 + 0.4 * next(draws)) for change in changes]
    for _, change, factor in sorted(turns, key=lambda turn: turn[0]):
        pixels = change(pixels, factor)
    return pixels


def _draws(*key: int) -> Iterator[float]:
    """Uniform numbers in [0, 1), from a generator's raw bits, which numpy guarantees not to change."""
    bits: list[int] = np.random.Philox(np.random.SeedSequence(key)).random_raw(32).tolist()
    return (number / 2**64 for number in bits)


def _random_part(height: int, width: int, draws: Iterator[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop: the first of ten tries that fits, else the largest centred one."""
    for _ in range(10):
        area = height * width * (0.4 + 0.6 * next(draws))
        shape = (4 / 3) ** (2 * next(draws) - 1)
        high, wide = round((area / shape) ** 0.5), round((area * shape) ** 0.5)
        if 0 < high <= height and 0 < wide <= width:
            return int(next(draws) * (height - high + 1)), int(next(draws) * (width - wide + 1)), high, wide
    high, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - high) // 2, (width - wide) // 2, high, wide


def blank(image_size: int) -> Tensor:
    """Return a blank image: uint8 (3, image_size, image_size), all grey."""
    return torch.full((3, image_size, image_size), BLANK, dtype=torch.uint8)


def _resize(pixels: Tensor, size: list[int]) -> Tensor:
    resized: Tensor = vision.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)
    return resized


def _padded(pixels: Tensor, image_size: int, colour: Colour) -> Tensor:
    """Pad to a square, then resize, bit for bit as `LlavaImageProcessor`, but in strips.

    The square of a long, narrow image would be up to a hundred times its size. Resizing is separable, along rows first
    and then along columns, so strips of rows are independent.
    """
    height, width = pixels.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    strips = torch.split(pixels, max(1, STRIP // (3 * side)), dim=1)
    square_rows = (vision.pad(strip, [left, 0, side - width - left, 0], fill=list(colour)) for strip in strips)
    narrow = torch.cat([_resize(rows, [rows.shape[1], image_size]) for rows in square_rows], dim=1)
    square = vision.pad(narrow, [0, top, 0, side - height - top], fill=list(colour))
    return _resize(square, [image_size, image_size])
