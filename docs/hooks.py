"""Pages that are made of the code: options of the dataclasses, `--help` of the commands, messages of the source."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs: add the pages that no file holds."""
    from mkdocs.structure.files import File

    pages = {
        "configuration.md": configuration(),
        "commands.md": commands(),
        "messages.md": messages(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


# ---------------------------------------------------------------- configuration


def configuration() -> str:
    """A table for each dataclass of the config: option, type, default, meaning."""
    from hive_scale import config

    lines = [
        "# Configuration reference",
        "",
        "Every option of a run. On the command line: `key=value`, nested keys with dots, such as "
        "`engine.precision=bf16` or `stages.joint.micro_batch=8`. In a YAML file (`--config`): the same keys, nested. "
        "`--print_config` shows the whole config of a run. This page is made from `hive_scale/config.py`.",
        "",
    ]
    for prefix, kind in SECTIONS.items():
        one = getattr(config, kind)
        lines += [f"## {prefix or 'The run'}", "", f"{ast.get_docstring(_class(kind), clean=True) or ''}", ""]
        lines += ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        comments = _comments(kind)
        for field in dataclasses.fields(one):
            name = f"{prefix}.{field.name}" if prefix else field.name
            row = (f"`{name}`", _type(one, field.name), _default(field), _cell(comments.get(field.name, "")))
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


SECTIONS = {
    "": "Config",
    "model": "ModelConfig",
    "model.vision, model.language": "PartConfig",
    "data": "DataConfig",
    "data.tokenizer": "TokenizerConfig",
    "stages.NAME": "StageConfig",
    "stages.NAME.groups.NAME": "GroupConfig",
    "engine": "EngineConfig",
    "engine.checkpointing": "CheckpointingConfig",
    "guard": "GuardConfig",
    "keep": "KeepConfig",
    "log": "LogConfig",
    "profile": "ProfileConfig",
}
SOURCE = ROOT / "hive_scale" / "config.py"


def _class(name: str) -> ast.ClassDef:
    (found,) = (
        node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
    )
    return found


def _comments(kind: str) -> dict[str, str]:
    """By option: the comment behind its line, or the lines above it."""
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE.read_text()).readline)
    notes = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in _class(kind).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        behind = [notes[line][0] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in notes]
        above, line = [], node.lineno - 1
        while line in notes and notes[line][1]:
            above.insert(0, notes[line][0])
            line -= 1
        found[node.target.id] = " ".join([*above, *behind])
    return found


def _type(kind: Any, name: str) -> str:
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    shown = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
    return f"`{re.sub(r'hive_scale[.]config[.]', '', shown)}`".replace("|", "or")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "below" if dataclasses.is_dataclass(made) else f"`{made!r}`"
    return "required"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---------------------------------------------------------------- commands


def commands() -> str:
    """What `--help` of every command says."""
    from hive_scale.commands import COMMANDS

    lines = ["# Command reference", "", "What each command's `--help` prints. This page is made from the parsers.", ""]
    for name, purpose in COMMANDS.items():
        done = subprocess.run(
            [sys.executable, "-m", "hive_scale", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        lines += [
            f"## {name}",
            "",
            f"{purpose[0].upper()}{purpose[1:]}.",
            "",
            "```text",
            done.stdout.rstrip(),
            "```",
            "",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------- messages


def messages() -> str:
    """Every message with which a command refuses, as the source has it."""
    lines = [
        "# Messages",
        "",
        "Each message says what is wrong, where, and, behind the last colon, what to change. Words in braces stand for "
        "values. Exit codes: 2 for something to change, 75 for something to try again; a traceback behind the message, "
        "and code 1, is a bug: please report it. This page is made from the source.",
        "",
    ]
    room = ""
    for path in sorted((ROOT / "hive_scale").rglob("*.py")):
        found = list(_raised(path))
        if not found:
            continue
        here = path.relative_to(ROOT / "hive_scale").parts
        if here[0] != room:
            room = here[0]
            title = room.removesuffix(".py")
            lines += [f"## {title}", ""]
        lines += [f"- {text}" for text in found]
    return "\n".join(lines) + "\n"


def _raised(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _text(node.exc.args[0])
            if isinstance(node.exc.func, ast.Name) and " " in re.sub(r"{[^}]*}", "", text).strip():
                yield text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        shown = str(node.value)
        return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", shown)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            "`{" + ast.unparse(part.value) + "}`" if isinstance(part, ast.FormattedValue) else _text(part)
            for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""
