"""Presets: functions that return a Config, by name. YAML files and ``key=value`` words override them.

Among those words, arguments of the preset itself (``fusion=concat``) may be given, too.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from hive_scale.config import (
    Config,
    DataConfig,
    GroupConfig,
    ModelConfig,
    PartConfig,
    StageConfig,
    TokenizerConfig,
)
from hive_scale.config_merge import logger as merging
from hive_scale.config_merge import read_words, read_yaml, refuse_references, resolve, with_new_names
from hive_scale.registry import FUSIONS, use_extensions

LLM_BODY = ("language.model.layers.*", "language.model.norm.*")  # all but embeddings and head, as in the authors' code


class _Declared(NamedTuple):
    """What presets ask of a fusion's class; of an unknown one, placeholders of the right kind."""

    new_parameters: Sequence[str] = ("*",)
    with_llm: Sequence[str] = ()
    gates: Sequence[str] = ("*",)
    beside_gates: Sequence[str] = ("*",)
    lengthens_sequence: bool = False


_is_draft = ContextVar("_is_draft", default=False)  # True: no fusion is imported, and nothing is said


def _fusion(name: str) -> Any:
    return _Declared() if _is_draft.get() else FUSIONS[name]


def three_stages(
    fusion: str,
    learning_rates: tuple[float, float, float],
    weight_decay: float = 1e-5,
    llm: Sequence[str] = LLM_BODY,
) -> dict[str, dict[str, GroupConfig]]:
    """Parameter groups of the stages `projector`, `language` and `joint` (paper 3.5).

    The fusion declares its new parameters, which train from the first stage on.
    """
    kind = _fusion(fusion)
    with_llm = [*llm, *kind.with_llm]

    def group(parameters: Sequence[str], lr: float) -> GroupConfig:
        return GroupConfig(list(parameters), lr, weight_decay)

    first, second, third = learning_rates
    return {
        "projector": {"connector": group(kind.new_parameters, first)},
        "language": {"connector": group(kind.new_parameters, second), "language": group(with_llm, second)},
        "joint": {
            "connector": group(kind.new_parameters, third),
            "language": group(with_llm, third),
            "vision": group(["vision.*"], third),
        },
    }


def open_gates(groups: dict[str, GroupConfig], fusion: str, lr: float = 3e-2) -> None:
    """Give the gates in `groups` their own, higher rate for short runs: little is learned behind a closed gate."""
    kind = _fusion(fusion)
    if kind.gates:
        groups["connector"] = replace(groups["connector"], parameters=list(kind.beside_gates))
        groups["gates"] = GroupConfig(list(kind.gates), lr)


def debug(fusion: str = "cross_attention") -> Config:
    """A small model from scratch on the shipped images: minutes on a laptop, no download."""
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vision_use_head": False,
    }
    language: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.1,  # with a smaller one, a frozen head's output would hardly differ from a uniform guess
    }
    # nothing is pretrained: the LLM trains with embeddings and head, at learning rates for small models
    groups = three_stages(fusion, (3e-3, 1e-3, 1e-3), weight_decay=1e-4, llm=["language.*"])
    open_gates(groups["projector"], fusion)
    groups["language"]["connector"] = replace(groups["language"]["connector"], lr=3e-3)
    # by the time the encoder is trained, the LLM has seen each caption many times, so its rate is low from then on
    groups["joint"]["language"] = replace(groups["joint"]["language"], lr=1e-4, weight_decay=2e-3)
    groups["joint"]["connector"] = replace(groups["joint"]["connector"], weight_decay=2e-3)
    groups["joint"]["vision"] = replace(groups["joint"]["vision"], lr=2e-3)
    common: dict[str, Any] = {"global_batch": 64, "micro_batch": 64}
    return Config(
        name=_name("debug", fusion),
        model=ModelConfig(
            vision=PartConfig(config=vision),
            language=PartConfig(config=language),
            fusion=fusion,
            encoder_layer_ratio=0.5,
        ),
        stages={
            "projector": StageConfig(groups["projector"], max_steps=30, seed=40, **common),
            "language": StageConfig(groups["language"], max_steps=60, seed=41, **common),
            "joint": StageConfig(groups["joint"], max_steps=120, seed=42, min_lr=0.0, **common),
        },
        # minutes of compilation would not pay for seconds of training
        engine=replace(Config().engine, compile=False),
        eval_interval=10,
        save_interval=100,
        blank_image_control=True,
    )


