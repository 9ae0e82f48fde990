"""Merge the layers of a config: YAML files, ``key=value`` words and mappings. A typo is answered by the nearest key.

This module imports no torch. The only keys of `Config` that it knows are those of shards and of model components.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from io import StringIO
from math import isnan
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hive_scale import credentials
from hive_scale.key_guesses import guess, is_known_elsewhere
from hive_scale.strangers import check_yaml, read_yaml_text
from hive_scale.strict_json import dumps

logger = logging.getLogger(__name__)
T = TypeVar("T")  # Config, or another dataclass of settings
STAGE_ORDER = "stage_order"  # key of a YAML file beside those of Config, since tools sort keys
# words that YAML would change: 10:13 becomes 613 (base 60), off becomes false, and an empty value becomes null
LITERAL = re.compile(r"\d+:\d+|on|off|")
RANGE = re.compile(r"\{\d+\.\.\d+\}|\$\{")  # a shard range or a variable: YAML would read its brace as a mapping
IN_QUOTES = r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\""""
QUOTED = re.compile(IN_QUOTES)
# one item of a list; a comma inside of braces, as in set/{a,b}.tar, ends none
ITEM = re.compile(rf"\s*({IN_QUOTES}|(?:\{{[^{{}}]*\}}|[^,])*?)\s*(?:,|$)")
# text with a shard range, such as 3 x set/{00..99}.tar; in a list of YAML, its brace would begin a mapping
WITH_RANGE = r"(?:[\d.]+ x )?(?:[^\s,\[\]{}'\"#]*\{\d+\.\.\d+\})+[^\s,\[\]{}'\"#]*"
IN_YAML = re.compile(rf"{IN_QUOTES}|#.*|({WITH_RANGE})")
KEY_REFERENCE = re.compile(r"\$\{[^}:]*\}")  # ${another.key}
RESOLVER = re.compile(r"\$\{[^}]*:")  # a resolver, which reads the environment or runs code; not ${another.key}
TOKENIZER = "data.tokenizer.path"
SHARDS_KEY = re.compile(r"(?:.*\.)?data\.(?:train|heldout)(?:\.\d+)?")
SECRET_KEY = re.compile(r".*(?:(?:auth|hub|hf|access)_?token|api_?key|passw(?:or)?d|secret)", re.IGNORECASE)
# a variable that is given a value, as the shell has it; not one of another variable, a command or a file
ASSIGNED = re.compile(r"""(?<![\w$])([A-Za-z_]\w*)=["']?[^\s"'$`/~.][^\s"']{7,}""")
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{30,}|AKIA[A-Z0-9]{16})\b")  # Hugging Face, GitHub, AWS


def resolve(base: T, *layers: Any) -> T:
    """Merge `layers` over `base`, in order: each is a mapping, the path of a saved YAML, or ``key=value`` words.

    Mappings and words are the user's own input: ``${another.key}`` is interpolated, and shard patterns may name
    environment variables. A saved config may hold no references. `STAGE_ORDER` in a layer says how the stages follow
    each other. Raises ValueError: for a typo it names the nearest key, for a bad value the remedy.
    """
    order: list[str] = []
    try:
        node = cast(DictConfig, OmegaConf.structured(base))
        start = OmegaConf.to_container(node)
        _own(start)  # the base may hold user input too: a preset's arguments are words
        for layer in layers:
            _unlock(node)  # omegaconf makes frozen dataclasses read-only nodes
            if not isinstance(layer, Path | Mapping):
                _check_stages(node, layer)
            read = _with_new_names(_read(layer, type(base)), type(base), is_users=not isinstance(layer, Path))
            order = _take_order(read) or order
            _check_text(type(base), OmegaConf.to_container(read, resolve=False))
            if isinstance(layer, Path):
                refuse_references(OmegaConf.to_container(read), layer)
            else:
                read = OmegaConf.create(_own(OmegaConf.to_container(read)))
            _follow_paths(node, read, start)
            old, new = OmegaConf.to_container(node), OmegaConf.to_container(read)
            _check_kinds(type(base), old, new)
            _check_names(type(base), new, list(flatten(old)))
            _make_way(node, read)
            node = cast(DictConfig, OmegaConf.merge(node, read))
        if order:
            stages = ordered(list(node.stages), order)
            OmegaConf.update(node, "stages", {name: node.stages[name] for name in stages}, merge=False)
        _check_each_stage(node)
        found = cast(T, OmegaConf.to_object(node))
        plain = asdict(cast(Any, found))
        refuse_references(plain, None)
    except TypeError:
        raise ValueError("config: a list stands where keys are wanted, or keys where a list is") from None
    except OmegaConfBaseException as error:
        # omegaconf's first line is the message, the rest is its own bookkeeping
        message = next(iter(str(error).splitlines()), type(error).__name__)
        if "is not a ListConfig" in message:
            message = "a list is wanted here: [a, b]"
        raise ValueError(f"config: {error.full_key or ''}: {credentials.hide(message)}") from None
    except (AttributeError, LookupError, RecursionError) as error:  # omegaconf's, for a value of the wrong kind
        raise ValueError(
            f"config: a value is of another kind than its key takes, or nested too deeply: {error}"
        ) from None
    for key, value in flatten(plain).items():
        if isinstance(value, float) and isnan(value):
            raise ValueError(f"config: {key}=nan is no number: set one")
    return found


