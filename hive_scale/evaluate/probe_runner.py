"""Train, select and test probes on a frozen encoder's features (paper, Table 1)."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hive_scale import strict_json
from hive_scale.data.feature_store import DiskError
from hive_scale.distributed import World
from hive_scale.evaluate.classification_datasets import ClassificationDataset, Split
from hive_scale.evaluate.encoder import AT_ONCE, Cache, Encoder, Numbers, Source, cut
from hive_scale.evaluate.probes import Kind, ProbeGrid, Recipe, nearest_neighbours
from hive_scale.evaluate.readers import write_json
from hive_scale.model.identity import key_of
from hive_scale.strict_json import dumps

logger = logging.getLogger(__name__)
HELD_BACK = 0.1  # share of training images held back to choose the learning rate, if there is no validation split


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of a probe evaluation."""

    kinds: tuple[Kind, ...]
    recipe: Recipe
    seeds: tuple[int, ...] = (0, 1, 2)
    augment: bool = True
    neighbours: bool = False  # also classify by nearest neighbours, which needs no training
    limit: int = 0  # number of training images to use, the same for every encoder; 0: all
    workers: int = 0


class ProbeRunner:
    """Probes of one encoder on one dataset."""

    def __init__(
        self, encoder: Encoder, data: ClassificationDataset, plan: ProbeConfig, world: World, cache: Path
    ) -> None:
        self.encoder, self.data, self.plan, self.world = encoder, data, plan, world
        order = np.random.default_rng(0).permutation(data.train.size)  # the same parts for every encoder and seed
        order = order[: plan.limit] if plan.limit else order
        held = 0 if data.validation else ceil(HELD_BACK * len(order))
        self.whole: Numbers = np.sort(order)
        self.train_part: Numbers = np.sort(order[held:])
        self.choice_part: Numbers = np.sort(order[:held])
        self.cache = cache
        self._sources: dict[str, Source] = {}

    def run(self, say: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
        """Return accuracies in percent by kind: each seed's on the test split, at the rate chosen without it."""
        results: dict[str, list[dict[str, Any]]] = {}
        for seed in self.plan.seeds if self.plan.kinds else ():
            for kind, one in self._one_seed(seed, say).items():
                results.setdefault(kind, []).append(one)
        summary = {kind: summarise(ones) for kind, ones in results.items()}
        if self.plan.neighbours:
            summary["neighbours"] = {"mean": self._vote(), "deviation": 0.0}
        return summary

    def _one_seed(self, seed: int, say: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        """Train the whole grid in one pass over the data, choose one rate per kind, and test that."""
        data, recipe, kinds = self.data, self.plan.recipe, self.plan.kinds
        [grid] = self._train([self._grid(kinds, recipe, seed)], self.train_part, seed, say)
        if data.validation:
            shares = self._share_right(grid, data.validation, np.arange(data.validation.size))
        else:
            shares = self._share_right(grid, data.train, self.choice_part)
        chosen_on = dict(zip(grid.keys, shares, strict=True))
        best = {kind: chosen({rate: chosen_on[kind, rate] for rate in recipe.rates}) for kind in kinds}
        if data.validation:
            tested = dict(zip(grid.keys, self._test(grid), strict=True))
            return {kind: {"accuracy": tested[kind, best[kind]["rate"]], **best[kind]} for kind in kinds}
        # without a validation split, retrain at the chosen rates on all training images, the held-back part included
        grids = [self._grid([kind], replace(recipe, rates=(best[kind]["rate"],)), seed) for kind in kinds]
        self._train(grids, self.whole, seed, lambda text: say(f"{text}, at the rates chosen"))
        return {kind: {"accuracy": self._test(one)[0], **best[kind]} for kind, one in zip(kinds, grids, strict=True)}

    def _grid(self, kinds: Sequence[Kind], recipe: Recipe, seed: int) -> ProbeGrid:
        return ProbeGrid(kinds, self.encoder.width, self.data.num_classes, recipe, seed, self.world)

    def _train(self, grids: list[ProbeGrid], part: Numbers, seed: int, say: Callable[[str], Any]) -> list[ProbeGrid]:
        """Train `grids` on the images `part` of the training split."""
        recipe, world = self.plan.recipe, self.world
        batch = min(recipe.batch, len(part))
        if batch < world.size:
            remedy = "start fewer, or give more images"
            raise ValueError(f"{batch} images a batch cannot be shared by {world.size} processes: {remedy}")
        per_epoch = len(part) // batch
        repeats = max(1, ceil(recipe.min_steps / (per_epoch * recipe.epochs)))
        num_steps, step = per_epoch * recipe.epochs * repeats, 0
        source = self._source(self.data.train)
        for epoch in range(recipe.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(part)[: per_epoch * batch]
            # this rank's share of every global batch
            shares = [np.array_split(one, world.size)[world.rank] for one in order.reshape(per_epoch, batch)]
            for features, labels in source.batches(shares, (seed, epoch) if self.plan.augment else None):
                for _ in range(repeats):
                    for grid in grids:
                        grid.step(features, labels, batch, step, num_steps)
                    step += 1
            say(f"seed {seed}: epoch {epoch + 1} of {recipe.epochs}")
        return grids

    def _source(self, split: Split) -> Source:
        if split.name not in self._sources:
            source = self._sources[split.name] = Source(self.encoder, split, self.plan.workers)
            if not self.plan.augment:  # without augmentation, each image needs the encoder only once
                wanted = self.whole if split is self.data.train else np.arange(split.size)
                held = key_of(self.data.name, self.data.identity)
                try:
                    source.cache = Cache(self.cache, held, source, wanted, self.world)
                except DiskError as error:
                    logger.warning("%s: %s. The encoder sees each image again each time", self.cache, error)
        return self._sources[split.name]

    def _share_right(self, grid: ProbeGrid, split: Split, part: Numbers) -> list[float]:
        """Percent of the images that each probe of the grid classifies correctly."""
        right = torch.zeros(len(grid.keys), device=self.world.device)
        for features, labels in self._source(split).batches(cut(part[self.world.rank :: self.world.size], AT_ONCE)):
            right += grid.right(features, labels)
        return [100.0 * one / max(1, len(part)) for one in self.world.sum(*right.tolist())]

    def _test(self, grid: ProbeGrid) -> list[float]:
        return self._share_right(grid, self.data.test, np.arange(self.data.test.size))

    def _vote(self) -> float:
        """Percent of the test images that their nearest training images classify correctly by vote."""
        known, labels = self._pooled(self.data.train, self.whole)
        asked, truth = self._pooled(self.data.test, np.arange(self.data.test.size))
        made = nearest_neighbours(known, labels, asked, self.data.num_classes)
        return 100.0 * float((made == truth).float().mean())

    def _pooled(self, split: Split, part: Numbers) -> tuple[Tensor, Tensor]:
        """Mean features (N, C) and labels (N,) of all images in `part`, gathered on every rank."""
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


def chosen(shares: Mapping[float, float]) -> dict[str, Any]:
    """Return the best rate, its percentage ("chosen"), and the edge of the grid it lies on, if any ("edge").

    Among equally good rates the middle one is taken, and one at an edge only if there is no other.
    """
    rates, best = sorted(shares), max(shares.values())
    edges = {rates[0]: "lowest", rates[-1]: "highest"} if len(rates) > 1 else {}
    equal = [rate for rate in rates if shares[rate] == best]
    equal = [rate for rate in equal if rate not in edges] or equal
    rate = equal[(len(equal) - 1) // 2]
    return {"chosen": best, "rate": rate, "edge": edges.get(rate, "")}


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Return a warning for each kind of probe whose best rate lies at an edge of the grid."""
    lines = []
    for kind, one in results.items():
        for edge, further in (("lowest", "lower"), ("highest", "higher")):
            rates = sorted({seed["rate"] for seed in one.get("seeds", ()) if seed["edge"] == edge})
            if rates:
                told = ", ".join(f"{rate:g}" for rate in rates)
                lines.append(f"{kind}: {told} is the {edge} rate of the grid; a {further} one may do better: --rates")
    return lines


def summarise(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [one["accuracy"] for one in seeds]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"mean": statistics.mean(accuracies), "deviation": deviation, "seeds": list(seeds)}


def save(path: Path, plan: ProbeConfig, encoder: Encoder, data: ClassificationDataset, results: dict[str, Any]) -> None:
    write_json(path, {**_made_of(plan, encoder, data), "results": results})


def read_results(path: Path, plan: ProbeConfig, encoder: Encoder, data: ClassificationDataset) -> dict[str, Any] | None:
    """Return the results that `save` wrote; None if there are none, or if plan, dataset or encoder differ."""
    try:
        content: dict[str, Any] = strict_json.read(path)
        results: dict[str, Any] = content.pop("results", {})
    except (OSError, ValueError, AttributeError):  # missing or truncated
        return None
    return results if content == _made_of(plan, encoder, data) else None


def results_for_all(
    path: Path, plan: ProbeConfig, encoder: Encoder, data: ClassificationDataset, world: World
) -> dict[str, Any] | None:
    """As `read_results`, what the main rank finds. A collective: other nodes may see another file, or none yet."""
    return world.of_main(read_results(path, plan, encoder, data) if world.is_main else None)


def _made_of(plan: ProbeConfig, encoder: Encoder, data: ClassificationDataset) -> dict[str, Any]:
    """Return plan, dataset and encoder as they come back from a JSON file."""
    asked = {name: value for name, value in asdict(plan).items() if name != "workers"}
    what = {"set": data.where, "plan": asked, "key": key_of(encoder.identity, data.name, data.identity)}
    made: dict[str, Any] = json.loads(dumps(what))
    return made
