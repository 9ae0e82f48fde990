"""Convert any image to a square JPEG on white; its size is checked before it is decoded."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from hive_scale.data.images import FORMATS, upright_rgb


@dataclass(frozen=True)
class Jpeg:
    """Format of stored images.

    The bytes depend on the JPEG library. Pillow 10.4, 11.3, 12.0 and 13.0 (libjpeg-turbo 3.0 to 3.2) write identical
    files. The defaults are the recipe of the shipped sample.
    """

    size: int = 64  # pixels per side
    quality: int = 65
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        if not (1 <= self.size <= 4096 and 1 <= self.quality <= 95):
            raise ValueError(
                f"size={self.size}, quality={self.quality}: use a size of 1 to 4096 and a quality of 1 to 95"
            )


def to_jpeg(data: bytes, recipe: Jpeg) -> bytes:
    """Fit `data` (PNG, JPEG or WebP) uncropped into a white square of ``recipe.size`` and encode it as JPEG.

    Raises ValueError if it is not such an image and, before decoding, if it has more than ``recipe.max_pixels``.
    """
    image = on_white(data, recipe.max_pixels)
    if image.size != (recipe.size, recipe.size):
        image = _fit(image, recipe.size)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=recipe.quality, optimize=True, subsampling="4:2:0")
    return out.getvalue()


def on_white(data: bytes, max_pixels: int) -> Image.Image:
    """Return the image in `data` as upright RGB, transparent parts white. Raises ValueError as `to_jpeg` does."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:  # reads the header only
            width, height = opened.size
            if width * height > max_pixels:
                raise ValueError(f"{width}x{height} pixels are more than the {max_pixels} allowed")
            return upright_rgb(opened)
    except Image.DecompressionBombError:  # Pillow's own limit, also checked at the header
        raise ValueError(f"more pixels than the {max_pixels} allowed") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"not a readable {', '.join(FORMATS)} image ({error})") from None


def _fit(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square
