"""Complete and check a DeepSpeed JSON: it decides ZeRO and offload, the run's Config decides everything else.

A key that the Config decides may be absent, "auto", or have the same value; any other value is refused by name.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hive_scale.config import EngineConfig, StageConfig
from hive_scale.device import CPU, kind
from hive_scale.engine.deepspeed_owned import (
    AUTO,
    OPTIONAL,
    Contradiction,
    check_keys,
    contradictions,
    filled,
    owned,
    told,
)
from hive_scale.strangers import MB, read_bytes
from hive_scale.strict_json import dumps, loads

log = logging.getLogger(__name__)
COMMENT = re.compile(r"_|//|#|comments?$", re.IGNORECASE)  # keys used as comments, since JSON has none

# Values of "auto" under zero_optimization, for models of some hundred million parameters. DeepSpeed's own defaults
# (buckets of 5e8, 1e9 live parameters) would keep all of such a model gathered.
AUTO_ZERO = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}

# Keys that affect neither training nor sharding, with their types; they are passed to DeepSpeed unchanged.
HARMLESS: dict[str, tuple[type, ...]] = {
    "aio": (dict,),
    "comms_logger": (dict,),
    "disable_python_gc": (bool,),
    "dump_state": (bool,),
    "flops_profiler": (dict,),
    "log_level": (str,),
    "memory_breakdown": (bool,),
    "steps_per_print": (int, float),
    "wall_clock_breakdown": (bool,),
    "zero_allow_untested_optimizer": (bool,),
}

# Known keys of sections that DeepSpeed does not check itself; () where they are checked elsewhere.
SECTIONS: dict[str, tuple[str, ...]] = {
    "fp16": (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
    ),
    "bf16": (
        *("enabled", "immediate_grad_update", "check_grad_overflow"),
        *("bf16_master_weights_and_grads", "bf16_optimizer_states"),
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype",),
    "optimizer": ("type", "params"),
    "scheduler": ("type", "params"),
    "activation_checkpointing": (),
    "zero_optimization": (),
}

# ZeRO features that are not supported: allowed values and reason.
_LAYOUT = "a checkpoint could not tell which rank owns what"
_NUMBERS = "steps would differ from those of every other engine"
REFUSED_ZERO: dict[str, tuple[tuple[Any, ...], str]] = {
    "round_robin_gradients": ((False,), _LAYOUT),
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


def resolve(path: Path, stage: StageConfig, config: EngineConfig, world_size: int, here: bool = True) -> dict[str, Any]:
    """The settings for DeepSpeed: the JSON at `path`, with the values of `stage` and `config` filled in.

    Needs no GPU, and starts nothing. With `here`, this machine must have what the JSON names, such as an NVMe drive.
    Raises ValueError that names the key, both values and the remedy.
    """
    text = _read(path)
    settings, found = _resolved(text, path, stage, config, world_size, here)
    _refuse(path, text, config, {"": found})
    return settings


def check(path: Path, stages: Mapping[str, tuple[StageConfig, int]], config: EngineConfig, here: bool = True) -> None:
    """Check the JSON for every one of `stages`, each given with its number of processes, as `resolve` does for one.

    Raises ValueError with all contradictions at once; with ``ds_config_owned=ignore`` they are logged instead, and
    the Config's values are used.
    """
    text = _read(path)
    found = {name: _resolved(text, path, stage, config, world, here)[1] for name, (stage, world) in stages.items()}
    if ignored := _refuse(path, text, config, found):
        log.warning("%s: ignored, as --ds_config_owned=ignore asks: %s", path, "; ".join(ignored))


def _refuse(path: Path, text: str, config: EngineConfig, found: Mapping[str, Sequence[Contradiction]]) -> list[str]:
    """Return descriptions of contradicting keys, which are ignored. Raises ValueError if they are to be refused."""
    lines = told(found, text)
    if lines and config.ds_config_owned == "refuse":
        raise ValueError(
            f'{path}: {"; ".join(lines)}: write "auto" there or remove it, or change the config, or give '
            "--ds_config_owned=ignore to go by the config"
        )
    return lines


def _resolved(
    text: str, path: Path, stage: StageConfig, config: EngineConfig, world_size: int, here: bool
) -> tuple[dict[str, Any], list[Contradiction]]:
    """The settings for DeepSpeed, and the contradictions found in the JSON."""
    ours = owned(stage, config, world_size)
    try:
        _check_engine(config)
        settings = _parsed(text)
        check_keys("", settings, _top_keys(ours))
        _check_sections(settings)
        _check_harmless(settings)
        for name in ("fp16", "bf16", "torch_autocast"):
            if not _enabled(settings.get(name, {})):
                settings.pop(name, None)  # keys of a switched-off section do not count
        found = list(contradictions(settings, ours, stage))
        zero = _zero(settings.get("zero_optimization"), here)
        _check_second_copy(zero, world_size)
        if config.compile is True and zero["stage"] == 3:
            raise ValueError(
                "engine.compile=true, but ZeRO-3 gathers inside the blocks and would cut each into many graphs: set "
                "engine.compile=false, or zero_optimization.stage=2, or leave engine.ds_config empty for FSDP"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kept = _without_auto({key: value for key, value in settings.items() if key in HARMLESS})
    kept.setdefault("steps_per_print", 1 << 60)  # never: this package prints the metrics
    return {**kept, **filled(ours, config, settings), "zero_optimization": zero}, found


def _read(path: Path) -> str:
    try:
        return read_bytes(path, MB).decode()
    except (OSError, ValueError) as error:
        is_text = not isinstance(error, UnicodeDecodeError)
        reason = (getattr(error, "strerror", None) or str(error)) if is_text else "it is not text"
        raise ValueError(
            f"engine.ds_config={path} is no file that can be read ({reason}): give a DeepSpeed JSON, or the name of "
            "one in ds_configs, such as zero2"
        ) from None


def _parsed(text: str) -> dict[str, Any]:
    """Parse the JSON, without comment keys and without optional sections that are off."""
    try:
        settings = loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{error}: correct the JSON") from None
    if not isinstance(settings, dict):
        raise ValueError(f"holds a {type(settings).__name__}: a DeepSpeed JSON is one object {{...}}")
    if "bfloat16" in settings:
        settings = _unique([("bf16" if key == "bfloat16" else key, value) for key, value in settings.items()])
    return {key: value for key, value in settings.items() if key not in OPTIONAL or _is_on(value)}


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if COMMENT.match(key):
            continue
        if key in result:
            raise ValueError(f"'{key}' is given twice")
        result[key] = value
    return result


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _is_on(section: Any) -> bool:
    """True if an optional section is switched on."""
    if isinstance(section, dict):
        asked = section.get("enabled", section.get("deepcompile", bool(section)))
        return asked not in (False, None, AUTO) and section.get("disable") is not True
    return section not in (False, None, AUTO)


def _check_engine(config: EngineConfig) -> None:
    """Raises ValueError if `config` sets sharding or offload, which the JSON decides."""
    for name, plain, instead in (
        ("shard_size", 0, "zero_optimization.stage"),
        ("cpu_offload", False, "zero_optimization.offload_optimizer"),
    ):
        if (value := getattr(config, name)) != plain:
            raise ValueError(
                f"engine.{name}={value} belongs to the native engine: set engine.{name}={plain} and use {instead} "
                "here, or leave engine.ds_config empty"
            )


def _top_keys(names: Iterable[str]) -> list[str]:
    return [*{path.split(".")[0] for path in names}, *SECTIONS, *HARMLESS]


def _check_sections(settings: Mapping[str, Any]) -> None:
    for name, known in SECTIONS.items():
        section = settings.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f"{name}={dumps(section)} must be an object, such as {{}}: correct or remove it")
        if known:
            check_keys(f"{name}.", section, known)
        if not isinstance(section.get("params", {}), dict):
            raise ValueError(f"{name}.params={dumps(section['params'])} must be an object: correct or remove it")


def _check_harmless(settings: Mapping[str, Any]) -> None:
    for name, types in HARMLESS.items():
        value = settings.get(name, AUTO)
        if value != AUTO and (type(value) not in types):
            wanted = {dict: "an object", bool: "true or false", str: "text"}.get(types[0], "a number")
            raise ValueError(f"{name}={dumps(value)} must be {wanted}: correct or remove it")
    load_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.utils.logging import log_levels

    if isinstance(settings.get("comms_logger"), dict):
        _check_types("comms_logger", CommsLoggerConfig, settings["comms_logger"])
    _check_like("aio", AIO_DEFAULT_DICT, settings.get("aio"))
    _check_like("flops_profiler", vars(DeepSpeedFlopsProfilerConfig({})), settings.get("flops_profiler"))
    if (level := settings.get("log_level", AUTO)) != AUTO and level.lower() not in log_levels:
        raise ValueError(f"log_level={dumps(level)} is none of {', '.join(log_levels)}: give one of them")
    if (steps := settings.get("steps_per_print", AUTO)) != AUTO and steps < 1:
        raise ValueError(f"steps_per_print={dumps(steps)} must be at least 1: correct or remove it")


def _check_like(section: str, plain: Mapping[str, Any], content: Any) -> None:
    """Raises ValueError if a value in `content` has another type than DeepSpeed's default."""
    for name, value in content.items() if isinstance(content, dict) else ():
        like = plain.get(name)
        kinds = (int, float) if type(like) in (int, float) else (type(like),)
        if like is not None and value != AUTO and type(value) not in kinds:
            raise ValueError(f"{section}.{name}={dumps(value)} must be like {dumps(like)}: correct or remove it")


