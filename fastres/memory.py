"""Large buffers on the CPU: keep them in the process instead of mapping and faulting them anew for
every op.

glibc maps any allocation above a threshold (at most 32 MiB) afresh and gives it back when freed, so
each activation of a training step is page-faulted again: a third of a ResNet-50's CPU time
(ANCHORS.md). `keep_buffers` turns that off with mallopt, for the whole process: M_MMAP_MAX=0,
M_TRIM_THRESHOLD=-1, M_TOP_PAD=64 MiB. The price is that peak memory stays with the process until it
ends. `FASTRES_MALLOC=0` leaves malloc alone; `release_buffers()` restores glibc's
defaults for what is allocated from then on.

`available` is what the host has left; `exhausted` tells an error for want of memory from others."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from . import _native

_kept = False


def state() -> str:
    """One line for `fastres doctor`."""
    if os.environ.get("FASTRES_MALLOC") == "0":
        return "off (FASTRES_MALLOC=0)"
    return (
        "on: large buffers are kept"
        if _kept
        else "not yet: the first convert of a CPU model turns it on"
    )


def available() -> int | None:
    """Bytes of the host's memory that Linux says are available; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def exhausted(error: BaseException) -> bool:
    """Whether a device, or torch's CPU allocator, had no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )


def keep_buffers() -> bool:
    """Tell malloc to keep large buffers; True when it does from now on."""
    global _kept
    if os.environ.get("FASTRES_MALLOC") == "0" or _native.why_missing() is not None:
        return False
    if not _kept:
        _kept = bool(_native.module().tune_malloc())
    return _kept


def release_buffers() -> None:
    """Restore glibc's defaults; what the heap holds already it keeps for reuse."""
    global _kept
    if _kept:
        _native.module().untune_malloc()
        _kept = False
