"""Keys of a DeepSpeed JSON that the Config decides: the values they must have, and how contradictions are reported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from hive_scale.config import EngineConfig, StageConfig
from hive_scale.registry import OPTIMIZERS
from hive_scale.strict_json import dumps

AUTO = "auto"

# Optional sections of a DeepSpeed JSON, and the option of ours that does the same.
SWITCHES = {
    "amp": "engine.precision=bf16",
    "autotuning": "launchers/plan.py --fit",
    "checkpoint": "save_interval and keep.*",
    "comet": "log.wandb=online or log.tensorboard=true",
    "compile": "engine.compile=true",
    "csv_monitor": "metrics.jsonl, which every stage writes",
    "curriculum_learning": "stages.NAME.data",
    "data_efficiency": "stages.NAME.data",
    "elasticity": "torchrun --nnodes MIN:MAX",
    "tensorboard": "log.tensorboard=true",
    "wandb": "log.wandb=online",
}
# All optional sections. They may be present if they are switched off.
OPTIONAL = (
    *SWITCHES,
    *("compression_training", "dataloader_drop_last", "disable_allgather", "eigenvalue", "hybrid_engine", "nebula"),
    *("pipeline", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    *("fp32_allreduce", "tensor_parallel", "weight_quantization"),
)


@dataclass(frozen=True)
class OwnedKey:
    """The required value of a JSON key that the Config decides."""

    value: Any
    source: str  # the config option that decides it, for messages
    also: tuple[Any, ...] = ()  # other values that are accepted, and mean the same
    choices: tuple[Any, ...] = ()  # other values that are accepted, and count


def owned(stage: StageConfig, config: EngineConfig, world_size: int) -> dict[str, OwnedKey]:
    """The keys of a DeepSpeed JSON that the Config decides, by dotted path, for one stage on `world_size` processes."""
    accumulation = stage.accumulation(world_size)
    micro_batch = stage.global_batch // world_size // accumulation
    precision = f"engine.precision={config.precision}"
    return {
        "train_batch_size": OwnedKey(stage.global_batch, "the stage's global_batch"),
        "train_micro_batch_size_per_gpu": OwnedKey(micro_batch, "the stage's micro_batch", (stage.micro_batch,)),
        "gradient_accumulation_steps": OwnedKey(accumulation, f"global_batch / {world_size} processes / micro_batch"),
        "gradient_clipping": OwnedKey(stage.max_grad_norm, "the stage's max_grad_norm"),
        "fp16.enabled": OwnedKey(False, precision),
        "torch_autocast.enabled": OwnedKey(False, precision),
        "bf16.enabled": OwnedKey(config.precision == "bf16", precision),
        "bf16.bf16_master_weights_and_grads": OwnedKey(False, "fp32 masters, always"),
        "bf16.bf16_optimizer_states": OwnedKey(False, "fp32 moments, always"),
        "bf16.check_grad_overflow": OwnedKey(True, "every engine: a gradient that is not finite is not stepped"),
        "data_types.grad_accum_dtype": OwnedKey("fp32", "fp32 gradient accumulation, always"),
        # in bf16, gradients are rounded to bf16 by the backward in any case; in fp32 this would cost their precision
        "communication_data_type": OwnedKey("fp32", precision, choices=("bf16",) * (config.precision == "bf16")),
        "gradient_allreduce_op": OwnedKey("mean", "the loss's scale"),
        "gradient_predivide_factor": OwnedKey(1.0, "the loss's scale"),
        "prescale_gradients": OwnedKey(False, "the loss's scale"),
        "zero_force_ds_cpu_optimizer": OwnedKey(False, "torch's AdamW, which needs no compiled op"),
    }


def filled(owned: Mapping[str, OwnedKey], config: EngineConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The owned keys as nested settings for DeepSpeed, without sections that are off. Choices are as `given`."""
    off = "fp16", "torch_autocast", *(["bf16", "data_types"] if config.precision == "fp32" else [])
    result: dict[str, Any] = {}
    for path, key in owned.items():
        section, _, name = path.rpartition(".")
        if section in off:
            continue
        if section:
            result.setdefault(section, {})[name] = key.value
        else:
            result[name] = given[name] if given.get(name) in key.choices else key.value
    return result


