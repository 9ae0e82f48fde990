"""Why: an image that is shown white, sideways or on another background trains with a caption of something not visible.

References are independent: formulas of the colour spaces, Pillow's and transformers' own handling.
"""

from __future__ import annotations

import colorsys
import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageOps
from tars import image_bytes, write_tar
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from hive_scale.config import ModelConfig, PartConfig
from hive_scale.data import transform
from hive_scale.data.images import upright_rgb
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.tar_scan import scan_shard
from hive_scale.data.transform import GREY, Colour, _jpeg_size, decode, decode_indexed, to_pixels
from hive_scale.export.huggingface import image_processor
from hive_scale.model import build
from hive_scale.preflight import open_data
from hive_scale.presets import load

MANY = 10**8
ORIENTATION = 0x112


def one(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (2, 2), value)


def palette(mode: str, colour: Colour) -> Image.Image:
    image = one(mode, (3, 255) if mode == "PA" else 3)
    image.putpalette(bytes([0, 0, 0] * 3) + bytes(colour))
    return image


def of_cmyk(cyan: int, magenta: int, yellow: int, black: int) -> Colour:
    red, green, blue = ((255 - ink) * (255 - black) // 255 for ink in (cyan, magenta, yellow))
    return red, green, blue


def of_hsv(hue: int, saturation: int, value: int) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue / 255, saturation / 255, value / 255))
    return red, green, blue


def of_jfif(luma: int, blue_difference: int, red_difference: int) -> Colour:
    cb, cr = blue_difference - 128, red_difference - 128
    red, green, blue = (round(luma + part) for part in (1.402 * cr, -0.344136 * cb - 0.714136 * cr, 1.772 * cb))
    return red, green, blue


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (one("1", 1), (255, 255, 255)),
        (one("L", 77), (77, 77, 77)),
        (one("LA", (50, 255)), (50, 50, 50)),
        (one("LA", (50, 51)), (214, 214, 214)),  # a fifth of it, on white
        (palette("P", (9, 90, 200)), (9, 90, 200)),
        (palette("PA", (9, 90, 200)), (9, 90, 200)),
        (one("RGB", (1, 2, 3)), (1, 2, 3)),
        (one("RGBA", (100, 0, 0, 0)), (255, 255, 255)),
        (one("RGBA", (100, 0, 0, 51)), (224, 204, 204)),
        (one("CMYK", (40, 90, 200, 30)), of_cmyk(40, 90, 200, 30)),
        (one("YCbCr", (120, 90, 160)), of_jfif(120, 90, 160)),
        (one("LAB", (113, 192, 158)), (200, 30, 60)),  # by a colour management system
        (one("HSV", (30, 100, 200)), of_hsv(30, 100, 200)),
        (one("I", 0x8021), (0x80, 0x80, 0x80)),
        (one("I", 70_000), (255, 255, 255)),
        (one("I;16", 0x8021), (0x80, 0x80, 0x80)),
        (one("I;16B", 0x8021), (0x80, 0x80, 0x80)),
        (one("I;16L", 0x8021), (0x80, 0x80, 0x80)),
        (one("F", 12.6), (12, 12, 12)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_of_pil_becomes_the_colour_it_stands_for(image: Image.Image, colour: Colour) -> None:
    rgb = upright_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (2, 2))
    assert np.abs(np.asarray(rgb, int) - colour).max() <= 2


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    ramp = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (4, 1))
    data = saved(Image.fromarray(ramp), "PNG")
    pixels = decode(data, MANY)
    assert torch.equal(pixels[0], torch.arange(256).expand(4, 256).byte())
    assert torch.equal(pixels, decode_indexed(data, (256, 4), MANY))
    image = Image.open(BytesIO(saved(Image.fromarray(ramp), "PNG")))
    image.info["transparency"] = 257 * 9
    assert np.asarray(upright_rgb(image))[0, 8:11].tolist() == [[8] * 3, [255] * 3, [10] * 3]


