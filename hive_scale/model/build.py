"""Build the model from its config: on the meta device, from scratch, or from pretrained components."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from hive_scale import checksums
from hive_scale.config import ModelConfig, PartConfig, StageConfig, run_of
from hive_scale.config_merge import holds_weights_alone
from hive_scale.locate import is_hub_name, locate
from hive_scale.model import pretrained
from hive_scale.model.adapters import adapt
from hive_scale.model.encoders import REFUSED, family_of
from hive_scale.model.hive import Hive
from hive_scale.model.hosts import ALIASES
from hive_scale.param_groups import ParamGroup, apply_trainable_groups
from hive_scale.registry import ENCODERS, HOSTS

# Fields that may differ from the config beside the weights: a wrong shape is found on loading, and the other fields
# do not change what is computed. Any field not listed here does.
FREE = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim"),
    *("image_size", "patch_size", "num_channels", "projection_dim", "vision_use_head", "vocab_size"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "max_window_layers"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value", "use_mask_token"),
    *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "use_head", "encoder_stride"),
    *("pooler_act", "pooler_output_size", "apply_layernorm", "reshape_hidden_states"),
    *("out_features", "out_indices", "stage_names"),
    *("attention_dropout", "initializer_range", "initializer_factor", "max_position_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
}
FAMILIES = {"vision": ENCODERS, "language": HOSTS}
T = TypeVar("T")
NOTHING: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})


def meta_model(config: ModelConfig) -> Hive:
    """The model with parameters on the meta device and real buffers: names, shapes and counts without memory."""
    model = on_meta(lambda: drawn_model(config))
    model.language.tie_weights()  # moving to the meta device breaks weight tying
    return model


def drawn_model(config: ModelConfig) -> Hive:
    """The model with weights drawn from torch's own generator, whatever paths `config` has."""
    vision, language = vision_config(config.vision), language_config(config.language)
    return Hive(_vision_from(vision), _language_from(language), config)


def for_stage(config: ModelConfig, stage: StageConfig) -> tuple[Hive, list[ParamGroup]]:
    """The model that `stage` trains, on the meta device, ``requires_grad`` set, and its parameter groups.

    Raises ValueError if a glob matches nothing, a parameter falls into two groups, or an adapter into none.
    """
    model = meta_model(config)
    frozen = model.unused_parameters()
    if stage.adapter:
        model.adapted = adapt(model, stage.adapter)
        frozen |= model.adapted.base([name for name, _ in model.named_parameters()])
    groups = apply_trainable_groups(model, stage, frozen)
    if model.adapted and (left := sorted(model.adapted.added - {name for one in groups for name in one.parameters})):
        part = left[0].split(".")[0]
        raise ValueError(
            f"adapter: no group of the stage trains {left[0]}: give its groups one, such as {part}: {{parameters: "
            f"['{part}.*'], lr: 2.0e-4}}"
        )
    return model, groups


def check_positions(model: Hive, max_tokens: int) -> None:
    """Raises ValueError if texts of `max_tokens` with an image reach positions that the LLM's family cannot run."""
    limit = model.host.max_positions(model.language.config)
    if limit is None:
        return
    _, context = model.fusion.prepare(torch.zeros(1, max_tokens, 1), [torch.zeros(1, model.num_visual, 1)], None)
    if (needed := int(context.positions.max()) + 1) > limit:
        raise ValueError(
            f"data.max_tokens={max_tokens} reaches {needed} positions with an image, and the LLM's rotary frequencies "
            f"change beyond {limit}: set data.max_tokens={max_tokens - needed + limit} or less"
        )


def on_meta(make: Callable[[], T]) -> T:
    """Call `make` such that the modules it creates have parameters on the meta device, and real buffers."""
    with init_empty_weights(include_buffers=False):
        return make()


def init_model(config: ModelConfig, seed: int, given: Mapping[str, Mapping[str, Tensor]] = NOTHING) -> Hive:
    """The initial model of a run's first stage, float32 on the CPU: pretrained components, the rest drawn from `seed`.

    `given` has tensors by name for "vision", "language" or "connector" whose path is not a Hugging Face directory.
    Raises ValueError for a missing directory, another architecture, or weights that do not fill a component.
    """
    vision, language = vision_config(config.vision), language_config(config.language)
    for role, part, made in (("vision", config.vision, vision), ("language", config.language, language)):
        if part.config:
            _check_function(made, part, role, offline=False)  # online, since the weights are fetched next anyway
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = _load(family_of(vision).model, config.vision, "vision", vision, given, family_of(vision).loading())
        llm = _load(_language_class(language), config.language, "language", language, given)
        model = Hive(tower or _vision_from(vision), llm or _language_from(language), config)
    if "connector" in given:
        pretrained.load_connector(model, given["connector"], config.connector_weights)
    return model


