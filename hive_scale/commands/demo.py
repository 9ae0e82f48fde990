"""Try a trained model in a browser on this machine: caption an image, ask about it, see what each word attends to."""

from __future__ import annotations

import argparse
import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended

if TYPE_CHECKING:
    from torch import Tensor

    from hive_scale.captioner import Captioner, Written

EXAMPLES = """\
examples:
  python -m hive_scale demo runs/mine                    http://127.0.0.1:7860
  python -m hive_scale demo runs/mine/joint --port 8000
  ssh -L 7860:localhost:7860 node                        the page of a program that runs on another machine

It needs gradio: pip install 'hive_scale[demo]'. The page is for this machine only and needs no network.
"""
HOST = "127.0.0.1"  # not for other machines


def main() -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("model", type=Path, metavar="RUN_OR_DIR", help="a run, a stage, or what `export hive` wrote")
    parser.add_argument("--port", type=int, default=7860, help="of the page (7860)")
    arguments = parser.parse_args()
    return ended(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    if not find_spec("gradio"):
        raise ValueError("the page needs gradio: pip install 'hive_scale[demo]'")
    from hive_scale.locate import check_there

    # before torch is imported and a model is loaded, which takes long
    _check_port(arguments.port)
    check_there(arguments.model)
    from hive_scale.captioner import Captioner
    from hive_scale.device import this_device

    shown = page(Captioner.open(arguments.model, this_device()), arguments.model.resolve().name)
    shown.launch(server_name=HOST, server_port=arguments.port, share=False, quiet=True, prevent_thread_lock=True)
    print(f"http://{HOST}:{arguments.port}  (Ctrl-C ends it)", flush=True)
    shown.block_thread()
    return 0


def _check_port(port: int) -> None:
    """Raises ValueError if no page can be served at `port`."""
    if not 0 < port < 2**16:
        raise ValueError(f"--port {port} is no port: give one from 1024 to 65535")
    try:
        with socket.create_server((HOST, port)):
            pass
    except OSError as error:
        raise ValueError(f"--port {port} cannot be used ({error.strerror}): give another one, such as 8000") from None


def page(captioner: Captioner, name: str) -> Any:
    """The page, a gradio Blocks: an image and a prompt in, a text and its attention maps out."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import: nothing is sent anywhere
    import gradio as gr

    from hive_scale.report.attention_maps import attention_figure

    asks = captioner.data.format == "conversation"
    has_maps = bool(captioner.model.visual_layers())

    def write(path: str | None, prompt: str) -> tuple[str, Any, str, tuple[Tensor, Written] | None]:
        if not path:
            raise gr.Error("give an image first")
        try:
            image = captioner.read(Path(path))
            (written,) = captioner.write([image], prompt.strip())
        except ValueError as error:
            raise gr.Error(str(error)) from None
        words = [(word, place) for place, word in enumerate(captioner.words(written))] if has_maps else []
        return written.text, gr.Radio(choices=words, value=None, visible=bool(words)), "", (image, written)

    def look(word: int | None, last: tuple[Tensor, Written] | None) -> str:
        if word is None or last is None:
            return ""
        return attention_figure(captioner.attention(*last, word))

    with gr.Blocks(title=f"{name}: hive_scale") as blocks:
        gr.Markdown(f"# {name}" if name.isidentifier() else "# A trained HIVE")
        last = gr.State(None)
        with gr.Row():
            with gr.Column():
                image: Any = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"])
                image.preprocess = _path_of
                prompt = gr.Textbox(label="Question" if asks else "Beginning of the caption (optional)")
                button = gr.Button("Answer" if asks else "Write a caption", variant="primary")
            with gr.Column():
                text = gr.Textbox(label="The model writes", interactive=False)
                words = gr.Radio(label="Attention of the word", choices=[], visible=False)
                maps = gr.HTML(label="Attention, by LLM layer")
        results = [text, words, maps, last]
        button.click(write, [image, prompt], results)
        prompt.submit(write, [image, prompt], results)
        words.input(look, [words, last], maps)
    return blocks


def _path_of(upload: Any) -> str | None:
    """The file that was dropped, as it is.

    Gradio's own step would decode it before its size is checked, and end with an unexplained error if it is damaged.
    """
    return upload.path if upload else None
