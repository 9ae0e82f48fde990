"""Give an encoder to a chat LLM, as in LLaVA: train the connector first, then connector and LLM (paper, Table 5)."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hive_scale.cli import Parser, add_run_arguments, add_training_arguments, check_new_run, named_run
from hive_scale.exit_codes import ended

if TYPE_CHECKING:
    from hive_scale.config import Config, PartConfig
    from hive_scale.distributed import World

EXAMPLES = """\
examples:
  python launchers/finetune_vlm.py runs/paper_siglip output=runs/vlm_hive      the paper's recipe on a run's encoder
  python launchers/finetune_vlm.py models/siglip-large-patch16-384             Base: the encoder as published
  torchrun --nproc_per_node 8 launchers/finetune_vlm.py runs/paper_siglip llm_only=true
  deepspeed launchers/finetune_vlm.py runs/paper_siglip --ds_config ds_configs/zero3.json
  python launchers/finetune_vlm.py runs/demo --preset vlm_small                SmolLM2 on easy-vqa, without a GPU

Presets: vlm (Llama-3.2-1B-Instruct, LCS-558K, LLaVA-NeXT) and vlm_small. llm_only=true leaves the connector as it is
in the second stage, as the paper's text has it; without, both train on, as in its code. The result is a run of two
stages and, beside them, <output>/llava: a stock LlavaForConditionalGeneration directory. The same command again goes
on. Exit codes: 0 done, 2 something to change in command, config or data, 75 try again: stopped and saved, or a rank
was lost, 76 stopped by a file STOP.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return ended(lambda: _finetune(arguments))


def _finetune(arguments: argparse.Namespace) -> int:
    from hive_scale import config
    from hive_scale.locate import check_there

    check_there(arguments.encoder)  # before torch is imported, which takes long
    from hive_scale.run import find_encoder

    resolved = _run(arguments, find_encoder(arguments.encoder))
    if arguments.print_config:
        print(config.to_yaml(resolved), end="")
        return 0
    check_new_run(resolved)
    return _train(resolved, arguments)


def check(argv: Sequence[str], vision: PartConfig, world_size: int) -> None:
    """Raise ValueError now for mistakes in the command `argv`, though its encoder does not exist yet.

    `vision` has the shape of that encoder.
    """
    from hive_scale.preflight import check, open_all

    arguments = _parse(argv)
    if arguments.overwrite:
        raise ValueError(
            "--overwrite: a job of a chain may begin again, and goes on then: move its old run away yourself"
        )
    config = _run(arguments, arguments.encoder)
    config = replace(config, model=replace(config.model, vision=vision))
    check(config, open_all(config, noted=False), dict.fromkeys(config.stages, world_size), here=False)


def _run(arguments: argparse.Namespace, encoder: Path) -> Config:
    return named_run(arguments, [*arguments.overrides, f"model.vision.path={encoder}"])


def _train(config: Config, arguments: argparse.Namespace) -> int:
    from hive_scale.launch import by_main, launch
    from hive_scale.pipeline import run_pipeline

    def work(world: World) -> None:
        trained = run_pipeline(config, world, arguments.overwrite)
        by_main(config, world, lambda: _give(config, trained))

    return launch(config, arguments, work)


def _give(config: Config, trained: bool) -> None:
    """Export the finished run as a LLaVA directory, if it is one, and print the next command."""
    from hive_scale.export import export_run, huggingface
    from hive_scale.locate import command_name
    from hive_scale.observability.console import console
    from hive_scale.registry import FUSIONS
    from hive_scale.report.summary import finished

    if not trained:
        console.print(finished(config), soft_wrap=True)
    llava = config.run_dir / "llava"
    if FUSIONS[config.model.fusion].is_llava and not llava.exists():
        if reason := huggingface.why_no_llava(config.model):
            console.print(f"no LLaVA was written: {reason}", soft_wrap=True, markup=False)
        else:
            export_run("llava", config.run_dir, llava)
    model = llava if llava.exists() else config.run_dir
    run = shlex.quote(str(config.run_dir))
    console.print(f"model    {model}", soft_wrap=True, markup=False)
    console.print(f"next     {command_name('evaluate')} {run} --tasks NAMES", soft_wrap=True, markup=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("encoder", type=Path, help="a run, one of its stages, or a Hugging Face directory")
    add_run_arguments(parser, default="vlm")
    add_training_arguments(parser)
    return parser.parse_args(argv)  # options may come anywhere between encoder and overrides
