"""Random access to samples: read byte ranges from shards, decode images and tokenize text for the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hive_scale.batch import BLANK, Sample
from hive_scale.config import DataConfig
from hive_scale.data.conversation import tokenize_conversation
from hive_scale.data.feature_store import FeatureStore
from hive_scale.data.images import LARGEST_FILE
from hive_scale.data.index import Index
from hive_scale.data.messages import parse_messages
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import ShardReader
from hive_scale.data.tar_scan import LARGEST_CAPTION
from hive_scale.data.tokenizer import Tokenizer, captioned
from hive_scale.data.transform import GREY, Colour, blank, check_size, decode_indexed, fit_into
from hive_scale.strict_json import LARGEST_LINE, loads

Text = str | Sample  # a caption, or a tokenized conversation: a Sample without pixels


class Read(NamedTuple):
    """A sample as read from disk, not yet decoded."""

    key: str
    text: Text
    image: bytes | Tensor | None  # encoded bytes, or features of a frozen encoder, or None with data.blank_images
    size: tuple[int, int]  # (width, height) of the image in pixels, from the index


@dataclass(frozen=True)
class Decoded:
    """A sample with decoded pixels, whose caption is not tokenized yet."""

    key: str
    text: Text
    pixels: Tensor
    number: int = -1  # the sample's number if features were wanted but `pixels` is an image; else -1


class SampleReader:
    """Random access to the samples of `index`, by number from 0 to len(index) - 1.

    `pad_colour` fills the border that ``data.image_transform=pad`` adds to an image (see `build.pad_colour`).
    """

    def __init__(
        self,
        config: DataConfig,
        index: Index,
        cache: ShardCache,
        tokenizer: Tokenizer,
        image_size: int,
        pad_colour: Colour = GREY,
    ) -> None:
        self.config = config
        self.index = index
        self.numbers: Sequence[int] | NDArray[np.int64] = range(len(index))  # of the samples that are served
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.pad_colour = pad_colour
        self.features: FeatureStore | None = None  # if set, features are read in place of images
        self._reader = ShardReader(index.shards, index.stamps, cache)

    def sample(self, i: int) -> Sample:
        """Return sample number i, ready for the model. Raises ValueError if it is broken."""
        return self.finished([self.decoded(self.read(i))])[0]

    def read(self, i: int) -> Read:
        """Read sample number i without decoding its image. Raises ValueError if it is broken."""
        size = self._size(i)
        key = self.index.key(i)
        text: Text = self._conversation(key, i) if self.config.format == "conversation" else self.caption(i)
        kept = self.features.get(i) if self.features else None  # None: missing or damaged, so read the image
        return Read(key, text, self._lying(i) if kept is None else kept, size)

    def _conversation(self, key: str, i: int) -> Sample:
        config, turns = self.config, parse_messages(self.record(i))
        return tokenize_conversation(key, None, turns, self.tokenizer, config.max_tokens, config.image_position)

    def decoded(self, read: Read, out: Tensor | None = None) -> Decoded:
        """Decode the image of `read`, into `out` if that is given. Raises ValueError if it cannot be decoded.

        If features are wanted but those of this image could not be read, the image is returned and `out` is not
        written.
        """
        if self.features and not isinstance(read.image, Tensor):
            out = None
        return Decoded(read.key, read.text, self._pixels(read.image, read.size, out))

    def finished(self, decoded: Sequence[Decoded]) -> list[Sample]:
        """Return samples ready for the model. Captions are tokenized in one call, which takes half the time."""
        captions = [one.text for one in decoded if isinstance(one.text, str)]
        tokens = iter(self.tokenizer.encode_all(captions, self.config.max_tokens))
        return [
            captioned(one.key, one.pixels, next(tokens))
            if isinstance(one.text, str)
            else replace(one.text, pixels=one.pixels)
            for one in decoded
        ]

    def pixels(self, i: int) -> Tensor:
        """Return the image of sample i, uint8 (3, H, W) at the model's size. Raises ValueError if it is broken."""
        return self._pixels(self._lying(i), self._size(i))

    def _size(self, i: int) -> tuple[int, int]:
        """(width, height) of the sample's image. Raises ValueError if decoding it would take too much memory."""
        width, height = self.index.image_sizes[i].tolist()
        check_size(width, height, self.config.max_pixels)
        return width, height

    def _lying(self, i: int) -> bytes | None:
        return None if self.config.blank_images else self.encoded(i)

    def _pixels(self, lying: bytes | Tensor | None, size: tuple[int, int], out: Tensor | None = None) -> Tensor:
        if isinstance(lying, Tensor):
            return lying if out is None else out.copy_(lying)
        if out is None:
            out = blank(self.image_size)
        if lying is None:
            return out.fill_(BLANK)
        return fit_into(
            out, decode_indexed(lying, size, self.config.max_pixels), self.config.image_transform, self.pad_colour
        )

    @property
    def text_bytes(self) -> NDArray[np.integer]:
        """Bytes of the text that each sample trains on, (N,): its caption, or the record with its conversation."""
        if self.config.format == "conversation":
            return self.index.members[:, 2, 1]
        return self.index.caption_bytes

    def encoded(self, i: int) -> bytes:
        """Return the encoded bytes of the image, as stored in the shard."""
        return self._read(i, 0)

    def spread(self, count: int) -> Iterator[tuple[Tensor, str]]:
        """Yield (image, caption) of up to `count` samples, evenly spaced through the set; skips broken samples."""
        stride = max(1, len(self.numbers) // count)
        pairs = (self._pair(int(i)) for i in self.numbers[stride // 2 :: stride])
        yield from islice(filter(None, pairs), count)

    def _pair(self, i: int) -> tuple[Tensor, str] | None:
        with suppress(ValueError):
            if (pixels := self.sample(i).pixels) is not None:
                return pixels, self.caption(i)
        return None

    def caption(self, i: int) -> str:
        return self._read(i, 1, LARGEST_CAPTION).decode().strip()

    def record(self, i: int) -> dict[str, Any]:
        """Return the .json member of sample i, {} if it has none. Raises ValueError if it is not a JSON object."""
        try:
            record = loads(self._read(i, 2, LARGEST_LINE) or b"{}", LARGEST_LINE)
        except ValueError as error:
            raise ValueError(f"its .json cannot be read: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"its .json holds no object, but a {type(record).__name__}")
        return record

    def _read(self, i: int, member: int, most: int = LARGEST_FILE) -> bytes:
        start, length = self.index.members[i, member].tolist()
        return self._reader.read(self.index.shard_of(i), start, length, most)
