"""The planner's peak memory beside the real one, and beside the estimates of DeepSpeed and Accelerate.

On a GPU the real peak is torch's own count, and the time of a step is compared as well. On a CPU a preloaded counter
follows every block that torch allocates; the batch and the initial weights, which exist before the engine, are not
counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, show
from benchmarks.task import CASES, from_scratch
from benchmarks.workers import LAUNCHER
from hive_scale.strict_json import dumps

if TYPE_CHECKING:
    from hive_scale.config import Config
    from hive_scale.distributed import World
    from hive_scale.plan.memory import StageProfile

HELP = "the planner's peak beside the real one"
SOURCE = Path(__file__).with_name("allocations.c")
TOKENS, MICRO_BATCH, VOCABULARY = 48, 4, 8192
TIMED = 6  # number of timed steps
FUSIONS, STAGES, RECOMPUTED = ("cross_attention", "concat"), ("projector", "language", "joint"), ("none", "full")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="a model in full size, as its stages run it (default: a small one)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="of the preset's config")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["one", "fsdp", "zero2", "zero3"])
    parser.add_argument("--ranks", type=int, default=2, help="processes of every case but the first (default 2)")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=FUSIONS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--features", action="store_true", help="kept ones in place of images, as of feature_cache")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, in bytes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        _measure(arguments)
        return
    if arguments.set and not arguments.preset:
        raise ValueError("--set: these are keys of a preset's config: give --preset, too")
    arguments.stages = _stages(arguments)
    found = [row for case in arguments.cases for row in _launch(case, arguments)]
    if arguments.json:
        print(dumps(found))
        return
    errors = [row["plan"] / row["real"] - 1 for row in found]
    timed = found[0]["seconds"] is not None
    columns = (
        "sharding",
        "fusion",
        "stage",
        "recompute",
        "real, MB",
        "planned, MB",
        "error",
        "DeepSpeed",
        "Accelerate",
    )
    columns += ("real, s/step", "planned") if timed else ()
    rows = [
        [
            *(row["title"], row["fusion"], row["stage"], row["recompute"]),
            *(f"{row['real'] / 1e6:.1f}", f"{row['plan'] / 1e6:.1f}", f"{error:+.2%}"),
            *(_ratio(row[peer], row["real"]) for peer in ("deepspeed", "accelerate")),
            *((f"{row['seconds']:.3f}", f"{row['planned_seconds'] or 0:.3f}") if timed else ()),
        ]
        for row, error in zip(found, errors, strict=True)
    ]
    worst = max(map(abs, errors))
    summary = f"median error {median(map(abs, errors)):.2%}, worst {worst:.2%} of {len(found)} cases"
    what = arguments.preset or arguments.precision
    show(columns, rows, f"{found[0]['machine']}; {what}; {summary}", arguments.markdown)


def _stages(arguments: argparse.Namespace) -> list[str]:
    """Return the requested stages. Raises ValueError for an unknown one, or if none can use stored features."""
    stages = from_scratch(arguments.preset, arguments.set).stages if arguments.preset else dict.fromkeys(STAGES)
    asked: list[str] = arguments.stages or list(stages)
    for name in asked:
        if name not in stages:
            raise ValueError(f"--stages {name}: no such stage: there are {', '.join(stages)}")
    if arguments.features and "joint" in asked:
        raise ValueError("--features: in stage joint the encoder learns: give --stages projector language")
    return asked


def _ratio(estimate: float | None, real: float) -> str:
    return "-" if estimate is None else f"{estimate / real - 1:+.0%}"


def _launch(case: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one way to shard, measured in processes of their own."""
    ranks = 1 if case == "one" else arguments.ranks
    with TemporaryDirectory() as folder:
        library, result = Path(folder, "allocations.so"), Path(folder, "rows.json")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-lpthread"], check=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--no-python"]
        words = ["memory", "--worker", str(result), "--cases", case, "--stages", *arguments.stages]
        words += ["--fusions", *arguments.fusions, "--precision", arguments.precision]
        words += ["--accumulation", str(arguments.accumulation), *["--features"] * arguments.features]
        words += ["--preset", arguments.preset, "--set", *arguments.set] if arguments.preset else []
        worker = ["env", f"LD_PRELOAD={library}", sys.executable, str(LAUNCHER), *words]
        command = [sys.executable, *torchrun, *worker] if ranks > 1 else worker
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        print(f"{case} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if not result.exists():
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"{case} failed: see above")
        rows: list[dict[str, Any]] = json.loads(result.read_text())
    return rows


