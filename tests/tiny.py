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


# What each LLM family can have that Llama has not, so small that it matters in texts of a few tokens. Windows are
# shorter than texts, and scores and logits reach their bounds.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.5, 2.0], "long_factor": [4.0, 5.0, 6.0], "partial_rotary_factor": 0.5}  # fmt: skip
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FACTORS = {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 4.0}
SOFTCAPS = {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
LLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0, 1, 0]}),
    "olmo2": ("olmo2", {"rope_parameters": YARN}),
    "granite": ("granite", FACTORS | {"attention_bias": True}),
    "phi3": ("phi3", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "sliding_window": 5}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128, "max_position_embeddings": 512},
    ),
    "gemma2": ("gemma2", SOFTCAPS | {"sliding_window": 5, "layer_types": SLIDING}),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 20, "sliding_window": 5, "layer_types": SLIDING, "rope_parameters": ROPES},
    ),
}


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
