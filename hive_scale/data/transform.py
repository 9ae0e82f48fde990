"""From the bytes of a sample to tensors: the picture at the model's size, the caption as tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hive_scale.batch import BLANK, Sample
from hive_scale.config import ImageMode, TokenizerConfig
from hive_scale.data.byte_tokenizer import END, PAD, UNKNOWN, byte_tokenizer
from hive_scale.data.scan import FORMATS

MAX_ASPECT = 100
# for tokenizers that come without a chat template: base models, bytes
CHAT_TEMPLATE = (
    "{{ bos_token | default(eos_token) }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ 'USER: ' if message.role == 'user' }}{{ message.content }}\n{% endif %}{% endfor %}"
)
# what templates ask for besides the turns: no hidden thoughts, and no date of today, which would change the prompt
TEMPLATE_WORDS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


class Tokenizer:
    """Text to token ids and back; start is the beginning-of-text token, or the end token where there is none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int = tokenizer.eos_token_id
        bos_id = tokenizer.bos_token_id
        self.start_id: int = self.eos_id if bos_id is None else bos_id
        self.vocab_size: int = len(tokenizer)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    @property
    def stock(self) -> Any:
        """The Hugging Face tokenizer itself, to be saved beside an exported model."""
        return self._tokenizer

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """[start] + text + [end], the text cut so that all are at most `max_tokens`."""
        return [self.start_id, *self._ids(text)[: max_tokens - 2], self.eos_id]

    def _ids(self, text: str) -> list[int]:
        """As the tokenizer's own `encode` without special tokens, in a fraction of its time."""
        if self._tokenizer.is_fast:
            found: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        else:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def render(self, turns: Sequence[dict[str, str]]) -> str | None:
        """`turns` ({role, content}) in the tokenizer's chat template; None if the template refuses them."""
        template = self._tokenizer.chat_template or CHAT_TEMPLATE
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(turns), chat_template=template, tokenize=False, **TEMPLATE_WORDS
            )
        except TemplateError:
            return None
        return text

    def special_in(self, text: str) -> str:
        """The first special token that `text` spells, or nothing."""
        found = self._special.search(text)
        return found[0] if found else ""

    def end_of_turn(self, text: str) -> int:
        """Where the special token ends that `text`, what a chat template puts after an answer, begins with.

        Raises ValueError if there is none: who has learned from such turns never stops.
        """
        blank = len(text) - len(text.lstrip())
        found = self._special.match(text, blank)
        if not found:
            raise ValueError("the tokenizer's chat template ends answers without a special token: use another")
        return found.end()

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """(token ids, flags) of the parts' joined text: a token has the flag of the part that it ends in."""
        texts = [text for text, _ in parts]
        if not self._tokenizer.is_fast:  # which cannot say where a token lies
            pieces = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
            flags = [flag for piece, (_, flag) in zip(pieces, parts, strict=True) for _ in piece]
            return [token for piece in pieces for token in piece], flags
        found = self._tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = list(accumulate(map(len, texts)))
        places = np.searchsorted(ends, [end for _, end in found["offset_mapping"]])
        return found["input_ids"], [parts[place][1] for place in places]


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer `config` names; code of a checkpoint is never run.

    Raises ValueError if it cannot be loaded, or has no padding or end token.
    """
    if config.path == "bytes":
        special = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
        stock: Any = PreTrainedTokenizerFast
        return Tokenizer(stock(tokenizer_object=byte_tokenizer(), **special))
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for what it cannot read
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"data.tokenizer.path={config.path} cannot be loaded: {reason}") from None
    if config.pad_token:
        if config.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"data.tokenizer.pad_token={config.pad_token} is not in the vocabulary of {config.path}: name one of "
                "its tokens, such as <unk>"
            )
        tokenizer.pad_token = config.pad_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {config.path} has no padding token: set data.tokenizer.pad_token to one of its tokens, "
            "such as <unk>"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {config.path} has no end token: use one whose eos_token is set")
    return Tokenizer(tokenizer)


def caption_sample(key: str, pixels: Tensor | None, text: str, tokenizer: Tokenizer, max_tokens: int) -> Sample:
    """A picture with its caption: every token but the start is a target."""
    tokens = tokenizer.encode(text, max_tokens)
    return Sample(key, pixels, tokens, [False] + [True] * (len(tokens) - 1))


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ValueError for a picture that would take too much memory, decoded or resized."""
    if max(width, height) > MAX_ASPECT * min(width, height):  # its shorter side resized, the longer would explode
        raise ValueError(f"the picture of {width} x {height} is more than {MAX_ASPECT} times as long as wide")
    if width * height > max_pixels:
        raise ValueError(f"the picture of {width} x {height} has more than data.max_pixels={max_pixels}")


