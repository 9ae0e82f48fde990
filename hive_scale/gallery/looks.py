"""Models put before pictures: gradient maps, attention maps and captions of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hive_scale.atomic import write_text
from hive_scale.batch import collate
from hive_scale.data.tokenizer import caption_sample
from hive_scale.evaluate.captions import write
from hive_scale.gallery.runs import Pair, Run
from hive_scale.model import build
from hive_scale.show.attention_map import AttentionMaps, attention_maps, choose, words_at
from hive_scale.show.curves import History, layer_norms
from hive_scale.show.figure import save
from hive_scale.show.gradient_map import GradientMaps, concentration, gradient_figure, gradient_maps
from hive_scale.strict_json import dumps


def gradients(run: Run, pairs: Sequence[Pair], stage: str = "") -> GradientMaps:
    tokenizer, model = run.tokenizer(), run.model(stage)
    limit, size = run.config.data.max_tokens, build.image_size(run.config.model)
    samples = [caption_sample("", pixels, text, tokenizer, limit) for pixels, text in pairs]
    batch = collate(samples, tokenizer.pad_id, size).to(model.pixel_mean.device)
    return gradient_maps(run.name, model, batch)


def attention(
    run: Run,
    pixels: Tensor,
    caption: str = "",
    words: Sequence[str] = (),
    layers: Sequence[int] = (),
    head: int | None = None,
    stage: str = "",
) -> AttentionMaps:
    """Of the caption given, or of what the model itself writes of the picture."""
    tokenizer, model = run.tokenizer(), run.model(stage)
    caption = caption or write(model, tokenizer, [pixels])[0]
    ids = tokenizer.encode(caption, run.config.data.max_tokens)
    chosen = choose(words_at(ids, tokenizer.decode), words)
    if not chosen:
        raise ValueError(f"the text '{caption}' has no words: give one by --caption")
    return attention_maps(model, pixels, ids, chosen, caption, layers, head)


def save_gradients(runs: Sequence[GradientMaps], histories: Sequence[History], path: Path) -> list[Path]:
    """The maps, the numbers of their spread beside them, and the norms over training where runs have logged them."""
    save(gradient_figure(runs), path)
    numbers = path.with_suffix(".json")
    write_text(numbers, dumps({run.name: concentration(run.norms) for run in runs}, indent=1) + "\n")
    written = [path, numbers]
    for number, svg in enumerate(layer_norms(histories).values(), 1):
        written.append(path.with_name(f"{path.stem}_over_training{number if number > 1 else ''}.svg"))
        save(svg, written[-1])
    return written