def demo(fusion: str = "cross_attention") -> Config:
    """SmolLM2-135M, pretrained, with a small encoder from scratch, on emoji in three styles.

    Run ``prepare_data.py smollm2`` and ``prepare_data.py emoji --styles all`` first.
    """
    base = debug(fusion)
    groups = three_stages(fusion, (2e-3, 1e-4, 1e-4))
    open_gates(groups["projector"], fusion)
    # encoder, projectors and fusion are new, so they train at higher rates than the pretrained LLM
    for stage, new in (("language", "connector"), ("joint", "connector"), ("joint", "vision")):
        groups[stage][new] = replace(groups[stage][new], lr=1e-3)
    vision = {**base.model.vision.config, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8}
    common: dict[str, Any] = {"global_batch": 32, "micro_batch": 32}
    return replace(
        base,
        name=_name("demo", fusion),
        model=replace(
            base.model,
            vision=PartConfig(config=vision),
            language=PartConfig(path="./data/smollm2"),
            encoder_layer_ratio=0.5,
        ),
        data=DataConfig(
            train=["data/emoji/train-*.tar"],
            heldout=["data/emoji/heldout-*.tar"],
            tokenizer=TokenizerConfig(path="./data/smollm2"),
            max_tokens=32,
        ),
        eval_interval=20,
        stages={
            "projector": StageConfig(groups["projector"], max_steps=30, seed=40, **common),
            "language": StageConfig(groups["language"], max_steps=30, seed=41, max_grad_norm=10.0, **common),
            "joint": StageConfig(groups["joint"], max_steps=80, seed=42, max_grad_norm=10.0, min_lr=0.0, **common),
        },
    )


VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def paper_siglip(fusion: str = "cross_attention") -> Config:
    """SigLIP-L/16-384 and MobileLLM-350M on LLaVA-CC3M-Pretrain-595K (paper, Table 3)."""
    # given in full, since the config on the hub has only the sizes
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 384,
        "patch_size": 16,
        **VIT_L,
    }
    # the paper's SigLIP run uses the later layers (paper 4.5)
    return _paper("paper_siglip", fusion, "google/siglip-large-patch16-384", vision, later=True)


def paper_clip(fusion: str = "cross_attention") -> Config:
    """CLIP-L/14-336 and MobileLLM-350M on LLaVA-CC3M-Pretrain-595K (paper, Table 3)."""
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 336,
        "patch_size": 14,
        **VIT_L,
        "projection_dim": 768,
    }
    base = _paper("paper_clip", fusion, "openai/clip-vit-large-patch14-336", vision, later=False)
    return replace(base, data=replace(base.data, image_transform="crop"))


def siglip2(fusion: str = "cross_attention") -> Config:
    """`paper_siglip` with SigLIP2-L/16-384, which has the same shape."""
    base = paper_siglip(fusion)
    vision = replace(base.model.vision, path="google/siglip2-large-patch16-384")
    return replace(base, name=_name("siglip2", fusion), model=replace(base.model, vision=vision))


def dinov3(fusion: str = "cross_attention") -> Config:
    """DINOv3-L/16 and MobileLLM-350M, on the data of `paper_siglip`."""
    # the config of the gated repository, but for image_size, which is 224 there: the positions are rotary, and at 384
    # there are as many patches as in the other presets
    vision = {
        "model_type": "dinov3_vit",
        "image_size": 384,
        "patch_size": 16,
        **VIT_L,
        "num_register_tokens": 4,
    }
    return _paper("dinov3", fusion, "facebook/dinov3-vitl16-pretrain-lvd1689m", vision, later=False)


# Micro-batch of each stage on a 24 GB card with 1.5 GB to spare, found by `plan.py --fit`, which shows the memory.
RTX3090: dict[str, tuple[int, int, int]] = {
    "cross_attention": (128, 64, 16),
    "joint_attention": (128, 64, 16),
    "concat": (32, 16, 8),
    "deepstack": (16, 16, 8),
    "gated_cross_attention": (128, 64, 16),
    "q_former": (64, 32, 8),
}


def rtx3090(fusion: str = "cross_attention") -> Config:
    """`paper_siglip` on one 24 GB card: the same global batches, with micro-batches that fit."""
    base = paper_siglip(fusion)
    # a fusion of one's own begins with the smallest of these
    sizes = zip(base.stages.items(), RTX3090.get(fusion, min(RTX3090.values())), strict=True)
    stages = {name: replace(stage, micro_batch=size) for (name, stage), size in sizes}
    return replace(base, name=_name("rtx3090", fusion), stages=stages)