def refuse_references(content: Any, file: Path | None) -> None:
    """Raises ValueError if a value in `content` holds a reference (``${...}``). `content` was read from `file`.

    `file` was written by a run or a stranger. A reference could read any variable of the user who opens the file, and
    its value would then be written into the new run.
    """
    for key, text in _strings(content):
        if "${" in text:
            raise ValueError(
                f"{file or 'config'}: {key}: {text}: what a run wrote, or is to write, refers to no variable, file or "
                "code: put the value itself there, or give it in your own command"
            )


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every string in a config given as plain data."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping | list | tuple):
        for name, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _strings(child, f"{key}.{name}" if key else str(name))


def _own(node: Any, key: str = "", secrets: Mapping[str, str] | None = None) -> Any:
    """Check a user's own config, and return it as plain data, with variables in shard patterns replaced by their names.

    Raises ValueError for any other reference to the environment, files or code, and for a secret.
    """
    secrets = credentials.secret_variables() if secrets is None else secrets
    if isinstance(node, Mapping):
        return {name: _own(child, f"{key}.{name}" if key else str(name), secrets) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return [_own(child, f"{key}.{place}", secrets) for place, child in enumerate(node)]
    if not isinstance(node, str):
        return node
    if SHARDS_KEY.fullmatch(key):
        if credentials.VARIABLE.search(node):
            return credentials.take(node, own=True)
    elif "://" in node and credentials.public(node) != node:
        raise ValueError(f"config: {key}: a URL with credentials would be written into the run: only shards have such")
    if RESOLVER.search(node):
        raise ValueError(
            f"config: {key}: {node} would be written into the run: only data.train and data.heldout may name a "
            "variable, as ${oc.env:NAME}; elsewhere give the value itself, as the shell does for $NAME"
        )
    shown = credentials.public(node)
    told = next((name for name, value in secrets.items() if value in shown), "")
    assigned = any(credentials.SECRET_VARIABLE.search(name.upper()) for name in ASSIGNED.findall(shown))
    if told or assigned or TOKEN.search(shown) or SECRET_KEY.fullmatch(key):
        what = f"holds the value of the variable {told}" if told else "holds what looks like a secret"
        raise ValueError(
            f"config: {key} {what}, and a config is written down: leave it to the environment, or in data.train and "
            f"data.heldout write ${{oc.env:{told or 'NAME'}}}"
        )
    return node


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys; tuples become lists."""
    if not isinstance(node, dict):
        return {prefix: list(node) if isinstance(node, tuple) else node}
    dotted = prefix and prefix + "."
    return {key: value for name, child in node.items() for key, value in flatten(child, f"{dotted}{name}").items()}


def holds_weights_alone(path: str) -> bool:
    """True if `path` names a safetensors file or a safetensors index."""
    return path.endswith((".safetensors", ".safetensors.index.json"))


def _follow_paths(node: DictConfig, layer: DictConfig | ListConfig, start: Any) -> None:
    """Clear a component's config in `node` if `layer` names another directory for it, which has a config of its own.

    The tokenizer follows the LLM, unless it is the user's choice: neither the former LLM's nor the one in `start`.
    ``config=preset`` in `layer` stands for the config in `start`, which is plain data from before all layers.
    """
    new = OmegaConf.to_container(layer, resolve=False)
    for role in ("vision", "language"):
        key = f"model.{role}"
        path, before = _at(new, f"{key}.path"), OmegaConf.select(node, f"{key}.path")
        if isinstance(path, str) and path not in ("", before) and not holds_weights_alone(path):
            OmegaConf.update(node, f"{key}.config", {}, merge=False)
            tokenizer = OmegaConf.select(node, TOKENIZER)
            if role == "language" and tokenizer in (before, _at(start, TOKENIZER)):
                _follow_llm(node, path, is_given=_at(new, TOKENIZER) is not None)
        if _at(new, f"{key}.config") == "preset":
            if not (own := _at(start, f"{key}.config")):
                raise ValueError(f"config: {key}.config=preset: the preset gives no config here: leave this word out")
            OmegaConf.update(layer, f"{key}.config", own, merge=False)


def _follow_llm(node: DictConfig, path: str, is_given: bool) -> None:
    """Set the tokenizer in `node` to that of the LLM at `path`, unless `path` is a local directory without one.

    An LLM from elsewhere without a tokenizer is worth a warning unless the user names one (`is_given`): to the LLM,
    another tokenizer's numbers mean other words. A run, which has no ``config.json``, is trained with a preset's.
    """
    place = Path(path).expanduser()
    if not place.is_dir() or any(place.glob("tokenizer*")):
        OmegaConf.update(node, TOKENIZER, path)
    elif not is_given and (place / "config.json").is_file():
        logger.warning(
            "model.language.path=%s has no tokenizer, and %s=%s is used: if the LLM was trained with another one, give "
            "its directory", path, TOKENIZER, OmegaConf.select(node, TOKENIZER),
        )  # fmt: skip


def _at(node: Any, key: str) -> Any:
    """The value at a dotted `key` of plain data, or None."""
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _make_way(node: DictConfig, layer: DictConfig | ListConfig) -> None:
    """Clear a component's config in `node` if `layer` brings one of another model family, or an empty one.

    Merging key by key would mix the sizes of two families.
    """
    for role in ("vision", "language"):
        place = f"model.{role}.config"
        old = OmegaConf.select(node, place)
        new = OmegaConf.select(layer, place, default=old)
        if new is old:
            continue
        family = new.get("model_type") if isinstance(new, DictConfig) else None
        if not new or family not in (None, old.get("model_type")):
            OmegaConf.update(node, place, {}, merge=False)
        if new is None:
            OmegaConf.update(layer, place, {}, merge=False)
            continue
        for name in new:  # RoPE scaling: numbers of one rope_type mean nothing to another
            parts = [OmegaConf.select(one, f"{place}.{name}") for one in (node, layer)]
            types = [part.get("rope_type") for part in parts if isinstance(part, DictConfig)]
            if len(types) == 2 and None not in types and types[0] != types[1]:
                theta = OmegaConf.select(node, f"{place}.{name}.rope_theta")
                OmegaConf.update(node, f"{place}.{name}", {"rope_theta": theta} if theta else {}, merge=False)


def _check_kinds(kind: Any, old: Any, new: Any, key: str = "") -> None:
    """Raises ValueError where `old`, of type `kind`, has a list or a section and `new` (plain data) something else."""
    if isinstance(new, str) and new.startswith("${"):
        return  # an interpolation: its value is checked once it is resolved
    if isinstance(old, Mapping) and not isinstance(new, Mapping | None):
        some = f", such as {next(iter(flatten(old, key)))}=..." if flatten(old) and key else ""
        raise ValueError(f"config: {key}: keys of its own are wanted here{some}")
    if is_dataclass(kind) and not isinstance(new, Mapping | list | None):  # an optional section that is not set yet
        first = next(one for one in fields(kind) if one.default is not MISSING)
        raise ValueError(f"config: {key}: keys of its own are wanted here, such as {key}.{first.name}={first.default}")
    is_list = isinstance(old, list | tuple) and not key.endswith(("encoder_layers", "llm_layers"))  # or a rule's name
    if is_list and not isinstance(new, list | tuple | None):
        raise ValueError(f"config: {key}: a list is wanted here: [a, b]")
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in old.keys() & new.keys():
            _check_kinds(_type_of(kind, [str(name)]), old[name], new[name], f"{key}.{name}" if key else str(name))


def _check_names(kind: Any, new: Any, keys: Sequence[str], place: str = "") -> None:
    """Raises ValueError for a key in `new` that was meant for another one of `keys`, or is another program's.

    Other typos are left to omegaconf, which names the nearest key at the same place.
    """
    if not isinstance(new, Mapping):
        return
    known = [one.name for one in fields(kind)] if is_dataclass(kind) else None
    for name, child in new.items():
        key = f"{place}.{name}" if place else str(name)
        if known is None or name in known:
            _check_names(_type_of(kind, [str(name)]), child, keys, key)
            continue
        is_ours = get_close_matches(str(name), known) and not is_known_elsewhere(str(name))
        if not is_ours and (hint := guess(next(iter(flatten(child, key)), key), keys)):
            raise ValueError(f"config: {key}: there is no such key: {hint}")


def _take_order(layer: DictConfig | ListConfig) -> list[str]:
    """Remove `STAGE_ORDER` from a layer, and return it; [] if it is not there. Raises ValueError if it is no list."""
    if not isinstance(layer, DictConfig) or STAGE_ORDER not in layer:
        return []
    order = OmegaConf.to_container(layer.pop(STAGE_ORDER)) if OmegaConf.is_list(layer.get(STAGE_ORDER)) else None
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise ValueError(f"config: {STAGE_ORDER}: a list of the stages' names is wanted here: [a, b]")
    return [str(name) for name in order]


def ordered(stages: Sequence[str], order: Sequence[str]) -> list[str]:
    """The names of `stages` in the order in which they run: as they stand, unless a tool has sorted them.

    `order` is what the file says of it. It may lack a stage that was added by hand, and have one that was removed.
    Raises ValueError if the two contradict each other.
    """
    said = [name for name in dict.fromkeys(order) if name in stages]
    if [name for name in stages if name in said] == said:
        return list(stages)
    if list(stages) != sorted(stages):
        raise ValueError(
            f"config: {STAGE_ORDER} is {', '.join(order)}, and the stages stand as {', '.join(stages)}: put them in "
            f"one order, or leave {STAGE_ORDER} out"
        )
    if missing := [name for name in stages if name not in said]:
        raise ValueError(f"config: {STAGE_ORDER} does not name the stage '{missing[0]}': add it where it belongs")
    return said


def _check_stages(node: DictConfig, words: Sequence[str]) -> None:
    """Raises ValueError if a word names a stage that does not exist: only a file may add stages."""
    for word in words:
        parts = word.split("=")[0].split(".")
        if parts[0] == "stages" and len(parts) > 1 and parts[1] not in node.stages:
            near = get_close_matches(parts[1], list(node.stages), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(node.stages)}"
            raise ValueError(f"config: {'.'.join(parts)}: there is no stage '{parts[1]}': {hint}")


def _check_each_stage(node: DictConfig) -> None:
    """Raises ValueError for a bad value in a stage, with the stage's name, which a stage itself does not know."""
    for name in node.stages if "stages" in node else ():
        try:
            OmegaConf.to_object(node.stages[name])
        except OmegaConfBaseException:
            raise  # it has the whole key
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None


def _read(layer: Any, kind: type) -> DictConfig | ListConfig:
    if isinstance(layer, Path):
        return read_yaml(layer)
    if isinstance(layer, Sequence):
        return read_words(layer, kind)
    return cast(DictConfig, OmegaConf.create(layer))


def read_yaml(file: Path) -> DictConfig | ListConfig:
    """Read a YAML file. Raises ValueError with file and line if it is not YAML.

    A config saved before a key existed gets the value that matches the behaviour of that time.
    """
    text = read_yaml_text(file, _with_quoted_ranges)
    try:
        read = OmegaConf.load(StringIO(text))
    except Exception as error:  # PyYAML raises many types, for instance for tags that do not fit their values
        raise ValueError(f"{file}: not YAML: {_in_a_line(error)}") from None
    try:
        if isinstance(read, DictConfig):
            _with_old_defaults(read)
    except OmegaConfBaseException as error:  # a bad interpolation
        raise ValueError(f"{file}: {_in_a_line(error)}") from None
    return read


def _with_old_defaults(read: DictConfig) -> None:
    stages = OmegaConf.select(read, "stages")
    of_stages = stages.values() if isinstance(stages, DictConfig) else ()
    for part in (read, *of_stages):
        data = OmegaConf.select(part, "data") if isinstance(part, DictConfig) else None
        # keys that saved configs of that time had: a saved config is complete, so these mark one without the new key
        if isinstance(data, DictConfig) and {"text", "max_pixels", "window"} <= data.keys():
            data.setdefault("image_position", "start")
        if isinstance(data, DictConfig) and {"retry_seconds", "max_bad_samples", "max_pixels"} <= data.keys():
            data.setdefault("max_bad_share", 1.0)


def with_new_names(kind: Any, node: Any, is_users: bool = False, key: str = "") -> Any:
    """Rename old keys in a config of type `kind`, given as plain data, to their present names.

    In a user's own config (`is_users`) each old name is answered with a warning. Where a list of texts is wanted, one
    text becomes a list of one, and nothing an empty list. Raises ValueError if both the old and the new name are given.
    """
    if kind == list[str] and not isinstance(node, list | Mapping) and not KEY_REFERENCE.fullmatch(str(node)):
        return [] if node is None else [node]
    if not isinstance(node, Mapping):
        return node
    old_names = getattr(kind, "OLD_NAMES", {})
    made: dict[Any, Any] = {}
    for name, child in node.items():
        new = old_names.get(name, name)
        old_key, new_key = (f"{key}.{one}" if key else str(one) for one in (name, new))
        if new != name and new in node:
            raise ValueError(f"config: {old_key} is the old name of {new_key}: give one of them")
        if new != name and is_users:
            logger.warning("config: %s is called %s now; the old name is read in this release", old_key, new_key)
        made[new] = with_new_names(_type_of(kind, [str(new)]), child, is_users, new_key)
    return made


def _with_new_names(layer: DictConfig | ListConfig, kind: type, is_users: bool) -> DictConfig | ListConfig:
    if isinstance(layer, ListConfig):
        return layer
    return cast(
        DictConfig, OmegaConf.create(with_new_names(kind, OmegaConf.to_container(layer, resolve=False), is_users))
    )


def read_words(words: Sequence[str], kind: type) -> DictConfig:
    """Merge ``key=value`` words into one layer for a config of type `kind`. Raises ValueError for a bad word."""
    _check_expanded(words)
    read = [_read_word(word, kind) for word in words]
    return cast(DictConfig, OmegaConf.merge(*read) if read else OmegaConf.create())


def _check_expanded(words: Sequence[str]) -> None:
    """Raises ValueError if several words name shards for one key: bash makes such of one with unquoted braces.

    That holds for lists, too: ``data.train=[set/{00..99}.tar]`` becomes a hundred lists of one shard.
    """
    given: dict[str, set[str]] = {}
    for key, _, value in (word.partition("=") for word in words):
        if SHARDS_KEY.fullmatch(key):
            given.setdefault(key, set()).add(value)
    for key, values in given.items():
        if len(values) > 1:
            raise ValueError(
                f"config: {key} is given {len(values)} times, and only the last would count: put a range in quotation "
                f"marks, as the shell has expanded it ({key}='set/{{00..99}}.tar'), or give one list ({key}='[a,b]')"
            )


def _read_word(word: str, kind: type) -> DictConfig:
    """Parse one ``key=value`` word into a layer for a config of type `kind`."""
    key, is_one, value = word.partition("=")
    if not is_one:
        raise ValueError(f"config: '{credentials.hide(word)}' is not key=value")
    try:
        quoted = _quoted(value, _type_of(kind, key.split("."), old=True))
        try:
            check_yaml(quoted)
        except ValueError:
            quoted = _with_quoted_ranges(quoted)
            check_yaml(quoted)
        return OmegaConf.from_dotlist([f"{key}={quoted}"])
    except Exception as error:  # PyYAML and omegaconf raise many types, as in read_yaml
        told = credentials.hide(f"{key}={value}: not YAML: {_in_a_line(error)}")
        raise ValueError(f"config: {told}: put it in quotation marks") from None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)  # evaluates every annotation of the class


