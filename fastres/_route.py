"""How a network's CPU inference ran on batches of one shape, to run so again: `Route`.

What every block asks before it may run fused is asked once, of a `Watch` in C++. Then the stem and
the blocks follow one another, in one call of csrc/route.cpp: its convolutions are torch's own, by
the C functions that libtorch_cpu exports for AOTInductor, and Winograd's. Python's part of a
convolution is 20 us and more; a ResNet-50 has 53.

The same steps also run from Python, one by one: a block that is to be called, one whose shortcut is
a module of its own, under torch's profiler (which the C functions pass by), where this torch
exports no such functions, and after an error of theirs, to raise the exception itself."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _native, backends, inference, plan
from ._arguments import DTYPE
from ._chosen import autocast_dtype
from ._layout import is_nhwc
from ._spec import global_hooks, watcher
from .nn import marked, run_folded


class Step(NamedTuple):
    """A block as it ran. folded: its convs, None where it is to be called; shape and given: x's;
    dtype: what it is cast to."""

    block: nn.Module
    folded: inference.Folded | None
    shape: torch.Size
    given: torch.dtype
    dtype: torch.dtype

    def takes(self, x: Tensor, largest: float | None) -> bool:
        """Whether folded may run on x. From outside, or of a block that was called, comes what
        may."""
        return self.folded is not None and (
            largest is not None
            or (
                type(x) is Tensor and x.shape == self.shape and x.dtype == self.given and is_nhwc(x)
            )
        )


class Trace:
    """The steps of a call. whole: they are all of it, and run alike next time."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.whole = True


class Stem(NamedTuple):
    """conv, batch norm, ReLU and the max-pool of a window (kernel, stride, padding), if any."""

    dtype: torch.dtype
    folded: inference.Folded
    window: tuple[int, int, int] | None

    def given(self, x: Tensor) -> Tensor:
        """x as the conv takes it."""
        return inference.in_channels_last(x.to(self.dtype))

    def run(self, h: Tensor) -> tuple[Tensor, float | None]:
        """(z, a bound of |z|) of h = given(x); (h, None) when its values do not let it run
        folded."""
        bound = inference.admit(h, None, self.folded.bound)
        if bound is None:
            return h, None
        z = inference.conv(h, self.folded.packs[0], relu=True)
        return z if self.window is None else inference.max_pool(z, *self.window), bound


