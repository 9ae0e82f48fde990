"""Export a run as directories that other tools load, with a model card, or verify the checksums of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended

EXAMPLES = """\
examples:
  python launchers/export.py encoder runs/debug                          the vision encoder of the last stage
  python launchers/export.py llm runs/debug --stage language             the LLM after stage two
  python launchers/export.py hive runs/debug --output hive --dtype bf16  all of it, for transformers with hive_scale
  python launchers/export.py llava runs/debug_concat                     the baseline, for LlavaForConditionalGeneration
  python launchers/export.py dcp runs/debug                              for torch.distributed.checkpoint.load
  python launchers/export.py encoder runs/debug --ema                    its average, of a stage with stages.joint.ema
  python launchers/export.py adapter runs/debug --stage joint            what its adapter has learned, for peft
  python launchers/export.py verify runs/debug                           every checksum of a run
  python launchers/export.py verify hive                                 every checksum of what was exported

Each makes RUN/export/WHAT, unless --output says otherwise.
Exit codes: 0 done, 1 verify found damage, 2 something to change in the command.
"""
KINDS = {
    "encoder": "the vision encoder in its own class, with its image processor",
    "llm": "the causal LM, with its tokenizer",
    "hive": "the whole model with its processor, for transformers' pipelines and hive_scale",
    "llava": "a fusion=concat model, for transformers' LlavaForConditionalGeneration",
    "dcp": "all tensors by name, as a stock torch.distributed.checkpoint",
    "adapter": "the LoRA or DoRA that a stage has trained, apart from the weights, for peft",
}


def main() -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    subparsers = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    for kind, text in KINDS.items():
        subparser = subparsers.add_parser(kind, help=text)
        subparser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
        subparser.add_argument("--output", type=Path, metavar="DIR", help="to make (default RUN/export/WHAT)")
        subparser.add_argument("--stage", default="", help="whose weights (default: the last, of a finished run)")
        if kind != "adapter":
            subparser.add_argument("--ema", action="store_true", help="the average of the weights: stages.*.ema")
        subparser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    subparsers.add_parser("verify", help="read all of a run, or of an export, against its checksums").add_argument(
        "run", type=Path, metavar="RUN", help="the run's directory, or one that was exported"
    )
    arguments = parser.parse_args()
    return ended(lambda: _act(arguments))


def _act(arguments: argparse.Namespace) -> int:
    from hive_scale.locate import check_there

    check_there(arguments.run)  # before torch is imported, which takes long
    return _verify(arguments.run) if arguments.what == "verify" else _export(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from hive_scale.export import export_run

    out = arguments.output or arguments.run / "export" / arguments.what
    ema = getattr(arguments, "ema", False)
    stage = export_run(arguments.what, arguments.run, out, arguments.stage, arguments.dtype, ema)
    print(f"{out}: {arguments.what} after stage {stage}{', averaged' if ema else ''}")
    return 0


def _verify(directory: Path) -> int:
    from hive_scale.checkpoint.run_reader import verify_path

    is_damaged = False
    for path, damage, remark in verify_path(directory):
        said = damage or remark
        print(f"{'DAMAGED' if damage else 'sound  '} {path}{': ' if said else ''}{said}", flush=True)
        is_damaged |= bool(damage)
    return int(is_damaged)
