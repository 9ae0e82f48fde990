"""The samples of a set by number: bytes by their range, then picture and caption made ready for the model."""

from __future__ import annotations

import json
from typing import Any

from hive_scale.batch import Sample
from hive_scale.config import DataConfig
from hive_scale.data.cache import ShardCache
from hive_scale.data.index import Index
from hive_scale.data.shards import ShardReader
from hive_scale.data.transform import Tokenizer, blank, caption_sample, check_size, picture


class Samples:
    """Random access to the samples of `index`; numbers below len(index)."""

    def __init__(
        self, config: DataConfig, index: Index, cache: ShardCache, tokenizer: Tokenizer, image_size: int
    ) -> None:
        self.config = config
        self.index = index
        self.tokenizer = tokenizer
        self.image_size = image_size
        self._reader = ShardReader(index.shards, cache)

    def sample(self, i: int) -> Sample:
        """Sample number i, ready for the model. Raises ValueError if it is broken."""
        width, height = self.index.picture_sizes[i].tolist()
        check_size(width, height, self.config.max_pixels)
        text = self.caption(i)
        if self.config.blank:
            pixels = blank(self.image_size)
        else:
            pixels = picture(self._read(i, 0), self.image_size, self.config.image, self.config.max_pixels)
        return caption_sample(self.index.key(i), pixels, text, self.tokenizer, self.config.max_tokens)

    def caption(self, i: int) -> str:
        return self._read(i, 1).decode().strip()

    def record(self, i: int) -> dict[str, Any]:
        """What else is known of sample i: its .json member, or nothing."""
        record: dict[str, Any] = json.loads(self._read(i, 2) or b"{}")
        return record

    def _read(self, i: int, member: int) -> bytes:
        start, length = self.index.members[i, member].tolist()
        return self._reader.read(self.index.shard_of(i), start, length)
