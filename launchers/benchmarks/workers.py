"""Run a part of a benchmark in fresh processes that form a world, free of what other contenders leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).resolve().parents[1] / "benchmark.py"


def launch(words: Sequence[str], ranks: int, result: Path, **environment: str) -> dict[str, Any]:
    """Return what ``benchmark.py WORDS``, in `ranks` single-threaded processes, writes to the new file `result`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(LAUNCHER), *words, "--worker", str(result)]
    print(f"{' '.join(words)} ...", file=sys.stderr, flush=True)
    env = {"OMP_NUM_THREADS": "1", **environment, **os.environ}
    done = subprocess.run(command, env=env, cwd=result.parent, capture_output=True, text=True, check=False)
    if not result.exists():
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"{' '.join(words)} failed: see above")
    found: dict[str, Any] = json.loads(result.read_text())
    return found
