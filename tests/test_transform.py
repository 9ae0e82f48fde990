"""Why: pixels must equal those of the model's own processor, and hostile bytes must not stop or overload a run."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import image_bytes
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

from hive_scale.config import TokenizerConfig
from hive_scale.data.tokenizer import caption_sample, open_tokenizer
from hive_scale.data.transform import (
    _draws,
    _jpeg_size,
    _random_part,
    augmented,
    decode,
    decode_indexed,
    fit_into,
    to_pixels,
)

MANY = 10**8
SIZES = [(50, 33), (20, 110), (64, 64), (17, 24), (203, 97), (32, 32)]


@pytest.mark.parametrize("width_height", SIZES)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pixels_equal_the_processors(width_height: tuple[int, int], format: str) -> None:
    data = image_bytes(*width_height, format=format)
    image = Image.open(BytesIO(data))
    raw = {"do_rescale": False, "do_normalize": False, "resample": 3}
    siglip = SiglipImageProcessor(size={"height": 32, "width": 32}, **raw)
    clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **raw)
    for mode, processor in (("resize", siglip), ("crop", clip)):
        expected = processor(image, return_tensors="pt").pixel_values[0]
        assert torch.equal(to_pixels(data, 32, mode, MANY), expected)
        batch = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        fit_into(batch[0], decode(data, MANY), mode)
        assert torch.equal(batch[0], expected)
        assert not batch[1].any()


def test_padding_is_grey_and_keeps_the_shape_inside() -> None:
    buffer = BytesIO()
    Image.new("RGB", (40, 20), "red").save(buffer, "PNG")
    pixels = to_pixels(buffer.getvalue(), 16, "pad", MANY)
    assert (pixels[:, :2] == 127).all()
    assert (pixels[:, 14:] == 127).all()
    assert (pixels[0, 6:10] == 255).all()
    assert (pixels[1:, 6:10] == 0).all()


@pytest.mark.parametrize(
    ("mode", "format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG")]
)
def test_other_colour_modes_become_three_channels(mode: str, format: str) -> None:
    image = Image.new("I;16", (8, 8)) if mode == "I;16" else Image.new("RGB", (8, 8), "white").convert(mode)
    buffer = BytesIO()
    image.save(buffer, format)
    pixels = decode(buffer.getvalue(), MANY)
    assert pixels.shape == (3, 8, 8)
    assert torch.equal(decode_indexed(buffer.getvalue(), (8, 8), MANY), pixels)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(format: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))  # black, wholly transparent: converting alone would give black
    buffer = BytesIO()
    image.save(buffer, format, lossless=True, exact=True)
    assert (decode(buffer.getvalue(), MANY) == 255).all()
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    buffer = BytesIO()
    palette.save(buffer, "PNG")
    assert (decode(buffer.getvalue(), MANY) == 255).all()


def _claims(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_claims(9_000, 9_000), r"max_pixels=50000000"),
        (_claims(60_000, 2), "times as long"),
        (image_bytes()[:-60], "cannot be decoded"),
        (image_bytes(format="PNG")[:-60], "cannot be decoded"),
        (image_bytes(format="GIF"), "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"\xff\xd8\xff", "cannot be decoded"),
    ],
)
def test_what_cannot_be_used_is_a_value_error_of_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        to_pixels(data, 16, "resize", 50_000_000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_indexed_image_is_the_same_or_refused_where_its_size_has_changed(format: str) -> None:
    data = image_bytes(24, 16, format=format)
    assert torch.equal(decode_indexed(data, (24, 16), MANY), decode(data, MANY))
    with pytest.raises(ValueError, match="not of 16 x 24"):
        decode_indexed(data, (16, 24), MANY)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"x" * 300}, {"exif": b"Exif\0\0" + bytes(70)}]
)
def test_the_size_in_a_jpegs_header_is_pils(options: dict[str, object]) -> None:
    data = resaved(24, 16, "RGB", **options)
    assert _jpeg_size(data) == (24, 16)
    assert not any(_jpeg_size(data[:cut]) for cut in range(data.index(b"\0\x10\0\x18") + 5))
    assert _jpeg_size(resaved(24, 16, "L", **options)) is None
    assert _jpeg_size(image_bytes(24, 16, format="PNG")) is None


def test_a_header_that_hides_its_size_is_left_to_pil() -> None:
    data = resaved(24, 16, "RGB")
    large = b"\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03"  # a frame of 65,500 x 65,500
    for before in (b"\xff\x01", b"\xff\xd0", b"\xff\xff", b"\0"):  # without a length, or padding
        assert _jpeg_size(data[:2] + before + large + data[2:]) is None
    assert _jpeg_size(data[:2] + large + data[2:]) == (65_500, 65_500), "the first frame is the one that is decoded"
    with pytest.raises(ValueError, match="cannot be decoded"):  # PIL goes by the last frame, libjpeg by none
        decode_indexed(data[:2] + large + data[2:], (24, 16), 10**6)


def resaved(width: int, height: int, mode: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.open(BytesIO(image_bytes(width, height))).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_random_damage_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP"):
        whole = bytearray(image_bytes(format=format))
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(256)
            with suppress(ValueError):
                assert to_pixels(bytes(data), 16, "pad", 10**6).shape == (3, 16, 16)
            with suppress(ValueError):
                assert decode_indexed(bytes(data), (24, 16), 10**6).shape == (3, 16, 24)


def test_augmentation_is_a_pure_function_of_its_key() -> None:
    pixels = decode(image_bytes(60, 40), MANY)
    global_state = torch.get_rng_state()
    first = augmented(pixels, 32, 7, 0, 5)
    assert (first.shape, first.dtype) == ((3, 32, 32), torch.uint8)
    assert torch.equal(first, augmented(pixels, 32, 7, 0, 5))
    assert torch.equal(global_state, torch.get_rng_state())
    others = [augmented(pixels, 32, *key) for key in ((8, 0, 5), (7, 1, 5), (7, 0, 6))]
    assert not any(torch.equal(first, other) for other in others)
    assert _random_part(40, 60, _draws(7, 0, 5)) == (1, 13, 38, 47), "other draws: what was published is not repeated"


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (10, 90)])
def test_the_parts_are_distributed_as_torchvisions(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    ours = torch.tensor([_random_part(*shape, iter(rng.random(40).tolist())) for _ in range(2000)]).float()
    image = torch.empty(3, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = v2.RandomResizedCrop(8, scale=(0.4, 1.0))
        drawn = [crop.make_params([image]) for _ in range(2000)]
    theirs = torch.tensor([[one[name] for name in ("top", "left", "height", "width")] for one in drawn]).float()
    for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert torch.allclose(ours.quantile(quantile, 0), theirs.quantile(quantile, 0), atol=2.5)
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()


def test_half_are_mirrored_and_colours_change_by_up_to_a_fifth() -> None:
    dark_left = torch.zeros(3, 16, 16, dtype=torch.uint8)
    dark_left[:, :, 8:] = 200
    results = [augmented(dark_left, 16, seed).float().mean(0) for seed in range(300)]
    mirrored = [bool(result[:, 0].mean() > result[:, -1].mean()) for result in results]
    assert 110 < sum(mirrored) < 190
    grey = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    levels = [int(augmented(grey, 16, seed)[0, 8, 8]) for seed in range(300)]
    assert 77 <= min(levels) < 83
    assert 117 < max(levels) <= 122
    red = torch.tensor([150, 50, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    spans = [augmented(red, 16, seed)[:2, 8, 8].int() for seed in range(300)]
    ratios = [int(high - low) / int(high + low) for high, low in spans]  # brightness alone would leave it as it is
    assert min(ratios) < 0.45
    assert max(ratios) > 0.55


def test_bytes_tokenizer_round_trips_and_cuts() -> None:
    tokenizer = open_tokenizer(TokenizerConfig())
    ids = tokenizer.encode("a café", 77)
    assert ids[0] == tokenizer.start_id
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == "a café"
    assert len(ids) == 2 + len("a café".encode())
    assert max(ids) < tokenizer.vocab_size
    cut = tokenizer.encode("x" * 200, 77)
    assert len(cut) == 77
    assert cut[-1] == tokenizer.eos_id
    sample = caption_sample("k", torch.zeros(3, 2, 2), "abc", tokenizer, 77)
    assert sample.is_target == [False, True, True, True, True]


def _saved(directory: Path, **special: str) -> str:
    words = ["<unk>", "</s>", "<s>", "horse", "rider"]
    raw = RawTokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special).save_pretrained(directory)
    return str(directory)


def test_a_saved_tokenizer_starts_with_bos_or_else_eos(tmp_path: Path) -> None:
    path = _saved(tmp_path / "bos", bos_token="<s>", eos_token="</s>")
    tokenizer = open_tokenizer(TokenizerConfig(path, pad_token="<unk>"))
    assert tokenizer.encode("horse rider", 77) == [2, 3, 4, 1]
    assert tokenizer.encode("horse rider", 3) == [2, 3, 1]
    assert tokenizer.decode([2, 3, 4, 1]) == "horse rider"
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, 5)
    path = _saved(tmp_path / "eos", eos_token="</s>", pad_token="</s>")
    assert open_tokenizer(TokenizerConfig(path)).encode("horse", 77) == [1, 3, 1]


def test_what_a_tokenizer_file_says_of_lengths_is_not_heeded(tmp_path: Path) -> None:
    path = _saved(tmp_path, eos_token="</s>", pad_token="<unk>")
    file = tmp_path / "tokenizer.json"
    raw = RawTokenizer.from_file(str(file))
    raw.enable_padding(length=6)
    raw.enable_truncation(1)
    raw.save(str(file))
    tokenizer = open_tokenizer(TokenizerConfig(path))
    assert tokenizer.encode_all(["horse", "rider horse"], 77) == [[1, 3, 1], [1, 4, 3, 1]]


def test_a_tokenizer_that_will_not_do_names_the_remedy(tmp_path: Path) -> None:
    path = _saved(tmp_path / "bare", bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match=r"no padding token: set data\.tokenizer\.pad_token"):
        open_tokenizer(TokenizerConfig(path))
    with pytest.raises(ValueError, match="<pad> is not in the vocabulary"):
        open_tokenizer(TokenizerConfig(path, pad_token="<pad>"))
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=.*nowhere is not there"):
        open_tokenizer(TokenizerConfig(str(tmp_path / "nowhere")))
