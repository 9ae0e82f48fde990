"""Captions and answers of a trained HIVE for a user's own images, from a run, a stage or an exported directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hive_scale.config import DataConfig
from hive_scale.data.conversation import prompt_with_slot
from hive_scale.data.messages import is_text
from hive_scale.data.tokenizer import Tokenizer, open_tokenizer
from hive_scale.data.transform import read_pixels
from hive_scale.device import default_precision
from hive_scale.export import from_pretrained, processing
from hive_scale.model.generate import generate
from hive_scale.model.hive import Hive
from hive_scale.precision import DTYPES
from hive_scale.report.attention_maps import AttentionMaps, attention_maps, words_at
from hive_scale.run import open_hive


@dataclass(frozen=True)
class Written:
    """What the model wrote about an image."""

    text: str  # with the prompt, if that was the beginning of a caption
    prompt_ids: list[int]  # tokens of the prompt, with the start token
    ids: list[int]  # tokens of `text`


class Captioner:
    """A model with what it needs to read images and prompts as in its training."""

    def __init__(self, model: Hive, tokenizer: Tokenizer, data: DataConfig, device: torch.device) -> None:
        self.model, self.tokenizer, self.data, self.device = model.to(device).eval(), tokenizer, data, device
        self.dtype = DTYPES[default_precision(device)]

    @classmethod
    def open(cls, path: Path, device: torch.device) -> Captioner:
        """Load a run (its last finished stage), a stage, or a directory that `export.py hive` wrote.

        Raises ValueError if `path` is none of them, or damaged.
        """
        if (path / "config.json").is_file():
            model, data = from_pretrained(path), processing(path)
        else:
            config, stage, model = open_hive(path)
            data = config.data_of(stage)
        return cls(model, open_tokenizer(data.tokenizer), data, device)

    def read(self, path: Path) -> Tensor:
        """The image at `path` as the model sees it, uint8 (3, H, W). Raises ValueError if it is not an image."""
        size, colour = self.model.vision.config.image_size, self.model.family.mean_colour
        return read_pixels(path, size, self.data.image_transform, self.data.max_pixels, colour)

    def write(self, images: Sequence[Tensor], prompt: str = "", max_tokens: int = 40) -> list[Written]:
        """Return what the model writes about each of `images`, uint8 (3, H, W), greedily.

        Args:
            images: as `read` returns them.
            prompt: a question if the model was trained on conversations, else the beginning of the caption.
            max_tokens: most tokens of each text.

        Raises ValueError if the prompt leaves no room in the LLM's context, holds a special token, or is no text.
        """
        if not is_text(prompt):
            raise ValueError("the prompt has bytes that are no text: give it in UTF-8")
        longest = self.model.host.longest(self.model.language.config)
        ids, slot = self._prompt(prompt, longest)
        if len(ids) + max_tokens > longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the text after it up to {max_tokens}: the LLM takes {longest}"
            )
        pixels = torch.stack(list(images)).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            count = range(len(pixels))
            made = generate(
                self.model, pixels, count, [ids] * len(pixels), self.tokenizer.end_ids, max_tokens, [slot] * len(pixels)
            )
        before = [] if self.data.format == "conversation" else ids
        return [Written(self.tokenizer.decode([*before, *one]).strip(), ids, one) for one in made]

    def _prompt(self, prompt: str, longest: int) -> tuple[list[int], int]:
        """(tokens of `prompt`, number of them before the image)."""
        if self.data.format == "conversation":
            asked = prompt or "Describe the image."
            return prompt_with_slot([{"role": "user", "content": asked}], self.tokenizer, self.data.image_position)
        return self.tokenizer.encode(prompt, longest + 2)[:-1], 1

    def words(self, written: Written) -> list[str]:
        """The words of a text, in order, some of them perhaps twice."""
        return [word for word, _ in self._words(written)]

    def attention(self, image: Tensor, written: Written, word: int) -> AttentionMaps:
        """Attention of the word of this index in `words(written)` to the image, in each LLM layer that attends to it.

        Raises ValueError if the model's fusion has no attention over patches.
        """
        ids = [*written.prompt_ids, *written.ids]
        return attention_maps(self.model, image, ids, [self._words(written)[word]], written.text)

    def _words(self, written: Written) -> list[tuple[str, list[int]]]:
        begin = len(written.prompt_ids)
        found = words_at([*written.prompt_ids, *written.ids], self.tokenizer.decode)
        return [(word, tokens) for word, tokens in found if tokens and tokens[-1] >= begin]
