"""Small models and samples shared by tests: real modules with a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hive_scale.batch import Batch, Sample, collate
from hive_scale.config import ModelConfig, PartConfig
from hive_scale.export.huggingface import export_encoder
from hive_scale.model.build import init_model
from hive_scale.model.hive import Hive

IMAGE = 32
VOCABULARY = 97
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": 8,
}
CLIP = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32}


def language(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes


def model_config(fusion: Any = "cross_attention", llm: str = "llama", **changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {"encoder_layer_ratio": 0.5} | changes
    parts = PartConfig(config=SIGLIP), PartConfig(config=language(llm))
    return ModelConfig(*parts, fusion=fusion, **settings)


def sighted(model: Hive, factor: float) -> Hive:
    """`model` with open gates, and weights `factor` times as large: so that the image matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
            elif not name.startswith("vision") and parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def samples(count: int, seed: int = 0, longest: int = 12, text_only: int = 0) -> list[Sample]:
    """Ragged captions of random tokens, the first `text_only` of them without an image."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(3, longest + 1, (1,), generator=random))
        pixels = torch.randint(0, 256, (3, IMAGE, IMAGE), dtype=torch.uint8, generator=random)
        tokens = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        made.append(Sample(str(i), None if i < text_only else pixels, tokens, [False] + [True] * (length - 1)))
    return made


def batch(count: int = 3, seed: int = 0, **changes: Any) -> Batch:
    return collate(samples(count, seed, **changes), pad_id=0, image_size=IMAGE)


def stock_encoder(path: Path) -> Path:
    """The directory `path`, with the encoder of `model_config()` as Hugging Face would have it."""
    config = model_config()
    export_encoder(config, dict(init_model(config, seed=0).named_parameters()), path, "resize")
    return path
