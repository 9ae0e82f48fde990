"""Studies: one choice of HIVE varied, from one encoder and in one data order, at equal steps and at equal FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hive_scale import presets
from launchers.reproduction.phases import Phases
from launchers.reproduction.steps import Step

REFERENCE = "cross_attention"  # its steps and its FLOPs are those of all
# study -> variant -> what it changes in the config
STUDIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fusions": {
        "cross_attention": (),
        "cascaded": ("model.encoder_layers=last",),  # paper section 6
        "joint_attention": ("fusion=joint_attention",),
        "concat": ("fusion=concat",),
        "deepstack": ("fusion=deepstack",),
        "q_former": ("fusion=q_former",),
        "gated_cross_attention": ("fusion=gated_cross_attention",),
    },
    "depths": {
        "cross_attention": (),
        "later": ("model.encoder_layers=later",),
        "last": ("model.encoder_layers=last",),
        "deep_to_shallow": ("model.pairing=deep_to_shallow",),
    },
    "density": {
        "12.5 %": ("model.encoder_layer_ratio=0.125",),
        "25 %": ("model.encoder_layer_ratio=0.25",),
        "cross_attention": (),  # 50 %, as in the paper
        "100 %": ("model.encoder_layer_ratio=1.0",),
    },
}
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the encoder's blocks, after which its features are probed


@dataclass(frozen=True)
class Arm:
    """One variant under one budget: what is trained for each seed."""

    variant: str
    budget: str  # what equals the reference's: "steps" or "FLOPs"
    words: tuple[str, ...]  # overrides of the config
    steps: Mapping[str, int]  # optimizer steps of each stage
    flops: Mapping[str, float]  # of a sample's forward and backward in each stage, at the longest text

    @property
    def key(self) -> str:
        """Name of its folders."""
        return f"{self.variant.replace(' %', '')}-{self.budget}"

    @property
    def gflops(self) -> float:
        """1e9 FLOPs per sample, over all steps: batches have the same number of samples in every stage."""
        return sum(self.steps[stage] * self.flops[stage] for stage in self.steps) / sum(self.steps.values()) / 1e9


@dataclass(frozen=True)
class Study(Phases):
    """Phases of a study: base encoders, pre-training of every arm, what the model sees, probes at several depths."""

    arms: tuple[Arm, ...] = ()

    def all(self, seeds: int) -> Iterator[list[Step]]:
        yield [self.base(seed) for seed in range(seeds)]
        for phase in (self._pretraining, self._heldout, self._probes):
            yield [step for seed in range(seeds) for step in phase(seed)]

    @property
    def depths(self) -> list[int]:
        """Numbers of blocks after which the encoder is probed."""
        return [max(1, round(share * self.scale.encoder["num_hidden_layers"])) for share in SHARES]

    def _pretraining(self, seed: int) -> Iterator[Step]:
        for arm in self.arms:
            steps = [f"stages.{stage}.max_steps={number}" for stage, number in arm.steps.items()]
            yield self.pretrain(arm.key, seed, [*arm.words, *steps])

    def _heldout(self, seed: int) -> Iterator[Step]:
        for arm in self.arms:
            words = (self.encoder(arm.key, seed), "--output", str(self.output / f"heldout/{arm.key}-{seed}.json"))
            yield Step(f"heldout-{arm.key}-{seed}", ("launchers/reproduction/heldout.py", *words))

    def _probes(self, seed: int) -> Iterator[Step]:
        for key in ("base", *(arm.key for arm in self.arms)):
            for depth in self.depths:
                for name, options in self.scale.probe.items():
                    words = [self.encoder(key, seed), "--set", name, *options, "--heads", "linear", "--seeds", "1"]
                    words += ["--depth", str(depth), "--output", str(self.output / f"probes/{key}-{seed}/{depth}")]
                    yield Step(f"probe-{name}-{key}-{depth}-{seed}", ("launchers/probe.py", *words))


def arms(study: str, preset: str, changes: Path | None, num_samples: int) -> tuple[Arm, ...]:
    """Every variant of `study` at the steps of the reference, and again at its FLOPs where that gives other steps.

    Args:
        study: one of STUDIES.
        preset: the run that is varied.
        changes: a YAML or JSON file of changes to the preset.
        num_samples: size of the training set, which decides the steps of stages that count epochs.
    """
    variants = STUDIES[study]
    costs = {name: _costs(preset, changes, words, num_samples) for name, words in variants.items()}
    reference = costs[REFERENCE]
    equal_steps = {stage: number for stage, (number, _) in reference.items()}
    found = []
    for name, words in variants.items():
        own = {stage: cost for stage, (_, cost) in costs[name].items()}
        equal_flops = {stage: max(1, round(number * cost / own[stage])) for stage, (number, cost) in reference.items()}
        found.append(Arm(name, "steps", words, equal_steps, own))
        if equal_flops != equal_steps:
            found.append(Arm(name, "FLOPs", words, equal_flops, own))
    return tuple(found)


def _costs(preset: str, changes: Path | None, words: tuple[str, ...], num_samples: int) -> dict[str, tuple[int, float]]:
    """(optimizer steps, FLOPs of one sample's forward and backward) of each stage."""
    from hive_scale.model import build
    from hive_scale.plan.flops import count

    config = presets.load(preset, changes, list(words))
    found = {}
    for name, stage in config.stages.items():
        work, tokens = count(build.for_stage(config.model, stage)[0]), config.data_of(name).max_tokens
        found[name] = stage.num_steps(num_samples), work.total(1, tokens, tokens - 1).model
    return found