def _enabled(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled", False) not in (False, AUTO)


def _zero(section: Any, here: bool) -> dict[str, Any]:
    """Check the zero_optimization section, and return it without "auto" and with our defaults. Raises ValueError."""
    stage = section.get("stage") if isinstance(section, dict) else None
    if not isinstance(section, dict) or stage not in (1, 2, 3) or stage is True:
        raise ValueError(
            f"zero_optimization.stage={dumps(stage)} is not 1, 2 or 3: "
            "set one, or leave engine.ds_config empty for DDP and FSDP"
        )
    load_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    check_keys("zero_optimization.", section, _names(DeepSpeedZeroConfig))
    section = _as_called_today(DeepSpeedZeroConfig, section)
    offload = {
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    for name, model in offload.items():
        if not isinstance(section.get(name) or {}, dict):
            raise ValueError(f'zero_optimization.{name}: give an object, such as {{"device": "cpu"}}, or remove it')
        check_keys(f"zero_optimization.{name}.", section.get(name) or {}, _names(model))
    for path, (allowed, reason) in REFUSED_ZERO.items():
        parent, _, name = path.rpartition(".")
        value = ((section.get(parent) or {}) if parent else section).get(name, AUTO)
        if value != AUTO and value not in allowed:
            raise ValueError(f"zero_optimization.{path}={dumps(value)} is not supported, since {reason}: remove it")
    zero = {key: value for key, value in {**AUTO_ZERO, **_without_auto(section)}.items() if _applies(key, section)}
    _check_offload(zero, here)
    _check_types("zero_optimization", DeepSpeedZeroConfig, zero)
    return zero


def _as_called_today(model: Any, section: Mapping[str, Any]) -> dict[str, Any]:
    """Rename deprecated keys of `section`, which DeepSpeed still accepts, to their documented names.

    For instance ``max_live_parameters`` becomes ``stage3_max_live_parameters``, and ``cpu_offload`` an
    ``offload_optimizer`` section.
    """
    pairs: list[tuple[str, Any]] = []
    names = {field: info.alias or field for field, info in model.model_fields.items()}
    for key, value in section.items():
        info = model.model_fields.get(key)
        deprecated = (info.json_schema_extra or {}) if info else {}
        if not deprecated.get("deprecated"):
            pairs.append((names.get(key, key), value))
        elif deprecated.get("set_new_param", True) and value != AUTO:
            made = deprecated.get("new_param_fn", lambda same: same)(value)
            made = made.model_dump(exclude_unset=True) if hasattr(made, "model_dump") else made
            pairs.append((names.get(deprecated["new_param"], deprecated["new_param"]), made))
    try:
        return _unique(pairs)
    except ValueError as error:
        raise ValueError(f"zero_optimization: {error}, under an older name, too: remove one of them") from None


def _applies(key: str, section: Mapping[str, Any]) -> bool:
    """True for a key that was given, and for a default that applies to this ZeRO stage."""
    return key in section or not key.startswith("stage3_") or section["stage"] == 3


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items()}
    # JSON spells counts such as 5e8 as floats
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in plain.items()
        if value != AUTO
    }