# -- one rank of one case -------------------------------------------------------------------------------------


class _Meter:
    """Bytes that torch has allocated on the device: now, and the peak since `reset`."""

    def __init__(self, device: Any) -> None:
        import torch

        self.cuda = torch.cuda if device.type == "cuda" else None
        if not self.cuda:
            self.library = ctypes.CDLL(None)
            self.library.allocations_alive.restype = self.library.allocations_peak.restype = ctypes.c_size_t

    def alive(self) -> int:
        gc.collect()
        return self.cuda.memory_allocated() if self.cuda else int(self.library.allocations_alive())

    def reset(self) -> None:
        _ = self.cuda.reset_peak_memory_stats() if self.cuda else self.library.allocations_reset()

    def peak(self) -> int:
        return self.cuda.max_memory_allocated() if self.cuda else int(self.library.allocations_peak())


def _measure(arguments: argparse.Namespace) -> None:
    from hive_scale.distributed import session

    rows = []
    with session() as world:
        for config in _configs(arguments, world.size):
            real, seconds = _real(config, world)
            if world.is_main:
                found = {"real": real, "seconds": seconds, "machine": describe_machine()}
                rows.append({**_planned(config, world), **found})
                print(dumps(rows[-1]), file=sys.stderr, flush=True)
            world.barrier()
        if world.is_main:
            arguments.worker.write_text(dumps(rows))
        world.barrier()
    sys.stdout.flush()
    os._exit(0)


def _configs(arguments: argparse.Namespace, world_size: int) -> Iterator[Config]:
    cache = "features" * arguments.features  # only planned with: nothing is read from it here
    for config in (_of_preset if arguments.preset else _small)(arguments, world_size):
        yield replace(config, feature_cache=cache)


def _of_preset(arguments: argparse.Namespace, world_size: int) -> Iterator[Config]:
    """The preset's model from random weights, one stage each; `accumulation` micro-batches per global batch."""
    title, shard, json_file = CASES[arguments.cases[0]]
    for fusion in arguments.fusions:
        config = from_scratch(arguments.preset, [f"fusion={fusion}", *arguments.set])
        engine = replace(config.engine, shard_size=shard, ds_config=json_file)
        for name in arguments.stages:
            stage = config.stages[name]
            stage = replace(stage, global_batch=world_size * arguments.accumulation * stage.micro_batch)
            yield replace(config, name=title, stages={name: stage}, engine=engine)


def _small(arguments: argparse.Namespace, world_size: int) -> Iterator[Config]:
    """A model of about 20 M parameters whose activations take about as much memory as its states."""
    from hive_scale.config import (
        CheckpointingConfig,
        Config,
        DataConfig,
        EngineConfig,
        ModelConfig,
        PartConfig,
        StageConfig,
    )
    from hive_scale.presets import three_stages

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision = {"model_type": "siglip_vision_model", "image_size": 128, "patch_size": 8, "vision_use_head": False}
    language = {"model_type": "llama", "vocab_size": VOCABULARY, "num_key_value_heads": 2, "tie_word_embeddings": True}
    parts = PartConfig(config={**vision, **sizes}), PartConfig(config={**language, **sizes})
    title, shard, json_file = CASES[arguments.cases[0]]
    batch = world_size * arguments.accumulation * MICRO_BATCH
    for fusion in arguments.fusions:
        for name in arguments.stages:
            for mode in RECOMPUTED:
                stage = StageConfig(three_stages(fusion, (1e-3,) * 3)[name], batch, MICRO_BATCH)
                engine = EngineConfig(arguments.precision, shard, ds_config=json_file)
                engine = EngineConfig(**vars(engine) | {"checkpointing": CheckpointingConfig(mode, mode, mode)})
                model = ModelConfig(*parts, fusion=fusion, encoder_layer_ratio=0.34)
                data = DataConfig(max_tokens=TOKENS)
                yield Config(title, model=model, data=data, stages={name: stage}, engine=engine)


