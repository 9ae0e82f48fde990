"""Credentials in shard patterns: usable by the run, but never written by it.

A user may give a pattern such as ``https://me:password@host/{0000..0099}.tar?sig=...`` or ``${oc.env:BASE}/*.tar``. Its
public form has no user, password or query credentials, and ``$BASE`` for the variable. A `Config` has only public
forms, and so do configs on disk, pickles, logs, model cards, caches and messages. Shard sets are told apart by it, too:
a new signature is no new set. The original stays in this process, keyed by its public form, and is looked up when a
shard is opened. Jobs on other machines read it from a private file of the user, outside of the run directory.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

from hive_scale.strict_json import dumps

VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)(?:_|$)")
URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s\"'<>]+")
# In URLs of these schemes, text before an @ belongs to the address (a container, a branch) and is no user.
NO_USER = "".join(f"(?<!{scheme}://)" for scheme in ("abfs", "abfss", "wasb", "wasbs", "github", "oci"))
# Everything up to the last @ before the path. A password may hold a slash; then no port number precedes that slash.
USER = re.compile(rf"(?<=://){NO_USER}(?:[^/\"'<>]*|(?!\[)[^/:@\"'<>]+:(?!:|\d*(?:/|$))[^\"'<>]*)@")
# Names of query parameters that hold credentials: in signed URLs of object stores and CDNs, and common token names.
PARAMETER = re.compile(
    r"x-(?:amz|goog|oss|cos|obs|tos|bce|ms)-.*|q-.*|google_?access_?id|key-pair-id|"
    r".*(?:token|secret|passw(?:or)?d|signature|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?)|"
    r"(?:.*[_-])?(?:key|sig|sign|auth|authorization|bearer|pwd|pass|pw|jwt|hmac|sid|session(?:_?id)?|ticket)|"
    r"policy|expires?|expiry|exp|hdnea|hdnts|hdntl",
    re.IGNORECASE,
)
MATRIX = re.compile(r";([^/;=]+)=[^/;]*")
# Parameters of Azure's signed URLs, which accompany `sig`.
AZURE = {
    *("sv", "ss", "srt", "sp", "se", "st", "spr", "sr", "sip", "si", "sdd", "ses"),
    *("skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid", "scid"),
}
SHORT = 6  # characters; a shorter secret is not searched for in texts, where it would match by chance

_given: dict[str, str] = {}  # original pattern, by its public form
_hidden: dict[str, str] = {}  # replacement text, by credential found in those patterns
_places: dict[str, str] = {}  # address of a shard, by its public name


def forget() -> None:
    """Forget every credential that this process knows."""
    for known in (_given, _hidden, _places):
        known.clear()


def take(pattern: str, own: bool = False) -> str:
    """Return the public form of a shard `pattern`, and remember the original in this process.

    Only a pattern of the user's `own` may name a variable. Raises ValueError for any other that does, for a variable
    that is not set, and for one whose value holds ranges or globs.
    """
    if "${" in VARIABLE.sub("", pattern) if own else "${" in pattern:
        raise ValueError(
            f"{hide(pattern)}: a pattern of shards refers to nothing but ${{oc.env:NAME}}, and does so in your own "
            "command or file only"
        )
    for variable in VARIABLE.findall(pattern):
        _value(variable)
    form = public(VARIABLE.sub(r"$\1", pattern))
    if form != pattern:
        _remember(form, pattern)
    return form


def public(pattern: str) -> str:
    """`pattern`, a path or URL, with its credentials removed."""
    before, scheme, _ = pattern.partition("://")
    if not scheme:
        return pattern
    address, mark, query = USER.sub("", pattern).partition("?")
    if before.endswith(("http", "https")):  # a fragment (#...) is never sent, and may hold a token
        address, query = (address if mark else address.partition("#")[0]), query.partition("#")[0]
    address = MATRIX.sub(lambda match: "" if PARAMETER.fullmatch(match[1]) else match[0], address)
    parts = _parts(query)
    kept = [part for part in parts if part not in _credentials(query)]
    query = query if kept == parts else "&".join(kept)
    return f"{address}?{query}" if query else address


def _parts(query: str) -> list[str]:
    return re.split("[&;]", query) if query else []


def _credentials(query: str) -> list[str]:
    """Parts of a URL query that hold credentials. A part that names a .tar selects the file, so it is never one."""
    parts = {part: unquote(part.partition("=")[0]) for part in _parts(query) if ".tar" not in part.lower()}
    is_azure = any(name.lower() == "sig" for name in parts.values())
    found = []
    for part, name in parts.items():
        is_named = PARAMETER.fullmatch(name) is not None or (is_azure and name.lower() in AZURE)
        is_token = "=" not in part and len(part) > 15  # a bare long word; ?download and the like are shorter
        found += [part] if (is_named and "=" in part) or is_token else []
    return found


def private(pattern: str) -> str:
    """The original of a public form, with variables filled in; `pattern` itself if nothing was hidden."""
    return VARIABLE.sub(lambda match: _value(match[1]), _given.get(pattern, pattern))


def name(pattern: str, place: str) -> str:
    """The public name of the shard at the address `place`, which the public `pattern` expands to."""
    shown = place
    for variable in VARIABLE.findall(_given.get(pattern, "")):
        shown = shown.replace(_value(variable), f"${variable}")
    shown = public(shown)
    if shown != place:
        _places[shown] = place
    return shown


def place(shard: str) -> str:
    """The address of the shard with this public name, including credentials."""
    return _places.get(shard, shard)


def identity(shard: str) -> str:
    """An identity of the shard with this public name: its address, variables filled in, without credentials."""
    return public(place(shard))


def hide(text: str) -> str:
    """`text`, such as another library's message, with all credentials replaced: in URLs, patterns and variables."""
    found = {os.environ[name]: f"${name}" for name in variables() if name in os.environ} | _hidden
    found |= {value: f"${name}" for name, value in secret_variables().items()}
    for secret in sorted(found, key=len, reverse=True):
        if len(secret) >= SHORT:
            text = text.replace(secret, found[secret])
    return URL.sub(lambda match: public(match[0]), text)


