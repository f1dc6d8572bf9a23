"""Who can run what, and the choice.

A backend is a module with the functions of docs/kernels.md. `select(x)` answers with the one that
runs an op on x: the one named by `use_backend`, or an error; otherwise the native one of x's
device, and the reference for float64, which no fused kernel takes. A device without a backend is an
error, never a slow path."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

MODULES = {
    "cpu": "fastres._cpu",
    "triton": "fastres.kernels",
    "cuda": "fastres._cuda",
    "reference": "fastres._reference_backend",
}
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Forced:
    """One use_backend that is active; no two are equal."""

    def __init__(self, name: str) -> None:
        self.name = name


_forced: list[_Forced] = []


class BackendError(RuntimeError):
    """No backend can run the op on these tensors; the message says which was asked and why not."""


def unavailable(name: str) -> str | None:
    """None when the backend can be used in this process, otherwise the reason."""
    if name == "cpu":
        from . import _native

        return _native.why_missing()
    if name in ("triton", "cuda"):
        return importlib.import_module(MODULES[name]).why_missing()
    return None


def supports(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when backend `name` takes tensors of this device and dtype, otherwise the reason."""
    if name not in MODULES:
        return f"unknown backend {name!r}; known: {', '.join(MODULES)}"
    if name == "reference":
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point dtype"
    if dtype not in FUSED_DTYPES:
        return f"the {name} kernels take float32, bfloat16 and float16, not {dtype}"
    if name == "cpu" and device.type != "cpu":
        return f"the cpu kernels take CPU tensors, not {device.type}"
    if name == "triton" and device.type != "cuda":
        kernels = importlib.import_module("fastres.kernels")
        if device.type != "cpu" or not kernels.interpreting():
            return (
                "Triton kernels take CUDA tensors (or CPU ones under TRITON_INTERPRET=1), "
                f"not {device.type}"
            )
    if name == "cuda" and device.type != "cuda":
        cuda = importlib.import_module("fastres._cuda")
        if device.type != "cpu" or not cuda.on_host():
            return f"the CUDA C++ kernels take CUDA tensors, not {device.type}"
    return unavailable(name)


def forced() -> str | None:
    """The backend that `use_backend` asks for now."""
    return _forced[-1].name if _forced else None


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, why) for tensors of this device and dtype; raises BackendError when there is
    none."""
    if _forced:
        name, why = _forced[-1].name, f"use_backend({_forced[-1].name!r})"
    elif dtype == torch.float64:
        name, why = "reference", "float64 is evaluated by the reference"
    elif device.type == "cpu":
        name, why = "cpu", "native C++ kernels"
    elif device.type == "cuda":
        name, why = "triton", "CUDA tensor"
    else:
        raise BackendError(
            f"fastres has no kernels for device {device.type!r}; supported: cpu, cuda. "
            "Call fastres.revert(model) to run the original modules there."
        )
    reason = supports(name, device, dtype)
    if reason is not None:
        raise BackendError(f"fastres backend {name!r} cannot run this: {reason}")
    return name, why


_selected: dict[tuple[str, torch.dtype], ModuleType] = {}  # by device type; not when forced


def select(x: Tensor) -> ModuleType:
    """The backend module that runs an op on x."""
    key = x.device.type, x.dtype
    if not _forced and key in _selected:  # every block asks several times a step
        return _selected[key]
    module = importlib.import_module(MODULES[choose(x.device, x.dtype)[0]])
    if not _forced:
        _selected[key] = module
    return module


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastres op inside the block on one backend ("cpu", "triton", "cuda",
    "reference"), or raise.

    A converted module whose fused forward cannot stand in for the original's, because of a hook, a
    replaced child or `forward`, or kernels that failed their self-check, raises, too. Only what
    watches the single operations of a call (tracing, dispatch modes, torch.func) has the original
    forward run, by torch (docs/fusion.md).

    Process-wide, because autograd runs a CUDA backward in its own threads. Raises BackendError at
    once when the backend is unknown or unavailable in this process."""
    if name not in MODULES:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(MODULES)}")
    reason = unavailable(name)
    if reason is not None:
        raise BackendError(f"fastres backend {name!r} is not available: {reason}")
    entry = _Forced(name)
    _forced.append(entry)
    try:
        yield
    finally:
        _forced.remove(entry)


def status() -> dict[str, str | None]:
    """Backend -> None when usable, else the reason; for `fastres doctor`."""
    return {name: unavailable(name) for name in MODULES}
