#!/usr/bin/env python
"""Our optimizer step beside other loops', and ways from hidden states to the loss beside each other.

Contenders take turns, round by round, in the same processes: whatever else the machine does meets them all
alike, and ratios hold where seconds do not. Before any timing they must agree on the loss.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:  # the real imports are late, so that --help answers at once
    from torch import Tensor, nn

    from hive_scale.batch import Batch
    from hive_scale.config import EngineConfig, ModelConfig, StageConfig
    from hive_scale.distributed import World
    from hive_scale.stage import ParamGroup

EXAMPLES = """\
examples:
  python launchers/benchmark.py engines                     every sharding, two processes
  python launchers/benchmark.py engines --cases fsdp zero2 --ranks 4 --markdown
  python launchers/benchmark.py loss                        head and cross-entropy: time and peak memory
  python launchers/benchmark.py loss --rows 4096 --vocabularies 128256 --dtypes bf16
"""
JSONS = Path(__file__).resolve().parents[1] / "ds_configs"
# by case: the row's title, engine.shard, the DeepSpeed JSON. ZeRO-3 replaces F.linear for good: each case has
# processes of its own
CASES = {
    "one": ("one process", 0, ""),
    "fsdp": ("FSDP2", 0, ""),
    "ddp": ("DDP", 1, ""),
    "zero2": ("ZeRO-2", 0, str(JSONS / "zero2.json")),
    "zero3": ("ZeRO-3", 0, str(JSONS / "zero3.json")),
}
ACCUMULATION, CLIP, WARMUP = 2, 0.05, 3
ROWS_PER_TARGET = 2  # of the "all rows" that a head over everything meets: padding and prompts carry no target


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(required=True, metavar="WHAT")
    engines = subparsers.add_parser("engines", help="seconds per optimizer step, ours and others'")
    engines.add_argument("--ranks", type=int, default=2, help="processes of every case but the first (default 2)")
    engines.add_argument("--steps", type=int, default=2, help="steps per contender and round (default 2)")
    engines.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    engines.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # one rank of one case, and its result
    engines.set_defaults(run=run_engines)
    loss = subparsers.add_parser("loss", help="head and cross-entropy: time and peak memory")
    loss.add_argument("--rows", nargs="+", type=int, default=[1024, 4096], help="target rows (1024 4096)")
    loss.add_argument("--vocabularies", nargs="+", type=int, default=[32000, 128256], help="(32000 128256)")
    loss.add_argument("--width", type=int, default=576, help="of the LLM (576)")
    loss.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    loss.set_defaults(run=run_loss)
    for subparser in (engines, loss):
        subparser.add_argument("--rounds", type=int, default=12, help="timed rounds (default 12)")
        subparser.add_argument("--markdown", action="store_true", help="print the table as the README has it")
        subparser.add_argument("--quick", action="store_true", help="toy sizes: does it run? The figures mean nothing")
    arguments = parser.parse_args()
    arguments.run(arguments)
    return 0


# -- engines: launching, and what came of it ------------------------------------------------------------------


def run_engines(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        measure(arguments)
        return
    rows: list[list[str]] = []
    machine = ""
    for case in arguments.cases:
        ranks = 1 if case == "one" else arguments.ranks
        title = CASES[case][0] + (f", {ranks} ranks" if ranks > 1 else "")
        result = launch(case, ranks, arguments)
        machine = result.get("machine", machine)
        rows += (found := compare(title, result["seconds"], result["reasons"]))
        print("\n".join(" | ".join(row) for row in found), file=sys.stderr, flush=True)  # should a later case fail
    columns = ("sharding", "ours, s", "peer", "peer, s", "ours / peer", "quartiles")
    show(columns, rows, f"{machine}; {arguments.rounds} rounds of {arguments.steps} steps", arguments.markdown)


def launch(case: str, ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure `case` in `ranks` fresh processes; a case that cannot run here says why."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        worker = [str(Path(__file__).resolve()), "engines", "--worker", str(path), "--cases", case]
        amounts = ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
        command = [sys.executable, *torchrun, *worker, *amounts, *(["--quick"] if arguments.quick else [])]
        # one arena: a thread of its own (Trainer's) would else get memory of its own, and faults of its own
        env = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", **os.environ}
        print(f"{case} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text())
            return result
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"{case} failed: see above")


def compare(title: str, seconds: Mapping[str, Sequence[float]], reasons: Mapping[str, str]) -> list[list[str]]:
    ours = seconds["ours"]
    rows = []
    for peer, theirs in seconds.items():
        if peer != "ours":
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            figures = f"{median(theirs):.3f}", f"{median(ratios):.3f}", spread(ratios)
            rows.append([title, f"{median(ours):.3f}", peer, *figures])
    return rows + [[title, "", peer, "-", "-", reason] for peer, reason in reasons.items()]


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{low:.3f} to {high:.3f}"


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, markdown: bool) -> None:
    caption = f"python launchers/benchmark.py {' '.join(sys.argv[1:])}: {caption}"
    if markdown:
        lines = [columns, ["---"] * len(columns), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n`{caption}`")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, caption=caption)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def describe_machine() -> str:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].split(':')[1].strip() if models else 'CPU'}, {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}"


# -- engines: one rank ----------------------------------------------------------------------------------------

Step = Callable[[Sequence["Batch"]], float]  # one optimizer step; the mean loss over all ranks' target tokens


@dataclass(frozen=True)
class Task:
    """What every contender is to do."""

    config: ModelConfig
    stage: StageConfig
    engine: EngineConfig
    world: World
    model: Any  # with its first weights, for copies

    def build(self) -> tuple[Any, list[ParamGroup]]:
        """A copy of the model, frozen and grouped as the stage says."""
        from hive_scale.stage import freeze

        model = deepcopy(self.model)  # not made anew: Transformers would cut it up once it has heard of ZeRO-3
        return model, freeze(model, self.stage, model.dormant())


def measure(arguments: argparse.Namespace) -> None:
    """Time the contenders of one case in turn, and write what rank 0 found."""
    import torch

    from hive_scale.distributed import session

    with session() as world:
        task = make_task(CASES[arguments.cases[0]], world, arguments.quick)
        data = make_data(task)
        steps, reasons = {}, {}
        for name, make in CONTENDERS.items():
            try:
                steps[name] = make(task)
            except NotImplementedError as error:
                reasons[name] = str(error)
        for _ in range(WARMUP):
            agree({name: step(data[0]) for name, step in steps.items()})
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        names = list(steps)
        for index in range(arguments.rounds):
            first = index % len(names)  # so that nobody always follows the same
            for name in names[first:] + names[:first]:
                world.barrier()
                began = perf_counter()
                for number in range(arguments.steps):
                    steps[name](data[number % len(data)])
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                world.barrier()
                seconds[name].append((perf_counter() - began) / arguments.steps)
        if world.is_main:
            result = {"seconds": seconds, "reasons": reasons, "machine": describe_machine()}
            arguments.worker.write_text(json.dumps(result))
        world.barrier()
    sys.stdout.flush()
    os._exit(0)  # Trainer's loop waits for a step that will not come


def agree(losses: Mapping[str, float]) -> None:
    for name, loss in losses.items():
        assert abs(loss / losses["ours"] - 1) < 1e-4, f"{name} does other work: {dict(losses)}"


def make_task(case: tuple[str, int, str], world: World, quick: bool) -> Task:
    """Stage `joint` of a HIVE whose step takes a core about a second.

    What sharding costs goes with parameters, what it is paid from goes with tokens: so the model is small, and
    a micro-batch has 2,048 visual tokens, which is still less than a GPU would be given.
    """
    import torch

    from hive_scale.config import EngineConfig, ModelConfig, PartConfig, StageConfig
    from hive_scale.model.build import assemble
    from hive_scale.presets import three_stages

    width, layers, micro_batch = (32, 2, 2) if quick else (192, 4, 8)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    vision = {"image_size": 32 if quick else 128, "patch_size": 8, "num_attention_heads": 4, "vision_use_head": False}
    language = {"vocab_size": 4096, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = ModelConfig(
        PartConfig(config={"model_type": "siglip_vision_model", **sizes, **vision}),
        PartConfig(config={"model_type": "llama", **sizes, **language}),
        density=0.5,
    )
    groups = three_stages("cross_attention", (1e-2, 1e-2, 1e-2), llm=["language.*"])["joint"]
    global_batch = ACCUMULATION * micro_batch * world.size
    # with so large an eps a gradient of another size or clipped otherwise shows in the next loss
    stage = StageConfig(groups, global_batch, micro_batch, max_grad_norm=CLIP, eps=1e-4)
    first = assemble(model, seed=0).to(world.device)
    with torch.no_grad():
        for fusion in cast(Any, first.fusion.layers):
            fusion.gate.fill_(0.5)  # so that pictures count from the first step
    return Task(model, stage, EngineConfig(shard=case[1], ds_config=case[2]), world, first)


def make_data(task: Task) -> list[list[Batch]]:
    """This rank's micro-batches of four steps: random pictures and ragged captions."""
    import torch

    from hive_scale.batch import Sample, collate

    random = torch.Generator().manual_seed(task.world.rank)
    image, vocabulary = task.config.vision.config["image_size"], task.config.language.config["vocab_size"]

    def sample() -> Sample:
        length = int(torch.randint(16, 49, (1,), generator=random))
        pixels = torch.randint(0, 256, (3, image, image), dtype=torch.uint8, generator=random)
        tokens = torch.randint(3, vocabulary, (length,), generator=random).tolist()
        return Sample("", pixels, tokens, [False] + [True] * (length - 1))

    def batch() -> Batch:
        return collate([sample() for _ in range(task.stage.micro_batch)], pad_id=0, image_size=image)

    return [[batch() for _ in range(ACCUMULATION)] for _ in range(4)]


