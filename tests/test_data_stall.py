"""Why: GPUs that wait for data are wasted, and the loss does not show it. On a cluster one slow node holds up all the
others, which seem to be busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny

from hive_scale import presets
from hive_scale.config import Config, PartConfig
from hive_scale.data.loader import Loader
from hive_scale.distributed import World
from hive_scale.observability.console import console
from hive_scale.observability.goodput import ENOUGH, DataStall
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline

SLOW = 0.3  # seconds


def test_it_is_said_once_with_the_rank_and_again_when_much_worse() -> None:
    starvation = DataStall(workers=3)
    said = []
    for waits in ENOUGH * [(0.0, 0.05)] + 3 * ENOUGH * [(0.1, 0.4)] + 3 * ENOUGH * [(0.1, 0.9)]:
        starvation.stepped(waits, seconds=1.0)
        said.append(starvation.warning())
    assert not any(said[:ENOUGH])  # a twentieth is no harm
    told = list(filter(None, said))
    assert len(told) <= 5
    assert "rank 1 the longest" in told[0]
    assert "data.workers (now 3)" in told[0]
    share = [int(text.split("%")[0].split()[-1]) for text in told]
    assert all(later > 1.4 * before for before, later in pairwise(share))


def slow_on_rank_1(world: World, output: Path) -> str:
    """What the screen shows of a stage whose second rank reads from a slow disk."""
    steps = Loader.steps

    def slow(self: Loader, **arguments: Any) -> Iterator[Any]:
        for step in steps(self, **arguments):
            time.sleep(SLOW * world.rank)
            yield step

    with pytest.MonkeyPatch.context() as patch, console.capture() as shown:
        patch.setattr(Loader, "steps", slow)
        run_pipeline(small(output), world, until="projector")
    return shown.get()


def small(output: Path) -> Config:
    words = [
        f"output={output}",
        "blank_image_control=false",
        f"stages.projector.max_steps={ENOUGH + 2}",
        "data.heldout=[sample:heldout]",
    ]
    run = presets.load("debug", None, [*words, "stages.projector.global_batch=4", "stages.projector.micro_batch=2"])
    language = tiny.language(vocab_size=259, hidden_size=32)
    model = replace(
        run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=language), encoder_layer_ratio=0.5
    )
    stage = replace(run.stages["projector"], data=run.data)  # whose workers count, not the run's
    return replace(run, model=model, stages={"projector": stage}, data=replace(run.data, workers=2))


def test_another_ranks_waiting_is_measured_and_named(tmp_path: Path) -> None:
    shown = ranks.run(slow_on_rank_1, 2, tmp_path / "run")[0]
    lines = read_metrics(tmp_path / "run" / "projector" / "metrics.jsonl")
    assert all(SLOW <= line["data_seconds"] < line["seconds"] for line in lines[1:])
    spent = lines[-1]["spent"]  # rank 0's, who has all its data at once
    assert spent["data"] >= len(lines) * SLOW
    assert 0 < spent["steps"] < sum(line["seconds"] for line in lines) - len(lines) * SLOW
    assert shown.count("training waits for data") == 1
    assert "rank 1 the longest: raise data.workers (now 0)" in " ".join(shown.split())
