"""A reproduction as commands: base encoders, pre-training, probes, fine-tuning, answers; per encoder and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.reproduction.scales import Scale
from launchers.reproduction.steps import Step

FUSIONS = {"sa": "concat", "hive": "cross_attention"}
ENCODERS = ("base", *FUSIONS)


@dataclass(frozen=True)
class Phases:
    """Phases of `scale`. Steps within a phase are independent. `output` holds the scale's settings."""

    scale: Scale
    data: Path
    output: Path

    def all(self, seeds: int) -> Iterator[list[Step]]:
        yield [self.base(seed) for seed in range(seeds)]
        for phase in (self._pretraining, self._probes, self._fine_tuning, self._answers):
            yield [step for seed in range(seeds) for step in phase(seed)]

    def base(self, seed: int) -> Step:
        """The starting encoder that all methods share for a seed."""
        words = ["--encoder", str(self.output / "encoder.json"), "--steps", str(self.scale.base_steps)]
        words += ["--seed", str(seed), "--output", self.encoder("base", seed)]
        shards = self.scale.pretrain["data"]["train"]
        return Step(f"base-{seed}", ("launchers/reproduction/base.py", *words, "--shards", *shards))

    def pretrain(self, key: str, seed: int, changes: Sequence[str]) -> Step:
        """Pre-training from the base encoder, with the same data order for every `key`; `changes` are overrides."""
        words = ["--preset", "demo", "--config", str(self.output / "pretrain.json"), *changes]
        words += ["blank_image_control=false", f"model.vision.path={self.encoder('base', seed)}"]
        seeds = [f"stages.{name}.seed={40 + i + 10 * seed}" for i, name in enumerate(self.scale.pretrain["stages"])]
        words += [*seeds, f"output={self.encoder(key, seed)}"]
        return Step(f"pretrain-{key}-{seed}", ("launchers/pretrain.py", *words))

    def encoder(self, key: str, seed: int) -> str:
        """Path of a trained encoder: its run, or the base encoder's directory."""
        return str(self.output / f"{key}-{seed}")

    def _pretraining(self, seed: int) -> Iterator[Step]:
        for key, fusion in FUSIONS.items():
            yield self.pretrain(key, seed, [f"fusion={fusion}"])

    def _probes(self, seed: int) -> Iterator[Step]:
        for key in ENCODERS:
            for name, options in self.scale.probe.items():
                words = [self.encoder(key, seed), "--set", name, *options, "--seeds", "1"]
                words += ["--output", str(self.output / f"probes/{key}-{seed}")]
                yield Step(f"probe-{name}-{key}-{seed}", ("launchers/probe.py", *words))

    def _fine_tuning(self, seed: int) -> Iterator[Step]:
        for key in ENCODERS:
            words = [self.encoder(key, seed), "--preset", "vlm_small", "--config", str(self.output / "vlm.json")]
            words += [f"stages.{name}.seed={i + 10 * seed}" for i, name in enumerate(self.scale.vlm["stages"])]
            yield Step(f"vlm-{key}-{seed}", ("launchers/finetune_vlm.py", *words, f"output={self._vlm(key, seed)}"))

    def _answers(self, seed: int) -> Iterator[Step]:
        for key in ENCODERS:
            words = [self._vlm(key, seed), "--tasks", "easyvqa", "--data", str(self.data)]
            words += ["--limit", str(self.scale.questions), "--output", str(self.output / f"answers/{key}-{seed}")]
            yield Step(f"answers-{key}-{seed}", ("launchers/evaluate.py", *words))

    def _vlm(self, key: str, seed: int) -> str:
        return str(self.output / f"vlm-{key}-{seed}")
