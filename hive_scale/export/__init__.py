"""Export a finished run as directories that others can load, each with a model card."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from hive_scale import checksums, strict_json
from hive_scale.checkpoint.format import StepCheckpoint, audit, directory_name
from hive_scale.checkpoint.io import CorruptFile, published
from hive_scale.checkpoint.run_reader import INITIAL, Run
from hive_scale.checkpoint.stage_files import LazyTensor
from hive_scale.checkpoint.weights import Merge, Weights, merge_trained_weights, read_weights, write_weights
from hive_scale.config import Config, DataConfig, ModelConfig, TokenizerConfig
from hive_scale.config_merge import resolve, with_new_names
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import EMA
from hive_scale.export import huggingface, portable
from hive_scale.export.model_card import card
from hive_scale.model import build
from hive_scale.model.adapters import merged_weight
from hive_scale.model.hive import Hive
from hive_scale.model.transformers_api import HiveConfig, HiveForConditionalGeneration
from hive_scale.precision import DTYPES
from hive_scale.shared_files import Held, locked, own_lock
from hive_scale.version import code_version

# fields of DataConfig by which images and prompts become what the model reads
PROCESSING = {"format", "image_position", "image_transform", "max_pixels", "max_tokens"}


def export_run(kind: str, directory: Path, out: Path, stage: str = "", dtype: str = "fp32", ema: bool = False) -> str:
    """Export `kind` (a key of `KINDS`) of the run in `directory` to the new directory `out`; return the stage exported.

    With `ema`, the average of the weights that the stage has kept is exported in place of its last weights.

    `out` appears complete or not at all. Raises ValueError if no `stage` is named and the run is not finished, if the
    stage is not done, the weights are damaged, `out` exists, the model cannot be exported as this kind, or another
    process exports to `out`.
    """
    if os.path.lexists(out):  # a link, too, whose disk may be away
        raise ValueError(f"{out} exists: give another --output, or remove it")
    run = Run(directory)
    if not stage and (left := [name for name in run.config.stages if name not in run.finished()]):
        done = ", ".join(run.finished()) or "none"
        raise ValueError(
            f"{directory} is not finished: {', '.join(left)} still to be trained, finished: {done}. Go on with "
            "the run, or name the stage whose weights you want: --stage NAME"
        )
    stage = run.stage(stage)
    last = read_weights(run.weights(stage))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            locked(own_lock(out), patience=0),
            _averaged(run, stage, out.parent) if ema else nullcontext(last) as weights,
            published(out, replace=False) as folder,
        ):
            config = replace(run.config, data=run.config.data_of(stage))
            KINDS[kind](Source(run, stage, config, weights), folder, DTYPES[dtype])
            (folder / "README.md").write_text(card(kind, run, stage, weights.identity, dtype, ema))
    except Held as held:
        raise ValueError(f"another process exports to {out}: wait for it, or give another --output. {held}") from None
    return stage


@contextmanager
def _averaged(run: Run, stage: str, place: Path) -> Iterator[Weights]:
    """The average of a stage's weights, from its last checkpoint, in a file in `place` for as long as it is read.

    Raises ValueError if the stage kept none.
    """
    names = [INITIAL, *run.config.stages]
    if stage == INITIAL or not run.config.stages[stage].ema:
        raise ValueError(f"stage {stage} kept no average of its weights: train with stages.{stage}.ema=0.9999, say")
    before = names[names.index(stage) - 1]
    with TemporaryDirectory(dir=place, prefix=".ema.") as folder:
        path = Path(folder, "weights.safetensors")
        merge_trained_weights(
            run.weights(before), _last_checkpoint(run, stage), path, merge_of(run.config, stage), kind=EMA
        )
        yield read_weights(path)


def _last_checkpoint(run: Run, stage: str) -> Path:
    """The checkpoint of the step at which a stage ended. Raises ValueError if it is not there, or damaged."""
    step = int(read_weights(run.weights(stage)).metadata["step"])
    path = run.dir / stage / directory_name(step)
    if not path.is_dir():
        raise ValueError(f"{path} is not there, and alone holds what stage {stage} ended with: restore it from a copy")
    if reason := audit(path):
        raise CorruptFile(f"{path} refused: {reason}: restore it from a copy, or export the stage's last weights")
    return path


def save_pretrained(config: Config, weights: Weights, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a whole HIVE, with its processor, for `from_pretrained` and for transformers' Auto classes and pipelines.

    Holds one tensor at a time.
    """
    model = build.with_full_configs(config.model)
    processing = {name: value for name, value in asdict(config.data).items() if name in PROCESSING}
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(config)
    processor, generation = huggingface.hive_processor(model, config.data, tokenizer)
    HiveConfig(
        architectures=[HiveForConditionalGeneration.__name__],
        dtype=dtype,
        model=asdict(model),
        data=processing,
        code=code_version(),
        image_token_id=processor.image_token_id,
    ).save_pretrained(path)
    write_weights(path / "model.safetensors", _converted(weights, dtype), {"format": "pt"})
    generation.save_pretrained(path)
    # the tokenizer of training: <image>, which the processor adds when it is loaded, is no row of the embeddings
    processor.tokenizer = copy.deepcopy(tokenizer)
    processor.tokenizer.chat_template = processor.chat_template
    processor.save_pretrained(path)
    processor.image_processor.save_pretrained(path)  # also in a file of its own, for those who read images alone
    portable.mend_tokenizer(path)