# -- engines: the contenders ----------------------------------------------------------------------------------


def ours(task: Task) -> Step:
    from hive_scale.engine import open_engine
    from hive_scale.model.build import skeleton
    from hive_scale.stage import freeze

    weights = dict(task.build()[0].named_parameters())
    model = skeleton(task.config)
    groups = freeze(model, task.stage, model.dormant())
    engine = open_engine(model, groups, task.stage, task.engine, task.world, weights)

    def step(batches: Sequence[Batch]) -> float:
        output = engine.step(batches, 1.0)
        assert output.grad_norm > CLIP, "clipping must be at work"
        return output.loss

    return step


def bare(task: Task) -> Step:
    """What one writes by hand: plain PyTorch, or DeepSpeed's own engine."""
    from contextlib import nullcontext

    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from hive_scale.engine.adamw import adamw

    if task.engine.ds_config:
        return bare_deepspeed(task)
    model, groups = task.build()
    world, sharded = task.world, is_fsdp(task)
    if sharded:
        for block in (block for blocks in model.blocks().values() for block in blocks):
            fully_shard(block)
        fully_shard(model)
    elif world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = adamw(dict(getattr(model, "module", model).named_parameters()), groups, task.stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batches: Sequence[Batch]) -> float:
        (num_tokens,) = world.sum(sum(batch.num_tokens for batch in batches))
        total = torch.zeros((), device=world.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if sharded:
                model.set_requires_gradient_sync(last)
            with nullcontext() if last or sharded or world.size == 1 else model.no_sync():
                loss = model(**batch.to(world.device).inputs())
                (loss * (world.size / num_tokens)).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return world.sum(total.item())[0] / num_tokens

    return step


def bare_deepspeed(task: Task) -> Step:
    import torch

    from hive_scale.engine.adamw import adamw
    from hive_scale.engine.ds_json import load_deepspeed

    model, groups = task.build()
    optimizer, world = adamw(dict(model.named_parameters()), groups, task.stage), task.world
    engine, *_ = load_deepspeed().initialize(model=model, optimizer=optimizer, config=deepspeed_settings(task))

    def step(batches: Sequence[Batch]) -> float:
        (num_tokens,) = world.sum(sum(batch.num_tokens for batch in batches))
        total = torch.zeros((), device=world.device)
        for batch in batches:
            loss = engine(**batch.to(world.device).inputs())
            engine.backward(loss * (world.size * ACCUMULATION / num_tokens))  # it divides by the accumulation
            engine.step()
            total += loss.detach()
        return world.sum(total.item())[0] / num_tokens

    return step


def is_fsdp(task: Task) -> bool:
    return task.world.size > 1 and task.engine.shard == 0 and not task.engine.ds_config


def deepspeed_settings(task: Task) -> dict[str, Any]:
    from hive_scale.engine.ds_json import resolve

    return resolve(Path(task.engine.ds_config), task.stage, task.engine, task.world.size)


def open_accelerator(task: Task, model: Any) -> Any:
    """An Accelerator for the task's sharding. Its state is the process's: Trainer finds it and does the same."""
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState(cpu=task.world.device.type == "cpu")  # unless told, it takes CPU ranks for strangers
    if task.engine.ds_config:
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(task)))
    if not is_fsdp(task):
        return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    blocks = {type(block).__name__ for part in model.blocks().values() for block in part}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(blocks),
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    if task.world.device.type == "cpu":
        # Accelerate offers FSDP on accelerators only, though nothing in its loop needs one
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