def _load(
    kind: Any,
    part: PartConfig,
    role: str,
    config: PretrainedConfig,
    given: Mapping[str, Mapping[str, Tensor]],
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module | None:
    place = locate(part.path, f"model.{role}.path") if part.path and role not in given else part.path
    if role == "vision" and place and role not in given:
        _check_pixels(place, config)
    return pretrained.load_pretrained(kind, place, config, given.get(role), arguments)


def _check_pixels(place: str, config: PretrainedConfig) -> None:
    """Raises ValueError if the image processor beside an encoder's weights normalises pixels in another way than ours.

    Nothing else would tell: the features would only be worse.
    """
    family = family_of(config)
    try:
        told, _ = family.processor.get_image_processor_dict(place)
    except Exception:  # there is none, or it is unreadable, for which transformers raises many types
        return
    for name, ours in (("image_mean", family.pixel_mean), ("image_std", family.pixel_std)):
        theirs = told.get(name) if isinstance(told, dict) else None
        if theirs is not None and not _are_close(theirs, ours):
            raise ValueError(
                f"model.vision.path={place}: its processor's {name} is {theirs!s:.80}, that of {config.model_type} "
                f"here is {list(ours)}: give weights that were trained with the latter"
            )


def _are_close(theirs: Any, ours: tuple[float, float, float]) -> bool:
    found = theirs if isinstance(theirs, list) else [theirs] * 3
    pairs = zip(found, ours, strict=False)
    return len(found) == 3 and all(isinstance(a, int | float) and abs(a - b) < 1e-3 for a, b in pairs)


def load_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Hive:
    """The whole model on the CPU, for use without an engine. `weights` has every parameter by name.

    Raises ValueError for a parameter that is missing in `weights`, or has another shape there.
    """
    model = meta_model(config).eval()
    if missing := [name for name, _ in model.named_parameters() if name not in weights]:
        raise ValueError(f"the weights lack {missing[0]}: they are of another model than the config says")
    try:
        model.load_state_dict({name: weights[name] for name, _ in model.named_parameters()}, strict=False, assign=True)
    except RuntimeError as error:  # torch's, which names each parameter of another shape
        raise ValueError(f"the weights are of another model than the config says: {error}") from None
    model.language.tie_weights()
    return model


def encoder_only(config: ModelConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Hive:
    """The model with only its encoder loaded, from `weights` by name, ready to `encode` on `device`."""
    model = meta_model(config).eval()
    names = [name for name, _ in model.vision.named_parameters()]
    model.vision.load_state_dict({name: weights[f"vision.{name}"] for name in names}, strict=False, assign=True)
    model.vision.to(device, dtype).requires_grad_(False)
    model.pixel_mean, model.pixel_std = model.pixel_mean.to(device), model.pixel_std.to(device)
    return model


def with_full_configs(config: ModelConfig) -> ModelConfig:
    """The same model config with the components' configs written out, so that it needs none of their directories."""
    vision = PartConfig(config=_fields(vision_config(config.vision)))
    return replace(config, vision=vision, language=PartConfig(config=_fields(language_config(config.language))))


def open_encoder(path: Path) -> nn.Module:
    """Load the encoder alone from a Hugging Face directory or hub name: float32 on the CPU, in eval mode.

    Raises ValueError for another architecture, and for weights that do not fill it or are not finite.
    """
    vision = vision_config(PartConfig(path=str(path)))
    _check_pixels(str(path), vision)
    family = family_of(vision)
    tower = pretrained.load_pretrained(family.model, str(path), vision, None, family.loading())
    assert tower is not None
    pretrained.check_finite(tower, path)
    return tower.eval()


def image_size(config: ModelConfig) -> int:
    """Side in pixels of the encoder's square input images."""
    size: int = vision_config(config.vision).image_size
    return size


def pad_colour(config: ModelConfig) -> tuple[int, int, int]:
    """Colour that ``data.image_transform=pad`` fills in: the encoder's mean colour, as in an exported model."""
    return family_of(vision_config(config.vision)).mean_colour


def vocabulary_size(config: ModelConfig) -> int:
    """Number of rows of the LLM's embedding table; token ids must be smaller."""
    size: int = language_config(config.language).vocab_size
    return size


def _vision_from(config: PretrainedConfig) -> nn.Module:
    with _buildable("vision"):
        return family_of(config).make(config)


def _language_from(config: PretrainedConfig) -> nn.Module:
    auto: Any = AutoModelForCausalLM
    with _buildable("language"):
        return cast(nn.Module, auto.from_config(config))


@contextmanager
def _buildable(role: str) -> Iterator[None]:
    """Turn any exception of transformers or torch about unusable config values into a ValueError."""
    try:
        yield
    except Exception as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "").strip()
        raise ValueError(
            f"model.{role}: its config makes no model ({type(error).__name__}: {reason}): correct model.{role}.config"
        ) from None


def _language_class(config: PretrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def vision_config(part: PartConfig) -> PretrainedConfig:
    """The encoder's Hugging Face config. Raises ValueError for an unsupported one."""
    config = _config(part, "vision")
    config = _inner(config)
    _known(config.model_type, part, "vision")
    for name in ("image_size", "patch_size"):
        if not isinstance(side := getattr(config, name), int):
            raise ValueError(f"model.vision: {name} is {side}: give one number, the side of a square")
    if config.num_channels != 3:
        raise ValueError(f"model.vision: num_channels is {config.num_channels}: images have 3, red, green and blue")
    if not 0 < config.patch_size <= config.image_size:
        raise ValueError(
            f"model.vision: image_size {config.image_size} has no room for a patch of {config.patch_size}: "
            "use a larger image_size or a smaller patch_size"
        )
    return config


def language_config(part: PartConfig) -> PretrainedConfig:
    """The LLM's Hugging Face config. Raises ValueError for an unsupported one."""
    config = _config(part, "language")
    _known(config.model_type, part, "language")
    try:
        HOSTS[config.model_type]().check(config)
    except ValueError as error:
        raise ValueError(f"model.language{f' {part.path}' if part.path else ''}: {error}") from None
    return config


def _inner(config: PretrainedConfig) -> PretrainedConfig:
    """The encoder's config, also from that of a whole CLIP or SigLIP, which holds it."""
    return cast(PretrainedConfig, getattr(config, "vision_config", config))


def _config(part: PartConfig, role: str) -> PretrainedConfig:
    if part.config:
        fields = dict(part.config)
        if "model_type" not in fields and part.path and not holds_weights_alone(part.path):
            fields = _fields(_inner(_config(PartConfig(part.path), role))) | fields  # changes to the path's own config
        model_type = fields.pop("model_type", None)
        _known(model_type, part, role)
        _check_fields(model_type, fields, role)
        with _buildable(role):
            config = _float32(AutoConfig.for_model(model_type, **fields))
        _check_function(config, part, role)
        return config
    if not part.path:
        raise ValueError(
            f"model.{role} has neither path nor config: give a Hugging Face directory, or a config to build"
        )
    if holds_weights_alone(part.path):
        raise ValueError(f"model.{role}.path={part.path} holds weights alone: give model.{role}.config, too")
    if run := run_of(part.path):
        return _config(getattr(run.model, role), role)
    place = locate(part.path, f"model.{role}.path")
    if os.path.exists(place) and not (Path(place) / "config.json").is_file():
        raise ValueError(f"model.{role}.path={part.path} has no config.json: give a Hugging Face model directory")
    said = _said_beside(part, role)
    if "vision_config" not in said and "model_type" in said:  # refuse it before transformers asks for more packages
        if role == "language" and str(said["model_type"]) in ALIASES:
            return _float32(ALIASES[str(said["model_type"])](said))
        _known(said["model_type"], part, role)
    try:
        return _float32(AutoConfig.from_pretrained(place, trust_remote_code=False))
    except Exception as error:  # transformers raises many types for a malformed config.json
        raise _unreadable(part, role, error) from None


def _check_function(config: PretrainedConfig, part: PartConfig, role: str, offline: bool = True) -> None:
    """Raises ValueError if `config`, made from `part.config`, computes another function than the weights' own config.

    Loading the weights finds other shapes, but not another activation, epsilon or rotary base. With `offline`, weights
    on the hub that were never fetched are not checked.
    """
    if not part.path or holds_weights_alone(part.path):
        return
    computing = _known_fields(config.model_type) - vars(PretrainedConfig()).keys() - FREE - {"model_type"}
    if run := run_of(part.path):
        theirs = _config(getattr(run.model, role), role)
    else:
        theirs = _as_said(config, computing, part, role, offline)
    ours, trained = config.to_dict(), getattr(theirs, "vision_config", theirs).to_dict()
    differing = [
        f"{name}={trained.get(name)} (here {ours.get(name)})"
        for name in sorted(computing)
        if not _is_same(ours.get(name), trained.get(name))
    ]
    if differing:
        raise ValueError(
            f"model.{role}: the weights of {part.path} were trained with {', '.join(differing)}: give the same in "
            f"model.{role}.config, or model.{role}.config={{}} to take the whole config that is beside them"
        )


def _is_same(ours: Any, trained: Any) -> bool:
    """True for equal fields, and for lists by layer of which one is longer, since layers may be left out."""
    if isinstance(ours, list) and isinstance(trained, list):
        return all(one == other for one, other in zip(ours, trained, strict=False))
    return bool(ours == trained)


def _as_said(
    config: PretrainedConfig, computing: set[str], part: PartConfig, role: str, offline: bool
) -> PretrainedConfig:
    """The ``config.json`` beside the weights, read as the type of `config`. Raises ValueError if its type differs."""
    said = _said_beside(part, role, offline)
    inner = said.get("vision_config") if role == "vision" else None
    said = inner if isinstance(inner, dict) else said
    family = said.get("model_type", config.model_type)
    if family != config.model_type and family in FAMILIES[role]:
        raise ValueError(
            f"model.{role}: {part.path} is of type {family}, its config here of type {config.model_type}: give "
            f"model.{role}.config={{}} to take the directory's own, or weights of that type"
        )
    if not said:
        return config
    known: dict[str, Any] = {}
    if family != config.model_type:  # a type that transformers does not know: missing fields are taken from `config`
        known = {name: value for name, value in config.to_dict().items() if name in computing | FREE}
        said = {name: said[name] for name in (computing | FREE) & said.keys()}
    if {"rope_theta", "rope_scaling"} & said.keys():
        known.pop("rope_parameters", None)  # the newer name for these two
    # a family's older names of fields, such as gemma3_text's rope_local_base_freq, are for its config to read
    known |= {name: value for name, value in said.items() if name != "model_type"}
    with _buildable(role):
        return AutoConfig.for_model(config.model_type, **known)


def _said_beside(part: PartConfig, role: str, offline: bool = False) -> dict[str, Any]:
    """The ``config.json`` beside the weights, {} if there is none. Raises ValueError if they cannot be trained."""
    place = os.path.expanduser(part.path) if offline else locate(part.path, f"model.{role}.path")
    if offline and not is_hub_name(part.path) and not os.path.exists(place):  # planned before it is there
        return {}
    checksums.check(Path(place), weights=False)
    try:
        said, _ = PretrainedConfig.get_config_dict(place, local_files_only=offline)
    except (OSError, TypeError):  # not available, or not a JSON object
        return {}
    except Exception as error:  # transformers raises many types, as in _config
        raise _unreadable(part, role, error) from None
    if not isinstance(said, dict):
        return {}
    if said.get("model_type") == "timm_wrapper":
        raise ValueError(f"model.{role}.path={part.path} is a timm model: give the same encoder as transformers has it")
    if packed := said.get("quantization_config"):
        method = packed.get("quant_method", "") if isinstance(packed, dict) else ""
        raise ValueError(
            f"model.{role}.path={part.path} holds quantized weights ({method or 'quantization_config'}), which cannot "
            "be trained: give the model that they were made of"
        )
    return said


def _unreadable(part: PartConfig, role: str, error: Exception) -> ValueError:
    reason = _first_line(error)
    return ValueError(f"model.{role}.path={part.path} cannot be read as a Hugging Face model: {reason}")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)


def _float32(config: Any) -> PretrainedConfig:
    """Set the config's dtype to float32, since master weights are float32 whatever the published precision."""
    for part in (config, getattr(config, "vision_config", config)):
        part.dtype = torch.float32
    return cast(PretrainedConfig, config)


def _check_fields(model_type: Any, fields: Mapping[str, Any], role: str) -> None:
    """Raises ValueError for an unknown field: Hugging Face configs would accept and ignore a typo."""
    known = _known_fields(model_type)
    for field in fields:
        if field not in known:
            near = get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see the {model_type} configuration of transformers"
            raise ValueError(f"model.{role}.config.{field}: there is no such field: {hint}")


def _known_fields(model_type: str) -> set[str]:
    # the last four are accepted by transformers, though some releases do not list them
    return {*AutoConfig.for_model(model_type).to_dict(), "rope_theta", "rope_scaling", "head_dim", "vision_use_head"}


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `config` from which `_config` makes the same config."""
    known = {*AutoConfig.for_model(config.model_type).to_dict()} - {"transformers_version", "_name_or_path", "dtype"}
    return {name: value for name, value in config.to_dict().items() if name in known}


def _known(model_type: Any, part: PartConfig, role: str) -> None:
    where = part.path or "its config"
    if reason := REFUSED.get(str(model_type)):
        raise ValueError(f"model.{role}: {where} is of type {model_type}: {reason}")
    if model_type not in FAMILIES[role]:
        supported = ", ".join(FAMILIES[role].names())
        raise ValueError(
            f"model.{role}: {where} is of type {model_type}: supported are {supported}; docs/extending.md says how to "
            "add a family"
        )
