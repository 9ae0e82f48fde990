"""What a result was made by, as one short text: the key of whatever is kept, or passed over because it is there.

Hashed are the tensors as they were loaded and the configs as they are used: in which files they lay, and under which
names, does not matter. A moved directory stays the same model, a changed one does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PretrainedConfig

from hive_scale.strict_json import dumps

# Part of every key: raise it when the same images, features or prompts come out otherwise, and nothing older is read.
VERSION = 1
# what a config says of its file, its use in training or its output's form, and nothing of what the model computes
UNUSED = {*PretrainedConfig().to_dict(), "torch_dtype"} - {"model_type"}


def key_of(*parts: Any) -> str:
    """32 hex digits that tell `parts`, anything that JSON can say, from all others."""
    return xxhash.xxh3_128_hexdigest(dumps([VERSION, *parts], sort_keys=True).encode())


def identity(model: nn.Module, unread: Collection[str] = ()) -> str:
    """32 hex digits that tell the function of `model` from all others: its tensors, their types, its configs.

    Args: `unread` names parameters that are never read, which do not count. A model of several Hugging Face modules
    counts the config of each; settings that are in no config and no tensor are the caller's to add (`key_of`).
    """
    digest = xxhash.xxh3_128(key_of(*_configs(model)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in unread:
            digest.update(dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def identity_of_processor(processor: Any) -> str:
    """32 hex digits that tell a tokenizer, or a processor with all its parts, from all others.

    They are hashed as transformers saves them: vocabulary, merges, special tokens, chat template, image sizes.
    """
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        saved = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return key_of({name: xxhash.xxh3_128_hexdigest(content) for name, content in saved.items()})


def _configs(model: nn.Module) -> Iterator[Any]:
    """What each config of the model says, once; and how it generates, if it does."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and id(config) not in seen:  # which its layers hold, too
            seen.add(id(config))
            yield [name, _used(config.to_dict())]
    generation = getattr(model, "generation_config", None)
    yield {key: value for key, value in generation.to_dict().items() if key not in UNUSED} if generation else None


def _used(fields: Any) -> Any:
    """`fields` of a config, those of the configs in it included, without what changes nothing."""
    if not isinstance(fields, dict):
        return str(fields) if isinstance(fields, torch.dtype) else fields
    return {str(name): _used(value) for name, value in fields.items() if name not in UNUSED}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