def _real(config: Config, world: World) -> tuple[int, float | None]:
    """Measure the peak bytes of the third step, when all lasting memory exists; on GPUs also the seconds of later
    steps.
    """
    import torch

    from hive_scale.batch import Sample, collate
    from hive_scale.engine import open_engine
    from hive_scale.engine.memory import release
    from hive_scale.model import build
    from hive_scale.param_groups import apply_trainable_groups
    from hive_scale.precision import DTYPES

    (stage,) = config.stages.values()
    vocabulary, num_tokens = config.model.language.config["vocab_size"], config.data.max_tokens
    random = torch.Generator().manual_seed(world.rank)
    size, seen = build.image_size(config.model), build.meta_model(config.model).features_shape
    dtype = DTYPES[config.engine.precision]

    def sample() -> Sample:
        pixels = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=random)
        if config.feature_cache:
            pixels = torch.randn(seen, dtype=dtype, generator=random)
        tokens = torch.randint(3, vocabulary, (num_tokens,), generator=random).tolist()
        return Sample("", pixels, tokens, [False] + [True] * (num_tokens - 1))

    samples = [[sample() for _ in range(stage.micro_batch)] for _ in range(stage.accumulation(world.size))]
    room = torch.empty(stage.micro_batch, *seen, dtype=dtype) if config.feature_cache else None
    batches = [collate(part, 0, size, room) for part in samples]
    first = build.init_model(config.model, seed=0)
    weights = dict(first.named_parameters())
    # exclude memory that kernels keep from their first call on (oneDNN: 20 MB in bf16)
    plain = deepcopy(first)
    apply_trainable_groups(plain, stage, plain.unused_parameters())
    plain.to(world.device, dtype)
    torch.autograd.backward(plain(**batches[0].to(world.device).inputs()))
    del plain
    meter = _Meter(world.device)
    before = meter.alive()
    model = build.meta_model(config.model)
    groups = apply_trainable_groups(model, stage, model.unused_parameters())
    engine = open_engine(model, groups, stage, config.engine, world, weights)
    for _ in range(2):
        engine.step(batches, 1.0)
    meter.reset()
    engine.step(batches, 1.0)
    peak = meter.peak() - before
    seconds = []
    for _ in range(TIMED if meter.cuda else 0):
        began = perf_counter()
        engine.step(batches, 1.0)  # reading loss and norm waits for the GPU
        seconds.append(perf_counter() - began)
    del model, engine, batches
    release()
    return peak, median(seconds) if seconds else None


def _planned(config: Config, world: World) -> dict[str, Any]:
    from hive_scale.engine.compilation import is_compiled
    from hive_scale.plan.devices import this_gpu
    from hive_scale.plan.memory import examine, measure
    from hive_scale.plan.run import zero_of
    from hive_scale.plan.time import step_time

    ((name, stage),) = config.stages.items()
    zero = zero_of(config, stage, world.size)
    compiled = is_compiled(config.engine, world.device.type)
    facts = examine(config, stage, config.data.max_tokens, zero.get("stage") == 3, compiled)
    plan = measure(facts, config.engine, zero, world.size, stage.micro_batch, stage.accumulation(world.size))
    gpu = this_gpu(world.device)
    time = gpu and step_time(
        facts, config.engine, zero, gpu, world.size, stage.micro_batch, stage.accumulation(world.size)
    )
    on_device = plan.batch if world.device.type == "cuda" else 0.0
    return {
        "title": config.name + (f", {world.size} ranks" if world.size > 1 else ""),
        "fusion": config.model.fusion,
        "stage": name,
        "recompute": config.engine.checkpointing.language,
        "plan": plan.peak - plan.batch + on_device,
        "where": plan.moment.where,
        "planned_seconds": time and time.total,
        "deepspeed": _deepspeed(facts, zero, world.size),
        "accelerate": _accelerate(config),
    }


def _deepspeed(facts: StageProfile, zero: dict[str, Any], ranks: int) -> float | None:
    """Estimate of DeepSpeed's own estimator, which knows only numbers of parameters."""
    if not zero:
        return None
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    numel = facts.numel()
    if zero["stage"] == 3:
        largest = max(param.numel for param in facts.params)  # its estimator needs the largest layer's parameters
        return float(stage3.estimate_zero3_model_states_mem_needs(numel, largest, ranks, cpu_offload=False)[1])
    return float(stage_1_and_2.estimate_zero2_model_states_mem_needs(numel, ranks, cpu_offload=False)[1])


def _accelerate(config: Config) -> float:
    """Estimate of ``accelerate estimate-memory``: training with Adam on one device."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    from hive_scale.model import build

    total, _ = calculate_maximum_sizes(build.meta_model(config.model))
    mixed = "bfloat16" if config.engine.precision == "bf16" else "float32"
    return float(max(estimate_training_usage(total, mixed).values()))
