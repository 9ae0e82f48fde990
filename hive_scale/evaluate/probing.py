"""How well a frozen encoder's features classify: probes trained, chosen and tested (paper, Table 1)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hive_scale.distributed import World
from hive_scale.evaluate.features import AT_ONCE, Cache, Encoder, Numbers, Source, cut
from hive_scale.evaluate.labelled import Labelled, Split
from hive_scale.evaluate.probes import Grid, Kind, Recipe, nearest_neighbours
from hive_scale.strict_json import dumps

HELD_BACK = 0.1  # share of the training pictures on which rates are chosen, where the set has no split for it


@dataclass(frozen=True)
class Plan:
    """What is asked of the encoder."""

    kinds: tuple[Kind, ...]
    recipe: Recipe
    seeds: tuple[int, ...] = (0, 1, 2)
    augment: bool = True
    neighbours: bool = False  # a vote of nearest neighbours, too: a quick look, nothing is trained
    limit: int = 0  # use so many training pictures only, the same for every encoder; 0: all
    workers: int = 0


class Bench:
    """One encoder on one labelled set."""

    def __init__(self, encoder: Encoder, data: Labelled, plan: Plan, world: World, cache: Path) -> None:
        self.encoder, self.data, self.plan, self.world = encoder, data, plan, world
        order = np.random.default_rng(0).permutation(data.train.size)  # the same parts for every encoder and seed
        order = order[: plan.limit] if plan.limit else order
        held = 0 if data.validation else ceil(HELD_BACK * len(order))
        self.train_part: Numbers = np.sort(order[held:])
        self.choice_part: Numbers = np.sort(order[:held])
        self.cache = cache
        self._sources: dict[str, Source] = {}

    def run(self, say: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
        """Accuracies in percent by kind: of each seed on the test split, at the rate chosen without it."""
        results: dict[str, Any] = {}
        for seed in self.plan.seeds if self.plan.kinds else ():
            for kind, one in self._one_seed(seed, say).items():
                results.setdefault(kind, []).append(one)
        summary = {kind: summarise(ones) for kind, ones in results.items()}
        if self.plan.neighbours:
            summary["neighbours"] = {"mean": self._vote(), "deviation": 0.0}
        return summary

    def _one_seed(self, seed: int, say: Callable[[str], Any]) -> dict[str, dict[str, float]]:
        """Train the whole grid in one pass over the data, and choose one rate a kind."""
        recipe, plan = self.plan.recipe, self.plan
        grid = Grid(plan.kinds, self.encoder.width, self.data.num_classes, recipe, seed, self.world)
        batch = min(recipe.batch, len(self.train_part))
        if batch < self.world.size:
            raise ValueError(f"{batch} pictures a batch cannot be shared by {self.world.size} processes: start fewer")
        per_epoch = len(self.train_part) // batch
        num_steps, step = per_epoch * recipe.epochs, 0
        source = self._source(self.data.train)
        for epoch in range(recipe.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(self.train_part)[: per_epoch * batch]
            # of every global batch this rank takes its share
            shares = [np.array_split(one, self.world.size)[self.world.rank] for one in order.reshape(per_epoch, batch)]
            for features, labels in source.batches(shares, (seed, epoch) if plan.augment else None):
                grid.step(features, labels, batch, step, num_steps)
                step += 1
            say(f"seed {seed}: epoch {epoch + 1} of {recipe.epochs}")
        if self.data.validation:
            chosen_on = self._share_right(grid, self.data.validation, np.arange(self.data.validation.size))
        else:
            chosen_on = self._share_right(grid, self.data.train, self.choice_part)
        tested = self._share_right(grid, self.data.test, np.arange(self.data.test.size))
        best: dict[str, dict[str, float]] = {}
        for kind in plan.kinds:
            places = [place for place, (one, _) in enumerate(grid.keys) if one == kind]
            place = max(places, key=lambda place: chosen_on[place])
            best[kind] = {"accuracy": tested[place], "chosen": chosen_on[place], "rate": grid.keys[place][1]}
        return best

    def _source(self, split: Split) -> Source:
        if split.name not in self._sources:
            source = self._sources[split.name] = Source(self.encoder, split, self.plan.workers)
            if not self.plan.augment:  # seen again and again unchanged, pictures need the encoder once
                wanted = np.arange(split.size)
                if split is self.data.train:
                    wanted = np.union1d(self.train_part, self.choice_part)
                source.cache = Cache(self.cache, f"{self.data.name} of {self.data.where}", source, wanted, self.world)
        return self._sources[split.name]

    def _share_right(self, grid: Grid, split: Split, part: Numbers) -> list[float]:
        """Percent of the pictures that each probe of the grid classifies rightly."""
        right = torch.zeros(len(grid.keys), device=self.world.device)
        for features, labels in self._source(split).batches(cut(part[self.world.rank :: self.world.size], AT_ONCE)):
            right += grid.right(features, labels)
        return [100.0 * one / max(1, len(part)) for one in self.world.sum(*right.tolist())]

    def _vote(self) -> float:
        """Percent of the test pictures whose nearest training pictures vote for their class."""
        known, labels = self._pooled(self.data.train, self.train_part)
        asked, truth = self._pooled(self.data.test, np.arange(self.data.test.size))
        made = nearest_neighbours(known, labels, asked, self.data.num_classes)
        return 100.0 * float((made == truth).float().mean())

    def _pooled(self, split: Split, part: Numbers) -> tuple[Tensor, Tensor]:
        """Mean features (N, C) and labels (N,) of all pictures in `part`, on every rank."""
        pooled = torch.zeros(len(part), self.encoder.width, device=self.world.device)
        labels = torch.zeros(len(part), dtype=torch.long, device=self.world.device)
        mine = np.arange(len(part))[self.world.rank :: self.world.size]
        place = 0
        for features, told in self._source(split).batches(cut(part[mine], AT_ONCE)):
            rows = torch.from_numpy(mine[place : place + len(told)])
            pooled[rows], labels[rows] = features.float().mean(1), told
            place += len(told)
        self.world.add_up([pooled])
        self.world.add_up([labels])
        return pooled, labels


def summarise(seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    accuracies = [one["accuracy"] for one in seeds]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"mean": statistics.mean(accuracies), "deviation": deviation, "seeds": list(seeds)}


def save(path: Path, plan: Plan, encoder: Encoder, data: Labelled, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps({**_made_of(plan, encoder, data), "results": results}, indent=1) + "\n")


def read_results(path: Path, plan: Plan, encoder: Encoder, data: Labelled) -> dict[str, Any] | None:
    """What `save` wrote, or None: there is nothing, or it is of another plan, set or encoder."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or one that was cut
        return None
    results: dict[str, Any] = content.pop("results", {})
    return results if content == _made_of(plan, encoder, data) else None


def _made_of(plan: Plan, encoder: Encoder, data: Labelled) -> dict[str, Any]:
    """As it comes back from a file."""
    what = {"weights": encoder.identity, "depth": encoder.depth, "set": data.where, "plan": asdict(plan)}
    made: dict[str, Any] = json.loads(dumps(what))
    return made
