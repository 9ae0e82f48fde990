"""The first hour of a stranger with own images: the commands of "Getting started", in an empty folder, one by one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import webdataset
from PIL import Image

from hive_scale.data.shards import SAMPLE_DIR

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "index.md"
SHORT = "stages.projector.max_steps=2 stages.language.max_steps=2 stages.joint.max_steps=2 blank_image_control=false"


def commands() -> list[str]:
    (block,) = re.findall(r"^## From an empty folder$.*?^```\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line.split("  #")[0].strip() for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def photographs(folder: Path, count: int) -> None:
    """Images and a CSV of captions, as a person has them."""
    (folder / "images").mkdir()
    rows = ["image,caption"]
    pairs = webdataset.WebDataset(str(next(SAMPLE_DIR.glob("train*.tar"))), shardshuffle=False)
    for number, sample in zip(range(count), pairs, strict=False):
        (name,) = [name for name in sample if name in ("jpg", "png", "webp")]
        image = Image.open(BytesIO(sample[name])).convert("RGB")
        image.resize((90, 60)).save(folder / "images" / f"{number:03}.jpg")
        rows.append(f'{number:03}.jpg,"{sample["txt"].decode()}"')
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")


def test_sixty_photographs_and_a_csv_become_an_encoder(tmp_path: Path) -> None:
    photographs(tmp_path, 60)
    asked = commands()
    assert len(asked) <= 8
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    said = {}
    for command in asked:
        shorter = f" {SHORT}" if " pretrain " in command else ""
        command = f"{shlex.quote(sys.executable)}{command.removeprefix('python')}{shorter}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said[command.split("hive_scale ")[-1].split()[0]] = done.stdout
    assert "train on it:" in said["prepare_data"]
    assert re.search(r"held-out, data/mine: \d+ samples in 1 shard", said["pretrain"])
    assert len(said["caption"].splitlines()) == 3
    assert "SiglipVisionModel" in "".join(said.values())
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 10_000