def picture(data: bytes, image_size: int, mode: ImageMode, max_pixels: int) -> Tensor:
    """Decode `data` to uint8 (3, image_size, image_size), resized (bicubic, antialiased) as the HF processors do.

    `resize` stretches (SigLIP), `crop` takes the middle square (CLIP), `pad` adds grey to the shorter side.
    Transparency becomes white. Raises ValueError for what is not a whole JPEG, PNG or WebP of at most `max_pixels`.
    """
    return fitted(decode(data, max_pixels), image_size, mode)


def fitted(pixels: Tensor, image_size: int, mode: ImageMode) -> Tensor:
    """uint8 (3, H, W) to (3, image_size, image_size), as `picture` describes."""
    if mode == "resize":
        return _resize(pixels, [image_size, image_size])
    if mode == "crop":
        pixels = _resize(pixels, [image_size])  # the shorter side
        top, left = ((side - image_size) // 2 for side in pixels.shape[-2:])  # HF rounds down, torchvision to even
        return pixels[:, top : top + image_size, left : left + image_size]
    return _padded(pixels, image_size)


def augmented(pixels: Tensor, image_size: int, *key: int) -> Tensor:
    """The training augmentation of the probes (paper, Table 4): uint8 (3, H, W) to (3, image_size, image_size).

    A random part of 0.4 to 1 of the area, 3:4 to 4:3 in shape, resized (bicubic); mirrored half the time;
    brightness, contrast and saturation changed by up to 0.2, in any order. A pure function of `key`, such as
    (seed, epoch, sample), in any process or thread and in every version of the libraries that draw.
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
    """Numbers in [0, 1), from the raw bits of a generator, which numpy promises to keep."""
    bits: list[int] = np.random.Philox(np.random.SeedSequence(key)).random_raw(32).tolist()
    return (number / 2**64 for number in bits)


def _random_part(height: int, width: int, draws: Iterator[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a part: the first of ten tries that fits, else the largest middle one."""
    for _ in range(10):
        area = height * width * (0.4 + 0.6 * next(draws))
        shape = (4 / 3) ** (2 * next(draws) - 1)
        high, wide = round((area / shape) ** 0.5), round((area * shape) ** 0.5)
        if 0 < high <= height and 0 < wide <= width:
            return int(next(draws) * (height - high + 1)), int(next(draws) * (width - wide + 1)), high, wide
    high, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - high) // 2, (width - wide) // 2, high, wide


def decode(data: bytes, max_pixels: int) -> Tensor:
    """uint8 (3, H, W). Raises ValueError, before decoding if the picture is too large."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, max_pixels)
            pixels: Tensor
            if image.format == "JPEG" and image.mode == "RGB":  # the same pixels a quarter sooner than through PIL
                pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            else:
                pixels = vision.pil_to_tensor(_on_white(image))
            return pixels
    except ValueError:
        raise
    except Exception as error:  # PIL's decoders raise what they like on broken input
        reason = str(error).splitlines()[0].rpartition(": ")[2] if str(error) else type(error).__name__
        raise ValueError(f"the picture cannot be decoded: {reason}") from None


def blank(image_size: int) -> Tensor:
    """A picture that tells nothing: uint8 (3, image_size, image_size), all grey."""
    return torch.full((3, image_size, image_size), BLANK, dtype=torch.uint8)


def _resize(pixels: Tensor, size: list[int]) -> Tensor:
    resized: Tensor = vision.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)
    return resized


def _padded(pixels: Tensor, image_size: int) -> Tensor:
    longest = max(pixels.shape[-2:])
    height, width = (max(1, round(side * image_size / longest)) for side in pixels.shape[-2:])
    left, top = (image_size - width) // 2, (image_size - height) // 2
    square = blank(image_size)
    square[:, top : top + height, left : left + width] = _resize(pixels, [height, width])
    return square


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
