"""A cache of one model is never read for another: the same function has one identity in any files, and any other
function, of weights, config, tokenizer or template, has another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from hive_scale.config import PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.evaluate.encoder import Encoder
from hive_scale.export.huggingface import export_encoder
from hive_scale.model.build import init_model, open_encoder
from hive_scale.model.identity import identity, identity_of_processor, key_of

CPU = torch.device("cpu")
Save = Callable[[dict[str, torch.Tensor], Path], object]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stock_encoder(tmp_path_factory.mktemp("encoder"))


def as_bin(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def as_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Two files and their index."""
    names = sorted(tensors)
    parts = {f"model-{i:05d}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    where = {name: file for file, held in parts.items() for name in held}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_one(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def saved(encoder: Path, folder: Path, save: Save, change: float = 0.0) -> Path:
    """The directory `encoder` again, its weights in another form, one number of them changed."""
    shutil.copytree(encoder, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = next(name for name in sorted(tensors) if name.endswith("layers.0.mlp.fc1.weight"))
    tensors[name][0, 0] += change
    save(tensors, folder)
    return folder


@pytest.mark.parametrize("save", [as_bin, as_shards, as_one])
def test_weights_have_one_identity_in_every_form_and_changed_ones_another(
    encoder: Path, tmp_path: Path, save: Save
) -> None:
    plain = Encoder(encoder, CPU).identity
    assert Encoder(saved(encoder, tmp_path / "same", save), CPU).identity == plain
    assert Encoder(saved(encoder, tmp_path / "other", save, change=1e-3), CPU).identity != plain


@pytest.mark.parametrize(
    ("field", "value", "differs"),
    [
        ("hidden_act", "quick_gelu", True),
        ("num_attention_heads", 4, True),
        ("layer_norm_eps", 1e-3, True),
        ("architectures", ["Another"], False),  # what changes nothing
        ("transformers_version", "4.0", False),
        ("_name_or_path", "hub/name", False),
    ],
)
def test_the_same_weights_under_another_config_are_another_encoder(
    encoder: Path, tmp_path: Path, field: str, value: Any, differs: bool
) -> None:
    other = saved(encoder, tmp_path / "other", as_one)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {field: value}))
    assert (Encoder(other, CPU).identity != Encoder(encoder, CPU).identity) == differs


def test_features_of_another_depth_precision_or_family_are_others(encoder: Path, tmp_path: Path) -> None:
    clip = replace(tiny.model_config(), vision=PartConfig(config=tiny.CLIP))
    export_encoder(clip, dict(init_model(clip, 0).named_parameters()), tmp_path / "clip", "crop")
    made = [
        Encoder(encoder, CPU),
        Encoder(encoder, CPU, depth=-1),
        Encoder(encoder, CPU, torch.bfloat16),
        Encoder(tmp_path / "clip", CPU),
    ]
    assert len({one.identity for one in made}) == len(made)


def test_weights_that_are_never_read_do_not_count(encoder: Path) -> None:
    tower, other = open_encoder(encoder), open_encoder(encoder)
    name = "encoder.layers.3.mlp.fc1.weight"
    with torch.no_grad():
        other.get_parameter(name).add_(1.0)
    assert identity(tower) != identity(other)
    assert identity(tower, {name}) == identity(other, {name})


def test_buffers_and_types_count() -> None:
    def module(value: float, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        made = torch.nn.Module()
        made.register_buffer("mean", torch.full((2,), value, dtype=dtype), persistent=False)
        return made

    made = [module(0.0), module(1.0), module(0.0, torch.int32)]
    assert len({identity(one) for one in made}) == 3
    assert identity(module(1.0)) == identity(made[1])


def test_names_shapes_and_kinds_of_config_count() -> None:
    """Where all bytes are the same."""

    def module(name: str, *shape: int, kind: str = "one") -> torch.nn.Module:
        made: Any = torch.nn.Module()
        made.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        made.config = type("Config", (PretrainedConfig,), {"model_type": kind})()
        return cast(torch.nn.Module, made)

    made = [module("a", 2, 3), module("b", 2, 3), module("a", 3, 2), module("a", 2, 3, kind="other")]
    assert len({identity(one) for one in made}) == 4
    assert identity(module("a", 2, 3)) == identity(made[0])


def test_a_tokenizer_with_another_template_or_word_is_another(tmp_path: Path) -> None:
    stock = open_tokenizer(TokenizerConfig()).stock
    plain = identity_of_processor(stock)
    assert identity_of_processor(open_tokenizer(TokenizerConfig()).stock) == plain
    stock.chat_template = "{{ messages }}"
    templated = identity_of_processor(stock)
    stock.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len({plain, templated, identity_of_processor(stock)}) == 3


def test_keys_tell_their_parts_apart() -> None:
    told = [("a", "b"), ("ab",), ("b", "a"), ("a", ["b"]), ("a", None), ({"a": 1},), ({"a": 1.5},)]
    assert len({key_of(*one) for one in told}) == len(told)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