def _type_of(kind: Any, keys: Sequence[str], old: bool = False) -> Any:
    """The declared type at the path `keys` below dataclass `kind`, or Any. With `old`, old key names count too."""
    for key in keys:
        key = getattr(kind, "OLD_NAMES", {}).get(key, key) if old else key
        if is_dataclass(kind):
            overrides = {one.name: one.metadata.get("overrides") for one in fields(kind)}
            kind = overrides.get(key) or _hints(cast(Any, kind)).get(key, Any)
            if isinstance(kind, UnionType) and NoneType in get_args(kind):  # an optional section
                kind = get_args(kind)[0]
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else Any
    return kind


def _check_text(kind: Any, value: Any, key: str = "") -> None:
    """Raises ValueError where a text option got an unquoted yes or 1.10, which YAML reads as True or 1.1."""
    if isinstance(value, dict):
        for name, child in value.items():
            _check_text(_type_of(kind, [str(name)]), child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and kind == list[str]:
        for child in value:
            _check_text(str, child, key)
    elif kind is str and isinstance(value, bool | float):
        raise ValueError(f"config: {key}: {value} is no text to YAML: put what was meant in quotation marks")


def _quoted(value: str, kind: Any) -> str:
    """Quote `value` so that YAML reads it as it was typed.

    For options of type text: YAML would read 2024_05_01 as 20240501, yes as true, and cut "a #1" at the hash. For
    others: list items with braces, such as shard ranges, are quoted.
    """
    if value == "null":
        return value
    if kind is str:
        return _as_text(value)
    if kind == list[str] and not value.startswith("["):
        return f"[{_as_text(value)}]" if value else "[]"
    if value.startswith("[") and value.endswith("]") and (kind == list[str] or RANGE.search(value)):
        items = filter(None, (match[1] for match in ITEM.finditer(value[1:-1])))
        return f"[{', '.join(_as_text(item) if kind == list[str] or RANGE.search(item) else item for item in items)}]"
    return f"'{value}'" if LITERAL.fullmatch(value) else value


def _with_quoted_ranges(text: str) -> str:
    """YAML `text` with quotation marks around what has a shard range and no quotation marks yet."""
    return IN_YAML.sub(lambda match: f'"{match[1]}"' if match[1] else match[0], text)


def _as_text(value: str) -> str:
    return value if QUOTED.fullmatch(value) else dumps(value)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unlock(node: DictConfig | ListConfig) -> None:
    OmegaConf.set_readonly(node, False)
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            _unlock(child)


def without_credentials(word: str, kind: type) -> str:
    """Rewrite a ``key=value`` word, for a config of type `kind`, without credentials, so that it may be written down.

    It is for another command of the same user. Raises ValueError for a secret.
    """
    key, _, value = word.partition("=")
    if not re.fullmatch(r"[\w.]+", key) or ("://" not in value and "${" not in value):
        return str(_own(word, "then"))
    read = OmegaConf.create(_own(OmegaConf.to_container(_read_word(word, kind))))
    found = OmegaConf.select(read, key)
    plain = OmegaConf.to_container(found) if isinstance(found, DictConfig | ListConfig) else found
    if SHARDS_KEY.fullmatch(key) and isinstance(plain, list):
        plain = [credentials.take(one) if isinstance(one, str) else one for one in plain]
    return f"{key}={dumps(plain)}"