# MobileLLM has Llama's architecture; its checkpoints hold no output head, so embeddings must be tied.
MOBILELLM_350M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def _paper(name: str, fusion: str, hub: str, vision: dict[str, Any], later: bool) -> Config:
    groups = three_stages(fusion, (1e-3, 5e-5, 5e-6))
    sequence = _fusion(fusion).lengthens_sequence
    return Config(
        name=_name(name, fusion),
        model=ModelConfig(
            vision=PartConfig(path=hub, config=vision),
            language=PartConfig(path="facebook/MobileLLM-350M", config=MOBILELLM_350M),
            fusion=fusion,
            encoder_layers="later" if later else "uniform",
        ),
        data=DataConfig(
            train=["data/cc3m_595k/train-*.tar"],
            heldout=["data/cc3m_595k/heldout-*.tar"],
            tokenizer=TokenizerConfig(path="facebook/MobileLLM-350M", pad_token="<unk>"),
            workers=4,
        ),
        stages={
            "projector": StageConfig(groups["projector"], micro_batch=16 if sequence else 64, seed=40),
            "language": StageConfig(
                groups["language"], micro_batch=8 if sequence else 32, epochs=2, max_grad_norm=10.0, seed=41
            ),
            "joint": StageConfig(
                groups["joint"],
                global_batch=1024,
                micro_batch=4 if sequence else 16,
                drop_last=True,
                max_grad_norm=10.0,
                min_lr=0.0,
                seed=42,
            ),
        },
        engine=replace(Config().engine, precision="bf16"),
    )


# The config of the gated repository, copied here so that a plan or a dry run needs no access to it.
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "tie_word_embeddings": True,
}


def vlm(encoder: str = "", fusion: str = "concat", llm_only: str = "false") -> Config:
    """LLaVA's two stages with a pretrained encoder and Llama-3.2-1B-Instruct (paper, Table 5).

    `encoder` is a Hugging Face directory. With `llm_only` "true", the second stage freezes the connector, as the
    paper's text says; the authors' code, and LLaVA, keep training it.
    """
    llm = "meta-llama/Llama-3.2-1B-Instruct"
    tokenizer = TokenizerConfig(path=llm, pad_token="<|finetune_right_pad_id|>")
    conversations = DataConfig(
        train=["data/llava_next/train-*.tar"],
        heldout=["data/llava_next/heldout-*.tar"],
        tokenizer=tokenizer,
        format="conversation",
        max_tokens=2048,
        image_transform="pad",
        workers=4,
    )
    captions = {
        "train": ["data/lcs_558k/train-*.tar"],
        "heldout": ["data/lcs_558k/heldout-*.tar"],
        "format": "caption",
        "image_transform": "resize",
    }
    connector, language = _vlm_groups(fusion, (1e-3, 2e-5), str(llm_only).lower() == "true")
    common: dict[str, Any] = {"drop_last": True, "min_lr": 0.0, "betas": (0.9, 0.999)}
    return Config(
        name="vlm",
        model=ModelConfig(
            vision=PartConfig(path=encoder), language=PartConfig(path=llm, config=LLAMA_1B), fusion=fusion
        ),
        data=conversations,
        stages={
            "connector": StageConfig(connector, micro_batch=32, data=captions, **common),
            "language": StageConfig(language, global_batch=64, micro_batch=4, seed=1, **common),
        },
        engine=replace(Config().engine, precision="bf16"),
    )


def vlm_small(encoder: str = "", fusion: str = "concat", llm_only: str = "false") -> Config:
    """The two stages of `vlm` with SmolLM2-135M on easy-vqa, for machines without a GPU.

    Run ``prepare_data.py smollm2`` and ``prepare_data.py easy_vqa`` first.
    """
    connector, language = _vlm_groups(fusion, (2e-3, 2e-4), str(llm_only).lower() == "true")
    common: dict[str, Any] = {"global_batch": 16, "micro_batch": 16, "min_lr": 0.0, "betas": (0.9, 0.999)}
    return Config(
        name="vlm_small",
        model=ModelConfig(vision=PartConfig(path=encoder), language=PartConfig(path="./data/smollm2"), fusion=fusion),
        data=DataConfig(
            train=["data/easyvqa/train-*.tar"],
            heldout=["data/easyvqa/heldout-*.tar"],
            tokenizer=TokenizerConfig(path="./data/smollm2"),
            format="conversation",
            max_tokens=128,
        ),
        stages={
            "connector": StageConfig(connector, max_steps=50, **common),
            "language": StageConfig(language, max_steps=150, seed=1, **common),
        },
        save_interval=50,
    )


def _vlm_groups(
    fusion: str, rates: tuple[float, float], llm_only: bool
) -> tuple[dict[str, GroupConfig], dict[str, GroupConfig]]:
    """Parameter groups of the stages `connector` and `language`; the encoder is frozen in both."""
    kind = _fusion(fusion)
    first = {"connector": GroupConfig(list(kind.new_parameters), rates[0])}
    second = {"language": GroupConfig(["language.*", *kind.with_llm], rates[1])}
    if not llm_only:
        second["connector"] = GroupConfig(list(kind.new_parameters), rates[1])
    return first, second


