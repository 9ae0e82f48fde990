"""The documentation builds without a broken link, covers every option and command, and its commands work.

Why: documentation that nobody runs becomes untrue first.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hive_scale import config
from hive_scale.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_pages_build_and_know_every_option_and_command(site: Path) -> None:
    options = (site / "configuration" / "index.html").read_text()
    for kind in (config.Config, config.DataConfig, config.StageConfig, config.EngineConfig):
        for field in dataclasses.fields(kind):
            assert re.search(rf"<code>([\w.]*\.)?{field.name}</code>", options), field.name
    commands = (site / "commands" / "index.html").read_text()
    assert all(f'id="{name}"' in commands for name in COMMANDS)
    assert "error" not in (site / "api" / "index.html").read_text().split("<title>")[0]


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img)[^>]+src="(https?:[^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)"',
            page.read_text(),
        )
        assert not loaded, (page, loaded)


@pytest.mark.slow
def test_the_site_reads_in_a_browser(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch()
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        for file in sorted(site.glob("*/index.html")):
            page.goto(file.as_uri())
            assert page.locator("h1").count() == 1, file
        browser.close()
    assert not problems


def documented() -> list[str]:
    """Commands in the pages' code blocks, without their comments."""
    blocks = [
        block for page in PAGES for block in re.findall(r"^```(?:bash)?\n(.*?)^```", page.read_text(), re.M | re.S)
    ]
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith(("python ", "deepspeed ", "torchrun ", "accelerate "))})


@pytest.mark.parametrize("command", [one for one in documented() if "launchers/pretrain.py" in one])
def test_a_training_command_names_a_run(command: str) -> None:
    words = shlex.split(command)
    words = [sys.executable, *words[words.index("launchers/pretrain.py") :], "--print_config"]
    env = os.environ | {"SCRATCH": "/scratch", "PASSWORD": "a-password"}  # which some of them name
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [one for one in documented() if one.startswith("python ")])
def test_a_command_is_there_and_knows_its_options(command: str) -> None:
    """Every --option of a documented command is one that its --help names."""
    _, script, *words = shlex.split(command.replace(" ..", ""))
    if script == "-m":
        script, words = f"launchers/{words[1]}.py", words[2:]
    known = [
        word
        for word in words[:1]
        if not word.startswith("-") and "=" not in word and "/" not in word and word.islower()
    ]
    line = [
        sys.executable,
        script,
        *(known if script.endswith(("prepare_data.py", "visualize.py", "export.py", "benchmark.py")) else []),
        "--help",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in done.stdout, f"{command}: no {option}"
