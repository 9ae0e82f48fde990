"""What comes from strangers runs no code and exhausts no memory, and a run writes down no secret."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import tiny
import torch

from hive_scale import presets
from hive_scale.checkpoint.store import Store
from hive_scale.config import Config, PartConfig
from hive_scale.distributed import World, session
from hive_scale.pipeline import run_pipeline
from hive_scale.preparation import open_data

SECRETS = {
    "WANDB_API_KEY": "0123secretwandb",
    "HF_TOKEN": "hf_0123secrethub",
    "AWS_SECRET_ACCESS_KEY": "0123secretaws",
    "SOME_PASSWORD": "0123secretpassword",
}


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def small(output: Path) -> Config:
    run = presets.load("debug", None, [f"output={output}", "eval_interval=0"])
    vision, language = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=259))
    stages = {name: replace(stage, steps=2, global_batch=4) for name, stage in run.stages.items()}
    return replace(run, model=replace(run.model, vision=vision, language=language), stages=stages, evidence=False)


def test_a_run_writes_down_no_secret(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = small(tmp_path / "run")
    run_pipeline(config, world, until="language")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_a_pickle_among_weights_is_not_run(tmp_path: Path) -> None:
    from hive_scale.model import build

    marker, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.language(vocab_size=259)))
    torch.save({"weight": torch.zeros(1), "bomb": Bomb(marker)}, folder / "pytorch_model.bin")
    config = replace(small(tmp_path).model, language=PartConfig(path=str(folder)))
    with pytest.raises(Exception, match=r"(?i)pickle|safetensors|weights"):
        build.assemble(config, seed=0)
    assert not marker.exists()


def test_a_pickle_in_a_checkpoints_place_is_not_run(tmp_path: Path, world: World) -> None:
    config, marker = small(tmp_path / "run"), tmp_path / "ran"
    run_pipeline(config, world, until="projector")
    stage_dir = tmp_path / "run" / "projector"
    (newest,) = stage_dir.glob("step_*")
    for path in newest.iterdir():
        path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is sound"):
        Store(stage_dir, world).latest()
    (stage_dir / "weights.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"cannot be read|not what was written|weights.safetensors"):
        run_pipeline(config, world, until="language")
    assert not marker.exists()


def png(width: int, height: int) -> bytes:
    """A black picture of any size in few bytes, all of whose rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width // 8 + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_picture_of_600_megapixels_and_a_pickle_in_a_shard_are_left_out(tmp_path: Path) -> None:
    marker, shard = tmp_path / "ran", tmp_path / "shard.tar"
    large = png(30_000, 20_000)
    assert len(large) < 1_000_000
    with tarfile.open(shard, "w") as tar:
        for key, picture in (("large", large), ("good", png(64, 64))):
            for name, content in ((f"{key}.png", picture), (f"{key}.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
            bomb = pickle.dumps(Bomb(marker))
            for name in (f"{key}.pickle", f"{key}.pyd", f"{key}.pth"):
                member = tarfile.TarInfo(name)
                member.size = len(bomb)
                tar.addfile(member, BytesIO(bomb))
    config = small(tmp_path / "run")
    data = open_data(replace(config, data=replace(config.data, train=[str(shard)])))
    keys = {data.train.index.key(i): i for i in range(len(data.train.index))}
    assert data.train.sample(keys["good"]).pixels is not None
    assert "large" not in keys
    (fault,) = data.train.index.faults
    assert fault.key == "large"
    assert "DecompressionBombError" in fault.reason  # Pillow has a limit of its own, above which nothing is opened
    assert not marker.exists()


def test_a_run_directory_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "launchers/pretrain.py", f"output={tmp_path / 'file' / 'run'}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
