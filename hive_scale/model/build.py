"""From configuration to model: on the meta device, from scratch, or from pretrained parts."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionModel,
    PretrainedConfig,
    SiglipImageProcessor,
    SiglipVisionModel,
)
from transformers.utils.logging import disable_progress_bar

from hive_scale.config import ModelConfig, PartConfig
from hive_scale.model.hive import Hive
from hive_scale.model.vision import PIXEL_STATISTICS

VISION = {"siglip_vision_model": SiglipVisionModel, "clip_vision_model": CLIPVisionModel}
LANGUAGE = ("llama", "qwen2", "qwen3")


def skeleton(config: ModelConfig) -> Hive:
    """The model with parameters on the meta device and real buffers: names, shapes and counts for free."""
    vision, language = _vision_config(config.vision), _language_config(config.language)
    with init_empty_weights(include_buffers=False):
        model = Hive(_vision_class(vision)(vision), _language_from(language), config)
    model.language.tie_weights()  # moving to meta made two parameters of a tied one
    return model


def assemble(config: ModelConfig, seed: int) -> Hive:
    """The model a first stage starts from, float32 on the CPU: pretrained parts, the rest drawn from `seed`.

    Raises ValueError for a missing directory, another architecture, or weights that do not fill the model.
    """
    vision, language = _vision_config(config.vision), _language_config(config.language)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = _load(_vision_class(vision), config.vision, vision)
        llm = _load(AutoModelForCausalLM, config.language, language)
        return Hive(tower, llm, config)


def materialise(config: ModelConfig, weights: Mapping[str, Tensor]) -> Hive:
    """The whole model on the CPU, for use without an engine, filled from `weights` by name."""
    model = skeleton(config).eval()
    model.load_state_dict({name: weights[name] for name, _ in model.named_parameters()}, strict=False, assign=True)
    model.language.tie_weights()
    return model


def export_encoder(config: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> None:
    """The encoder as a stock Hugging Face directory, with its image processor, for ``from_pretrained``."""
    vision = _vision_config(config.vision)
    with init_empty_weights(include_buffers=False):
        tower = _vision_class(vision)(vision)
    tensors = {name: weights[f"vision.{name}"] for name, _ in tower.named_parameters()}
    tower.load_state_dict(tensors, strict=False, assign=True)
    _quiet()
    tower.save_pretrained(path)
    _image_processor(vision).save_pretrained(path)


def image_size(config: ModelConfig) -> int:
    """Side of the square pictures that the encoder takes, in pixels."""
    size: int = _vision_config(config.vision).image_size
    return size


def vocabulary_size(config: ModelConfig) -> int:
    size: int = _language_config(config.language).vocab_size
    return size


def _image_processor(config: PretrainedConfig) -> Any:
    mean, std = PIXEL_STATISTICS[config.model_type]
    side = config.image_size
    if config.model_type == "clip_vision_model":
        crop = {"height": side, "width": side}
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop, image_mean=mean, image_std=std)
    return SiglipImageProcessor(size={"height": side, "width": side}, image_mean=mean, image_std=std)


def _quiet() -> None:
    """One run has one progress bar."""
    disable_progress_bar()  # type: ignore[no-untyped-call]


def _load(auto: Any, part: PartConfig, config: PretrainedConfig) -> nn.Module:
    if not part.path:
        return _language_from(config) if auto is AutoModelForCausalLM else cast(nn.Module, auto(config))
    _quiet()
    model, report = auto.from_pretrained(
        part.path, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    wrong = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{part.path}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}: "
            "give the directory that belongs to this config"
        )
    return cast(nn.Module, model)


def _language_from(config: PretrainedConfig) -> nn.Module:
    auto: Any = AutoModelForCausalLM
    return cast(nn.Module, auto.from_config(config, attn_implementation="sdpa"))


def _vision_class(config: PretrainedConfig) -> Any:
    return VISION[config.model_type]


def _vision_config(part: PartConfig) -> PretrainedConfig:
    config = _config(part, "vision")
    config = getattr(config, "vision_config", config)  # a whole CLIP or SigLIP directory holds its tower's
    _known(config.model_type, tuple(VISION), part, "vision")
    if config.image_size % config.patch_size:
        raise ValueError(
            f"model.vision: image_size {config.image_size} is not a multiple of patch_size {config.patch_size}: "
            f"use {config.image_size - config.image_size % config.patch_size}"
        )
    config._attn_implementation = "sdpa"
    return config


def _language_config(part: PartConfig) -> PretrainedConfig:
    config = _config(part, "language")
    _known(config.model_type, LANGUAGE, part, "language")
    if set(getattr(config, "layer_types", None) or {"full_attention"}) != {"full_attention"}:
        raise ValueError(
            f"model.language {part.path}: sliding-window layers are not supported: use a full-attention LLM"
        )
    return config


def _config(part: PartConfig, role: str) -> PretrainedConfig:
    if part.config:
        fields = dict(part.config)
        model_type = fields.pop("model_type", None)
        _known(model_type, (*VISION, *LANGUAGE), part, role)
        _check_fields(model_type, fields, role)
        return _float32(AutoConfig.for_model(model_type, **fields))
    if not part.path:
        raise ValueError(
            f"model.{role} has neither path nor config: give a Hugging Face directory, or a config to build"
        )
    if part.path.startswith((".", "/", "~")) and not (Path(part.path).expanduser() / "config.json").is_file():
        raise ValueError(f"model.{role}.path={part.path} has no config.json: give a Hugging Face model directory")
    try:
        return _float32(AutoConfig.from_pretrained(part.path, trust_remote_code=False))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.{role}.path={part.path} cannot be read as a Hugging Face model: {reason}") from None


def _float32(config: Any) -> PretrainedConfig:
    """Masters are float32 whatever precision the published weights have."""
    for part in (config, getattr(config, "vision_config", config)):
        part.dtype = torch.float32
    return cast(PretrainedConfig, config)


def _check_fields(model_type: Any, fields: Mapping[str, Any], role: str) -> None:
    """Hugging Face configs take any field and ignore it; a typo must not pass."""
    # the last three are understood though not listed
    known = {*AutoConfig.for_model(model_type).to_dict(), "rope_theta", "rope_scaling", "head_dim"}
    for field in fields:
        if field not in known:
            near = get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see the {model_type} configuration of transformers"
            raise ValueError(f"model.{role}.config.{field}: there is no such field: {hint}")


def _known(model_type: str | None, known: tuple[str, ...], part: PartConfig, role: str) -> None:
    if model_type not in known:
        where = part.path or "its config"
        raise ValueError(f"model.{role}: {where} is of type {model_type}: supported are {', '.join(known)}")