def saved(image: Image.Image, format: str, orientation: int = 0, **options: Any) -> bytes:
    buffer = BytesIO()
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_turned_image_is_upright_in_the_index_and_in_pixels(
    tmp_path: Path, orientation: int, format: str, mode: str
) -> None:
    drawn = Image.open(BytesIO(image_bytes(24, 16, seed=orientation))).convert(mode)
    data = saved(drawn, format, orientation)
    with Image.open(BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode(data, MANY)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    name = {"JPEG": "jpg"}.get(format, format.lower())
    table = scan_shard(write_tar(tmp_path / "a.tar", [("k", {name: data, "txt": b"t"})]), ShardCache(10**9))
    width, height = table.image_sizes[0].tolist()
    assert (width, height) == expected.shape[1::-1]
    assert torch.equal(decode_indexed(data, (width, height), MANY), pixels)


def segment(content: bytes) -> bytes:
    """A JPEG of 24 x 16 with an APP1 segment of `content`."""
    data = image_bytes(24, 16)
    return data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def exif(order: str, kind: int, value: bytes) -> bytes:
    """EXIF of one entry, an orientation, in byte order `order`."""
    head = {"little": b"II*\0\x08\0\0\0", "big": b"MM\0*\0\0\0\x08"}[order]
    entry = struct.pack(("<" if order == "little" else ">") + "HHHI", 1, ORIENTATION, kind, 1)
    return b"Exif\0\0" + head + entry + value.ljust(4, b"\0") + bytes(4)


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation%s/></x:xmpmeta>"


@pytest.mark.parametrize(
    ("content", "turned"),
    [
        (exif("little", 3, b"\x06\0"), True),
        (exif("big", 3, b"\0\x06"), True),
        (exif("little", 4, b"\x06\0\0\0"), True),  # a long where EXIF wants a short
        (exif("big", 3, b"\0\x01"), False),
        (exif("little", 3, b"\x01\0"), False),
        (exif("big", 3, b"\0\x09"), False),
        (XMP % b'="6"', True),
        (XMP % b'="1"', False),
        (b"Exif\0\0" + bytes(70), False),
        (b"Exif\0\0MM\0*\xff\xff\xff\xff", False),
        (b"Exif\0\0" + b"\x01\x12" * 9, False),
    ],
)
def test_a_jpeg_is_turned_if_its_exif_or_xmp_can_be_read_and_says_so(content: bytes, turned: bool) -> None:
    data = segment(content)
    assert decode(data, MANY).shape == ((3, 24, 16) if turned else (3, 16, 24))
    assert torch.equal(decode_indexed(data, (16, 24) if turned else (24, 16), MANY), decode(data, MANY))


@pytest.mark.parametrize("content", [exif("big", 3, b"\0\x01"), exif("little", 3, b"\x01\0"), XMP % b'="1"'])
def test_a_camera_s_upright_jpeg_is_decoded_at_once(content: bytes) -> None:
    assert _jpeg_size(segment(content)) == (24, 16)


@pytest.mark.parametrize("width_height", [(50, 33), (20, 110), (64, 64), (17, 24), (203, 97), (300, 5), (5, 300)])
@pytest.mark.parametrize("strip", [2**25, 2000])
def test_padding_is_llavas_bit_for_bit_in_any_strips(
    width_height: tuple[int, int], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transform, "STRIP", strip)
    data = image_bytes(*width_height)
    for colour in (GREY, (122, 116, 104)):
        stock: Any = LlavaImageProcessor
        processor = stock(
            size={"height": 32, "width": 32},
            image_mean=[(part + 0.5) / 255 for part in colour],
            do_pad=True,
            do_center_crop=False,
            do_rescale=False,
            do_normalize=False,
        )
        expected = processor(Image.open(BytesIO(data)), return_tensors="pt").pixel_values[0]
        assert torch.equal(to_pixels(data, 32, "pad", MANY, colour), expected)


@pytest.mark.parametrize("tower", [tiny.SIGLIP, tiny.CLIP])
@pytest.mark.parametrize("mode", ["resize", "crop", "pad"])
def test_training_sees_what_the_exported_processor_makes(tower: dict[str, Any], mode: Any) -> None:
    config = ModelConfig(PartConfig(config=tower), PartConfig(config=tiny.language()), fusion="concat")
    model = build.init_model(config, seed=0)
    data = image_bytes(50, 33)
    pixels = to_pixels(data, build.image_size(config), mode, MANY, build.pad_colour(config))
    processor = image_processor(build.vision_config(config.vision), mode)
    expected = processor(Image.open(BytesIO(data)), return_tensors="pt").pixel_values
    torch.testing.assert_close((pixels[None] - model.pixel_mean) / model.pixel_std, expected, atol=1e-5, rtol=0)


def test_a_run_on_clip_pads_with_clip_s_colour(tmp_path: Path) -> None:
    base = load("debug", None, [f"output={tmp_path}/run", "data.image_transform=pad"])
    for tower, colour in ((tiny.SIGLIP, (127, 127, 127)), (tiny.CLIP, (122, 116, 104))):
        run = replace(base, model=replace(base.model, vision=PartConfig(config=tower)))
        assert open_data(run).train.pad_colour == open_data(run).heldout.pad_colour == colour
