"""Gather metrics, captions and maps of some runs for one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hive_scale import config as configs
from hive_scale.atomic import write_text
from hive_scale.batch import collate
from hive_scale.credentials import public
from hive_scale.data.bad_samples import read_faults
from hive_scale.data.tokenizer import caption_sample
from hive_scale.evaluate.captions import write
from hive_scale.model import build
from hive_scale.observability.metrics import damage
from hive_scale.report.attention_maps import AttentionMaps, attention_figure, attention_maps, choose, words_at
from hive_scale.report.curves import History, curves, layer_norms
from hive_scale.report.gradient_maps import GradientMaps, concentration, gradient_figure, gradient_maps
from hive_scale.report.html import Report, page
from hive_scale.report.run_view import Pair, RunView
from hive_scale.report.svg import save
from hive_scale.strangers import some
from hive_scale.strict_json import dumps, read_lines


def gradients(run: RunView, pairs: Sequence[Pair], stage: str = "") -> GradientMaps:
    tokenizer, model = run.tokenizer(), run.model(stage)
    limit, size = run.config.data.max_tokens, build.image_size(run.config.model)
    samples = [caption_sample("", pixels, text, tokenizer, limit) for pixels, text in pairs]
    batch = collate(samples, tokenizer.pad_id, size).to(model.pixel_mean.device)
    return gradient_maps(run.name, model, batch)


def attention(
    run: RunView,
    pixels: Tensor,
    caption: str = "",
    words: Sequence[str] = (),
    layers: Sequence[int] = (),
    head: int | None = None,
    stage: str = "",
) -> AttentionMaps:
    """Return attention maps of the given caption, or of the one that the model writes for the image.

    Raises ValueError if the caption has no words.
    """
    tokenizer, model = run.tokenizer(), run.model(stage)
    caption = caption or write(model, tokenizer, [pixels])[0]
    ids = tokenizer.encode(caption, run.config.data.max_tokens)
    chosen = choose(words_at(ids, tokenizer.decode), words)
    if not chosen:
        raise ValueError(f"the text '{caption}' has no words: give one by --caption")
    return attention_maps(model, pixels, ids, chosen, caption, layers, head)


def save_gradients(runs: Sequence[GradientMaps], histories: Sequence[History], path: Path) -> list[Path]:
    """Write the maps, their concentration as JSON beside them, and gradient norms over training, if logged."""
    save(gradient_figure(runs), path)
    numbers = path.with_suffix(".json")
    write_text(numbers, dumps({run.name: concentration(run.norms) for run in runs}, indent=1) + "\n")
    written = [path, numbers]
    for number, svg in enumerate(layer_norms(histories).values(), 1):
        written.append(path.with_name(f"{path.stem}_over_training{number if number > 1 else ''}.svg"))
        save(svg, written[-1])
    return written


Captioned = tuple[Tensor, Mapping[str, str]]  # an image, and its captions by author


def report(runs: Sequence[RunView], look: bool = True, images: int = 4) -> Report:
    """Gather the report of `runs`. With `look` False no model is loaded: no captions and no maps."""
    histories = [run.history() for run in runs]
    notes = _holes(runs) + _other_recipes(runs) + _without_heldout(runs)
    captions: list[Captioned] = []
    maps: dict[str, str] = {}
    if look:
        try:
            captions, maps = _looks(runs, images, notes)
        except ValueError as error:
            notes.append(f"No captions and no maps: {error}")
    return Report(
        title=" and ".join(run.name for run in runs),
        notes=notes,
        runs=[_summary(run, history) for run, history in zip(runs, histories, strict=True)],
        recipe=[row for run in runs for row in _recipe(run, len(runs) > 1)],
        plots=curves(histories) if any(history.stages for history in histories) else {},
        captions=captions,
        maps=maps,
        memory={title: text for run in runs for title, text in _memory(run, len(runs) > 1).items()},
        faults=[fault for run in runs for fault in _faults(run)],
    )


def save_report(found: Report, path: Path, plots: Path | None = None) -> None:
    """Write the page; if `plots` names a folder, also write each figure to a file of its own."""
    write_text(path, page(found))
    for title, svg in found.plots.items() if plots else ():
        assert plots is not None
        save(svg, plots / f"{title.lower().replace(' ', '_').replace(':', '')}.svg")


def _looks(runs: Sequence[RunView], images: int, notes: list[str]) -> tuple[list[Captioned], dict[str, str]]:
    pairs = {run.name: run.heldout(images) for run in runs}
    first = pairs[runs[0].name]
    written: dict[str, list[str]] = {}
    for run in runs:
        run.stage()  # raises ValueError if none is finished
        for stage in run.finished() if len(runs) == 1 else run.finished()[-1:]:
            title = stage if len(runs) == 1 else f"{run.name}: {stage}"
            written[title] = write(run.model(stage), run.tokenizer(), [pixels for pixels, _ in pairs[run.name]])
    captions: list[Captioned] = [
        (pixels, {"the truth": truth} | {title: texts[index] for title, texts in written.items()})
        for index, (pixels, truth) in enumerate(first)
    ]
    maps = {"Gradient of the loss at each encoder layer": gradient_figure([gradients(r, pairs[r.name]) for r in runs])}
    for run in runs:
        pixels, truth = pairs[run.name][0]
        try:
            maps[f"Attention of words to patches: {run.name}"] = attention_figure(attention(run, pixels, truth))
        except ValueError as error:
            notes.append(f"No attention maps of {run.name}: {error}")
    return captions, maps


def _summary(run: RunView, history: History) -> dict[str, str]:
    lines = [line for stage in history.stages.values() for line in stage]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "run": run.name,
        "fusion": run.config.model.fusion,
        "stages finished": f"{len(run.finished())} of {len(run.config.stages)}",
        "steps": str(len(lines)),
        "samples": f"{max((x for x, _ in history.points()), default=0):,}",
        "held-out loss": f"{losses[-1]:.4f}" if losses else "-",
        "restarts": str(sum(stage[-1].get("restarts", 0) for stage in history.stages.values())),
        "steps lost": str(sum(stage[-1].get("lost_steps", 0) for stage in history.stages.values())),
        "bad samples": str(len(read_faults(run.dir / "bad_samples.jsonl"))),
        "batches left out": str(len(read_lines(run.dir / "bad_batches.jsonl")[0])),
    }


def _recipe(run: RunView, several: bool) -> list[dict[str, str]]:
    rows = []
    for name, stage in run.config.stages.items():
        groups = (
            f"{key}: {', '.join(g.parameters)} at {g.lr:g}, decay {g.weight_decay:g}" for key, g in stage.groups.items()
        )
        rows.append(
            ({"run": run.name} if several else {})
            | {
                "stage": name,
                "trains": "; ".join(groups),
                "length": f"{stage.max_steps} steps" if stage.max_steps else f"{stage.epochs:g} epochs",
                "global batch": str(stage.global_batch),
                "clipping": f"{stage.max_grad_norm:g}",
                "warm-up": f"{stage.warmup_ratio:.0%}",
            }
        )
    return rows


def _memory(run: RunView, several: bool) -> dict[str, str]:
    files = {stage: run.dir / stage / "memory.txt" for stage in run.config.stages}
    return {
        f"{run.name}: {stage}" if several else stage: path.read_text(errors="replace")
        for stage, path in files.items()
        if path.exists()
    }


def _faults(run: RunView) -> list[dict[str, str]]:
    faults = read_faults(run.dir / "bad_samples.jsonl")
    # earlier versions logged shards as given, perhaps with credentials
    first = {fault.reason: f"{public(fault.shard)}: {fault.key}" for fault in reversed(faults)}
    counts = Counter(fault.reason for fault in faults)
    return [
        {"run": run.name, "reason": reason, "samples": str(count), "such as": first[reason]}
        for reason, count in counts.most_common()
    ]


def _holes(runs: Sequence[RunView]) -> list[str]:
    paths = [run.dir / stage / "metrics.jsonl" for run in runs for stage in run.config.stages]
    return [f"{path}: {text}" for path in paths for text in damage(path)]


def _without_heldout(runs: Sequence[RunView]) -> list[str]:
    return [
        f"{run.name} held nothing out (data.heldout=none): its images here are ones that it was trained on"
        for run in runs
        if not run.config.data.heldout
    ]


def _other_recipes(runs: Sequence[RunView]) -> list[str]:
    notes = []
    for run in runs[1:]:
        if changed := configs.differences(runs[0].config, run.config):
            notes.append(
                f"{run.name} is of another recipe than {runs[0].name} (other {some(changed)}): curves are "
                "aligned by the samples seen"
            )
    return notes
