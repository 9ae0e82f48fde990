"""Write directories that transformers 4 and 5, and tools built on either, load as the same model.

transformers 5 writes new names and fields, about which version 4 only warns: it then leaves weights random, uses the
wrong rotary base, or does not find the tokenizer's class. The files written here work with both.
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

from hive_scale.model.pretrained import quiet
from hive_scale.shared_files import share

# prefix of a tensor's name in memory (transformers 5) -> prefix in the file, which both versions read
LLM_FILE = {"": ""}
PHI3_ROPE = {"short_factor", "long_factor"}
LLAVA_FILE = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def save_model(module: Any, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None, path: Path) -> None:
    """Write config.json and the weights of `module`, a transformers model; `tensors` are its parameters by name.

    Without `names`, weights have the names of published files, to which transformers 5 turns its own when it saves.
    """
    path.mkdir(parents=True, exist_ok=True)
    if names is None:
        quiet()
        module.save_pretrained(path, state_dict=dict(tensors), max_shard_size="5GB")
    else:
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
    """Write a tokenizer that transformers 4 and 5 both load unchanged."""
    tokenizer.save_pretrained(path)
    mend_tokenizer(path)


def mend_tokenizer(path: Path) -> None:
    """Fix the tokenizer files in a directory that transformers 5 has written, for a tokenizer or a processor."""
    with _edited(path / "tokenizer_config.json") as fields:
        if (path / "tokenizer.json").is_file():  # this class loads it as is; others would add a start token
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        fields.setdefault("model_input_names", ["input_ids", "attention_mask"])  # version 4 would add token_type_ids
        extra = fields.get("extra_special_tokens")
        if isinstance(extra, list):  # version 4 expects a dict under this key
            fields["additional_special_tokens"] = fields.pop("extra_special_tokens")


def _old_rope(fields: dict[str, Any]) -> None:
    """Add the fields that version 4 reads beside ``rope_parameters``: the base and the scaling."""
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "sliding_attention" in rope:  # rotary positions by type of layer (Gemma 3)
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if isinstance(rope, dict) and "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        partial = scaled.pop("partial_rotary_factor", None)
        if scaled.get("rope_type") == "longrope":  # version 4 reads its original length elsewhere, and no factor
            length = fields["original_max_position_embeddings"] = scaled["original_max_position_embeddings"]
            factor = scaled.get("factor") or fields["max_position_embeddings"] / length
            scaled.setdefault("attention_factor", math.sqrt(1 + math.log(max(1.0, factor)) / math.log(length)))
        if partial is not None:  # Phi-3, whose config refuses fields of a longrope that others need
            fields["partial_rotary_factor"] = partial
            scaled = {"type": scaled["rope_type"]} | {key: scaled[key] for key in PHI3_ROPE & scaled.keys()}
        if scaled.get("rope_type", scaled.get("type")) not in (None, "default"):
            fields["rope_scaling"] = scaled


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield fields
    yield from (value for value in fields.values() if isinstance(value, dict) and "model_type" in value)


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the fields of a JSON file, and write them back at the end."""
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    yield fields
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
