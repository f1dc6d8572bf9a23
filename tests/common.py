"""What the kernel tests share: backends, cases, inputs, poisoned outputs, the error criterion.

A test compares a backend's out-variant (docs/kernels.md) with `fastres.reference` in float64. Its
error may be twice that of eager PyTorch doing the same maths in the same dtype, plus a floor from
TOLERANCES."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from dataclasses import dataclass, replace

import cuda_host
import pytest
import torch
from torch import Tensor

from fastres import reference as ref
from fastres._layout import mask_shape, outer_inner, rows

# The CUDA C++ kernels run on a GPU, or on the host shim in the processes that test_cuda_host.py
# starts: nowhere else would their tests have anything to do.
BACKENDS = ("cpu", "triton")
if torch.cuda.is_available() or cuda_host.wanted():
    BACKENDS += ("cuda",)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by conftest.py without a GPU
MODULES = {"cpu": "fastres._cpu", "triton": "fastres.kernels", "cuda": "fastres._cuda"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

# The floor under every comparison, relative to the largest value (max error) or rms (rms error):
# about half a unit in the last place of the dtype; fp32 has a few, for sums in another order.
TOLERANCES = {torch.float32: 4e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}

# Channel counts and row counts that are multiples of nothing, single channels, pixels and images,
# and one shape for each cut of a reduction: many channels, a long plane, many rows.
SHAPES = {
    "cpu": [
        (2, 35, 7, 7),
        (1, 1, 5, 3),
        (4, 40, 1, 1),
        (1, 64, 9, 5),
        (2, 130, 13, 11),
        (9, 24, 6, 6),
        (2, 600, 9, 8),
        (2, 5, 70, 70),
    ],
    # thin: the interpreter runs one program at a time in Python
    "triton": [(2, 35, 7, 7), (1, 1, 5, 3), (4, 40, 1, 1), (2, 130, 5, 3)],
    # thin, on the host shim a thread is a fiber: units of 1 and of 8, one column tile and two,
    # one chunk of a reduction and several, in each layout
    "cuda": [
        (2, 35, 7, 7),
        (1, 1, 5, 3),
        (9, 24, 8, 6),
        (5, 264, 5, 4),
        (70, 3, 3, 3),
        (300, 3, 2, 4),
    ],
}
NCHW_CHANNELS = 7  # a program each, which the interpreter runs one after the other
THIN = (2, 35, 7, 7), (2, 130, 13, 11)  # FASTRES_TEST_THIN=1: the other ISA variants
POOLS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)]  # kernel, stride, padding


@dataclass(frozen=True)
class Case:
    backend: str
    dtype: torch.dtype
    layout: torch.memory_format
    shape: tuple[int, int, int, int]

    @property
    def run(self):
        return backend(self.backend)

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def count(self) -> int:
        n, _, h, w = self.shape
        return n * h * w


@functools.cache
def _missing(name: str) -> str | None:
    if name == "cuda" and cuda_host.wanted():
        importlib.import_module(MODULES[name]).use_host(cuda_host.module())
    module = importlib.import_module("fastres._native" if name == "cpu" else MODULES[name])
    return module.why_missing()


def backend(name: str):
    """The backend module, or a skip with the reason it is missing."""
    reason = _missing(name)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return importlib.import_module(MODULES[name])


def cuda_convs():
    """The cuda backend with its convolutions, or a skip with the reason they are missing."""
    module = backend("cuda")
    reason = module.conv_missing(torch.empty(0).device)
    if reason is not None:
        pytest.skip(reason)
    return module


@contextlib.contextmanager
def table(**changes):
    """The table of convolution tiles in use (the interpreter's, or the GPU's) with other values."""
    from fastres.kernels import _conv_config

    before = _conv_config.arch_of(torch.device("cuda"))
    _conv_config.ARCHS[before.name] = replace(before, **changes)
    try:
        yield
    finally:
        _conv_config.ARCHS[before.name] = before


def cases(dtypes=tuple(DTYPES), layouts=tuple(LAYOUTS), shapes=None):
    """pytest parameters `case`, ids backend-dtype-layout-shape."""
    out = []
    for name in BACKENDS:
        chosen = shapes.get(name) if isinstance(shapes, dict) else shapes
        chosen = chosen or (THIN if os.environ.get("FASTRES_TEST_THIN") else SHAPES[name])
        for dtype in dtypes:
            for layout in layouts:
                for shape in chosen:
                    n, c, h, w = shape
                    if layout == "nchw" and (c == 1 or h == w == 1):
                        continue  # dense in both layouts: the nhwc case
                    if layout == "nchw" and name == "triton" and INTERPRETED:
                        shape = n, min(c, NCHW_CHANNELS), h, w
                    label = f"{name}-{dtype}-{layout}-{'x'.join(map(str, shape))}"
                    case = Case(name, DTYPES[dtype], LAYOUTS[layout], shape)
                    out.append(pytest.param(case, id=label))
    return pytest.mark.parametrize("case", out)


# --- inputs and outputs ---------------------------------------------------------------------------


def activation(case: Case, seed: int, shape=None, scale: float = 1.5, shift: float = 0.3) -> Tensor:
    """A random dense activation of the case."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape or case.shape, generator=generator) * scale + shift
    return x.to(case.dtype).contiguous(memory_format=case.layout)


