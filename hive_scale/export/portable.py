"""Directories that transformers 4 and 5, and the tools built on either, read as the same model.

transformers 5 writes names and fields of its own, at which version 4 only warns: it then leaves weights at random,
turns by another rotary base, or knows no such tokenizer. Both read what is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from hive_scale.shared_files import share

# a tensor's name in memory begins with the first (transformers 5), in the file with the second, which both read
LLM_FILE = {"": ""}
LLAVA_FILE = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def save_model(module: Any, tensors: Mapping[str, Tensor], names: Mapping[str, str], path: Path) -> None:
    """Write config.json and weights of `module`, a transformers model, whose parameters are `tensors` by name."""
    path.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in tensors.items():
        memory, file = next((a, b) for a, b in names.items() if name.startswith(a))
        state[file + name.removeprefix(memory)] = tensor
    save_torch_state_dict(state, path, max_shard_size="5GB", metadata={"format": "pt"})
    share(path)
    config = module.config
    config.architectures = [type(module).__name__]
    dtype = next(iter(tensors.values())).dtype
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(path)
    with _edited(path / "config.json") as fields:
        for part in _parts(fields):
            _old_rope(part)


def save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write a tokenizer that transformers 4 and 5 both read as it is."""
    tokenizer.save_pretrained(path)
    mend_tokenizer(path)


def mend_tokenizer(path: Path) -> None:
    """Of a directory that transformers 5 has written, with a tokenizer or a processor in it."""
    with _edited(path / "tokenizer_config.json") as fields:
        if (path / "tokenizer.json").is_file():  # the class that takes it as it is: others would add a start token
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        fields.setdefault("model_input_names", ["input_ids", "attention_mask"])  # version 4 would add a third
        extra = fields.get("extra_special_tokens")
        if isinstance(extra, list):  # which version 4 takes for a table by name
            fields["additional_special_tokens"] = fields.pop("extra_special_tokens")


def _old_rope(fields: dict[str, Any]) -> None:
    """Beside ``rope_parameters`` what version 4 reads: the base, and how it is scaled."""
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaled.get("rope_type") == "longrope":  # whose length before scaling, and no factor, it reads elsewhere
            length = fields["original_max_position_embeddings"] = scaled["original_max_position_embeddings"]
            factor = scaled.get("factor") or fields["max_position_embeddings"] / length
            scaled.setdefault("attention_factor", math.sqrt(1 + math.log(max(1.0, factor)) / math.log(length)))
        if scaled.get("rope_type", "default") != "default":
            fields["rope_scaling"] = scaled


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield fields
    yield from (value for value in fields.values() if isinstance(value, dict) and "model_type" in value)


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Any]]:
    """Within, the fields of a JSON file, which are written back at the end."""
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    yield fields
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
