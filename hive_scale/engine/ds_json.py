"""A DeepSpeed JSON, completed and checked: it owns ZeRO and offload, the run's Config owns everything else.

Every key that Config owns may be absent, "auto", or say the same; anything else is refused by name.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from hive_scale.config import EngineConfig, StageConfig

AUTO = "auto"

# What "auto" means under zero_optimization, for models of some hundred million parameters; DeepSpeed's own
# defaults (buckets of 5e8, 1e9 live parameters) would keep all of such a model gathered.
AUTO_ZERO = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}

# Keys that change neither what is learned nor how it is cut; they reach DeepSpeed as they are.
HARMLESS = (
    "aio",
    "comms_logger",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
)

# ZeRO features that this toolkit does not carry, and why.
_LAYOUT = "a checkpoint could not tell which rank owns what"
_NUMBERS = "steps would differ from those of every other engine"
REFUSED_ZERO: dict[str, tuple[tuple[Any, ...], str]] = {
    "round_robin_gradients": ((False,), _LAYOUT),
    "zero_hpz_partition_size": ((0, 1), _LAYOUT),
    "zero_quantized_weights": ((False,), _NUMBERS),
    "zero_quantized_nontrainable_weights": ((False,), _NUMBERS),
    "zero_quantized_gradients": ((False,), _NUMBERS),
    "zenflow": ((None,), _NUMBERS),
    "compute_grad_norm": ((True,), "clipping needs the norm"),
    "legacy_stage1": ((False,), "DeepSpeed has dropped it"),
    "elastic_checkpoint": ((False,), "checkpoints are not DeepSpeed's"),
    "offload_optimizer.ratio": ((1, 1.0), _LAYOUT),
    "offload_optimizer.super_offload": ((False,), _LAYOUT),
}


@dataclass(frozen=True)
class Owned:
    """A key of the JSON that Config decides."""

    value: Any
    source: str  # where Config decides it
    also: tuple[Any, ...] = ()  # other spellings of the same


def resolve(path: Path, stage: StageConfig, config: EngineConfig, world_size: int) -> dict[str, Any]:
    """The settings that DeepSpeed is given: the JSON at `path`, with what `stage` and `config` own filled in.

    Needs no GPU and starts nothing. Raises ValueError that names the key, both values and the remedy.
    """
    settings = _read(path)
    try:
        _check_engine(config)
        owned = _owned(stage, config, world_size)
        _check_keys("", settings, _top_keys(owned))
        for name in ("fp16", "bf16", "torch_autocast"):
            if not _enabled(settings.get(name, {})):
                settings.pop(name, None)  # what a switched-off section says does not matter
        _check_owned(settings, owned)
        _check_optimizer(settings.get("optimizer", {}), stage)
        _check_schedule(settings.get("scheduler", {}))
        _check_unused("activation_checkpointing", settings, "engine.checkpointing.*")
        zero = _zero(settings.get("zero_optimization"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kept = {key: value for key, value in settings.items() if key in HARMLESS and value != AUTO}
    kept.setdefault("steps_per_print", 1 << 60)  # the metrics are ours to print
    return {**kept, **_filled(owned, config), "zero_optimization": zero}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"engine.ds_config={path} is no file: give a DeepSpeed JSON, such as ds_configs/zero2.json")
    try:
        settings = json.loads(path.read_text(), object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: correct the JSON") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds a {type(settings).__name__}: a DeepSpeed JSON is one object {{...}}")
    return settings


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"'{key}' is given twice")
        result[key] = value
    return result


def _check_engine(config: EngineConfig) -> None:
    """With a JSON, sharding and offload are its own."""
    for name, plain, instead in (
        ("shard", 0, "zero_optimization.stage"),
        ("offload", False, "zero_optimization.offload_optimizer"),
    ):
        if (value := getattr(config, name)) != plain:
            raise ValueError(
                f"engine.{name}={value} belongs to the native engine: set engine.{name}={plain} and use {instead} "
                "here, or leave engine.ds_config empty"
            )


def _owned(stage: StageConfig, config: EngineConfig, world_size: int) -> dict[str, Owned]:
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
        "data_types.grad_accum_dtype": Owned("fp32", "fp32 gradient accumulation, always"),
        "communication_data_type": Owned("fp32", "fp32 gradient reduction, always"),
        "gradient_allreduce_op": Owned("mean", "the loss's scale"),
        "gradient_predivide_factor": Owned(1.0, "the loss's scale"),
        "prescale_gradients": Owned(False, "the loss's scale"),
        "zero_force_ds_cpu_optimizer": Owned(False, "torch's AdamW, which needs no compiled op"),
    }


def _filled(owned: Mapping[str, Owned], config: EngineConfig) -> dict[str, Any]:
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


def _top_keys(owned: Iterable[str]) -> list[str]:
    sections = ("zero_optimization", "optimizer", "scheduler", "activation_checkpointing")
    return [*{path.split(".")[0] for path in owned}, *sections, *HARMLESS]


def _check_keys(prefix: str, given: Iterable[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            nearest = get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"known here are {', '.join(sorted(known))}"
            raise ValueError(f"'{prefix}{key}' is not a key that can be set in this JSON: {hint}")


def _check_owned(settings: Mapping[str, Any], owned: Mapping[str, Owned]) -> None:
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


def _check_optimizer(section: Mapping[str, Any], stage: StageConfig) -> None:
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
    _check_keys("optimizer.params.", params, list(ours))
    for name, value in params.items():
        plain = tuple(value) if isinstance(value, list) else value
        if plain != AUTO and ours[name] != {plain}:
            _contradiction(f"optimizer.params.{name}", value, sorted(ours[name]), "the stage's groups")


def _check_schedule(section: Mapping[str, Any]) -> None:
    """A scheduler whose parameters are all "auto" is a form to be filled in: ours fills it, whatever its type."""
    for name, value in section.get("params", {}).items():
        if value != AUTO:
            _contradiction(f"scheduler.params.{name}", value, AUTO, "the stage's warmup and min_lr")


def _check_unused(name: str, settings: Mapping[str, Any], source: str) -> None:
    for key, value in settings.get(name, {}).items():
        if value not in (AUTO, False, None):
            _contradiction(f"{name}.{key}", value, False, source)


def _enabled(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled", False) not in (False, AUTO)


def _zero(section: Any) -> dict[str, Any]:
    """`section` without "auto", every key known to DeepSpeed and of its type."""
    if not isinstance(section, dict) or section.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage={section.get('stage') if isinstance(section, dict) else None} is not 1, 2 or 3: "
            "set one, or leave engine.ds_config empty for DDP and FSDP"
        )
    load_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    known = _names(DeepSpeedZeroConfig)
    _check_keys("zero_optimization.", section, known)
    offload = {
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    for name, model in offload.items():
        _check_keys(f"zero_optimization.{name}.", section.get(name) or {}, _names(model))
    for path, (allowed, reason) in REFUSED_ZERO.items():
        parent, _, name = path.rpartition(".")
        value = ((section.get(parent) or {}) if parent else section).get(name, AUTO)
        if value != AUTO and value not in allowed:
            raise ValueError(
                f"zero_optimization.{path}={json.dumps(value)} is not supported, since {reason}: remove it"
            )
    zero = {key: value for key, value in {**AUTO_ZERO, **_without_auto(section)}.items() if _applies(key, section)}
    _check_offload(zero)
    _check_types(DeepSpeedZeroConfig, zero)
    return zero


def _applies(key: str, section: Mapping[str, Any]) -> bool:
    """Whether our default for an absent key belongs to this stage; a given key stays."""
    return key in section or not key.startswith("stage3_") or section["stage"] == 3


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items()}
    # 5e8 is a float in JSON, and a count here
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in plain.items()
        if value != AUTO
    }


def _names(model: Any) -> list[str]:
    return [name for field, info in model.model_fields.items() for name in (field, info.alias) if name]


def _check_types(model: Any, zero: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    try:
        model(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["zero_optimization", *(str(part) for part in first["loc"])])
        raise ValueError(f"{where}={first['input']!r}: {first['msg']}") from None


def _check_offload(zero: Mapping[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        device = section.get("device", "none")
        if name == "offload_param" and device != "none" and zero["stage"] != 3:
            raise ValueError(f"zero_optimization.{name} needs stage 3, not {zero['stage']}: remove it, or set stage 3")
        if device == "nvme":
            _check_nvme(f"zero_optimization.{name}", section, zero["stage"])


def _check_nvme(where: str, section: Mapping[str, Any], stage: int) -> None:
    if stage != 3:
        raise ValueError(f'{where}.device="nvme" needs stage 3, not {stage}: set stage 3, or device "cpu"')
    if where.endswith("offload_optimizer"):
        raise ValueError(
            f'{where}.device="nvme" keeps masters and moments in files of DeepSpeed\'s own, out of the reach of '
            'checkpoints: set device "cpu"; offload_param may stay on nvme'
        )
    path = Path(section.get("nvme_path") or "")
    if not section.get("nvme_path") or not os.access(path, os.W_OK):
        raise ValueError(
            f"{where}.nvme_path={section.get('nvme_path')} is no writable directory: give one on the drive"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f'{where}.device="nvme" needs DeepSpeed\'s async_io op, which this machine cannot build: install '
            'libaio-dev (apt) and a C++ compiler, or set device "cpu"'
        )


def load_deepspeed() -> Any:
    """The package, told what it would otherwise find out aloud or at a cost."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    # a collective of CPU inference, compiled at every machine's first start and never called here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # it calls collectives by names that torch has since replaced
    warnings.filterwarnings("ignore", message=r".*_tensor. is deprecated", category=FutureWarning)
    return deepspeed
