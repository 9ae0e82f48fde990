"""The documentation builds without a broken link, covers every option and command, and its commands work.

Why: documentation that nobody runs becomes untrue first.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from hive_scale import config, presets
from hive_scale.__main__ import main as hive_scale_main
from hive_scale.cli import Parser, named_run
from hive_scale.commands import COMMANDS
from hive_scale.slurm import resources

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


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_the_site_reads_in_a_browser(browser: Any, site: Path) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    # the theme's search reads its index by HTTP, not from a file
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for file in sorted(site.glob("*/index.html")):
            page.goto(f"http://127.0.0.1:{server.server_port}/{file.parent.name}/")
            assert page.locator("h1").count() == 1, file
        server.shutdown()
    assert not problems


def documented() -> list[str]:
    """Commands in the pages' code blocks and in the examples of `--help`, which are a page, too."""
    blocks = [
        block for page in PAGES for block in re.findall(r"^```(?:bash)?\n(.*?)^```", page.read_text(), re.M | re.S)
    ]
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    sources = [*(ROOT / "hive_scale" / "commands").glob("*.py"), *(ROOT / "launchers").glob("*.py")]
    examples = [
        one for path in sources for one in re.findall(r"^examples:\n(.*?)^(?!  )", path.read_text(), re.M | re.S)
    ]
    joined = [line for block in examples for line in re.sub(r"\\+\n\s*", "", block).splitlines()]
    lines += [re.split(r"\s{2,}", line.strip())[0] for line in joined]
    return sorted({line for line in lines if re.match(PROGRAMS, line) and re.search(OURS, line)})


PROGRAMS = r"(\w+=\S* )*(python|deepspeed|torchrun|accelerate|srun|mpirun) "
OURS = r" (?:(?:launchers|slurm|tests)/\w+\.py|(?:-m|--module) hive_scale)(?=\s|$)"


class Parsed(BaseException):
    """Ends a command once its arguments are parsed."""


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments of a command, by its own parser. Raises SystemExit if that refuses them."""

    def ending(method: Any) -> Any:
        def parse(*arguments: Any) -> None:
            raise Parsed(method(*arguments))

        return parse

    for kind in (Parser, argparse.ArgumentParser):
        for name in {"parse_args", "parse_intermixed_args"} & vars(kind).keys():
            monkeypatch.setattr(kind, name, ending(vars(kind)[name]))
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "hive_scale")
    monkeypatch.setattr(sys, "argv", words[place:])
    monkeypatch.setattr(sys, "path", [*sys.path])
    start = hive_scale_main if words[place] == "hive_scale" else partial(runpy.run_path, words[place], None, "__main__")
    with pytest.raises(Parsed) as found:
        start()
    arguments: argparse.Namespace = found.value.args[0]
    return arguments


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command's own parser; the words of a run by the config's, and those of jobs by that of their resources."""
    monkeypatch.chdir(ROOT)
    for name in ("SCRATCH", "PASSWORD"):  # which some of them name
        monkeypatch.setenv(name, "/a-password")
    with monkeypatch.context() as patch:
        arguments = parsed(shlex.split(command, comments=True), patch)
    if "default_preset" in arguments:
        arguments.config = None  # a file of the reader's
        plain, slurm_words = resources.split(arguments.overrides)
        run = named_run(arguments, [word for word in plain if not word.startswith("after.")])
        bases = dict.fromkeys(run.stages, resources.Resources())
        assert resources.read(getattr(arguments, "profile", None), slurm_words, bases).keys() == bases.keys()


def test_the_pages_have_the_commands_that_a_reader_would_copy() -> None:
    """The parsing above finds them, also in blocks with comments, launchers and continued lines."""
    found = documented()
    for command in COMMANDS:
        assert any(
            re.search(rf"(launchers/{command}\.py|hive_scale {command}|slurm/{command}\.py)", one) for one in found
        ), command
    assert any(one.startswith("deepspeed ") for one in found)
    assert len(found) > 100


SPAN = re.compile(r"`([^`]+)`")


def words_in_text() -> list[str]:
    """Words of a run, such as `engine.compile=true`, that the pages' text names between code blocks."""
    keys = {field.name for field in dataclasses.fields(config.Config)}
    texts = [re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S) for page in PAGES]
    found = set()
    for span in (span for text in texts for span in SPAN.findall(text)):
        with suppress(ValueError):  # other code than a shell's
            words = [word for word in shlex.split(span) if re.match(r"[a-z_]+(\.\w+)*=.", word)]
            for key, value in (word.split("=", 1) for word in words if re.split(r"[.=]", word)[0] in keys):
                found |= {f"{key}={one}" for one in ([value] if key.startswith("data.") else value.split("|"))}
    return sorted(found)


@pytest.mark.parametrize("word", words_in_text())
def test_a_word_in_the_text_is_one_of_a_run(word: str) -> None:
    presets.load("rtx3090", None, [word])
