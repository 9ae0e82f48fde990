"""Pre-train HIVE: every stage of a preset, resuming where the run stands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hive_scale.cli import Parser, add_run_arguments, add_training_arguments, check_new_run, named_run
from hive_scale.exit_codes import ended

if TYPE_CHECKING:
    from hive_scale.config import Config
    from hive_scale.distributed import World

EXAMPLES = """\
examples:
  python launchers/pretrain.py --preset debug                       one process, CPU or one GPU
  python launchers/pretrain.py --preset debug fusion=concat         the self-attention baseline
  deepspeed launchers/pretrain.py --ds_config ds_configs/zero2.json  ZeRO on this node
  torchrun --nproc_per_node 2 launchers/pretrain.py                 FSDP2 on two processes
  python launchers/pretrain.py --preset paper_siglip --print_config stages.joint.epochs=2
  python launchers/pretrain.py --config runs/debug/config.yaml      a run again, or on

Run the same command again to resume; a finished run returns at once. Exit codes: 0 done, 2 something to
change in command, config or data, 75 try again: stopped and saved, or a rank was lost, 76 stopped by a file STOP.
"""


def main() -> int:
    arguments = _parse()
    return ended(lambda: _pretrain(arguments))


def _pretrain(arguments: argparse.Namespace) -> int:
    from hive_scale import config

    resolved = named_run(arguments, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(resolved), end="")
        return 0
    check_new_run(resolved)
    return _train(resolved, arguments)


def _train(config: Config, arguments: argparse.Namespace) -> int:
    from hive_scale.launch import by_main, launch, preset_of
    from hive_scale.observability.console import console
    from hive_scale.pipeline import run_pipeline
    from hive_scale.report.summary import blank_image_control, has_blank_image_control, show

    def work(world: World) -> None:
        trained = run_pipeline(config, world, arguments.overwrite)
        if has_blank_image_control(config):
            control = blank_image_control(config)
            if world.is_main and not (control.run_dir / "data.json").exists():
                console.print(
                    f"{config.run_dir} is trained. Now its control: the same stages on blank images, in "
                    f"{control.run_dir} (blank_image_control=false leaves it out)",
                    soft_wrap=True,
                )
            trained |= run_pipeline(control, world, follows=True)
        by_main(config, world, lambda: show(config, world.device, trained, preset=preset_of(arguments)))

    return launch(config, arguments, work)


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    add_run_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_args()  # overrides may come anywhere among the options
