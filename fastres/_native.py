"""Loads fastres._C, the C++ kernels, and gives it torch's thread pool; says why not when it cannot.

`why_missing()` is None when the kernels run, `serial_reason()` when they run on torch's threads."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from types import ModuleType

_POOL_SYMBOL = "torch_parallel_for"
_NEWEST = "conv_wgrad_jobs"  # of csrc/bindings.cpp's functions: what older builds do not have


@functools.cache
def _load() -> tuple[ModuleType | None, str | None, str | None]:
    """(module, why it is missing, why it is serial)."""
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        folder = Path(__file__).parent
        built = sorted(p.name for p in folder.glob("_C*"))
        found = f"found {', '.join(built)} there" if built else "it was not built"
        return (
            None,
            (
                f"the extension fastres._C does not load in {folder} ({found}: {error}); "
                "build it with `pip install -e .` in the repository, which needs a C++ compiler"
            ),
            None,
        )
    if not hasattr(_C, _NEWEST):
        return (
            None,
            (
                f"the extension {getattr(_C, '__file__', 'fastres._C')} was built from other "
                f"sources, without {_NEWEST}: `pip install -e .` again in the repository"
            ),
            None,
        )
    try:
        _C.isa()  # raises when FASTRES_CPU_ISA names one that this CPU lacks
    except RuntimeError as error:
        return None, str(error), None
    address, reason = _pool_address()
    if reason is None:
        _C.set_parallel_for(address)
    return _C, None, reason


@functools.cache
def torch_library() -> ctypes.CDLL | str:
    """libtorch_cpu, or why it does not load."""
    import torch

    names = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
    library = Path(torch.__file__).parent / "lib" / names.get(sys.platform, "libtorch_cpu.so")
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        return f"{library} does not load ({error})"


def _pool_address() -> tuple[int, str | None]:
    """Address of libtorch_cpu's C function torch_parallel_for, or why there is none."""
    import torch

    library = torch_library()
    if isinstance(library, str):
        return 0, f"{library}: the kernels run in one thread"
    try:
        function = getattr(library, _POOL_SYMBOL)
    except AttributeError:
        return 0, f"torch {torch.__version__} has no {_POOL_SYMBOL}: the kernels run in one thread"
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address, None


def module() -> ModuleType:
    """fastres._C, or an ImportError that says why it is missing."""
    native, missing, _ = _load()
    if native is None:
        raise ImportError(missing)
    return native


def why_missing() -> str | None:
    """None when the C++ kernels can run in this process, otherwise the reason."""
    return _load()[1]


def serial_reason() -> str | None:
    """None when the C++ kernels share torch's thread pool, otherwise why they run in one thread."""
    return _load()[2]


def build_info() -> dict | None:
    """What was built and how (compiler, flags, variants), or None when nothing was."""
    import json

    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else None
