"""A model is a path or a name on the hub; what is missing is said within a second.

Why: a mistyped folder was taken for a name on the hub, and waited through minutes of a library's retries. The hub here
is a local server that the real client asks by HF_ENDPOINT.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from transformers import SiglipVisionConfig

from hive_scale import locate as locating
from hive_scale.config import TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.locate import is_hub_name, locate, missing

ROOT = Path(__file__).resolve().parents[1]
REFUSALS = {  # repository -> (status, headers) as the real hub answers
    "org/gated": (401, {"X-Error-Code": "GatedRepo"}),
    "org/waiting": (403, {"X-Error-Code": "GatedRepo"}),
    "org/forbidden": (403, {}),
    "org/stale": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "org/broken": (503, {}),
}
# prints, as JSON, what became of each name, the seconds, and what was logged
ASK = """
import json, logging, sys, time
from hive_scale.locate import locate
logging.basicConfig(stream=sys.stderr, format="LOG %(message)s")
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        found = locate(name, "model.vision.path")
    except ValueError as error:
        found = f"error: {error}"
    print(json.dumps([found, time.monotonic() - began]))
"""
OPEN = """
import sys
from hive_scale.config import PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.model.build import vision_config
print(vision_config(PartConfig(path=sys.argv[1])).hidden_size, open_tokenizer(TokenizerConfig(sys.argv[1])).eos_id)
"""


class Hub:
    """A server that answers as the hub does, and counts the requests."""

    def __init__(self, folder: Path) -> None:
        requests: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
                path = folder / repository / file
                if not repository.startswith("api/"):
                    requests.append(self.path)
                if repository.startswith("api/"):  # the client reports itself, and lists what a repository has besides
                    status, headers = 404, {"X-Error-Code": "EntryNotFound"}
                elif repository in REFUSALS:
                    status, headers = REFUSALS[repository]
                elif not (folder / repository).is_dir():
                    status, headers = 401, {"X-Error-Code": "RepoNotFound"}
                elif not file or not path.is_file():
                    status, headers = 404, {"X-Error-Code": "EntryNotFound"}
                else:
                    status, headers = 200, {"ETag": f'"{file}"', "X-Repo-Commit": "a" * 40}
                content = path.read_bytes() if status == 200 else b""
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_GET = do_HEAD

            def log_message(self, *_: Any) -> None:
                pass

        self.requests = requests
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    made = folder / "org" / "model"
    SiglipVisionConfig(hidden_size=32, num_attention_heads=2).save_pretrained(made)
    open_tokenizer(TokenizerConfig()).stock.save_pretrained(made)
    (folder / "org" / "unusual").mkdir()
    hub = Hub(folder)
    Thread(target=hub.server.serve_forever, daemon=True).start()
    yield hub
    hub.server.shutdown()


def run(code: str, words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "hf"), "HOME": str(cwd)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, cwd=cwd, env=known | environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def asked(names: list[str], cwd: Path, **environment: str) -> tuple[dict[str, str], list[float], str]:
    done = run(ASK, names, cwd, **environment)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(names, [one for one, _ in found], strict=True)), [seconds for _, seconds in found], done.stderr


def test_what_the_hub_refuses_is_said_with_its_remedy_after_one_request(hub: Hub, tmp_path: Path) -> None:
    names = ["org/model", "org/unusual", "org/none", *REFUSALS, "org/none"]
    before = len(hub.requests)
    found, _, log = asked(names, tmp_path, HF_ENDPOINT=hub.url)
    assert len(hub.requests) - before == len(set(names))
    assert (found["org/model"], found["org/unusual"]) == ("org/model", "org/unusual")
    for name, words in {
        "org/none": "or it is private: correct the name, or log in (hf auth login, or HF_TOKEN",
        "org/gated": f"gated: ask for access at {hub.url}/org/gated, then log in (hf auth login",
        "org/waiting": f"your login has no access: ask for it at {hub.url}/org/waiting",
        "org/forbidden": "refuses your login for org/forbidden (403)",
        "org/stale": "refuses your login for org/stale (401): log in",
        "org/broken": "answers 503 to a request for org/broken: try again later",
    }.items():
        assert words in found[name]
        assert found[name].startswith(f"error: model.vision.path={name} is not there; and as a name on the hub: ")
    assert not log


def test_without_a_network_the_hub_is_tried_once_and_its_local_copies_are_used(hub: Hub, tmp_path: Path) -> None:
    assert run(OPEN, ["org/model"], tmp_path, HF_ENDPOINT=hub.url).stdout.split() == ["32", "1"]
    before = len(hub.requests)
    names = ["org/model", "org/other", "org/third"]
    found, seconds, log = asked(names, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert (Path(found["org/model"]) / "config.json").is_file()
    assert "cannot be reached" in found["org/other"]
    assert "hf download org/third" in found["org/third"]
    assert seconds[0] < 3
    assert max(seconds[1:]) < 0.5
    assert log.count("LOG") == 1  # that a copy is used, and nothing of retries
    offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    found, _, log = asked(names, tmp_path, **offline)
    assert (Path(found["org/model"]) / "config.json").is_file()
    assert "HF_HUB_OFFLINE forbids asking" in found["org/other"]
    assert not log
    assert run(OPEN, ["org/model"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9").stdout.split() == ["32", "1"]
    assert len(hub.requests) == before


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as deaf:  # listens, and accepts nothing
        url = f"http://127.0.0.1:{deaf.server_address[1]}"
        found, seconds, _ = asked(["org/one", "org/two"], tmp_path, HF_ENDPOINT=url, HF_HUB_ETAG_TIMEOUT="1")
    assert "cannot be reached" in found["org/one"]
    assert seconds[0] < 3
    assert seconds[1] < 0.5


@pytest.mark.parametrize(
    ("name", "is_name"),
    [
        ("google/siglip-large-patch16-384", True),
        ("gpt2", True),
        ("runs/foo/joint/encoder", False),
        ("./google/siglip", False),
        ("/google/siglip", False),
        ("~/siglip", False),
        ("google/siglip/", False),
        ("models/siglip.safetensors", False),
        ("a folder/of mine", False),
        ("", False),
    ],
)
def test_a_path_is_told_from_a_name_on_the_hub(name: str, is_name: bool) -> None:
    assert is_hub_name(name) is is_name


def test_a_missing_path_is_answered_by_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(locating, "_ask", lambda name: pytest.fail(f"the hub was asked for {name}"))
    (tmp_path / "runs" / "debug" / "joint").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").touch()
    assert locate("~/runs/debug/joint/", "key") == f"{tmp_path}/runs/debug/joint"
    for given, said in {
        "runs/debgu/joint/encoder": "did you mean runs/debug/joint/encoder?",
        "runs/debug/joint/encoder": "runs/debug/joint has no 'encoder'",
        "runs/other/joint/encoder": "runs has no 'other', but debug, notes.txt",
        f"{tmp_path}/nope": f"{tmp_path} has no 'nope', but runs",
        "nope/is/missing": f"there is no 'nope' in {tmp_path}",
        "./data/smollm2": "make it with python -m hive_scale prepare_data smollm2 --output data/smollm2",
    }.items():
        with pytest.raises(ValueError, match="is not there: ") as error:
            locate(given, "key")
        assert said in str(error.value)
    assert "runs/notes.txt is a file, not a folder" in missing("runs/notes.txt/x")
    assert "prepare_data easy_vqa --output /scratch/data/easyvqa" in missing("/scratch/data/easyvqa/train-*.tar")
    with pytest.raises(ValueError, match="is a URL: give the model's name on the hub"):
        locate("https://huggingface.co/google/siglip", "key")
