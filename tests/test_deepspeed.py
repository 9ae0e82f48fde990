"""A DeepSpeed JSON configures ZeRO and nothing else: missing fields are filled in, contradictions refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hive_scale.config import EngineConfig, GroupConfig, StageConfig
from hive_scale.engine.deepspeed_config import check, resolve

SHIPPED = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
STAGE = StageConfig({"all": GroupConfig(["*"], 1e-3, 0.01)}, global_batch=64, micro_batch=8, max_grad_norm=0.5)

# What users bring: the three JSONs of LLaVA's repository, key for key.
FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
LLAVA_COMMON: dict[str, Any] = {
    "fp16": FP16,
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}
ZERO2 = {
    "stage": 2,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
}
ZERO3 = ZERO2 | {
    "stage": 3,
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
CPU = {"device": "cpu", "pin_memory": True}
LLAVA: dict[str, dict[str, Any]] = {
    "zero2": LLAVA_COMMON | {"zero_optimization": ZERO2},
    "zero3": LLAVA_COMMON | {"zero_optimization": ZERO3},
    "zero3_offload": LLAVA_COMMON
    | {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": ZERO3 | {"offload_optimizer": CPU, "offload_param": CPU},
        "gradient_clipping": "auto",
        "steps_per_print": 1e5,
        "wall_clock_breakdown": False,
    },
}


def resolved(tmp_path: Path, settings: Any, stage: StageConfig = STAGE, **engine: Any) -> dict[str, Any]:
    path = tmp_path / "mine.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return resolve(path, stage, EngineConfig(**engine), world_size=4)


def refusal(tmp_path: Path, settings: Any, **engine: Any) -> str:
    with pytest.raises(ValueError, match=r"mine\.json: ") as caught:
        resolved(tmp_path, settings, **engine)
    return str(caught.value).split("mine.json: ")[1]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_jsons_hold_zero_alone(path: Path) -> None:
    assert json.loads(path.read_text()).keys() == {"zero_optimization"}
    settings = resolve(path, STAGE, EngineConfig("bf16"), world_size=4)
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"]
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert settings["zero_optimization"]["reduce_bucket_size"] <= 50_000_000


@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forms_of_others_are_filled_in(tmp_path: Path, name: str, precision: Any) -> None:
    settings = resolved(tmp_path, LLAVA[name], precision=precision)
    assert "auto" not in json.dumps(settings)
    assert not {"fp16", "optimizer", "scheduler"} & settings.keys()
    assert ("bf16" in settings) == (precision == "bf16")
    zero = settings["zero_optimization"]
    assert zero["stage"] == LLAVA[name]["zero_optimization"]["stage"]
    assert zero["reduce_bucket_size"] == 50_000_000
    assert zero["sub_group_size"] == 1_000_000_000
    assert ("stage3_max_live_parameters" in zero) == (zero["stage"] == 3)


def test_what_agrees_is_accepted(tmp_path: Path) -> None:
    agreeing = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 128},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.01}},
        "activation_checkpointing": {"partition_activations": False},
        "comms_logger": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    assert resolved(tmp_path, agreeing, precision="bf16")["comms_logger"] == {"enabled": True}


def test_what_goes_over_the_wire_may_be_chosen(tmp_path: Path) -> None:
    given = {"communication_data_type": "bf16", "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    settings = resolved(tmp_path, given, precision="bf16")
    assert settings["communication_data_type"] == "bf16"
    assert settings["zero_optimization"]["zero_hpz_partition_size"] == 2
    larger = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    assert resolved(tmp_path, larger)["zero_optimization"]["zero_hpz_partition_size"] == 8, "the whole of a small world"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batch_size": 128}, ("train_batch_size=128", "64", "global_batch")),
        ({"train_micro_batch_size_per_gpu": 4}, ("train_micro_batch_size_per_gpu=4", "8", "micro_batch")),
        ({"gradient_accumulation_steps": 1}, ("gradient_accumulation_steps=1", "2", "4 processes")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping=1.0", "0.5", "max_grad_norm")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled=true", "false", "engine.precision=fp32")),
        ({"bf16": {"enable": True}}, ("'bf16.enable'", "did you mean 'enabled'?")),
        ({"fp16": False}, ("fp16=false must be an object",)),
        ({"fp16": {"enabled": True}}, ("fp16.enabled=true", "false", "engine.precision=fp32")),
        ({"optimizer": {"type": "Lamb"}}, ("optimizer.type=", "Lamb", "AdamW")),
        ({"optimizer": {"params": {"lr": 0.1}}}, ("optimizer.params.lr=0.1", "0.001", "groups")),
        ({"optimizer": {"params": {"lrr": 0.1}}}, ("optimizer.params.lrr", "did you mean 'lr'")),
        ({"scheduler": {"params": {"warmup_num_steps": 9}}}, ("scheduler.params.warmup_num_steps=9", "warmup")),
        ({"communication_data_type": "bf16"}, ("communication_data_type", "bf16", "fp32", "engine.precision=fp32")),
        ({"communication_data_type": "fp16"}, ("communication_data_type", "fp16", "fp32")),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ("data_types.grad_accum_dtype", "bf16", "fp32")),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ("cpu_checkpointing", "engine.checkpointing")),
        ({"gradient_clippin": 1}, ("'gradient_clippin'", "did you mean 'gradient_clipping'?")),
        ({"tensorboard": {"enabled": True}}, ("'tensorboard'", "log.tensorboard=true")),
        ({"nebula": {"enabled": True}}, ("'nebula'", "remove it, it is not supported")),
        ({"tensor_parallel": {"autotp_size": 2}}, ("'tensor_parallel'", "remove it, it is not supported")),
        ({"aio": {"block_size": "1"}}, ('aio.block_size="1"', "must be like 1048576")),
        ({"flops_profiler": {"enabled": "yes"}}, ('flops_profiler.enabled="yes"', "must be like false")),
        ({"log_level": "loud"}, ('log_level="loud"', "warning")),
        ({"steps_per_print": 0}, ("steps_per_print=0", "at least 1")),
        ({"steps_per_print": "ten"}, ("steps_per_print", "must be a number")),
        ({"flops_profiler": True}, ("flops_profiler=true", "must be an object")),
        ({"comms_logger": {"enable": True}}, ("comms_logger.enable", "Extra inputs")),
    ],
)
def test_contradictions_name_key_values_and_remedy(tmp_path: Path, changes: Any, words: tuple[str, ...]) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 2}} | changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": 0}, ("stage=0", "1, 2 or 3", "engine.ds_config empty")),
        ({"stage": "auto"}, ('stage="auto"',)),
        ({"stage": True}, ("stage=true", "1, 2 or 3")),
        ({"reduce_bucket": 1}, ("zero_optimization.reduce_bucket'", "did you mean 'reduce_bucket_size'?")),
        ({"reduce_bucket_size": "big"}, ("zero_optimization.reduce_bucket_size='big'", "integer")),
        ({"round_robin_gradients": True}, ("round_robin_gradients=true", "owns", "remove it")),
        ({"zero_hpz_partition_size": 2}, ("zero_hpz_partition_size=2", "needs stage 3, not 2")),
        ({"stage": 3, "zero_hpz_partition_size": "8"}, ("zero_hpz_partition_size=8 is no whole number",)),
        ({"stage": 3, "zero_hpz_partition_size": 3}, ("does not divide the 4 processes", "GPUs of a node")),
        ({"stage": 3, "zero_hpz_partition_size": 2, "offload_param": {"device": "cpu"}}, ("with offload_param",)),
        ({"zero_quantized_gradients": True}, ("zero_quantized_gradients=true", "remove it")),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ("offload_optimizer.ratio=0.5", "remove it")),
        ({"offload_optimizer": {"devise": "cpu"}}, ("offload_optimizer.devise'", "did you mean 'device'?")),
        ({"offload_param": {"device": "cpu"}}, ("offload_param needs stage 3, not 2",)),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, ("offload_optimizer.device", 'set device "cpu"')),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, ("nvme_path=None", "writable directory")),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, ("needs stage 3",)),
    ],
)
def test_zero_section_is_checked_to_the_last_key(tmp_path: Path, changes: Any, words: tuple[str, ...]) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 2} | changes})
    assert all(word in message for word in words), message


def test_nvme_needs_its_compiled_op_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    assert "libaio-dev" in refusal(tmp_path, nvme)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    assert resolved(tmp_path, nvme)["zero_optimization"]["offload_param"]["nvme_path"] == str(tmp_path)


@pytest.mark.parametrize("engine", [{"shard_size": 2}, {"cpu_offload": True}])
def test_two_owners_of_sharding_are_one_too_many(tmp_path: Path, engine: dict[str, Any]) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 2}}, **engine)
    assert "belongs to the native engine" in message


def test_zero_3_is_not_compiled(tmp_path: Path) -> None:
    assert "engine.compile=false" in refusal(tmp_path, {"zero_optimization": {"stage": 3}}, compile=True)


def test_unreadable_jsons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json is no file"):
        resolve(tmp_path / "absent.json", STAGE, EngineConfig(), 1)
    assert "correct the JSON" in refusal(tmp_path, "{")
    assert "given twice" in refusal(tmp_path, '{"fp16": {}, "fp16": {}}')
    assert "one object" in refusal(tmp_path, "[]")


TEXT = """{
  "_comment": "made by hand",
  "//": "JSON has no comments", "//": "so some write them as keys",
  "bfloat16": {"enabled": true, "_why": "faster"},
  "gradient_clipping": 1.0,
  "train_batch_size": 64,
  "wandb": {"enabled": false, "team": "x"},
  "zero_optimization": {"stage": 2, "comment": "enough"}
}"""


def test_every_stage_is_held_against_the_json_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.json"
    path.write_text(TEXT)
    first = replace(STAGE, max_grad_norm=1.0)
    stages = {"first": (first, 4), "second": (STAGE, 4), "third": (replace(STAGE, global_batch=128), 2)}
    with pytest.raises(ValueError, match=r"mine\.json: ") as caught:
        check(path, stages, EngineConfig("bf16"))
    message = str(caught.value)
    assert "line 5: gradient_clipping=1.0 contradicts 0.5 of second, third, from the stage's max_grad_norm" in message
    assert "line 6: train_batch_size=64 contradicts 128 of third" in message
    assert message.count("line ") == 2
    assert "--ds_config_owned=ignore" in message
    check(path, {"first": stages["first"]}, EngineConfig("bf16"))

    ignoring = EngineConfig("bf16", ds_config_owned="ignore")
    check(path, stages, ignoring)
    assert "line 5: gradient_clipping=1.0 contradicts 0.5 of second, third" in caplog.text
    settings = resolve(path, STAGE, ignoring, 4)
    assert (settings["gradient_clipping"], settings["train_batch_size"]) == (0.5, 64)
    assert settings.keys().isdisjoint({"_comment", "//", "bfloat16", "wandb"})
    assert settings["zero_optimization"].keys().isdisjoint({"comment"})


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clippin": 1},
        {"zero_optimization": {"stage": 2, "zenflow": {}}},
        {"fp16": 1},
        {"optimizer": {"params": 3}},
    ],
)
def test_what_is_not_the_config_s_is_refused_all_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mine\.json: "):
        resolved(tmp_path, {"zero_optimization": {"stage": 2}} | settings, ds_config_owned="ignore")


def test_older_and_shorter_names_are_deepspeed_s_own(tmp_path: Path) -> None:
    short = {"stage": 3, "max_live_parameters": 5e7, "prefetch_bucket_size": "auto", "cpu_offload": True}
    zero = resolved(tmp_path, {"zero_optimization": short | {"stage3_gather_fp16_weights_on_model_save": True}})[
        "zero_optimization"
    ]
    assert zero["stage3_max_live_parameters"] == 50_000_000
    assert zero["stage3_prefetch_bucket_size"] == 20_000_000
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero.keys().isdisjoint({"max_live_parameters", "prefetch_bucket_size", "cpu_offload"})
    twice = short | {"stage3_max_live_parameters": 1}
    assert "'stage3_max_live_parameters' is given twice" in refusal(tmp_path, {"zero_optimization": twice})


@pytest.mark.parametrize(
    ("section", "ours"),
    [
        ({"compile": {"enabled": True}}, "engine.compile=true"),
        ({"compile": {"deepcompile": True}}, "engine.compile=true"),
        ({"wandb": {"enabled": True}}, "log.wandb=online"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "engine.precision=bf16"),
    ],
)
def test_a_section_that_has_a_switch_of_ours_is_answered_with_it(
    tmp_path: Path, section: dict[str, Any], ours: str
) -> None:
    assert f"remove it and use {ours}" in refusal(tmp_path, {"zero_optimization": {"stage": 2}} | section)
    off = {
        name: {key: False if key in ("enabled", "deepcompile") else value for key, value in content.items()}
        for name, content in section.items()
    }
    resolved(tmp_path, {"zero_optimization": {"stage": 2}} | off)
    disabled = {name: content | {"disable": True} for name, content in section.items()}
    resolved(tmp_path, {"zero_optimization": {"stage": 2}} | disabled)


def test_auto_is_left_to_deepspeed_s_defaults_wherever_it_stands(tmp_path: Path) -> None:
    settings = {"flops_profiler": {"enabled": "auto", "top_modules": 2}, "aio": {"thread_count": 1}}
    given = resolved(tmp_path, {"zero_optimization": {"stage": 2}} | settings)
    assert (given["flops_profiler"], given["aio"]) == ({"top_modules": 2}, {"thread_count": 1})


def test_another_machine_s_drive_is_not_looked_for_here(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    offload = {"device": "nvme", "nvme_path": "/of/another/machine"}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}))
    with pytest.raises(ValueError, match="no writable directory"):
        check(path, {"a": (STAGE, 4)}, EngineConfig())
    check(path, {"a": (STAGE, 4)}, EngineConfig(), here=False)


def test_a_world_that_does_not_divide_the_batch(tmp_path: Path) -> None:
    path = SHIPPED[0]
    with pytest.raises(ValueError, match="does not divide among 3 processes"):
        resolve(path, STAGE, EngineConfig(), 3)
