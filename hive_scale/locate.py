"""Find a model by its path or by its name on the Hugging Face hub, and say at once if it is missing.

The hub is asked once for each name, and not again once it cannot be reached. Otherwise every file that a library looks
for would cost it five retries. This module imports no torch.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from hive_scale.strangers import some

if TYPE_CHECKING:
    from hive_scale.config import Config

logger = logging.getLogger(__name__)
# folders of the presets and the docs, with the words of `prepare_data` that make them
PREPARED = {
    "data/smollm2": "smollm2",
    "data/emoji": "emoji --styles all",
    "data/easyvqa": "easy_vqa",
    "data/tuxpaint": "tuxpaint",
    "data/fashion_mnist": "fashion_mnist",
    # without a folder these say where the files come from
    "data/cc3m_595k": "cc3m",
    "data/lcs_558k": "lcs",
    "data/llava_next": "llava_next",
}
FILES = (".safetensors", ".json", ".yaml", ".tar", ".bin", ".pt", ".pth", ".gguf", ".zip")  # no model's name ends so
SIGNS = ("config.json", "tokenizer.json", "tokenizer_config.json")  # one of them is in every repository that is used
PATIENCE = 5.0  # seconds for the hub's first answer; HF_HUB_ETAG_TIMEOUT sets another number
_silent: list[str] = []  # the reason why the hub cannot be reached, once that is known


def locate(name: str, key: str) -> str:
    """The existing path that `name` means, or `name` itself if the hub has a model of that name.

    If the hub cannot be asked, it is the local copy of what was fetched before.

    Args:
        name: a path, absolute, relative or with ``~``, or a hub name such as ``org/model``.
        key: the option that holds `name`, for messages.

    Raises:
        ValueError: There is no such path, the hub has no such model or does not give it, or it cannot be reached.
    """
    place = os.path.expanduser(name)
    if os.path.exists(place):
        return str(Path(place))
    if "://" in name:
        raise ValueError(f"{key}={name} is a URL: give the model's name on the hub, as org/model, or a folder")
    if not is_hub_name(name):
        raise ValueError(f"{key}={missing(name)}")
    if not (problem := _ask(name)):
        return name
    if copy := _fetched_before(name):
        logger.log(logging.INFO if _told_offline() else logging.WARNING, "%s; its local copy is used", problem)
        return copy
    here = missing(name) if os.path.exists(name.split("/")[0]) else f"{name} is not there"
    raise ValueError(f"{key}={here}; and as a name on the hub: {problem}")


def check_sources(config: Config, begins: bool = True) -> None:
    """Raises ValueError that names all models, tokenizers and prepared sets that are missing, before any is opened.

    A run that `begins` needs the models of its first weights, too. Other shards are looked for when they are opened.
    """
    datas = [config.data_of(stage) for stage in config.stages]
    model = {"vision.path": config.model.vision.path, "language.path": config.model.language.path}
    wanted = [(f"model.{part}", path) for part, path in model.items()] if begins else []
    wanted += [("data.tokenizer.path", data.tokenizer.path) for data in datas if data.tokenizer.path != "bytes"]
    problems = [_problem(path, key) for key, path in dict.fromkeys(wanted) if path]
    weights = config.model.connector_weights
    if begins and weights and not os.path.exists(os.path.expanduser(weights)):
        problems.append(f"model.connector_weights={missing(weights)}")
    folders = [os.path.dirname(pattern) for data in datas for pattern in (*data.train, *data.heldout)]
    sets = [folder for folder in dict.fromkeys(folders) if prepared_by(folder) and not Path(folder).is_dir()]
    problems += [f"data.train: {missing(folder)}" for folder in sets]
    if found := list(filter(None, problems)):
        raise ValueError("; ".join(dict.fromkeys(found)))


def _problem(path: str, key: str) -> str:
    try:
        locate(path, key)
    except ValueError as error:
        return str(error)
    return ""


def is_hub_name(name: str) -> bool:
    """True if `name` can be a model's name on the hub; False for what can only be a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # in its docs, not in __all__

    if name.startswith((".", "/", "~")) or name.endswith(FILES):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_there(path: Path) -> None:
    """Raises ValueError if `path`, which a user named as a folder or file of his, does not exist."""
    if not path.exists():
        fetch = f"; a model on the hub is fetched first: hf download {path} --local-dir models/{path.name}"
        raise ValueError(f"{missing(path)}{fetch if '/' in str(path) and is_hub_name(str(path)) else ''}")