def from_pretrained(path: Path) -> Hive:
    """Load the model that `save_pretrained` wrote, on the CPU, in the precision of the file.

    Raises ValueError if `path` holds no HIVE, or a damaged one.
    """
    checksums.check(path, weights=False)  # weight files carry their own checksums
    try:
        fields = _content(path)["model"]
        model = resolve(ModelConfig(), with_new_names(ModelConfig, fields) if isinstance(fields, dict) else {})
        if model.vision.path or model.language.path:
            raise ValueError("a path in config.json, where the whole config of each part is wanted")
        return build.load_model(model, read_weights(path, checksummed=checksums.is_listed(path)))
    except CorruptFile:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not an exported HIVE: {error}") from None


def processing(path: Path) -> DataConfig:
    """How the model that `save_pretrained` wrote to `path` reads images and prompts; its tokenizer is that of `path`.

    Raises ValueError for a value that cannot be.
    """
    known = _content(path).get("data", {})  # exports of older versions have none
    if not isinstance(known, dict):
        raise ValueError(f"{path / 'config.json'}: data holds no keys, but a {type(known).__name__}")
    wanted = {name: value for name, value in known.items() if name in PROCESSING}
    return resolve(DataConfig(tokenizer=TokenizerConfig(str(path))), wanted)


def _content(path: Path) -> dict[str, Any]:
    """The config.json that `save_pretrained` wrote. Raises ValueError if it is another model's."""
    content: Any = strict_json.read(path / "config.json")
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "hive":
        raise ValueError(f"it holds a {kind or 'file of another kind'}, not a whole HIVE")
    return dict(content)


def _converted(weights: Weights, dtype: torch.dtype) -> dict[str, LazyTensor]:
    def read(name: str) -> Tensor:
        return weights[name].to(dtype)

    return {name: LazyTensor(dtype, weights.shape(name), partial(read, name)) for name in weights}


def _tokenizer(config: Config) -> Any:
    return open_tokenizer(config.data.tokenizer).stock


def merge_of(config: Config, name: str) -> Merge:
    """How what the adapter of stage `name` has learned, if it has one, becomes part of the weights."""
    if config.stages[name].adapter is None:
        return Merge()
    adapted = build.for_stage(config.model, config.stages[name])[0].adapted
    assert adapted
    return Merge(adapted.added, {f"{layer}.weight": partial(merged_weight, adapted, layer) for layer in adapted.layers})


class Source(NamedTuple):
    """What is exported: a stage of a run, its weights, and the run's config with the data of that stage."""

    run: Run
    stage: str
    config: Config
    weights: Weights


def _encoder(source: Source, path: Path, dtype: torch.dtype) -> None:
    config = source.config
    huggingface.export_encoder(config.model, source.weights, path, config.data.image_transform, dtype)


def _llm(source: Source, path: Path, dtype: torch.dtype) -> None:
    huggingface.export_llm(source.config.model, source.weights, path, _tokenizer(source.config), dtype)


def _hive(source: Source, path: Path, dtype: torch.dtype) -> None:
    save_pretrained(source.config, source.weights, path, dtype)


def _llava(source: Source, path: Path, dtype: torch.dtype) -> None:
    config, data = source.config, source.config.data
    huggingface.export_llava(
        config.model, source.weights, path, _tokenizer(config), data.image_transform, dtype, data.image_position
    )


def _dcp(source: Source, path: Path, dtype: torch.dtype) -> None:
    """A torch.distributed.checkpoint of all tensors by name, from which any sharding loads. Holds the whole model."""
    state = {name: weights.to(dtype) for name, weights in source.weights.items()}
    saver: Any = dcp  # whose type hints do not export what it exports
    saver.save(state, checkpoint_id=path, no_dist=True)


def _adapter(source: Source, path: Path, dtype: torch.dtype) -> None:
    """The adapter of a stage, from its last checkpoint, as peft reads it: folders ``language`` and ``vision``."""
    run, name, stages = source.run, source.stage, source.config.stages
    having = [stage for stage, content in stages.items() if content.adapter]
    if name not in having:
        have = f"those with one are {', '.join(having)}" if having else "nor has any other"
        raise ValueError(f"stage {name} has no adapter: {have}")
    adapted = build.for_stage(source.config.model, stages[name])[0].adapted
    assert adapted
    snapshot, parts = StepCheckpoint(_last_checkpoint(run, name)), adapted.parts()
    for part, (layers, added) in parts.items():
        folder = path / part
        folder.mkdir()
        tensors = {own: snapshot.master(f"{part}.{own}").to(dtype) for own in added}
        adapted.adapter.save(layers, tensors, folder, is_llm=part == "language")


KINDS: dict[str, Callable[[Source, Path, torch.dtype], None]] = {
    "encoder": _encoder,
    "llm": _llm,
    "hive": _hive,
    "llava": _llava,
    "dcp": _dcp,
    "adapter": _adapter,
}