def _names(model: Any) -> list[str]:
    return [name for field, info in model.model_fields.items() for name in (field, info.alias) if name]


def _check_types(section: str, model: Any, content: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    try:
        model(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([section, *(str(part) for part in first["loc"])])
        raise ValueError(f"{where}={first['input']!r}: {first['msg']}") from None
    except Exception as error:  # DeepSpeed's validators raise many types for a value of the wrong kind
        raise ValueError(f"{section}: {error}: correct or remove it") from None


def _check_offload(zero: Mapping[str, Any], here: bool) -> None:
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        device = section.get("device", "none")
        if name == "offload_param" and device != "none" and zero["stage"] != 3:
            raise ValueError(f"zero_optimization.{name} needs stage 3, not {zero['stage']}: remove it, or set stage 3")
        if device == "nvme":
            _check_nvme(f"zero_optimization.{name}", section, zero["stage"], here)


def _check_second_copy(zero: Mapping[str, Any], world_size: int) -> None:
    """Raises ValueError if the groups of ranks that share ZeRO-3's second copy cannot be made."""
    size = zero.get("zero_hpz_partition_size", 1)
    what = f"zero_optimization.zero_hpz_partition_size={size}"
    if not isinstance(size, int) or isinstance(size, bool):
        raise ValueError(f"{what} is no whole number: set the number of GPUs of a node")
    if size <= 1:
        return
    if zero["stage"] != 3:
        raise ValueError(f"{what} needs stage 3, not {zero['stage']}: remove it, or set stage 3")
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        raise ValueError(f"{what} was never tried with offload_param: remove one of them")
    if size < world_size and world_size % size:
        raise ValueError(f"{what} does not divide the {world_size} processes: set the number of GPUs of a node")


def _check_nvme(where: str, section: Mapping[str, Any], stage: int, here: bool) -> None:
    if stage != 3:
        raise ValueError(f'{where}.device="nvme" needs stage 3, not {stage}: set stage 3, or device "cpu"')
    if where.endswith("offload_optimizer"):
        raise ValueError(
            f'{where}.device="nvme" keeps masters and moments in files of DeepSpeed\'s own, out of the reach of '
            'checkpoints: set device "cpu"; offload_param may stay on nvme'
        )
    path = section.get("nvme_path")
    if not (isinstance(path, str) and path) or (here and not os.access(path, os.W_OK)):
        raise ValueError(
            f"{where}.nvme_path={section.get('nvme_path')} is no writable directory: give one on the drive"
        )
    if not here:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f'{where}.device="nvme" needs DeepSpeed\'s async_io op, which this machine cannot build: install '
            'libaio-dev (apt) and a C++ compiler, or set device "cpu"'
        )


def load_deepspeed() -> Any:
    """Import DeepSpeed, with settings that spare slow or noisy detection."""
    if kind() == CPU.type:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    # this op, a collective for CPU inference, would be compiled at every first start, and is never called here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch has deprecated
    warnings.filterwarnings("ignore", message=r".*_tensor. is deprecated", category=FutureWarning)
    return deepspeed
