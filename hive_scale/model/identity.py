"""Hashes that identify a model, a processor or a computation: keys of feature caches and of evaluation results.

They cover the tensors as loaded and the configs as used, but neither file names nor their layout. So a moved directory
is the same model, and a changed one is not.
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

# Part of every key: raise it when features or prompts of the same inputs change, so that old results are not reused.
VERSION = 1
# Config fields about files, training use or output form, which do not affect what the model computes.
UNUSED = {*PretrainedConfig().to_dict(), "torch_dtype"} - {"model_type"}


def key_of(*parts: Any) -> str:
    """A hash of `parts` (JSON types), 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(dumps([VERSION, *parts], sort_keys=True).encode())


def identity(model: nn.Module, unread: Collection[str] = ()) -> str:
    """A hash of the function that `model` computes, 32 hex digits: its tensors, their dtypes, its configs.

    Args: `unread` names parameters that are never read; they are left out. For a model of several Hugging Face modules
    the config of each counts. Settings outside of configs and tensors are for the caller to add, by `key_of`.
    """
    digest = xxhash.xxh3_128(key_of(*_configs(model)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in unread:
            digest.update(dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def identity_of_processor(processor: Any) -> str:
    """A hash of a tokenizer, or of a processor with all its parts, 32 hex digits.

    It covers what transformers saves: vocabulary, merges, special tokens, chat template, image sizes.
    """
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        saved = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return key_of({name: xxhash.xxh3_128_hexdigest(content) for name, content in saved.items()})


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield each config of the model once, and its generation config."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and id(config) not in seen:  # submodules share their parent's config
            seen.add(id(config))
            yield [name, _used(config.to_dict())]
    generation = getattr(model, "generation_config", None)
    yield {key: value for key, value in generation.to_dict().items() if key not in UNUSED} if generation else None


def _used(fields: Any) -> Any:
    """`fields` of a config and of its nested configs, without those that do not affect the computation."""
    if not isinstance(fields, dict):
        return str(fields) if isinstance(fields, torch.dtype) else fields
    return {str(name): _used(value) for name, value in fields.items() if name not in UNUSED}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
