"""The paper's Tables 1 and 2 at full size: commands, Slurm jobs, and the planner's estimates."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from hive_scale import presets
from hive_scale.slurm.downstream import SETS, TASKS
from launchers.reproduction.phases import ENCODERS, FUSIONS
from launchers.reproduction.studies import Arm, arms

if TYPE_CHECKING:
    from hive_scale.config import Config
    from hive_scale.plan.run import Machine

FAMILIES = {"siglip": "models/siglip-large-patch16-384", "clip": "models/clip-vit-large-patch14-336"}
PRESET, DEPTHS = "paper_siglip", (6, 12, 18, 24)  # what studies vary, and after which of its blocks they probe
CC3M = 595_375  # pairs of LLaVA-CC3M-Pretrain-595K
# Samples with an image of LCS-558K and LLaVA-NeXT-Data, and the tokens per text to plan with: the caption limit in
# pre-training, and a guess for conversations, whose lengths are not known here
VLM = {"connector": (558_128, 77), "language": (738_601, 512)}


@dataclass(frozen=True)
class Row:
    """One encoder of the tables: how it is trained, and how it is evaluated."""

    family: str
    method: str  # base, sa or hive

    @property
    def encoder(self) -> str:
        """Path of the encoder: as published for Base, as trained for the others."""
        return FAMILIES[self.family] if self.method == "base" else f"runs/paper_{self.family}_{self.method}"

    @property
    def vlm(self) -> str:
        """Path of its fine-tuned model; "" if Table 2 has none."""
        if self.family == "clip":
            return ""
        return "runs/vlm_base" if self.method == "base" else f"{self.encoder}/vlm"

    def commands(self, launch: str) -> Iterator[tuple[str, str]]:
        """Return (description, command) pairs in order. `launch` starts a program on all GPUs."""
        if self.method != "base":
            words = f"--preset paper_{self.family} fusion={FUSIONS[self.method]} output={self.encoder}"
            yield "pre-training", f"{launch} launchers/pretrain.py {words}"
        yield "Table 1", f"{launch} launchers/probe.py {self.encoder} --set {SETS} --workers 8"
        if self.vlm:
            yield "fine-tuning", f"{launch} launchers/finetune_vlm.py {self.encoder} output={self.vlm}"
            yield "Table 2", f"{launch} launchers/evaluate.py {self.vlm} --tasks {TASKS} --precision bf16"

    def submission(self) -> list[str]:
        """Return the same as words for submit_pipeline.py; empty for an encoder that is only probed."""
        table_2 = ["after.evaluate=--precision bf16"] if self.vlm else []
        if self.method != "base":
            run = ["--preset", f"paper_{self.family}", f"fusion={FUSIONS[self.method]}", f"output={self.encoder}"]
            return [*run, "--then", "probe,vlm,evaluate" if self.vlm else "probe", "after.probe=--workers 8", *table_2]
        if not self.vlm:
            return []
        # fine-tuning leaves the encoder frozen, so this probes the published one
        run = ["--preset", "vlm", f"encoder={self.encoder}", f"output={self.vlm}"]
        return [*run, "--then", "probe,evaluate", "after.probe=--workers 8", *table_2]

    def hours(self, machine: Machine) -> dict[str, float]:
        """Planned hours of everything that is trained, by the names of `commands`; estimates (see plan/time.py)."""
        found = {}
        if self.method != "base":
            found["pre-training"] = _pretraining(self, machine)
        if self.vlm:
            found["fine-tuning"] = _finetuning(self.family, machine)
        return found


@dataclass(frozen=True)
class Trial:
    """One arm of a study: pre-training, and probes after several blocks."""

    study: str
    arm: Arm

    family = "siglip"

    @property
    def method(self) -> str:
        """What a reader calls it."""
        return f"{self.arm.variant}, equal {self.arm.budget}"

    @property
    def encoder(self) -> str:
        """Path of its run."""
        return f"runs/{self.study}_{self.arm.key}"

    def words(self) -> list[str]:
        """Words of its pre-training, as for pretrain.py."""
        steps = [f"stages.{stage}.max_steps={number}" for stage, number in self.arm.steps.items()]
        return ["--preset", PRESET, *self.arm.words, *steps, f"output={self.encoder}"]

    def commands(self, launch: str) -> Iterator[tuple[str, str]]:
        """Return (description, command) pairs in order. `launch` starts a program on all GPUs."""
        yield "pre-training", f"{launch} launchers/pretrain.py {shlex.join(self.words())}"
        for depth in DEPTHS:
            words = f"{self.encoder} --set {SETS} --workers 8 --depth {depth} --output {self.encoder}/probes/{depth}"
            yield f"probes after block {depth}", f"{launch} launchers/probe.py {words}"

    def submission(self) -> list[str]:
        """Return the same, with probes at the depth of Table 1 only, as words for submit_pipeline.py."""
        return [*self.words(), "--then", "probe", "after.probe=--workers 8"]

    def hours(self, machine: Machine) -> dict[str, float]:
        """Planned hours of the pre-training."""
        config = presets.load(PRESET, None, self.words()[2:])
        return {"pre-training": total(config, dict.fromkeys(config.stages, (CC3M, 77)), machine)}


def trials(study: str) -> list[Trial]:
    """Every arm of `study` at the paper's size."""
    return [Trial(study, arm) for arm in arms(study, PRESET, None, CC3M)]


ROWS = [Row(family, method) for family in FAMILIES for method in ENCODERS]


@cache
def _pretraining(row: Row, machine: Machine) -> float:
    config = presets.load(f"paper_{row.family}", None, [f"fusion={FUSIONS[row.method]}"])
    return total(config, dict.fromkeys(config.stages, (CC3M, 77)), machine)


@cache  # the cost does not depend on how the encoder was trained
def _finetuning(family: str, machine: Machine) -> float:
    config, encoder = presets.load("vlm", None, []), presets.load(f"paper_{family}", None, []).model.vision
    return total(replace(config, model=replace(config.model, vision=encoder)), VLM, machine)


def total(config: Config, sizes: Mapping[str, tuple[int, int]], machine: Machine) -> float:
    """Planned hours of all stages of `config`; `sizes` gives each stage's samples and tokens per text."""
    from hive_scale.plan.run import plan_run

    hours = 0.0
    for name, (samples, tokens) in sizes.items():
        data = replace(config.data, max_tokens=tokens)
        [plan] = plan_run(replace(config, data=data, stages={name: config.stages[name]}), machine, samples)
        hours += plan.hours
    return hours
