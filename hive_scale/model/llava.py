"""Run a standard LLaVA directory, exported by this package or not, with transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hive_scale import checksums
from hive_scale.chat_template import without_image
from hive_scale.model.pretrained import check_finite


class StockLlava:
    """``LlavaForConditionalGeneration`` with its processor: greedy answers in batches padded on the left."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Load the directory.

        Raises ValueError if it has no chat template, a weight is not finite, the processor's image size is not the
        encoder's, or files of a directory of ours are corrupt.
        """
        checksums.check(path)
        auto: Any = AutoProcessor
        processor = auto.from_pretrained(path, trust_remote_code=False)
        self.template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        if not self.template:
            raise ValueError(f"{path} has no chat template: add chat_template.jinja, as its authors use it")
        model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        check_finite(model, path)
        wanted, size = model.config.vision_config.image_size, processor.image_processor.size
        made = size.get("height") or size.get("shortest_edge")
        if made != wanted:
            raise ValueError(f"{path}: the processor makes images of {made} pixels, the encoder takes {wanted}")
        self.processor, self.model, self.device = processor, model.to(device).eval(), device
        self.tokenizer = processor.tokenizer
        stops = model.generation_config.eos_token_id
        self.end_ids = {self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
        self.start: str = self.tokenizer.bos_token or self.tokenizer.eos_token
        # templates of vision-language models take content parts; those of plain chat models take only strings
        try:
            parts = self._render([{"type": "image"}, {"type": "text", "text": "?"}])
        except TypeError:  # such a template may concatenate the content with a string
            parts = ""
        self.places_images = parts.count(processor.image_token) == 1

    @torch.inference_mode()
    def answer(self, asked: Sequence[tuple[str, Tensor | None]], max_tokens: int) -> list[tuple[str, bool]]:
        """Answer each (question, image uint8 (3, H, W) or None). Returns (answer, True if it was cut off) for each."""
        texts = [self._prompt(question, image is not None) for question, image in asked]
        images = [image for _, image in asked if image is not None]
        inputs = self.processor(
            images=images or None,
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=not texts[0].startswith(self.start),
            return_tensors="pt",
        ).to(self.device, self.model.dtype)
        made = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1)
        rows = made[:, inputs["input_ids"].shape[1] :].tolist()
        words = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [(word.strip(), not self.end_ids & set(row)) for word, row in zip(words, rows, strict=True)]

    def _prompt(self, question: str, has_image: bool) -> str:
        question = without_image(question, self.processor.image_token)
        if self.places_images:
            image = [{"type": "image"}] if has_image else []
            return self._render([*image, {"type": "text", "text": question}])
        return self._render(f"{self.processor.image_token}\n{question}" if has_image else question)

    def _render(self, content: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text