def accelerate(task: Task) -> Step:
    """The loop of Accelerate's guide to accumulation, its loss scaled by tokens instead of a mean of means."""
    from contextlib import nullcontext

    import torch

    from hive_scale.engine.adamw import adamw

    model, groups = task.build()
    accelerator = open_accelerator(task, model)
    model, optimizer = accelerator.prepare(model, adamw(dict(model.named_parameters()), groups, task.stage))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    world, extra = task.world, {"scale_wrt_gas": False} if task.engine.ds_config else {}

    def step(batches: Sequence[Batch]) -> float:
        count = torch.tensor(sum(batch.num_tokens for batch in batches), device=world.device)
        num_tokens = int(accelerator.reduce(count, "sum"))
        total = torch.zeros((), device=world.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            # Trainer, which counts micro-batches itself, has set the state they share to 1 per step: do likewise
            accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else accelerator.no_sync(model):
                loss = model(**batch.to(world.device).inputs())
                accelerator.backward(loss * (world.size / num_tokens), **extra)
            total += loss.detach()
        accelerator.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(accelerator.reduce(total, "sum")) / num_tokens

    return step


def trainer(task: Task) -> Step:
    """HF Trainer's own loop, in a thread that waits at each step for its data; it counts ``labels`` itself."""
    from queue import Queue
    from threading import Thread

    import torch
    from torch.distributed.fsdp import FSDPModule
    from transformers import Trainer, TrainingArguments

    from hive_scale.engine.adamw import adamw

    model, groups = task.build()
    turns: Queue[Sequence[Batch]] = Queue()
    done: Queue[BaseException | None] = Queue()
    sums: list[Tensor] = []

    class Feed:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            while True:
                done.put(None)  # asked for a step's data: the step before is over
                for batch in turns.get():
                    yield batch.inputs() | {"labels": batch.target_ids}

    class Loop(Trainer):
        def get_train_dataloader(self) -> Any:
            return Feed()

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = adamw(dict(cast(Any, self.model).named_parameters()), groups, task.stage)
            return self.optimizer

    def mean(loss: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        sums.append(loss.detach())
        return loss / num_items_in_batch

    def train() -> None:
        try:
            if task.world.device.type == "cuda":
                torch.cuda.set_device(task.world.device)  # which is each thread's own
            loop.train()
        except BaseException as error:
            done.put(error)

    arguments = TrainingArguments(
        max_steps=10**9,
        per_device_train_batch_size=task.stage.micro_batch,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=task.world.device.type == "cpu",
        ddp_find_unused_parameters=False,
        accelerator_config={"use_configured_state": True},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    arguments.deepspeed_plugin = None  # the state has it already

    def wait() -> None:
        if error := done.get():
            raise error

    loop = Loop(model, arguments, train_dataset=[None], compute_loss_func=mean)
    Thread(target=train, daemon=True).start()
    wait()
    assert isinstance(loop.model_wrapped, FSDPModule) == is_fsdp(task)

    def step(batches: Sequence[Batch]) -> float:
        sums.clear()
        turns.put(batches)
        wait()
        total, num_tokens = task.world.sum(sum(sums).item(), sum(batch.num_tokens for batch in batches))  # type: ignore[union-attr]
        return total / num_tokens

    return step


CONTENDERS: dict[str, Callable[[Task], Step]] = {
    "ours": ours,
    "bare loop": bare,
    "Accelerate": accelerate,
    "Trainer": trainer,
}


# -- loss -----------------------------------------------------------------------------------------------------


def run_loss(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.quick:
        arguments.rows, arguments.vocabularies, arguments.width = [64], [1000], 32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in arguments.dtypes:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        for vocabulary in arguments.vocabularies:
            for number in arguments.rows:
                found = time_losses(number, vocabulary, arguments.width, dtype, device, arguments.rounds)
                base = found["target rows"][0]
                for way, (seconds, peak) in found.items():
                    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
                    figures = f"{median(seconds):.3f}", f"{median(ratios):.2f}", spread(ratios), f"{peak / 1e6:.0f}"
                    rows.append([name, str(vocabulary), str(number), way, *figures])
    columns = ("dtype", "vocabulary", "target rows", "way", "seconds", "/ target rows", "quartiles", "peak, MB")
    caption = f"{describe_machine()}; width {arguments.width}; {arguments.rounds} rounds, forward and backward"
    show(columns, rows, caption, arguments.markdown)


def time_losses(
    number: int, vocabulary: int, width: int, dtype: Any, device: Any, rounds: int
) -> dict[str, tuple[list[float], int]]:
    """By way: seconds of each round, and the most memory that one forward and backward adds."""
    import torch

    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(ROWS_PER_TARGET * number, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randperm(len(hidden), device=device)[:number].sort().values
    ids = torch.randint(vocabulary, (number,), device=device)
    ways = loss_ways(head, hidden, targets, ids)

    def run(way: str) -> float:
        hidden.grad = head.weight.grad = None
        loss = ways[way]()
        torch.autograd.backward(loss)
        return loss.item()

    peaks, losses = {}, {}
    for way in ways:
        run(way)  # the first of its kind allocates what stays
        peaks[way] = peak_bytes(lambda way=way: losses.update({way: run(way)}), device)  # type: ignore[misc]
    worst = max(abs(loss / losses["target rows"] - 1) for loss in losses.values())
    assert worst < (1e-4 if dtype == torch.float32 else 2e-2), losses  # a sum in bf16 has two digits
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            began = perf_counter()
            run(way)  # ends with the loss on the host, and backward comes before that
            seconds[way].append(perf_counter() - began)
    return {way: (seconds[way], peaks[way]) for way in ways}


def loss_ways(head: nn.Linear, hidden: Tensor, targets: Tensor, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    everywhere = torch.full((len(hidden),), -100, device=ids.device).index_put((targets,), ids)

    def plain(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    def chunked(count: int) -> Tensor:
        pairs = zip(hidden[targets].tensor_split(count), ids.tensor_split(count), strict=True)
        return torch.stack([checkpoint(plain, *pair, use_reentrant=False) for pair in pairs]).sum()

    def fused(policy: Any) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return F.linear_cross_entropy(hidden[targets], head.weight, ids, reduction="sum", options=options)

    return {
        "all rows": lambda: plain(hidden, everywhere),
        "target rows": lambda: plain(hidden[targets], ids),
        "linear_cross_entropy, auto": lambda: fused("auto"),
        "linear_cross_entropy, accurate": lambda: fused("accurate"),
        "checkpointed in 8": lambda: chunked(8),
    }


def peak_bytes(run: Callable[[], None], device: Any) -> int:
    """The most that `run` adds to the memory of this process: torch's on a GPU, else what Linux counts."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what others have freed is given back
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    sys.exit(main())
