"""Exit codes: which one each error maps to, and the line printed for it. No other module decides this.

docs/stops.md has every kind of stop with its code and its remedy.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from urllib.error import HTTPError, URLError

from hive_scale import credentials
from hive_scale.strangers import printable

FAULT = 1  # a bug in this program: the only exit with a traceback
REFUSED = 2  # the user must change the command, config, data or machine
TRY_AGAIN = 75  # the same command resumes from the last checkpoint (EX_TEMPFAIL of sysexits.h)
HALTED = 76  # a user asked for the stop by a file STOP: the run does not restart until that is removed

# errno values of an OSError that would recur until somebody changes something
LASTING = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# messages of plain RuntimeErrors by which CUDA and its libraries report a failing device, not bad inputs
NO_DEVICE = re.compile(
    r"CU(BLAS|DNN|SOLVER|SPARSE|FFT)_(STATUS_)?(EXECUTION_FAILED|EXEC_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
    r"|NCCL Error|CUDA driver error|CUDA unknown error|Triton Error \[CUDA\]|NVML_SUCCESS|from cudaGetDeviceCount"
)
NO_MEMORY = re.compile(r"(CUDA|HIP) error: out of memory|_STATUS_ALLOC_FAILED")
OUR_FAULT = re.compile(r"device-side assert|no kernel image|invalid (argument|configuration|device function)")
LAUNCHED = (  # variables that show that this process may be one of several
    *("WORLD_SIZE", "SLURM_STEP_ID", "SUBMITIT_LOCAL_GLOBALID"),
    *("OMPI_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "FLUX_JOB_SIZE"),
)


class TryAgain(RuntimeError):
    """An error that may pass by itself, so that a restart can succeed. The message is one line with the reason."""


class Stopped(Exception):
    """The run stopped on request, after saving what it needs to resume."""


def ended(work: Callable[[], int]) -> int:
    """Call `work`, and print one line on stderr if an error ends it.

    If the process has not met the other ranks yet, it reports its error to them, since they would wait for it.

    Args:
        work: the body of a command; returns its exit code.

    Returns:
        The exit code of `work`, or the one for the error that it raised.
    """
    try:
        return work()
    except (Exception, KeyboardInterrupt) as error:
        code = code_of(error)
        with suppress(OSError):  # stderr may be a file on the disk that is full
            print(printable(credentials.hide(line_of(error, code))), file=sys.stderr, flush=True)
            if code == FAULT:
                traceback.print_exception(error)
        if any(name in os.environ for name in LAUNCHED):
            from hive_scale.distributed import tell_others

            tell_others(error, code)
        return code


def say(text: str) -> None:
    """Write `text` to stderr in one system call, so that no other output splits it; errors (full disk) are ignored."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def code_of(error: BaseException) -> int:
    """The exit code for a process that ends by `error`."""
    if isinstance(error, TryAgain | BrokenProcessPool | KeyboardInterrupt) or is_worker_death(error):
        return TRY_AGAIN
    if is_loss_of_contact(error) or is_device_failure(error):
        return TRY_AGAIN
    if isinstance(error, OSError) or _errno(error):
        return REFUSED if _lasts(error) else TRY_AGAIN
    return REFUSED if isinstance(error, ValueError | MemoryError) or _is_out_of_memory(error) else FAULT


def line_of(error: BaseException, code: int) -> str:
    """The message for the user about `error`: its first line with the remedy, all its text for a refused ValueError."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped: the same command goes on with what is left to do"
    said = str(error).strip() or type(error).__name__
    first = said.splitlines()[0]
    if isinstance(error, ValueError) and code == REFUSED:
        return f"error: {said}"
    if _errno(error) in FULL:
        return f"stopped: {first}: make room, then the same command goes on"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"error: out of memory ({first}): lower micro_batch, or see what fits with `hive_scale plan --fit`"
    if code == REFUSED:
        return f"error: {first}"
    if code == TRY_AGAIN:
        reason = f"another rank has gone ({first})" if is_loss_of_contact(error) else first
        return f"stopped: {reason}: the same command goes on from what is saved"
    return f"error: {type(error).__name__}: {first}: this is a fault of the program, and how it came to it follows"


def is_loss_of_contact(error: BaseException | None) -> bool:
    """True if torch reports by `error`, or by its cause, that another rank has gone.

    gloo raises plain RuntimeErrors, which are known by their text.
    """
    if error is None:
        return False
    torch = sys.modules.get("torch.distributed")
    told = isinstance(error, RuntimeError) and "gloo" in str(error)
    return told or (torch is not None and isinstance(error, torch.DistError)) or is_loss_of_contact(error.__cause__)


def is_worker_death(error: BaseException) -> bool:
    """True if a data worker was killed or crashed. torch raises a plain RuntimeError, anywhere in the main process."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def is_device_failure(error: BaseException) -> bool:
    """True if a device failed (ECC, Xid, NVLink); False for bad inputs or out of memory."""
    torch = sys.modules.get("torch")
    if torch is None or _is_out_of_memory(error) or OUR_FAULT.search(str(error)):
        return False
    told = isinstance(error, RuntimeError) and NO_DEVICE.search(str(error))
    return bool(told) or isinstance(error, torch.AcceleratorError)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    told = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    return torch is not None and (bool(told) or isinstance(error, torch.OutOfMemoryError))


def _lasts(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)
    if number := _errno(error):
        return number in LASTING
    return not isinstance(error, URLError | TimeoutError | ConnectionError)  # others are a library's own OSErrors


def _errno(error: BaseException) -> int:
    """The errno of `error`, or 0. Libraries in Rust, such as safetensors, have it only in their message."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(told[1]) if told else 0