def _name(preset: str, fusion: str) -> str:
    return preset if fusion == ModelConfig.fusion else f"{preset}_{fusion}"


PRESETS: dict[str, Callable[..., Config]] = {
    "debug": debug,
    "demo": demo,
    "paper_siglip": paper_siglip,
    "paper_clip": paper_clip,
    "siglip2": siglip2,
    "dinov3": dinov3,
    "rtx3090": rtx3090,
    "vlm": vlm,
    "vlm_small": vlm_small,
}


SAVED = {"name", "output", "model", "data", "stages", "engine", "log", "profile", "eval_interval"}


def load(preset: str | None, file: Path | None, words: Sequence[str]) -> Config:
    """Build the config from a preset, a YAML file and ``key=value`` words, each overriding the one before.

    The file may name the preset that it extends (``preset: debug``). Raises ValueError with the remedy: for most
    mistakes before torch is imported, which takes seconds, and which fusions need.
    """
    if "torch" not in sys.modules:
        with _drafting():
            _load(preset, file, words)
    return _load(preset, file, words)


@contextmanager
def _drafting() -> Iterator[None]:
    """Context in which a config is made to find mistakes in it: its groups are not those of the fusion."""
    token = _is_draft.set(True)
    merging.addFilter(_say_nothing)  # warnings are for the config that is made afterwards
    try:
        yield
    finally:
        merging.removeFilter(_say_nothing)
        _is_draft.reset(token)


def _say_nothing(record: logging.LogRecord) -> bool:
    return False


def _load(preset: str | None, file: Path | None, words: Sequence[str]) -> Config:
    layer: dict[str, Any] = read_file(file) if file else {}
    if file and _is_a_runs(file, layer):
        refuse_references(layer, file)
        layer = with_new_names(Config, layer)  # without warnings about old names: the user did not write this file
        use_extensions(_extensions({}, words))
    else:
        use_extensions(_extensions(layer, words))
    named = layer.pop("preset", None)
    if file and not preset and not named:
        base = Config()  # no preset: the file is complete, as one that a run saved
        arguments: dict[str, Any] = {}
    else:
        function = _find(preset or named or "debug")
        takes = inspect.signature(function).parameters
        arguments = {word.split("=", 1)[0]: word.split("=", 1)[1] for word in words if word.split("=")[0] in takes}
        arguments = {key: layer.pop(key) for key in takes if key in layer} | arguments
        _check_arguments(arguments)
        base = function(**arguments)
    config = resolve(base, layer, [word for word in words if word.split("=")[0] not in arguments])
    if not config.stages:
        raise ValueError(f"{file}: there are no stages in it: extend a preset (preset: debug), or name stages")
    return config


def _extensions(layer: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Names of extension modules in a user's own file and words, to import before their entries are looked up."""
    given = [word for word in words if word.startswith("extensions=")]
    read = OmegaConf.to_container(read_words(given, Config)) if given else dict(layer)
    modules = read.get("extensions") if isinstance(read, dict) else None
    modules = [modules] if isinstance(modules, str) else modules
    return [str(module) for module in modules] if isinstance(modules, list) else []


def read_file(file: Path) -> dict[str, Any]:
    """Read a YAML file as a mapping. Raises ValueError if it is not one."""
    if not file.is_file():
        hint = f"it is a folder: give {file / 'config.yaml'}" if file.is_dir() else "give the YAML file of a run"
        raise ValueError(f"--config {file}: no such file: {hint}")
    content = OmegaConf.to_container(read_yaml(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _is_a_runs(file: Path, content: Mapping[str, Any]) -> bool:
    """True if a run wrote `file`, by its content or place. It may be a stranger's run, and is no user's command."""
    folder = file.resolve().parent
    says_all = content.keys() >= SAVED and "preset" not in content
    signs = (place / name for place in (folder, folder.parent) for name in ("initial", "data.json", "slurm/chain.json"))
    return says_all or (file.name == "config.yaml" and any(sign.exists() for sign in signs))


def _find(name: Any) -> Callable[..., Config]:
    if not isinstance(name, str) or name not in PRESETS:
        near = get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"there is no preset '{name}': {hint}")
    return PRESETS[name]


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    fusion, llm_only = (arguments.get(name, plain) for name, plain in (("fusion", "cross_attention"), ("llm_only", "")))
    FUSIONS.check(fusion, "fusion")
    if str(llm_only).lower() not in ("true", "false", ""):
        raise ValueError(f"llm_only={llm_only} is neither true nor false: give one of them")
    if not isinstance(arguments.get("encoder", ""), str):
        raise ValueError(f"encoder={arguments['encoder']} is no directory's name: put it in quotation marks")
