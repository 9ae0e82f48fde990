"""The keys of a DeepSpeed JSON that belong to Config: what they must say, and the refusal of anything else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from hive_scale.config import EngineConfig, StageConfig

AUTO = "auto"


@dataclass(frozen=True)
class Owned:
    """A key of the JSON that Config decides."""

    value: Any
    source: str  # where Config decides it
    also: tuple[Any, ...] = ()  # other spellings of the same


def owned(stage: StageConfig, config: EngineConfig, world_size: int) -> dict[str, Owned]:
    accumulation = stage.accumulation(world_size)
    micro_batch = stage.global_batch // world_size // accumulation
    precision = f"engine.precision={config.precision}"
    return {
        "train_batch_size": Owned(stage.global_batch, "the stage's global_batch"),
        "train_micro_batch_size_per_gpu": Owned(micro_batch, "the stage's micro_batch", (stage.micro_batch,)),
        "gradient_accumulation_steps": Owned(accumulation, f"global_batch / {world_size} processes / micro_batch"),
        "gradient_clipping": Owned(stage.max_grad_norm, "the stage's max_grad_norm"),
        "fp16.enabled": Owned(False, precision),
        "torch_autocast.enabled": Owned(False, precision),
        "bf16.enabled": Owned(config.precision == "bf16", precision),
        "bf16.bf16_master_weights_and_grads": Owned(False, "fp32 masters, always"),
        "bf16.bf16_optimizer_states": Owned(False, "fp32 moments, always"),
        "bf16.check_grad_overflow": Owned(True, "every engine: a gradient that is not finite is not stepped"),
        "data_types.grad_accum_dtype": Owned("fp32", "fp32 gradient accumulation, always"),
        "communication_data_type": Owned("fp32", "fp32 gradient reduction, always"),
        "gradient_allreduce_op": Owned("mean", "the loss's scale"),
        "gradient_predivide_factor": Owned(1.0, "the loss's scale"),
        "prescale_gradients": Owned(False, "the loss's scale"),
        "zero_force_ds_cpu_optimizer": Owned(False, "torch's AdamW, which needs no compiled op"),
    }


def filled(owned: Mapping[str, Owned], config: EngineConfig) -> dict[str, Any]:
    """The owned keys as DeepSpeed is given them."""
    off = "fp16", "torch_autocast", *(["bf16", "data_types"] if config.precision == "fp32" else [])
    result: dict[str, Any] = {}
    for path, key in owned.items():
        section, _, name = path.rpartition(".")
        if section in off:
            continue
        if section:
            result.setdefault(section, {})[name] = key.value
        else:
            result[name] = key.value
    return result


def check_keys(prefix: str, given: Iterable[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            nearest = get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"known here are {', '.join(sorted(known))}"
            raise ValueError(f"'{prefix}{key}' is not a key that can be set in this JSON: {hint}")


def check_owned(settings: Mapping[str, Any], owned: Mapping[str, Owned]) -> None:
    for path, key in owned.items():
        section, _, name = path.rpartition(".")
        value = settings.get(section, {}).get(name, AUTO) if section else settings.get(name, AUTO)
        if value not in (AUTO, key.value, *key.also):
            _contradiction(path, value, key.value, key.source)


def _contradiction(path: str, given: Any, ours: Any, source: str) -> None:
    raise ValueError(
        f"{path}={json.dumps(given)} contradicts {json.dumps(ours)}, from {source}: "
        f'remove {path} or write "auto", or change the config'
    )


def check_optimizer(section: Mapping[str, Any], stage: StageConfig) -> None:
    """Ours is AdamW with the stage's groups; a JSON may repeat what holds for every group."""
    if section.get("type", AUTO) not in (AUTO, "AdamW"):
        _contradiction("optimizer.type", section["type"], "AdamW", "every stage's optimizer")
    ours: dict[str, set[Any]] = {
        "lr": {group.lr for group in stage.groups.values()},
        "weight_decay": {group.weight_decay for group in stage.groups.values()},
        "betas": {tuple(stage.betas)},
        "eps": {stage.eps},
        "torch_adam": {True},
        "adam_w_mode": {True},
    }
    params = section.get("params", {})
    check_keys("optimizer.params.", params, list(ours))
    for name, value in params.items():
        plain = tuple(value) if isinstance(value, list) else value
        if plain != AUTO and ours[name] != {plain}:
            _contradiction(f"optimizer.params.{name}", value, sorted(ours[name]), "the stage's groups")


def check_schedule(section: Mapping[str, Any]) -> None:
    """A scheduler whose parameters are all "auto" is a form to be filled in: ours fills it, whatever its type."""
    for name, value in section.get("params", {}).items():
        if value != AUTO:
            _contradiction(f"scheduler.params.{name}", value, AUTO, "the stage's warmup and min_lr")


def check_unused(name: str, settings: Mapping[str, Any], source: str) -> None:
    for key, value in settings.get(name, {}).items():
        if value not in (AUTO, False, None):
            _contradiction(f"{name}.{key}", value, False, source)
