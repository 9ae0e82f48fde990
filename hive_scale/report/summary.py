"""Outcome of a finished run: did it learn, does it use the image, where are the files, what comes next?"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import wraps
from io import StringIO
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from hive_scale import config as configs
from hive_scale.atomic import write_text
from hive_scale.batch import Batch
from hive_scale.checkpoint.stage_files import WEIGHTS
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config, ModelConfig
from hive_scale.data.bad_samples import read_faults
from hive_scale.distributed import World
from hive_scale.evaluate.captions import matched_share, write
from hive_scale.model import build
from hive_scale.observability import goodput
from hive_scale.observability.console import Screen, console
from hive_scale.observability.metrics import read_metrics
from hive_scale.phase_timer import tick
from hive_scale.preflight import open_data
from hive_scale.registry import FUSIONS
from hive_scale.resilience.loss_guard import BAD_BATCHES
from hive_scale.strangers import printable
from hive_scale.strict_json import read_lines

PAIRS = 512  # most held-out pairs to evaluate
BATCH = 32
BASELINE = "concat"  # the fusion that others are compared with (paper, 4.1)
MOST = 50  # most runs beside this one to look at


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


def show(config: Config, device: torch.device, trained: bool = True, preset: str = "") -> None:
    """Print the outcome of a finished run, and save it to `<output>/outcome.txt`. Needs no other process.

    The run is trained and saved by then, so a part that cannot be shown is reported in a line, and nothing is raised.

    Args:
        trained: False if there was nothing left to train, which is said, and an outcome that was saved is shown again.
        preset: the preset that the command named, which takes words such as ``fusion=concat``; "": none.
    """
    kept = config.run_dir / "outcome.txt"
    if not trained:
        console.print(finished(config), soft_wrap=True)
    if trained or not kept.exists():
        screen = Screen(StringIO())  # plain text, wherever it is shown later
        parts = [
            _losses(config, screen),
            _looks(config, screen, device),
            _faults(config, screen),
            _files(config, screen),
        ]
        text = screen.file.getvalue()  # type: ignore[attr-defined]
        if all(parts):  # else the next start tries again
            write_text(kept, text)
    else:
        lines = kept.read_text(errors="replace").splitlines()
        text = "".join(f"{Text.from_ansi(line).plain}\n" for line in lines)  # older versions saved colours
        text = re.sub(r"^next  .*\n", "", text, flags=re.MULTILINE)  # and the hint, which may fit no more
    console.out(text, end="")
    _hint(config, console, preset)


def finished(config: Config) -> str:
    """A line that says when a run was finished, if there was nothing left to train."""
    lines = read_metrics(config.run_dir / list(config.stages)[-1] / "metrics.jsonl")
    when = f" on {datetime.fromtimestamp(lines[-1]['time']):%Y-%m-%d %H:%M}" if lines and "time" in lines[-1] else ""
    return f"nothing to do: finished{when}. To train it again use --overwrite, or another output=DIR"


def _told(what: Callable[..., None]) -> Callable[..., bool]:
    """Wrap a part of the outcome: on an exception, print the reason in a line. Returns True if the part was shown."""

    @wraps(what)
    def part(config: Config, screen: Screen, *arguments: Any) -> bool:
        try:
            what(config, screen, *arguments)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"training is done and saved, but not all of it can be shown: {type(error).__name__}: {reason}"
            screen.print(text, soft_wrap=True)
            return False
        return True

    return part


@_told
def _losses(config: Config, screen: Screen) -> None:
    losses = heldout_losses(config)
    if any(losses.values()):
        screen.print(_losses_table(config, losses, "held-out"))
    else:
        screen.print(_losses_table(config, losses_of(config, "loss"), "training"))
        told = "nothing is held out (data.heldout=none): how the model does on new data is not known"
        screen.print(told, soft_wrap=True)
    screen.print(_time(config), soft_wrap=True)


@_told
def _looks(config: Config, screen: Screen, device: torch.device) -> None:
    """Show whether the model uses the image, with some of its captions beside the true ones."""
    stage_dir = config.run_dir / list(config.stages)[-1]
    data = open_data(config, stage_dir.name)
    model = build.load_model(config.model, read_weights(stage_dir / WEIGHTS)).to(device)
    if has_blank_image_control(config) and data.heldout:
        if len(data.heldout.numbers) > 1:  # else there is no other image
            batches = islice(data.heldout.once(batch_size=BATCH, world=World(0, 1, device)), PAIRS // BATCH)
            share = matched_share(model, (_got_on(batch.to(device)) for batch in batches))
            screen.print(f"captions likelier with their own image than with another's: {share:.0%} (chance 50%)")
        screen.print(_gain(config, heldout_losses(config)), soft_wrap=True)
    if not data.heldout:
        screen.print("captions of images that it was trained on:")
    if pairs := list((data.heldout or data.train).spread(3)):
        written = write(model, data.tokenizer, [pixels for pixels, _ in pairs])
        for (_, truth), text in zip(pairs, written, strict=True):
            screen.print(f"  truth: {printable(truth)}\n  model: {printable(text)}", soft_wrap=True)


def _got_on(batch: Batch) -> Batch:
    tick()  # keeps the watchdog quiet, while the other ranks wait
    return batch


@_told
def _faults(config: Config, screen: Screen) -> None:
    """Name what was wrong with the data: samples that could not be used, and batches that were skipped."""
    if faults := read_faults(bad := config.run_dir / "bad_samples.jsonl"):
        reasons = Counter(fault.reason for fault in faults).most_common(3)
        told = ", ".join(f"{number:,} x {reason}" for reason, number in reasons)
        screen.print(f"unusable {len(faults):,} samples were left out ({told}): {bad}", soft_wrap=True)
    if (skipped := config.run_dir / BAD_BATCHES).is_file():
        lines, cut = read_lines(skipped)
        number = len(lines) + len(cut)
        screen.print(
            f"skipped  {number:,} batch{'es' * (number != 1)}, for loss or gradient: {skipped}", soft_wrap=True
        )


@_told
def _files(config: Config, screen: Screen) -> None:
    stage_dir = config.run_dir / list(config.stages)[-1]
    screen.print(
        f"weights  {stage_dir / WEIGHTS}\n"
        f"encoder  {stage_dir / 'encoder'}  (loads with transformers' from_pretrained)\n"
        f"metrics  {config.run_dir}/<stage>/metrics.jsonl",
        soft_wrap=True,
    )


@_told
def _hint(config: Config, screen: Screen, preset: str) -> None:
    screen.print(f"next     {_next(config, preset)}", soft_wrap=True)


def _next(config: Config, preset: str) -> str:
    """What to do next: compare with the same run of the other kind of fusion, if there is one, or train that."""
    is_baseline, run = FUSIONS[config.model.fusion].is_llava, str(config.run_dir)
    if sibling := _sibling(config, is_baseline):
        return f"compare both: python -m hive_scale visualize report {shlex.quote(sibling)} {shlex.quote(run)}"
    if not preset:
        return f"see its curves, maps and captions: python -m hive_scale visualize report {shlex.quote(run)}"
    other = ModelConfig.fusion if is_baseline else BASELINE
    # only a folder named by the preset changes with the fusion
    is_default = config.output == Config.output and config.name in (preset, f"{preset}_{config.model.fusion}")
    output = "" if is_default else f" output={shlex.quote(f'{run}_{other}')}"
    what = "HIVE's cross-attention" if is_baseline else "the self-attention baseline"
    return f"compare with {what}: the same command with fusion={other}{output}"


def _sibling(config: Config, is_baseline: bool) -> str:
    """A run beside this one, of the same components and data, where one is the baseline and the other is not; or ""."""
    for path in islice(sorted(config.run_dir.parent.glob("*/config.yaml")), MOST):
        try:
            other = configs.load(path)
            if FUSIONS[other.model.fusion].is_llava != is_baseline and _parts(other) == _parts(config):
                return str(path.parent)
        except (ValueError, TypeError, OSError):  # another program's file, or of another version
            continue
    return ""


def _parts(config: Config) -> tuple[Any, ...]:
    return config.model.vision, config.model.language, config.data.train, list(config.stages)


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
