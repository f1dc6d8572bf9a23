"""Bytes that the Triton kernels load and store, counted address by address.

`metered()` wraps the functions of docs/kernels.md. Each call becomes a `Call`: for every
activation, weight or mask of its arguments the distinct bytes that each of its launches loads and
stores, which is what crosses memory once a launch. The addresses are those of Triton's interpreter,
or of compiled kernels (compiled_bytes.py)."""

from __future__ import annotations

import bisect
import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from aot_cases import MODULES
from torch import Tensor

FUNCTIONS = (
    "bn_stats", "bn_apply", "bn_bwd_reduce", "bn_bwd_apply", "add_relu", "relu_bwd",
    "bn_relu_maxpool", "bn_relu_maxpool_bwd_reduce", "bn_relu_maxpool_bwd_apply",
    "conv_fprop", "conv_fprop_act", "conv_dgrad", "conv_wgrad", "conv_bwd_pointwise",
)  # fmt: skip


@dataclass
class Call:
    """One call of a backend's function. reads, writes: argument ("g.dz", "prev.shortcut.x") ->
    bytes; of per-channel vectors and workspaces together in `small`."""

    function: str
    arguments: dict[str, object]
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    small: dict[str, int] = field(default_factory=dict)
    launches: int = 0


def flat(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for part, v in zip(value._fields, value, strict=True):
            yield from flat(f"{name}.{part}", v)
    elif isinstance(value, (tuple, list)):
        for i, v in enumerate(value):
            yield from flat(f"{name}.{i}", v)


def _large(t: Tensor) -> bool:
    """An activation, a weight or a mask: not a vector of the channels."""
    return t.dim() == 4 or t.element_size() == 1


def _span(t: Tensor) -> tuple[int, int]:
    length = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + length * t.element_size()


def _addresses(ptrs, mask) -> np.ndarray:
    return np.asarray(ptrs.data)[np.asarray(mask.data, bool)]


class _Memory:
    """The memory of one launch's tensors: which elements were loaded and stored."""

    def __init__(self, tensors: list[tuple[str, Tensor]]) -> None:
        spans: dict[tuple[int, int], list[str]] = {}
        self.size: dict[tuple[int, int], int] = {}
        for name, t in tensors:
            if t.numel() == 0:
                continue
            span = _span(t)
            spans.setdefault(span, []).append(name)
            self.size[span] = t.element_size()
        self.spans = sorted(spans)
        self.names = spans
        self.seen = {
            (kind, span): np.zeros((span[1] - span[0]) // self.size[span], bool)
            for kind in ("load", "store")
            for span in self.spans
        }

    def touch(self, kind: str, addresses: np.ndarray, width: int | None = None) -> None:
        """width: bytes at each address; None: an element."""
        while addresses.size:
            first = int(addresses.min())
            at = bisect.bisect_right(self.spans, (first, 1 << 63)) - 1
            span = self.spans[at] if at >= 0 else (0, 0)
            inside = addresses < span[1]
            last = int(addresses[inside].max(initial=first)) + (width or 1)
            if not span[0] <= first < last <= span[1]:
                raise AssertionError(f"a {kind} at {first:#x}, outside the launch's tensors")
            elements, rest = divmod(width or self.size[span], self.size[span])
            assert elements and not rest, (width, self.size[span])
            index = (addresses[inside] - span[0]) // self.size[span]
            for i in range(elements):
                self.seen[kind, span][index + i] = True
            addresses = addresses[~inside]

    def bytes(self, kind: str) -> Iterator[tuple[str, int]]:
        """(name, distinct bytes); of arguments that share memory an output's name where it is
        stored to, otherwise an input's."""
        for span in self.spans:
            names = self.names[span]
            count = int(self.seen[kind, span].sum()) * self.size[span]
            if count:
                yield names[0 if kind == "store" else -1], count


@contextlib.contextmanager
def interpreted() -> Iterator[Callable]:
    """How a launch is counted: (memory, launch, *its arguments). Here: it runs in the
    interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    current: list[_Memory] = []
    builder_load = InterpreterBuilder.create_masked_load
    builder_store = InterpreterBuilder.create_masked_store

    def load(self, ptrs, mask, *rest, **options):
        if current:
            current[-1].touch("load", _addresses(ptrs, mask))
        return builder_load(self, ptrs, mask, *rest, **options)

    def store(self, ptrs, value, mask, *rest, **options):
        if current:
            current[-1].touch("store", _addresses(ptrs, mask))
        return builder_store(self, ptrs, value, mask, *rest, **options)

    def run(memory, launch, *args, **options):
        current.append(memory)
        try:
            launch(*args, **options)
        finally:
            current.pop()

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    try:
        yield run
    finally:
        InterpreterBuilder.create_masked_load = builder_load
        InterpreterBuilder.create_masked_store = builder_store


@contextlib.contextmanager
def metered(counted=interpreted) -> Iterator[list[Call]]:
    """Inside, every call of the Triton backend's functions is counted."""
    from fastres import kernels

    calls: list[Call] = []
    with counted() as run, _patched(calls, run, kernels):
        yield calls


@contextlib.contextmanager
def _patched(calls: list[Call], count: Callable, kernels) -> Iterator[None]:
    def launch(run, kernel, programs, args, *rest, **options):
        call = calls[-1]
        known = [p for a, v in call.arguments.items() for p in flat(a, v)]
        mine = [_span(t) for _, t in known]
        for name, arg in zip(kernel.arg_names, args, strict=False):
            t = arg if arg is None or isinstance(arg, Tensor) else getattr(arg, "base", None)
            if t is None:  # base: of a tensor descriptor
                continue
            lo, hi = _span(t)  # a row of `stats` is inside
            if not any(a <= lo and hi <= b for a, b in mine):
                known.append((f"workspace {name}", t))
        memory = _Memory(known)
        count(memory, run, kernel, programs, args, *rest, **options)
        call.launches += 1
        tensors = dict(known)
        for kind, large in (("load", call.reads), ("store", call.writes)):
            for name, size in memory.bytes(kind):
                # the finalise kernel of bn_stats reads the first row of x again
                again = kernel.__name__ == "_bn_stats_finalise_kernel"
                small = name.startswith("workspace") or not _large(tensors[name]) or again
                into, key = (call.small, f"{kind} {name}") if small else (large, name)
                into[key] = into.get(key, 0) + size

    def function(name, run):
        parameters = list(inspect.signature(run).parameters)

        def called(*args):
            calls.append(Call(name, dict(zip(parameters, args, strict=True))))
            run(*args)

        return called

    patched = []
    for name in MODULES:
        module = importlib.import_module(f"fastres.kernels.{name}")
        real = module.launch
        patched.append((module, "launch", lambda *a, real=real, **k: launch(real, *a, **k)))
    patched += [(kernels, name, function(name, getattr(kernels, name))) for name in FUNCTIONS]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


# --- the same in the words of fastres.roofline ----------------------------------------------------

OPS = {
    "conv_fprop": "fprop",
    "conv_fprop_act": "fprop",
    "conv_dgrad": "dgrad",
    "conv_wgrad": "wgrad",
    "conv_bwd_pointwise": "dgrad_wgrad",
}
_READS = {
    "bn": {"x": "y", "mask": "bits", "dz": "dz", "index": "index"},
    "conv": {
        "weight": "w", "residual": "residual", "shortcut.x": "shortcut", "g.mask": "g bits",
        "bn.y": "y", "dres.dz": "dres", "dres.mask": "dres bits", "prev.mask": "bits",
        "prev.shortcut.x": "y_short",
    },
}  # fmt: skip
_WRITES = {
    "bn": {"z": "z", "mask": "bits", "dx": "dy", "dres": "dy_short", "index": "index"},
    "conv": {"y": "y", "z": "z", "dw": "dw"},
}


def in_formulas_words(call: Call) -> tuple[str, dict[str, int], dict[str, int]]:
    """(op, reads, writes) of a call, named as in fastres.roofline."""
    family = "conv" if call.function.startswith("conv") else "bn"
    reads, writes = dict(_READS[family]), dict(_WRITES[family])
    a = call.arguments
    if call.function == "bn_apply":
        reads["residual"] = "residual"
    elif family == "bn":
        reads["residual"] = "y_short"
    if call.function == "relu_bwd":
        reads["dy"] = writes["dx"] = "dx"
    if call.function == "conv_fprop":
        reads["x"] = "x" if a["norm"] is None else "y_in"
        writes |= {"z": "side z", "mask": "side bits"}
    elif call.function == "conv_fprop_act":
        reads["x"] = "x"
    elif family == "conv":
        reads["g.dz"] = "dy" if a["bn"] is None else "g"
        reads["x"] = "x" if a.get("norm") is None else "y_in"
        prev = a.get("prev")
        reads["prev.y"] = "y_in" if prev is not None and prev.mask is None else "y_end"
        writes["dx"] = "dx" if prev is None else "g_in"
    found = []
    for names, counted in ((reads, call.reads), (writes, call.writes)):
        renamed: dict[str, int] = {}
        for name, count in counted.items():
            renamed[names[name]] = renamed.get(names[name], 0) + count
        found.append(renamed)
    return OPS.get(call.function, call.function), found[0], found[1]
