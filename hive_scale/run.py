"""Open the results of a finished run or stage: its encoder and its model."""

from __future__ import annotations

from pathlib import Path

from hive_scale import checksums, strict_json
from hive_scale.checkpoint.run_reader import CONFIG, Run, encoder_remedy
from hive_scale.checkpoint.stage_files import ENCODER
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config, PartConfig
from hive_scale.locate import check_there
from hive_scale.model import build
from hive_scale.model.encoders import family_of
from hive_scale.model.hive import Hive


def find_encoder(path: Path) -> Path:
    """The Hugging Face directory of the encoder at `path`, which is that directory, a stage, or a run (last stage).

    Raises ValueError if there is none, its files are corrupt, or its image processor does not make images of the
    encoder's size.
    """
    if (path / "config.json").is_file() or (checksums.is_listed(path) and not (path / CONFIG).is_file()):
        checksums.check(path, remedy=encoder_remedy(path))
        _check_processor(path)
        return path
    run, stage = _find(path)
    folder = run.dir / stage / ENCODER
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not there: name a stage that is done; of one that is, the command that trained the run "
            "makes it again"
        )
    return find_encoder(folder)


def _check_processor(path: Path) -> None:
    """Raises ValueError if the image processor's size is not the encoder's: the images would be of the wrong size."""
    file, config = path / "preprocessor_config.json", build.vision_config(PartConfig(path=str(path)))
    wanted: int = config.image_size
    told = strict_json.read(file) if file.is_file() else {}
    size = (told.get("crop_size") or told.get("size") or {}) if isinstance(told, dict) else {}
    side = size.get("height", size.get("shortest_edge", wanted)) if isinstance(size, dict) else size
    if side != wanted and not family_of(config).any_size:
        raise ValueError(f"{path}: its processor makes images of {side} pixels, its encoder takes {wanted}")


def open_hive(path: Path) -> tuple[Config, str, Hive]:
    """Load the run or stage at `path`: its config, the stage's name, and the model on the CPU. Raises ValueError."""
    run, stage = _find(path)
    return run.config, stage, read_model(run, stage)


def read_model(run: Run, stage: str = "") -> Hive:
    """The model at the end of `stage` (default: the last finished one), on the CPU."""
    return build.load_model(run.config.model, read_weights(run.weights(run.stage(stage))))


def _find(path: Path) -> tuple[Run, str]:
    """The run and stage at `path`; for a run directory, its last finished stage. Raises ValueError if it is neither."""
    if (path / CONFIG).is_file():
        run = Run(path)
        return run, run.stage()
    if (path.parent / CONFIG).is_file():
        run = Run(path.parent)
        return run, run.stage(path.name)
    check_there(path)
    raise ValueError(f"{path} is no Hugging Face directory (config.json), no run ({CONFIG}) and no stage of one")
