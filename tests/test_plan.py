"""Why: a plan is only as good as its predictions. FLOPs are compared with torch's counter, bytes with the real peak."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from hive_scale import presets
from hive_scale.config import CheckpointingConfig, Config, EngineConfig, ModelConfig, PartConfig, StageConfig
from hive_scale.engine.activation_checkpointing import checkpoint_blocks
from hive_scale.model.build import for_stage, init_model, meta_model
from hive_scale.observability.throughput import Throughput
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.plan import complexity
from hive_scale.plan.devices import CONTEXT, FRAGMENTATION, GPUS
from hive_scale.plan.fit import fit, too_large
from hive_scale.plan.flops import count
from hive_scale.plan.fsdp_memory import Fsdp, Pass
from hive_scale.plan.memory import examine
from hive_scale.plan.run import Machine, StagePlan, plan_run, plan_stage
from hive_scale.plan.sweep import limit, sweep
from hive_scale.plan.time import Volume
from hive_scale.plan.trace import CPU_ATTENTION
from hive_scale.presets import three_stages

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("projector", "language", "joint")
SHARDED = ("fsdp", "zero2", "zero3")
CASES = [("cross_attention", stage) for stage in STAGES] + [("joint_attention", "language"), ("concat", "joint")]
CASES += [("deepstack", "joint"), ("gated_cross_attention", "projector"), ("q_former", "language")]


def stage_of(fusion: Any, name: str, **changes: Any) -> StageConfig:
    return StageConfig(three_stages(fusion, (1e-3, 1e-3, 1e-3))[name], **changes)


def run_config(fusion: Any = "cross_attention", **changes: Any) -> Config:
    stages = {name: stage_of(fusion, name, global_batch=8, micro_batch=4) for name in STAGES}
    engine = EngineConfig(**{"compile": False} | changes)
    return Config(model=tiny.model_config(fusion), stages=stages, engine=engine)


@pytest.mark.contract
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize(("fusion", "stage"), CASES)
def test_flops_are_those_that_torch_counts(fusion: str, stage: str, mode: Any) -> None:
    checkpointing = CheckpointingConfig(mode, mode, mode)
    model, batch = init_model(tiny.model_config(fusion), seed=0), tiny.batch(4)
    apply_trainable_groups(model, stage_of(fusion, stage), model.unused_parameters())
    work = count(for_stage(tiny.model_config(fusion), stage_of(fusion, stage))[0], checkpointing)
    want = work.total(len(batch), batch.tokens.shape[1], batch.num_tokens)
    checkpoint_blocks(model.blocks(), checkpointing)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as forward:
        loss = model(**batch.inputs())
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as backward:
        loss.backward()
    assert want.forward == pytest.approx(forward.get_total_flops(), rel=1e-6)
    assert want.backward + want.recompute == pytest.approx(backward.get_total_flops(), rel=1e-6)


@pytest.mark.contract
def test_the_trace_counts_the_same_flops() -> None:
    config, stage = run_config(), stage_of("cross_attention", "joint")
    want = count(for_stage(config.model, stage)[0]).total(1, 12, 11)
    found = examine(config, stage, 12).trace.flops
    assert found["forward"] == pytest.approx(want.forward, rel=0.001)
    assert found["backward"] == pytest.approx(want.backward + want.recompute, rel=0.001)


def test_flops_of_an_llm_are_those_of_its_formula() -> None:
    """By hand: no table of formulas is shared with what is judged."""
    model, _ = for_stage(tiny.model_config("concat"), stage_of("concat", "joint"))
    text, targets = 10, 9
    tokens, width, kv, mlp, layers = text + 16, 48, 2 * 12, 96, 4  # of `tiny.language`; 16 patches
    weights = 2 * width * width + 2 * width * kv + 3 * width * mlp  # queries and output, keys and values, the MLP
    products, attention = layers * 2 * tokens * weights, layers * 2 * (2 * tokens * tokens * width)
    head = 2 * targets * width * tiny.VOCABULARY
    found = count(model).components(1, text, targets)["language"]
    assert found.forward == pytest.approx(products + attention + head, rel=1e-9)
    # each product has two in backward, but the head's: its weights are the embeddings, which do not train here
    assert found.backward == pytest.approx(2 * products + 2 * attention + head, rel=1e-9)
    assert found.recompute == pytest.approx(attention / 2, rel=1e-9)  # its scores, once more


def test_a_side_that_the_patch_does_not_divide_counts_whole_patches() -> None:
    def counted(side: int) -> float:
        base = tiny.model_config()
        return (
            count(meta_model(replace(base, vision=PartConfig(config=tiny.SIGLIP | {"image_size": side}))))
            .total(2, 9, 8)
            .forward
        )

    assert counted(39) == counted(32) < counted(40)


def test_the_papers_formulas_are_the_counted_flops() -> None:
    """(4), with a constant per term, is exact; (5) leaves out what the image itself costs the LLM's side."""

    def counted(fusion: Any, num_text: int, side: int, component: str) -> float:
        vision = tiny.SIGLIP | {"image_size": side}
        base = tiny.model_config(fusion)
        model = ModelConfig(replace(base.vision, config=vision), base.language, fusion=fusion, encoder_layer_ratio=0.5)
        parts = count(meta_model(model)).components(1, num_text, 0)
        return parts[component].forward

    def sizes(side: int) -> int:
        return (side // tiny.SIGLIP["patch_size"]) ** 2

    width, layers = 48.0, 4.0
    shapes = [(8, 32), (40, 32), (8, 64), (40, 128)]
    square = [layers * (t + sizes(side)) ** 2 * width / 2 for t, side in shapes]
    linear = [layers * (t + sizes(side)) * width**2 for t, side in shapes]
    found = [counted("concat", t, side, "language") for t, side in shapes]
    a, b = torch.linalg.solve(
        torch.tensor([[square[0], linear[0]], [square[3], linear[3]]], dtype=torch.float64),
        torch.tensor([found[0], found[3]], dtype=torch.float64),
    ).tolist()
    for (text, side), expected in zip(shapes, found, strict=True):
        scaled = complexity.self_attention_llm(text, sizes(side), width, layers)
        assert a * layers * (text + sizes(side)) ** 2 * width / 2 + b * (
            scaled - layers * (text + sizes(side)) ** 2 * width / 2
        ) == pytest.approx(expected, rel=1e-9)
    for text, side in shapes:  # HIVE's LLM costs the same whatever the image
        assert counted("cross_attention", text, side, "language") == counted("cross_attention", text, 32, "language")
    ratio = complexity.cross_attention_llm(77, 576, 960, 32, 6) / complexity.self_attention_llm(77, 576, 960, 32)
    assert ratio == pytest.approx(0.101, abs=0.001)


def measured(*words: str) -> list[dict[str, Any]]:
    """Rows of ``benchmark.py memory``."""
    command = [sys.executable, str(ROOT / "launchers" / "benchmark.py"), "memory", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.mark.skipif(sys.platform != "linux", reason="the counter of allocations is preloaded")
@pytest.mark.parametrize("case", ["one", *(pytest.param(case, marks=pytest.mark.slow) for case in SHARDED)])
def test_the_planned_peak_is_the_real_one(case: str) -> None:
    rows = measured("--cases", case, "--stages", "projector", "joint", "--fusions", "cross_attention")
    assert len(rows) == 4
    for row in rows:
        assert row["plan"] == pytest.approx(row["real"], rel=0.03), row


@pytest.mark.skipif(sys.platform != "linux", reason="the counter of allocations is preloaded")
@pytest.mark.parametrize("case", ["one", *(pytest.param(case, marks=pytest.mark.slow) for case in SHARDED)])
def test_a_stage_that_reads_kept_features_is_planned_without_its_encoder(case: str) -> None:
    rows = measured("--cases", case, "--features", "--stages", "language", "--fusions", "cross_attention")
    assert len(rows) == 2
    for row in rows:
        assert row["plan"] == pytest.approx(row["real"], rel=0.03), row


def test_kept_features_are_made_once_and_save_the_encoders_work() -> None:
    config, machine = run_config(), Machine(GPUS["a100-40"], 2)
    plain, kept = (plan_run(replace(config, feature_cache=cache), machine, 1000) for cache in ("", "features"))
    for stage, before, after in zip(STAGES, plain, kept, strict=True):
        model = meta_model(config.model)
        encoder = count(model).components(1, config.data.max_tokens, 0)["vision"].forward
        saved = encoder if stage != "joint" else 0.0  # where the encoder learns
        assert before.flops["forward"] - after.flops["forward"] == pytest.approx(saved, rel=1e-6), stage
        assert not before.seeing
        assert bool(after.seeing) == bool(saved)
    assert kept[0].seeing == pytest.approx(kept[0].features / 1e9)  # so small an encoder waits for the disk
    texts = 8 * config.data.max_tokens * 24  # bytes of a step's tokens and targets, at most
    assert 0 <= kept[0].time.reading * 1e9 - 8 * kept[0].features / 1000 <= texts
    assert kept[0].time.total >= kept[0].time.reading > plain[0].time.reading == 0.0


def test_more_samples_need_more_memory_and_more_ranks_less() -> None:
    def peaks(world: int, micro_batch: int, *names: str) -> list[float]:
        config = run_config()
        stages = {name: replace(config.stages[name], micro_batch=micro_batch) for name in names}
        machine = Machine(GPUS["a100-40"], world)
        return [plan.memory.peak for plan in plan_run(replace(config, stages=stages), machine, 1000)]

    once = peaks(1, 4, *STAGES)
    assert once[0] < once[1] < once[2]  # the more trains, the more is held
    assert peaks(1, 8, "joint") > once[2:]
    assert peaks(2, 4, "joint") < once[2:]


def test_what_happens_between_micro_batches_is_planned() -> None:
    def joint(**changes: Any) -> StagePlan:
        config = run_config(**{"precision": "bf16", "reshard_after_backward": True} | changes)
        stages = {"joint": replace(config.stages["joint"], global_batch=64, micro_batch=4)}
        return plan_run(replace(config, stages=stages), Machine(GPUS["a100-40"], 4), 1000)[0]

    usual = joint()
    kept, synced = joint(reshard_after_backward=False), joint(sync_each_micro_batch=True)
    assert usual.accumulation == 4
    assert usual.memory.peak > synced.memory.peak
    whole = 4 * sum(trained for trained, _ in usual.components.values())
    waiting, cut = (plan.memory.moment.held["gradients"] for plan in (usual, synced))
    assert cut < whole / 2 < waiting
    sent = [plan.time.volume.sent for plan in (kept, usual, synced)]
    assert sent[0] < sent[1] < sent[2]
    gather = 2 * sum(trained for trained, _ in usual.components.values()) * 3 / 4  # of bf16, but for padding
    assert sent[1] - sent[0] == pytest.approx(3 * gather, rel=0.03), "one for each micro-batch but one"
    facts = examine(run_config(precision="bf16"), stage_of("cross_attention", "joint"), 12)
    ends = [Fsdp(facts.trace, facts.units, 4, 2, True, one).gathered for one in (Pass(), Pass("whole", True, True))]
    assert ends == [set(), set(facts.units.members)]


def test_memory_for_checkpoints_counts_against_the_hosts() -> None:
    config = run_config(precision="bf16")
    for world in (1, 2, 8):
        for plan in plan_run(config, Machine(GPUS["a100-40"], world), 1000):
            saved = 12 * sum(trained for trained, _ in plan.components.values()) / world
            assert saved <= plan.memory.staging < 2 * saved + 1
            assert plan.memory.host == 0
    small = Machine(GPUS["a100-40"], 1, host_memory=1000.0)
    with pytest.raises(ValueError, match="needs"):
        fit(config, small, 1000)
    assert fit(config, replace(small, host_memory=1e9), 1000).plans[0].memory.on_host > 1000


def test_bad_input_is_answered_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="multiple, such as 8"):
        Machine(GPUS["h100"], 12)
    with pytest.raises(ValueError, match="at least 1 process"):
        Machine(GPUS["h100"], 0)
    with pytest.raises(ValueError, match="--host_gb"):
        plan_run(run_config(cpu_offload=True), Machine(GPUS["h100"], 1), 1000)
    with pytest.raises(ValueError, match="does not divide --world"):
        plan_run(run_config(shard_size=3), Machine(GPUS["h100"], 2), 1000)
    with pytest.raises(ValueError, match="no such stage"):
        sweep(run_config(), "join", GPUS["h100"], [1], 1000)


def test_fit_takes_what_is_fastest_and_says_what_would_fit() -> None:
    config = run_config(precision="bf16")
    config = replace(config, stages={"joint": config.stages["joint"]})
    machine = Machine(GPUS["a100-40"], 1)
    found = fit(config, machine, 1000)
    assert [plan.micro_batch for plan in found.plans] == [8]  # the whole batch at once
    assert found.config.engine.checkpointing == CheckpointingConfig()
    with pytest.raises(ValueError, match="more GPUs"):
        fit(config, machine, 1000, spare=machine.capacity)


def test_the_single_card_presets_leave_room() -> None:
    """SigLIP-L/16-384 and MobileLLM-350M on 24 GB, every stage, with FSDP2's engine and with the JSON."""
    machine, config = Machine(GPUS["rtx3090"], 1), presets.load("rtx3090", None, [])
    zero = json.loads((ROOT / "ds_configs" / "rtx3090.json").read_text())["zero_optimization"]
    for name, stage in config.stages.items():
        facts = examine(config, stage, config.data.max_tokens)
        for section in ({}, zero):
            plan = plan_stage(config, name, facts, section, machine, 595_375)
            assert plan.spare >= 1.5e9, (name, section)
            assert plan.samples == {"projector": 256, "language": 256, "joint": 1024}[name]


class Fixed:
    model, hardware = 6e12, 8e12


def test_rates_are_of_all_ranks_and_utilisation_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Throughput(lambda *_: Fixed(), peak=10e12, world_size=4)
    rates = meter.step([tiny.batch(3), tiny.batch(3)], num_tokens=100)
    assert rates == {
        "samples_per_second": 12.0,
        "tokens_per_second": 50.0,
        "tflops_per_device": 6.0,
        "mfu": 0.6,
        "hfu": 0.8,
    }


def planned(*words: str) -> Any:
    """What ``plan.py --json`` prints."""
    command = [sys.executable, str(ROOT / "launchers" / "plan.py"), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_settings_that_fit_on_eight_cards_are_those_of_a_plan() -> None:
    words = ("--preset", "debug", "--world", "8", "--gpu", "a100-40")
    fitted = planned(*words, "--fit")
    again = planned(*words, *fitted["settings"])
    assert [stage["stage"] for stage in again["stages"]] == list(STAGES)
    for one, other in zip(fitted["stages"], again["stages"], strict=True):
        assert one == other
        assert one["fits"]
        assert one["micro_batch"] * one["accumulation"] * 8 == one["samples"]
    assert fitted["stages"][0]["features"] > fitted["stages"][2]["features"] == 0


def test_a_plan_that_does_not_fit_names_the_option_and_then_the_command(tmp_path: Path) -> None:
    words = ["--preset", "debug", "fusion=concat", "output=runs/my own"]
    small = ["--gpu_memory_gb", "1", "--gpu_tflops", "10", "--gpu_bandwidth_gb_s", "100"]
    command = [sys.executable, "-m", "hive_scale", "plan", *words, *small]
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def show(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    assert "more memory than there is. --fit finds settings that fit." in show().stdout
    fitted = show("--fit")
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    assert "python -m hive_scale pretrain --preset debug fusion=concat 'output=runs/my own'" in fitted.stdout


def test_a_sweep_is_a_table_and_an_image(tmp_path: Path) -> None:
    words = ("--preset", "debug", "--gpu", "h100", "--sweep", "1,2,8")
    points = planned(*words)
    assert {(point["engine"], point["world"]) for point in points} >= {("DDP", 1), ("FSDP2", 2), ("ZeRO-3", 8)}
    assert all(point["efficiency"] == 1 for point in points if point["world"] == 1)
    assert all(point["efficiency"] <= 1 for point in points if point["engine"] == "DDP")  # others cut the update, too
    image = tmp_path / "sweep.png"
    command = [sys.executable, str(ROOT / "launchers" / "plan.py"), *words, "--output", str(image)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count("| weak |") == shown.count("| strong |") == 15
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_wire_is_the_link_inside_a_node_and_the_network_between_nodes() -> None:
    gpu = replace(GPUS["h100"], link=100.0, network=10.0, per_node=4)
    latency = 3 * 2e-5  # of one collective among eight
    assert Volume(1000.0, 0).seconds(4, gpu, 4) == 10
    assert Volume(1000.0, 0).seconds(8, gpu, 8) == 100, "one ring over both nodes"
    assert Volume(1000.0, 1, copies=200.0).seconds(4, gpu, 8) == pytest.approx(8 + 20 + latency)
    assert Volume(1000.0, 0).seconds(1, gpu, 8) == 100, "replicas on two nodes"
    assert Volume(0.0, 0).seconds(1, gpu, 1) == 0


def test_a_sweep_says_where_the_batch_stops_to_scale() -> None:
    config = run_config(precision="bf16")
    points = sweep(config, "joint", GPUS["h100"], [1, 2, 8, 16], 1000)
    assert {point["engine"] for point in points} == {"DDP", "FSDP2", "HSDP", "ZeRO-2", "ZeRO-3"}
    assert "raise stages.joint.global_batch" in limit(points, 8, "joint")
    fast = [point | {"efficiency": 1.0} for point in points if point["world"] <= 8]
    assert limit(fast, 8, "joint") == ""
    assert limit(sweep(config, "joint", GPUS["h100"], [3], 1000), 8, "joint") == "", "a batch of 8 is not for 3 GPUs"


def test_a_micro_batch_that_does_not_fit_is_answered_with_one_that_does() -> None:
    run = run_config()
    (plan,) = plan_run(replace(run, stages={"joint": run.stages["joint"]}), Machine(GPUS["rtx3090"], 1), 100)

    def device(peak: float) -> float:
        """Memory of a device of which just `peak` bytes can be used."""
        return peak / (1 - FRAGMENTATION) + CONTEXT

    facts = examine(run, run.stages["joint"], run.data.max_tokens)
    assert too_large(run, "joint", facts, {}, 1, device(plan.memory.peak * 1.01)) == ""
    line = too_large(run, "joint", facts, {}, 1, device(plan.memory.peak * 0.99))
    assert re.search(r"^stages\.joint: micro_batch=4 may not fit: .*: set stages\.joint\.micro_batch=[12],", line)
    smaller = int(line.split("micro_batch=")[2].split(",")[0])
    fitting = replace(run, stages={"joint": replace(run.stages["joint"], micro_batch=smaller)})
    assert too_large(fitting, "joint", facts, {}, 1, device(plan.memory.peak * 0.99)) == ""
    assert "nor would micro_batch=1" in too_large(run, "joint", facts, {}, 1, CONTEXT)