def situation(x: Any) -> tuple | None:
    """All that CPU inference of a converted model depends on beside its modules and their tensors;
    None where this call is not plain CPU inference without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or watcher(x) is not None:
        return None
    forced = backends.forced()
    if not x.is_cpu or x.dim() != 4 or forced not in (None, "cpu") or global_hooks():
        return None
    if inference.sharded() or not torch._C._get_mkldnn_enabled():
        return None
    version = plan.current(x.device).version
    dtype = autocast_dtype(x)
    return x.shape, x.dtype, is_nhwc(x), dtype, forced, version, inference.epoch()


# --- in C++ ---------------------------------------------------------------------------------------


@functools.cache
def why_interpreted() -> str | None:
    """None when routes run in C++, otherwise why they run from Python."""
    native = _native.module()
    library = _native.torch_library()
    if isinstance(library, str):
        return library
    try:
        functions = [getattr(library, name) for name in native.torch_shim_names()]
        torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors  # noqa: B018
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs  # noqa: B018
    except AttributeError as error:
        return f"torch {torch.__version__} lacks a function for it ({error})"
    native.set_torch_shims([ctypes.cast(f, ctypes.c_void_p).value for f in functions])
    return None


def _handles(*tensors: Tensor | None) -> list[Any]:
    """References for C++, which takes them over."""
    found = iter(
        torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([t for t in tensors if t is not None])
    )
    return [None if t is None else next(found) for t in tensors]


def _packed(p: inference.Packed) -> tuple:
    geometry = p.padding, p.stride, p.dilation, p.groups
    return (*_handles(p.weight, p.bias, p.add_bias), *geometry, p.channels or 0)


class Native(NamedTuple):
    """The stem, if it has one, and blocks, as one call of C++."""

    route: Any
    stem: Stem | None
    steps: list[Step]

    @staticmethod
    def of(stem: Stem | None, steps: list[Step]) -> Native:
        route = _native.module().Route(DTYPE[steps[0].dtype if stem is None else stem.dtype])
        if stem is not None:
            packed = _packed(stem.folded.packs[0])
            route.add_stem(packed, tuple(stem.folded.bound), *(stem.window or (0, 0, 0)))
        for step in steps:
            assert step.folded is not None
            packs = [_packed(p) for p in step.folded.packs]
            projected = _spec(step).shortcut is not None
            route.add_block(packs, tuple(step.folded.bound), projected)
        return Native(route, stem, steps)

    def run(self, x: Tensor, largest: float | None) -> tuple[Tensor, float, int] | None:
        """(z, a bound of |z|, how many parts ran: fewer than all where the next one's input is too
        large); None where torch reports an error. x is not written to."""
        (handle,) = _handles(x)
        known = math.nan if largest is None else largest
        try:
            capsule, known, parts = self.route.run(handle, known, torch.get_num_threads())
        except RuntimeError:
            return None
        (z,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([capsule])
        return z, known, parts


def _spec(step: Step) -> Any:
    block: Any = step.block
    return block._fastres.spec


def _in_cpp(stem: Stem | None, steps: list[Step]) -> list[Native | Step]:
    """What of a route is one call of C++, and what is between."""
    parts: list[Native | Step] = []
    row: list[Step] = []

    def end_row() -> None:
        nonlocal stem, row
        if row or stem is not None:
            parts.append(Native.of(stem, row))
        stem, row = None, []

    for step in steps:
        if step.folded is None or _spec(step).branch is not None:
            end_row()
            parts.append(step)
            continue
        if step.given != step.dtype:
            end_row()
        row.append(step)
    end_row()
    return parts


# --- a route --------------------------------------------------------------------------------------


class Route:
    """CPU inference on batches of one shape: the stem, blocks, the last layer where it is not to be
    called."""

    def __init__(
        self, steps: list[Step], stem: Stem | None = None, head: inference.Linear | None = None
    ) -> None:
        self.stem, self.steps, self.head = stem, steps, head
        self._plain: list[Any] = [*steps] if stem is None else [stem, *steps]
        self._parts = self._plain if why_interpreted() else _in_cpp(stem, steps)

    def run(self, x: Tensor) -> Tensor | None:
        """z before the head; None when the values of x do not let the stem run folded."""
        return self._run(x, self._plain if torch.autograd._profiler_enabled() else self._parts)

    def _run(self, images: Tensor, parts: list[Any]) -> Tensor | None:
        x = images if self.stem is None else self.stem.given(images)
        largest: float | None = None
        own, done = False, 0  # of self.steps
        for part in parts:
            if isinstance(part, Stem):
                x, largest = part.run(x)
                if largest is None:
                    return None
            elif isinstance(part, Native):
                if part.stem is None:
                    if not part.steps[0].takes(x, largest):
                        return self._block_by_block(done, x)
                    x = x.to(part.steps[0].dtype)
                    largest = inference.known(x) if largest is None else largest
                ran = part.run(x, largest)
                if ran is None:
                    return self._run(images, self._plain)
                x, largest, count = ran
                if part.stem is not None:
                    if count == 0:
                        return None
                    count -= 1
                done += count
                if count < len(part.steps):
                    return self._block_by_block(done, x)
            elif part.folded is None:
                x, own, largest = part.block(marked(x, largest)), False, None
                done += 1
                continue
            else:
                found = None
                if part.takes(x, largest):
                    found = run_folded(part.block, part.folded, x.to(part.dtype), own, largest)
                if found is None:
                    return self._block_by_block(done, x)
                x, largest = found
                done += 1
            own = True
        return marked(x, largest)

    def _block_by_block(self, done: int, x: Any) -> Any:
        """The rest, where each block by itself finds what is to be done."""
        for step in self.steps[done:]:
            x = step.block(x)
        return x