def secret_variables() -> dict[str, str]:
    """Environment variables whose names suggest a secret, with their values."""
    return {
        name: value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) > SHORT + 1
    }


def variables() -> list[str]:
    """Names of the environment variables in this process's shard patterns."""
    return sorted({name for given in _given.values() for name in VARIABLE.findall(given)})


def keep(run_dir: Path) -> None:
    """Write the original patterns to a private file of the user, for the jobs of the run in `run_dir`.

    Variables stay unresolved. Raises ValueError if the file cannot be written.
    """
    if not _given:
        return
    file = store(run_dir)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unnamed = file.with_suffix(f".{os.getpid()}.tmp")
        with os.fdopen(os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
            written.write(dumps(_given, indent=1))
        unnamed.rename(file)
    except OSError as error:
        raise ValueError(
            f"{file}: {error.strerror}: the jobs find the shards' credentials there: make it writable, or set "
            "XDG_CONFIG_HOME"
        ) from None


def recall(run_dir: Path) -> None:
    """Read what `keep` wrote for the run in `run_dir`, if anything; patterns given to this process take precedence."""
    with suppress(OSError, ValueError):
        for form, given in json.loads(store(run_dir).read_text()).items():
            if form not in _given:
                _remember(form, given)


def store(run_dir: Path) -> Path:
    """Path of the private file with the credentials of a run's jobs."""
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    digest = sha256(os.path.realpath(run_dir).encode()).hexdigest()[:16]
    return config_home / "hive_scale" / "credentials" / f"{digest}.json"


def _value(variable: str) -> str:
    try:
        value = os.environ[variable]
    except KeyError:
        raise ValueError(f"${{oc.env:{variable}}}: the environment has no variable {variable}: set it") from None
    if not value or "${" in value or set(value) & set("{}*[") or ("?" in value and "://" not in value):
        raise ValueError(
            f"${{oc.env:{variable}}}: the variable {variable} must hold text that stands for itself: write ranges and "
            "globs in the pattern"
        )
    return value


def _remember(form: str, given: str) -> None:
    _given[form] = given
    texts = [text for user in USER.findall(given) for text in (user[:-1], *user[:-1].split(":"))]
    texts += [part.partition("=")[2] or part for part in _credentials(given.partition("?")[2].partition("#")[0])]
    _hidden.update(dict.fromkeys((text for text in texts if "${" not in text), "..."))
