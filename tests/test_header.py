"""A run says what it will do, and on what, before anything is slow: hours on the wrong device or on half of the data
are not noticed later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tars
import tiny
import torch

from hive_scale import device, header, presets
from hive_scale.config import Config, PartConfig
from hive_scale.distributed import World, session
from hive_scale.engine import memory
from hive_scale.pipeline import run_pipeline
from hive_scale.plan.choose import Chosen
from hive_scale.preflight import open_all

GB = 1_000_000_000


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def run(folder: Path, *words: str) -> Config:
    """The debug preset with a tiny model, on 9 pairs, of which 2 cannot be used."""
    bad = [("x", {"jpg": tars.image_bytes()}), ("y", {"jpg": b"none", "txt": b"y"})]
    shard = tars.write_tar(folder / "train-0.tar", [*((f"{i}", tars.pair(i)) for i in range(7)), *bad])
    words = (f"output={folder / 'run'}", f"data.train=[{shard}]", f"data.heldout=[{shard}]", *words)
    words = ("data.max_bad_share=0.5", *words)
    config = presets.load("debug", None, words)
    parts = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=259))
    model = replace(config.model, vision=parts[0], language=parts[1])
    stages = {name: replace(stage, global_batch=8, micro_batch=4, max_steps=5) for name, stage in config.stages.items()}
    return replace(config, model=model, stages=stages)


def test_a_header_says_what_will_run_where_on_what(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tmp_path)
    (tmp_path / "run" / "language" / "step_00000003").mkdir(parents=True)
    left = ["language", "joint"]
    header.show_run(config, left, world)
    header.show_data(config, open_all(config, noted=False), left, world)
    shown = capsys.readouterr().out
    lines = [(line[:10].strip(), line[11:]) for line in shown.splitlines()]
    labels = [label for label, _ in lines]
    assert labels == [
        "run",
        "output",
        "stages",
        "device",
        "processes",
        "engine",
        "data",
        "",
        "tokenizer",
        *["stage"] * 2,
    ]
    told = dict(lines)
    assert told["run"] == "debug"
    assert told["stages"] == "projector (not now), language (goes on from step 3), joint"
    assert told["processes"] == "1, no launcher"
    assert told["engine"] == "native engine in one process, nothing is sharded; fp32"
    assert told["data"].startswith(f"training, {tmp_path}/train-0.tar: 7 samples in 1 shard; 2 unusable (22.2%): 1 x ")
    assert told[""].startswith(f"held-out, {tmp_path}/train-0.tar: 7 samples in 1 shard; 2 unusable")
    assert told["tokenizer"] == "bytes, 259 tokens"
    language, joint = (text for label, text in lines if label == "stage")
    assert language.startswith(
        "language: 5 steps of 8 samples (micro-batch 4 x 2 accumulated); adamw; trained: language "
    )
    assert "frozen: vision" in language
    assert "trained: vision" in joint
    assert "\x1b" not in shown
    if not device.is_accelerator(world.device):
        assert "no GPU was found" in told["device"]
        assert "training runs on the CPU" in told["device"]


def test_the_header_comes_before_the_data_are_opened(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        run_pipeline(replace(config, data=replace(config.data, train=["nowhere/*.tar"])), world)
    assert "\ndevice     " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "size", "engine"),
    [
        (["engine.precision=bf16", "engine.compile=true"], 1, "nothing is sharded; bf16; compiled"),
        (["engine.shard_size=1"], 4, "DDP: 4 replicas; fp32"),
        (["engine.shard_size=2"], 4, "FSDP2, sharded over 2 processes, 2 replicas; fp32"),
        (["engine.cpu_offload=true"], 4, "FSDP2, sharded over 4 processes; fp32; optimizer in host memory"),
        (["engine.checkpointing.vision=full"], 4, "; fp32; activation checkpointing: vision full"),
        (["engine.ds_config=zero2.json"], 1, "DeepSpeed, zero2.json; fp32"),
    ],
)
def test_the_engine_is_named(words: list[str], size: int, engine: str) -> None:
    assert header._engine(presets.load("debug", None, words), size, "cpu").endswith(engine)


def test_sharding_over_nodes_is_left_to_the_plan_where_there_is_one() -> None:
    def engine(*words: str) -> str:
        return header._engine(presets.load("debug", None, words), 4, "cuda", chooses=True)

    assert engine() == "FSDP2, sharded inside each node or over all 4 processes, as the plan below says; fp32"
    assert engine("engine.shard_size=4").startswith("FSDP2, sharded over 4 processes;")
    assert engine("engine.cpu_offload=true").startswith("FSDP2, sharded over 4 processes;")


def test_devices_are_counted_and_idle_ones_are_named() -> None:
    a = header._View("a", "NVIDIA H100", 60 * GB, 80 * GB, 8)
    text = header._devices(torch.device("cuda", 0), [a, a._replace(free=70 * GB)], 2)
    assert text == (
        "2 x NVIDIA H100, 80.0 GB each; at least 60.0 GB free; 8 are visible: torchrun --nproc_per_node 8 uses all"
    )
    mixed = header._devices(torch.device("cuda", 0), [a, a._replace(device="NVIDIA A10", total=24 * GB)], 8)
    assert mixed == "1 x NVIDIA H100, 80.0 GB each, 1 x NVIDIA A10, 24.0 GB each; at least 60.0 GB free"


def gpu(monkeypatch: pytest.MonkeyPatch, name: str, memory: float) -> None:
    """Let the CPU pass for a GPU: the plan needs its name and memory only."""
    monkeypatch.setattr(device, "pins_memory", lambda _: True)
    monkeypatch.setattr(device, "name_of", lambda _: name)
    monkeypatch.setattr(device, "memory_of", lambda _: (round(memory), round(memory)))


def show_plan(config: Config, data: Any, world: World, **chosen: Any) -> None:
    engine = replace(config.engine, **chosen)
    header.show_plan(config, data, ["joint"], world, {"joint": Chosen(engine)})


def test_stages_are_planned_for_a_device_that_the_planner_knows(
    tmp_path: Path,
    world: World,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run(tmp_path)
    data = open_all(config, noted=False)
    show_plan(config, data, World(0, 1, torch.device("cpu")))
    assert not capsys.readouterr().out, "nothing is known of a CPU"
    gpu(monkeypatch, "NVIDIA H100 80GB HBM3", 85 * GB)
    show_plan(config, data, world)
    assert capsys.readouterr().out == "plan       joint: 0.0 GB of 80.0 GB per device at the peak; takes about 0:00\n"
    assert not caplog.records
    two = replace(world, size=2)
    show_plan(config, data, two, reshard_after_backward=False)
    assert capsys.readouterr().out.endswith("; weights stay gathered between micro-batches\n")
    four = replace(world, size=4)
    show_plan(config, data, four, shard_size=2)
    assert capsys.readouterr().out.endswith("; sharded over the 2 processes of a node, 2 replicas\n")
    show_plan(config, data, four, shard_size=4)
    assert capsys.readouterr().out.endswith("over all 4 processes, since a copy in each node is not planned to fit\n")
    gpu(monkeypatch, "NVIDIA Nothing", 0.8 * GB + 1e6)
    show_plan(config, data, world)
    assert capsys.readouterr().out.endswith("; the planner does not know this device's speed\n")
    assert "stages.joint: micro_batch=" in caplog.text
    monkeypatch.setattr(header, "ENOUGH", -1.0)
    show_plan(config, data, world)
    assert "not made here" in capsys.readouterr().out


def test_what_strangers_wrote_cannot_pass_for_a_line_of_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    header._show({"data": "a.tar\nprocesses  8\x1b[2J"})
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    assert "\x1b" not in shown


def test_a_plan_that_fails_stops_nothing(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(tmp_path, "engine.ds_config=nowhere.json")
    gpu(monkeypatch, "NVIDIA H100 80GB HBM3", 85 * GB)
    show_plan(config, open_all(config, noted=False), world)
    assert "stage joint cannot be planned: " in caplog.text


def test_the_memory_tables_legend_is_shown_once(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tmp_path)
    stages = {name: replace(config.stages[name], max_steps=1) for name in ("projector", "joint")}
    run_pipeline(replace(config, stages=stages), world)
    shown = capsys.readouterr().out
    assert shown.count("MB per process") == 2
    assert shown.count(memory.LEGEND) == 1
    for name in stages:
        assert (config.run_dir / name / "memory.txt").read_text().endswith(f"{memory.LEGEND}\n"), "each explains itself"