def check_is_file(path: Path) -> None:
    """Raises ValueError if `path`, which a user named as an image of his, is a folder or does not exist."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the files in it, such as {path}/*.jpg")
    if not path.exists():
        raise ValueError(missing(path))


def missing(path: str | Path) -> str:
    """The message that `path` does not exist, with the command that makes it, the nearest name, or what is there."""
    if command := prepared_by(path):
        return f"{path} is not there: make it with {command}"
    whole = Path(os.path.expanduser(path))
    steps = [whole, *whole.parents]
    there = next((number for number, step in enumerate(steps) if os.path.exists(step)), len(steps) - 1)
    folder, wanted = steps[there], steps[there - 1].name
    if not folder.is_dir():
        return f"{path} is not there: {folder} is a file, not a folder"
    try:
        names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    except OSError as error:
        return f"{path} is not there: {folder} cannot be listed ({error.strerror})"
    if near := get_close_matches(wanted, names, n=1, cutoff=0.7):
        rest = Path(*whole.parts[len(folder.parts) + 1 :])
        return f"{path} is not there: did you mean {folder / near[0] / rest}?"
    if folder == Path():
        return f"{path} is not there: there is no '{wanted}' in {Path.cwd()}"
    return f"{path} is not there: {folder} has no '{wanted}'" + (f", but {some(names)}" if 0 < len(names) < 20 else "")


def command_name(name: str) -> str:
    """How to call command `name`, as this command was called: a launcher's path, or ``-m hive_scale``."""
    launcher = Path(sys.argv[0])
    if launcher.suffix != ".py" or launcher.parent.name != "launchers":
        return f"python -m hive_scale {name}"
    return f"python {shlex.quote(str(launcher.with_name(f'{name}.py')))}"


def prepared_by(path: str | Path) -> str:
    """The command that makes `path` or the folder that it lies in; "" if it is none that `prepare_data` makes."""
    text = f"/{path}/"
    for folder, words in PREPARED.items():
        if (at := text.find(f"/{folder}/")) >= 0:
            output = text[1 : at + len(folder) + 1].removeprefix("./")
            return f"python -m hive_scale prepare_data {words} --output {output}"
    return ""


@cache
def _ask(name: str) -> str:
    """Why the hub does not give the model `name`; "" if it does."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    hub = constants.ENDPOINT
    fetch = f"fetch the model where there is a network (hf download {name})"
    if _told_offline():
        return f"HF_HUB_OFFLINE forbids asking {hub}: unset it, or {fetch}"
    if _silent:
        return f"{hub} cannot be reached ({_silent[0]}): connect, or {fetch}"
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    login = "log in (hf auth login, or HF_TOKEN in the environment)"
    # without the cache and without retries, unlike the functions that download
    error = _error_of(lambda: get_hf_file_metadata(hf_hub_url(name, SIGNS[0]), timeout=seconds), seconds)
    if error is None or isinstance(error, EntryNotFoundError):  # a repository without this file is one, too
        return ""
    if not isinstance(error, HfHubHTTPError):  # each version of the client raises its HTTP library's own errors
        _silent.append(next(iter(str(error).splitlines()), "") or type(error).__name__)
        return f"{hub} cannot be reached ({_silent[0]}): connect, or {fetch}"
    code = getattr(error.response, "status_code", 0)
    if isinstance(error, GatedRepoError):
        if code == 403:
            return f"{name} is gated, and your login has no access: ask for it at {hub}/{name}"
        return f"{name} is gated: ask for access at {hub}/{name}, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {name} at {hub}, or it is private: correct the name, or {login}"
    if code in (401, 403):
        return f"{hub} refuses your login for {name} ({code}): {login} with a token that may read it"
    return f"{hub} answers {code} to a request for {name}: try again later, or give a folder"


def _error_of(work: Callable[[], object], seconds: float) -> Exception | None:
    """The exception that `work` raises, None if none; TimeoutError if it takes longer than `seconds`.

    It runs in a thread of its own, since a look-up of a host's name has no time limit.
    """
    raised: list[Exception | None] = []

    def run() -> None:
        try:
            work()
            raised.append(None)
        except Exception as error:
            raised.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0] if raised else TimeoutError(f"no answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT waits longer")


def _fetched_before(name: str) -> str:
    """The folder of the hub's cache that holds the model `name`; "" if it was never fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, sign) for sign in SIGNS)
    return next((str(Path(file).parent) for file in found if isinstance(file, str)), "")


def _told_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()
