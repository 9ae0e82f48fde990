"""Settings of each scale, as data: encoder, LLM, sets, steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ENCODER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vision_use_head": False,
}
# SmolLM2-135M cut after six of its thirty layers, which suffice to answer with thirteen words about shapes
SHORT_SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
BYTES: dict[str, Any] = {"path": "bytes", "pad_token": ""}
LEAN = {"log": {"wandb": "off"}, "keep": {"last": 1}}  # many runs: keep one checkpoint each, no wandb


@dataclass(frozen=True)
class Scale:
    """Settings of one scale. `pretrain` and `vlm` override the presets `demo` and `vlm_small`."""

    note: str  # caveats for readers of the figures
    encoder: dict[str, Any]
    base_steps: int  # steps of masked prediction, which trains the common starting encoder
    pretrain: dict[str, Any]
    vlm: dict[str, Any]
    probe: dict[str, list[str]]  # set -> command-line words of probe.py
    questions: int  # number of easy-vqa's test questions to ask
    seeds: int = 3


def _steps(**stages: int) -> dict[str, Any]:
    return {name: {"max_steps": steps} for name, steps in stages.items()}


def small(data: Path) -> Scale:
    """SmolLM2-135M and a ViT of 3.7M parameters on 5,476 emoji and stamps."""
    probe = ["--augment", "none", "--batch", "256"]
    return Scale(
        note="small: a ViT of 3.7M parameters, SmolLM2-135M, 64-pixel images; tells nothing about the paper's sizes",
        encoder=ENCODER,
        base_steps=600,
        pretrain={
            "model": {"language": {"path": str(data / "smollm2")}},
            "data": {
                "train": [str(data / "emoji/train-*.tar"), str(data / "tuxpaint/train-*.tar")],
                "heldout": [str(data / "emoji/heldout-*.tar")],
                "tokenizer": {"path": str(data / "smollm2")},
            },
            "stages": _steps(projector=30, language=40, joint=130),
            "eval_interval": 0,
            **LEAN,
        },
        vlm={
            "model": {"language": {"path": str(data / "smollm2"), "config": SHORT_SMOLLM2}},
            "data": _questions(data, str(data / "smollm2")),
            "stages": _steps(connector=60, language=240),
            **LEAN,
        },
        probe={
            "fashion_mnist": ["--data", str(data / "fashion_mnist"), "--limit", "10000", *probe],
            "emoji": ["--data", str(data / "emoji"), *probe],
        },
        questions=2000,
    )


def small_study(data: Path) -> Scale:
    """The small scale with the first six layers of SmolLM2-135M, since a study trains many models."""
    scale = small(data)
    language = {"language": {"path": str(data / "smollm2"), "config": SHORT_SMOLLM2}}
    stages = _steps(projector=30, language=30, joint=90)
    return replace(
        scale,
        note="small: a ViT of 3.7M parameters, six layers of SmolLM2-135M, 64-pixel images; tells nothing about the "
        "paper's sizes",
        base_steps=300,
        pretrain=scale.pretrain | {"model": language, "stages": stages},
        probe={"fashion_mnist": [*scale.probe["fashion_mnist"], "--epochs", "5"]},
    )


def smoke(data: Path) -> Scale:
    """The same path with toy sizes, to see that it runs. Its figures mean nothing."""
    from hive_scale.presets import debug

    language = {"path": "", "config": debug().model.language.config}
    few = {"global_batch": 8, "micro_batch": 8}
    probe = ["--augment", "none", "--epochs", "2", "--batch", "32", "--rates", "1e-3,1e-2", "--limit", "64"]
    return Scale(
        note="smoke: toys that show that the path is whole; its figures mean nothing",
        encoder=ENCODER | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
        base_steps=3,
        pretrain={
            "model": {"language": language},
            "data": {"train": ["sample:train"], "heldout": ["sample:heldout"], "tokenizer": BYTES},
            "stages": {name: {"max_steps": 2, **few} for name in ("projector", "language", "joint")},
            "eval_interval": 0,
            **LEAN,
        },
        vlm={
            "model": {"language": language},
            # too few samples to hold any out
            "data": {**_questions(data, "bytes", heldout="train"), "max_tokens": 200},
            "stages": {name: {"max_steps": 2, **few} for name in ("connector", "language")},
            **LEAN,
        },
        probe={"emoji": ["--data", str(data / "emoji"), *probe]},
        questions=8,
        seeds=1,
    )


def _questions(data: Path, tokenizer: str, heldout: str = "heldout") -> dict[str, Any]:
    return {
        "train": [str(data / "easyvqa/train-*.tar")],
        "heldout": [str(data / f"easyvqa/{heldout}-*.tar")],
        "tokenizer": {"path": tokenizer},
    }


SCALES = {"small": small, "smoke": smoke}
STUDY_SCALES = {"small": small_study, "smoke": smoke}