def vector(case: Case, seed: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """A random fp32 per-channel vector."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(case.channels, generator=generator) * (high - low) + low


def bits(x: Tensor, seed: int) -> Tensor:
    """A random mask for x, pad bits 0."""
    generator = torch.Generator().manual_seed(seed)
    outer, inner = outer_inner(x)
    return ref.pack_mask(torch.rand((outer, inner), generator=generator) < 0.5, inner)


def norm(case: Case, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, rstd, gamma, beta (fp32) for x: its own statistics and a random affine."""
    mean, _, rstd = ref.bn_stats(x.double(), 1e-3)
    return (
        mean.float(),
        rstd.float(),
        vector(case, seed, 0.5, 1.5) * torch.where(vector(case, seed + 2) < -0.5, -1.0, 1.0),
        vector(case, seed + 1),
    )


def poison(like: Tensor, shape=None, dtype=None) -> Tensor:
    """An output like `like` full of NaN (uint8: 0xA5): an element that is not written shows."""
    dtype = dtype or like.dtype
    nhwc = like.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(shape or like.shape, dtype=dtype, device=like.device).contiguous(
        memory_format=torch.channels_last if nhwc else torch.contiguous_format
    )
    return out.fill_(0xA5 if dtype == torch.uint8 else float("nan"))


def poison_vector(c: int) -> Tensor:
    return torch.full((c,), float("nan"))


def poison_mask(x: Tensor) -> Tensor:
    return torch.full(mask_shape(x), 0xA5, dtype=torch.uint8)


def gate_of(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as a boolean activation."""
    flat = ref.unpack_mask(mask, outer_inner(like)[1])
    gate = torch.empty_like(like, dtype=torch.bool)
    n, c, h, w = like.shape
    nhwc = like.is_contiguous(memory_format=torch.channels_last)
    return gate.copy_(flat.view(n, h, w, c).permute(0, 3, 1, 2) if nhwc else flat.view(n, c, h, w))


def mask_from(gate: Tensor) -> Tensor:
    """The mask the contract asks for, pad bits 0, from a boolean activation."""
    return ref.pack_mask(rows(gate), outer_inner(gate)[1])


def gated(dz: Tensor, gate: Tensor) -> Tensor:
    return torch.where(gate, dz, torch.zeros_like(dz))


def pool_shape(shape, kernel: int, stride: int, padding: int) -> tuple[int, int, int, int]:
    n, c, h, w = shape
    return (
        n,
        c,
        (h + 2 * padding - kernel) // stride + 1,
        (w + 2 * padding - kernel) // stride + 1,
    )


# --- eager PyTorch, the yardstick -----------------------------------------------------------------


def eager_norm(x: Tensor, mean, rstd, gamma, beta) -> Tensor:
    """F.batch_norm with the given statistics, in the dtype of x; torch 2.11 takes no eps of 0."""
    var = rstd.double().pow(-2).float()
    return torch.nn.functional.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-30)


def eager_norm_bwd(g: Tensor, x: Tensor, mean, rstd, gamma, training: bool = True):
    """dx, dgamma, dbeta of F.batch_norm with the given saved statistics, in the dtype of x."""
    var = rstd.double().pow(-2).float()
    return torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, mean, var, mean, rstd, training, 0.0, [True, True, True]
    )


# --- the criterion --------------------------------------------------------------------------------


def assert_close(
    what: str, got: Tensor, truth: Tensor, eager: Tensor, scale=None, length: int = 2
) -> None:
    """max and rms error of `got` at most 2x eager's, plus TOLERANCES[got.dtype] of max and rms.

    scale: what the floor is relative to instead of |truth|; for sums, the sum of magnitudes.
    length: how many values were summed; the floor grows with its logarithm."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    truth = truth.double()
    error = (got.double() - truth).abs()
    yard = (eager.double() - truth).abs()
    size = truth.abs() if scale is None else torch.as_tensor(scale).double()
    floor = TOLERANCES[got.dtype] * math.log2(max(length, 2))
    for kind, of in (("max", lambda t: t.max()), ("rms", lambda t: t.square().mean().sqrt())):
        limit = 2 * of(yard) + floor * of(size)
        if not of(error) <= limit:
            at = torch.nan_to_num(error, nan=float("inf")).argmax()
            where = tuple(int(i) for i in torch.unravel_index(at, error.shape))
            wrong = int((~(error <= limit)).sum())
            raise AssertionError(
                f"{what}: {kind} error {of(error):.3g} > {limit:.3g} (eager {of(yard):.3g}); "
                f"worst at {where}: {got[where].item()} instead of {truth[where].item()}; "
                f"{wrong} of {error.numel()} beyond the limit"
            )


def assert_same_bits(what: str, a: Tensor, b: Tensor) -> None:
    """Equal bit for bit, NaNs included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.view(kind) == b.view(kind)
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"


def assert_deterministic(outputs) -> None:
    """outputs() -> {name: tensor} gives the same bits twice, and with 1 thread and with 2; on the
    host shim, in three orders of the blocks and threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for order, threads in enumerate((2, 1, 2)):
            torch.set_num_threads(threads)
            cuda_host.set_order(order)
            results.append(outputs())
    finally:
        torch.set_num_threads(before)
        cuda_host.set_order(0)
    for other in results[1:]:
        for name, value in results[0].items():
            assert_same_bits(name, value, other[name])
