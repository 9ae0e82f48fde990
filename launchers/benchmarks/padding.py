"""Savings from splitting a global batch by length: padding, and seconds of the same optimizer step.

Captions have the lengths of CC3M's alt texts (log-normal, about ten words). The model is an LLM with almost no
encoder, since the split cannot save a large encoder's time.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, show, spread

if TYPE_CHECKING:
    from hive_scale.batch import Batch
    from hive_scale.distributed import World
    from hive_scale.engine import Engine

HELP = "padding and seconds saved by dealing batches by length"
WAYS = ("as they come", "by length")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--global-batch", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 32], help="samples of each (8 32)")
    parser.add_argument("--width", type=int, default=256, help="of the LLM of 8 layers (256)")


def run(arguments: argparse.Namespace) -> None:
    from hive_scale.distributed import session

    if arguments.quick:
        arguments.global_batch, arguments.micro_batches, arguments.width = 16, [4], 32
    rows = []
    with session() as world:
        for micro_batch in arguments.micro_batches:
            engine = make_engine(arguments.global_batch, micro_batch, arguments.width, world)
            rows += measure(engine, arguments.global_batch, micro_batch, arguments.rounds)
    caption = f"{describe_machine()}; global batch {arguments.global_batch}, one process; {arguments.rounds} rounds"
    columns = ("micro-batch", "dealt", "padding", "step, s", "ratio", "quartiles")
    show(columns, rows, caption, arguments.markdown)


def measure(engine: Engine, global_batch: int, micro_batch: int, rounds: int) -> list[list[str]]:
    """Time both ways in turns, on the same samples; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    padding: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            batches = make_batches(number, global_batch, micro_batch, way)
            began = perf_counter()
            engine.step(batches, 0.0)
            if number:
                seconds[way].append(perf_counter() - began)
                places = sum(batch.tokens.numel() for batch in batches)
                padding[way].append(1 - sum(batch.num_tokens + len(batch) for batch in batches) / places)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    against = {WAYS[0]: ("1", "-"), WAYS[1]: (f"{median(ratios):.3f}", spread(ratios))}
    return [
        [str(micro_batch), way, f"{median(padding[way]):.1%}", f"{median(seconds[way]):.3f}", *against[way]]
        for way in WAYS
    ]


def make_batches(number: int, global_batch: int, micro_batch: int, way: str) -> list[Batch]:
    """Global batch `number` as one rank's micro-batches; both ways get the same samples."""
    import numpy as np
    import torch

    from hive_scale.batch import Sample, collate
    from hive_scale.data.sampler import split_by_length

    rng = np.random.default_rng(number)
    words = np.clip(rng.lognormal(np.log(9.3), 0.45, global_batch), 4, 60)
    lengths = np.clip(words * 1.28 + 2, 5, 77).astype(int)
    count = global_batch // micro_batch
    dealt = split_by_length(lengths, 1, count)[0] if way == "by length" else np.arange(global_batch).reshape(count, -1)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)

    def sample(length: int) -> Sample:
        return Sample("", image, [3] * length, [False] + [True] * (length - 1))

    return [collate([sample(int(length)) for length in lengths[places]], 0, 32) for places in dealt]


def make_engine(global_batch: int, micro_batch: int, width: int, world: World) -> Engine:
    from hive_scale.config import EngineConfig, ModelConfig, PartConfig, StageConfig
    from hive_scale.engine import open_engine
    from hive_scale.model.build import init_model, meta_model
    from hive_scale.param_groups import apply_trainable_groups
    from hive_scale.presets import three_stages

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "vision_use_head": False, **sizes}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 4}
    language = {"vocab_size": 8192, "num_hidden_layers": 8, "tie_word_embeddings": True, **sizes}
    model = ModelConfig(
        PartConfig(config={"model_type": "siglip_vision_model", **vision}),
        PartConfig(config={"model_type": "llama", **language}),
    )
    stage = StageConfig(three_stages("cross_attention", (1e-3, 1e-3, 1e-3))["language"], global_batch, micro_batch)
    shell = meta_model(model)
    groups = apply_trainable_groups(shell, stage, shell.unused_parameters())
    weights = dict(init_model(model, seed=0).named_parameters())
    return open_engine(shell, groups, stage, EngineConfig(), world, weights)
