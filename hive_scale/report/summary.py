"""Outcome of a finished run: did it learn, does it use the image, where are the files, what comes next?"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from hive_scale.atomic import write_text
from hive_scale.batch import Batch
from hive_scale.checkpoint.stage_files import WEIGHTS
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config
from hive_scale.distributed import World
from hive_scale.evaluate.captions import matched_share, write
from hive_scale.model import build
from hive_scale.observability import goodput
from hive_scale.observability.console import console
from hive_scale.observability.metrics import read_metrics
from hive_scale.phase_timer import tick
from hive_scale.preflight import open_data
from hive_scale.registry import FUSIONS
from hive_scale.strangers import printable

PAIRS = 512  # most held-out pairs to evaluate
BATCH = 32


def blank_image_control(config: Config) -> Config:
    """Return the config of the same run on blank images: what can be learned from the captions without seeing."""
    data, log = replace(config.data, blank_images=True), replace(config.log, wandb="off", tensorboard=False)
    # only its last held-out loss is used
    return replace(
        config, output=str(config.run_dir / "blank"), data=data, log=log, blank_image_control=False, eval_interval=0
    )


def has_blank_image_control(config: Config) -> bool:
    """True if the run is to be compared with a control, by the held-out loss of the last stage."""
    return config.blank_image_control and bool(config.data_of(list(config.stages)[-1]).heldout)


def show(config: Config, device: torch.device) -> None:
    """Print the outcome of a finished run, and save it to `<output>/outcome.txt`. Needs no other process.

    The run is trained and saved by then, so a part that cannot be shown is reported in a line, and nothing is raised.
    """
    kept = config.run_dir / "outcome.txt"
    if not kept.exists():
        with console.capture() as text:
            whole = all([_losses(config), _looks(config, device), _files(config)])
        if not whole:  # not saved, so that the next start tries again
            console.out(text.get(), end="")
            return
        write_text(kept, text.get())  # whole: it is shown from now on
    console.out(kept.read_text(errors="replace"), end="")


def _told(what: Callable[..., None]) -> Callable[..., bool]:
    """Wrap a part of the outcome: on an exception, print the reason in a line. Returns True if the part was shown."""

    @wraps(what)
    def part(*arguments: Any) -> bool:
        try:
            what(*arguments)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"training is done and saved, but not all of it can be shown: {type(error).__name__}: {reason}"
            console.print(text, soft_wrap=True)
            return False
        return True

    return part


@_told
def _losses(config: Config) -> None:
    losses = heldout_losses(config)
    if any(losses.values()):
        console.print(_losses_table(config, losses, "held-out"))
    else:
        console.print(_losses_table(config, losses_of(config, "loss"), "training"))
        console.print("nothing is held out (data.heldout=none): how the model does on new data is not known")
    console.print(_time(config), soft_wrap=True)


@_told
def _looks(config: Config, device: torch.device) -> None:
    """Show whether the model uses the image, with some of its captions beside the true ones."""
    stage_dir = config.run_dir / list(config.stages)[-1]
    data = open_data(config, stage_dir.name)
    model = build.load_model(config.model, read_weights(stage_dir / WEIGHTS)).to(device)
    if has_blank_image_control(config) and data.heldout:
        if len(data.heldout.numbers) > 1:  # else there is no other image
            batches = islice(data.heldout.once(batch_size=BATCH, world=World(0, 1, device)), PAIRS // BATCH)
            share = matched_share(model, (_got_on(batch.to(device)) for batch in batches))
            console.print(f"captions likelier with their own image than with another's: {share:.0%} (chance 50%)")
        console.print(_gain(config, heldout_losses(config)))
    if not data.heldout:
        console.print("captions of images that it was trained on:")
    if pairs := list((data.heldout or data.train).spread(3)):
        written = write(model, data.tokenizer, [pixels for pixels, _ in pairs])
        for (_, truth), text in zip(pairs, written, strict=True):
            console.print(f"  truth: {printable(truth)}\n  model: {printable(text)}")


def _got_on(batch: Batch) -> Batch:
    tick()  # keeps the watchdog quiet, while the other ranks wait
    return batch


def _next(config: Config) -> str:
    if FUSIONS[config.model.fusion].is_llava:
        return (
            f"see both side by side: python -m hive_scale visualize report OTHER_RUN {shlex.quote(str(config.run_dir))}"
        )
    return "compare with the self-attention baseline: the same command with fusion=concat"


@_told
def _files(config: Config) -> None:
    stage_dir = config.run_dir / list(config.stages)[-1]
    console.print(
        f"weights  {stage_dir / WEIGHTS}\n"
        f"encoder  {stage_dir / 'encoder'}  (loads with transformers' from_pretrained)\n"
        f"metrics  {config.run_dir}/<stage>/metrics.jsonl\n"
        f"next     {_next(config)}",
        soft_wrap=True,
    )


def heldout_losses(config: Config) -> dict[str, list[float]]:
    """Return every held-out loss of each stage, in order, in nats per token."""
    return losses_of(config, "eval_loss")


def losses_of(config: Config, key: str) -> dict[str, list[float]]:
    """Return what each stage logged as `key`, in order."""
    lines = {name: read_metrics(config.run_dir / name / "metrics.jsonl") for name in config.stages}
    return {name: [line[key] for line in stage if line.get(key) is not None] for name, stage in lines.items()}


def _time(config: Config) -> str:
    """Summarise where the time went, over all stages and restarts."""
    last = [lines[-1] for name in config.stages if (lines := read_metrics(config.run_dir / name / "metrics.jsonl"))]
    return goodput.summary(*goodput.added(last))


def _losses_table(config: Config, losses: dict[str, list[float]], of: str) -> Table:
    table = Table("stage", f"{of} loss, first", "last", title=Text(f"{config.name} (nats per token)"))
    for name, values in losses.items():
        last = f"{values[-1]:.4f}" if values else "nothing held out"
        table.add_row(name, f"{values[0]:.4f}" if len(values) > 1 else "", last)
    return table


def _gain(config: Config, losses: dict[str, list[float]]) -> str:
    blank = heldout_losses(blank_image_control(config))
    last = list(config.stages)[-1]
    seen, unseen = losses[last][-1], blank[last][-1]
    less = 1 - seen / unseen
    return f"held-out loss {seen:.4f}, {less:.1%} lower than with blank images: the control ends at {unseen:.4f}"
