"""HIVE beside self-attention over visual tokens (the paper's tables 6 and 9): FLOPs, seconds and memory, per stage.

Full-size models from random weights take turns on one device, forward and backward of the same micro-batch.
What the FLOPs allow is the limit of any implementation; how near we come to it is ours to answer for.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, peak_bytes, show, spread, this_device
from benchmarks.task import from_scratch

if TYPE_CHECKING:
    from hive_scale.batch import Batch
    from hive_scale.config import Config
    from hive_scale.plan.flops import Flops

HELP = "HIVE beside self-attention: FLOPs, seconds and memory per stage"
OURS, BASELINE = "cross_attention", "concat"
STAGES = ("projector", "language", "joint")
PAPER = "the paper says: 0.14 of the TFLOPs, 3.43 times as fast, 59.3 % less memory"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="paper_siglip", help="the model (paper_siglip)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--fusions", nargs="+", default=[OURS, BASELINE], help=f"({OURS} {BASELINE})")
    parser.add_argument("--tokens", nargs="+", type=int, default=[77], help="of a caption (77); CC3M has about 20")
    parser.add_argument("--micro_batch", type=int, default=2, help="(2)")
    parser.add_argument("--features", action="store_true", help="kept ones in place of images, as of feature_cache")
    parser.add_argument("--compile", action="store_true", help="blocks of both sides, as engine.compile does")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="cost against resolution and text length, no timing")


def run(arguments: argparse.Namespace) -> None:
    if arguments.draw:
        from benchmarks.complexity import draw

        draw(arguments.preset, arguments.draw)
        print(f"drawn in {arguments.draw}")
        return
    if arguments.features and "joint" in arguments.stages:
        raise ValueError("--features: in stage joint the encoder learns: give --stages projector language")
    if arguments.quick:
        arguments.preset = "debug"
    rows = []
    contenders = {fusion: _build(arguments.preset, fusion, arguments.compile) for fusion in arguments.fusions}
    for stage in arguments.stages:
        for tokens in arguments.tokens:
            rows += (found := _compare(contenders, stage, tokens, arguments))
            print("\n".join(" | ".join(row) for row in found), file=sys.stderr, flush=True)  # a later one may fail
    columns = ("stage", "tokens", "fusion", "GFLOP/sample", "of the baseline", "without encoder", "s/sample")
    columns += ("times as fast", "quartiles", "FLOP limit", "of the limit", "memory, GB", "less memory")
    columns += ("MFU",) if _peak() else ()
    caption = f"{describe_machine()}; bf16, micro-batch {arguments.micro_batch}, {arguments.rounds} rounds; {PAPER}"
    show(columns, rows, caption, arguments.markdown)


def _peak() -> float | None:
    """Peak FLOP/s of the GPU, if the planner knows it."""
    from hive_scale.plan.devices import peak_flops

    return peak_flops(this_device(), "bf16")


def _build(preset: str, fusion: str, compiled: bool) -> tuple[Any, Config, int]:
    """(model of the preset's size in bf16, its config, its image size in pixels)."""
    import torch

    from hive_scale.engine.activation_checkpointing import blocks_of
    from hive_scale.model import build

    config = from_scratch(preset, [f"fusion={fusion}"])
    model = build.init_model(config.model, seed=0)
    with torch.no_grad():
        for layer in model.fusion.layers:
            if hasattr(layer, "gate"):
                layer.gate.fill_(0.5)
    if compiled:
        for block in blocks_of(model):
            block.compile()
    return model.to(this_device(), torch.bfloat16), config, build.image_size(config.model)


def _compare(contenders: dict[str, Any], stage: str, tokens: int, arguments: argparse.Namespace) -> list[list[str]]:
    from hive_scale.model import build
    from hive_scale.param_groups import apply_trainable_groups
    from hive_scale.plan.flops import count

    if arguments.compile:
        import torch

        torch.compiler.reset()  # drops graphs compiled for the previous stage's frozen parts
    batch = arguments.micro_batch
    work: dict[str, dict[str, Flops]] = {}
    runs, peaks = {}, {}
    for fusion, (model, config, side) in contenders.items():
        apply_trainable_groups(model, config.stages[stage], model.unused_parameters())
        counter = count(build.for_stage(config.model, config.stages[stage])[0])
        counter = counter.without("vision") if arguments.features else counter
        work[fusion] = counter.components(1, tokens, tokens - 1)
        runs[fusion] = _step(model, _batch(batch, tokens, side, model, arguments.features))
        runs[fusion]()  # warm-up: the first run allocates memory that stays
        peaks[fusion] = peak_bytes(runs[fusion], model.pixel_mean.device)
    seconds: dict[str, list[float]] = {fusion: [] for fusion in runs}
    for _ in range(arguments.rounds):
        for fusion, step in runs.items():
            began = perf_counter()
            step()
            seconds[fusion].append((perf_counter() - began) / batch)
    return [_row(stage, tokens, fusion, work, seconds, peaks) for fusion in runs]


def _row(
    stage: str,
    tokens: int,
    fusion: str,
    work: dict[str, dict[str, Flops]],
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
) -> list[str]:
    def total(name: str, *without: str) -> float:
        return sum(part.model for component, part in work[name].items() if component not in without)

    base = BASELINE if BASELINE in work else next(iter(work))
    faster = [b / a for a, b in zip(seconds[fusion], seconds[base], strict=True)]
    speed, peak = total(fusion) / median(seconds[fusion]), _peak()
    share, limit = total(fusion) / total(base), total(base) / total(fusion)
    return [
        *(stage, str(tokens), fusion, f"{total(fusion) / 1e9:.1f}", f"{share:.3f}"),
        f"{total(fusion, 'vision') / total(base, 'vision'):.3f}",
        *(f"{median(seconds[fusion]):.4f}", f"{median(faster):.2f}", spread(faster), f"{limit:.2f}"),
        *(f"{median(faster) / limit:.2f}", f"{peaks[fusion] / 1e9:.2f}", f"{1 - peaks[fusion] / peaks[base]:.1%}"),
        *([f"{speed / peak:.1%}"] if peak else []),
    ]


def _step(model: Any, batch: Batch) -> Any:
    """Forward and backward; gradients are dropped, as a step that clears them would."""
    import torch

    inputs = batch.inputs()

    def step() -> None:
        torch.autograd.backward(model(**inputs))
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    gc.collect()
    return step


def _batch(samples: int, tokens: int, side: int, model: Any, features: bool) -> Batch:
    import torch

    from hive_scale.batch import Sample, collate

    random = torch.Generator().manual_seed(0)
    vocabulary = model.language.config.vocab_size

    def sample() -> Sample:
        pixels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=random)
        ids = torch.randint(3, vocabulary, (tokens,), generator=random).tolist()
        return Sample("", pixels, ids, [False] + [True] * (tokens - 1))

    batch = collate([sample() for _ in range(samples)], pad_id=0, image_size=side).to(model.pixel_mean.device)
    if features:
        with torch.no_grad():
            seen = torch.stack(model.features(model.encode(batch.pixels)), dim=1)
        batch = replace(batch, pixels=seen)
    return batch