def check_keys(prefix: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for a key not in `known`; the message has the nearest key, or our option for the same."""
    for key in given:
        if key not in known:
            nearest = get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"known here are {', '.join(sorted(set(known)))}"
            if not prefix and key in OPTIONAL:
                hint = f"remove it and use {SWITCHES[key]}" if key in SWITCHES else "remove it, it is not supported"
            raise ValueError(f"'{prefix}{key}' is not a key that can be set in this JSON: {hint}")


class Contradiction(NamedTuple):
    """A JSON value that differs from the Config's."""

    path: str
    given: Any
    ours: Any
    source: str


def contradictions(
    settings: Mapping[str, Any], owned: Mapping[str, OwnedKey], stage: StageConfig
) -> Iterator[Contradiction]:
    """Yield every contradiction. Raises ValueError for an unknown option of the optimizer."""
    for path, key in owned.items():
        section, _, name = path.rpartition(".")
        value = settings.get(section, {}).get(name, AUTO) if section else settings.get(name, AUTO)
        if value not in (AUTO, key.value, *key.also, *key.choices):
            yield Contradiction(path, value, key.value, key.source)
    yield from _optimizer(settings.get("optimizer", {}), stage)
    for name, value in settings.get("scheduler", {}).get("params", {}).items():
        if value != AUTO:  # "auto" is filled in with our schedule, whatever the scheduler's type
            yield Contradiction(f"scheduler.params.{name}", value, AUTO, "the stage's warmup and min_lr")
    for name, value in settings.get("activation_checkpointing", {}).items():
        if value not in (AUTO, False, None):
            yield Contradiction(f"activation_checkpointing.{name}", value, False, "engine.checkpointing.*")


def _optimizer(section: Mapping[str, Any], stage: StageConfig) -> Iterator[Contradiction]:
    """Yield contradictions in the optimizer section. It may repeat values that are the same in all of our groups."""
    ours_type = OPTIMIZERS[stage.optimizer].deepspeed_type or AUTO
    if section.get("type", AUTO) not in (AUTO, ours_type):
        yield Contradiction("optimizer.type", section["type"], ours_type, "stages.*.optimizer")
        return  # another optimizer type has other parameters
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
        if plain != AUTO and list(ours[name]) != [plain]:
            yield Contradiction(f"optimizer.params.{name}", value, sorted(ours[name]), "the stage's groups")


def told(found: Mapping[str, Sequence[Contradiction]], text: str) -> list[str]:
    """One message per contradicting key of the JSON `text`: its line, its value, and the Config's value by stage."""
    by_path: dict[str, dict[str, list[str]]] = {}
    first: dict[str, Contradiction] = {}
    for stage, many in found.items():
        for one in many:
            first.setdefault(one.path, one)
            by_path.setdefault(one.path, {}).setdefault(dumps(one.ours), []).append(stage)
    lines = []
    for path, values in by_path.items():
        ours = " and ".join(f"{value}{_of(stages)}" for value, stages in values.items())
        one = first[path]
        lines.append(f"line {_line(text, path)}: {path}={dumps(one.given)} contradicts {ours}, from {one.source}")
    return lines


def _of(stages: Sequence[str]) -> str:
    return f" of {', '.join(stages)}" if any(stages) else ""


def _line(text: str, path: str) -> int:
    """Line number (from 1) of the key at the dotted `path` in the JSON `text`."""
    at = 0
    for name in path.split("."):
        found = re.compile(rf'"{re.escape(name)}"\s*:').search(text, at)
        at = found.start() if found else at
    return text.count("\n", 0, at) + 1
