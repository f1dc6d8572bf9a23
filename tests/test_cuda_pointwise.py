"""The pointwise convolutions of sm_90a (csrc/cuda/pointwise*): every form x dtype, against the
reference in float64, by test_conv's criterion.

On a Hopper GPU, or on the host shim (tests/cuda_host/hopper.h), where test_cuda_host.py runs this
file under AddressSanitizer and UBSan. The shapes are few and small: a block's tile is 128 pixels by
64 to 256 channels, and the shim multiplies all of it."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from common import DTYPES, assert_same_bits, backend
from test_conv import (
    Layer,
    _act,
    _fprop,
    check,
    empty,
    fprop_case,
    poison,  # noqa: F401 (a fixture of every test here)
)

from fastres import _cuda_pointwise as pointwise
from fastres import _reference_backend as reference
from fastres._contract import Normalise

if not cuda_host.wanted():
    if not torch.cuda.is_available():
        pytest.skip("no GPU; test_cuda_host.py runs this on the CPU", allow_module_level=True)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0", allow_module_level=True)

HALVES = {k: v for k, v in DTYPES.items() if k != "fp32"}


def layer(n: int, c: int, h: int, w: int, k: int) -> Layer:
    return Layer(n, c, h, w, k, 1, 1, 1, 0, 1)


# Tiles of 64, 128 and 256 columns, whole and not; one tile of pixels, a part of one, several in a
# block; reductions of 8 to 328 channels, an even and an odd number of steps; weights that stay in
# shared memory and (328 x 256 of them) that do not.
LAYERS = {
    "whole": layer(2, 64, 8, 8, 64),
    "few": layer(1, 8, 1, 3, 8),
    "odd": layer(1, 136, 7, 7, 72),
    "tiles": layer(3, 72, 11, 13, 24),
    "wide": layer(2, 40, 9, 10, 136),
    "deep": layer(1, 328, 5, 5, 264),
}
FEW = ("odd", "tiles")


def layers(names=tuple(LAYERS)):
    return pytest.mark.parametrize(
        "layer, dtype",
        [pytest.param(LAYERS[n], t, id=f"{d}-{n}") for d, t in HALVES.items() for n in names],
    )


@pytest.fixture
def cuda(gpu):
    backend("cuda")
    yield pointwise
    cuda_host.set_order(0)


def same_in_every_order(outputs) -> None:
    """outputs() -> {name: tensor} has the same bits again, in other orders of blocks, threads and
    copies."""
    first = outputs()
    for order in (1, 2, 3):
        cuda_host.set_order(order)
        for name, value in outputs().items():
            assert_same_bits(name, value, first[name])


# --- fprop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@layers()
def test_fprop(cuda, layer, dtype, norm):
    outputs, inputs = fprop_case(layer, dtype, norm)
    check(cuda, dtype, outputs, _fprop, *inputs)


@layers(FEW)
def test_fprop_without_statistics(cuda, layer, dtype):
    outputs, inputs = fprop_case(layer, dtype, True, stats=False)
    check(cuda, dtype, outputs, _fprop, *inputs)


@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (False, False)])
@layers((*FEW, "wide"))
def test_fprop_act(cuda, layer, dtype, residual, relu):
    from test_conv import Random

    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    random = Random(dtype, "act", layer)
    res = random.activation(*layer.out) if residual else None
    check(cuda, dtype, {"z": layer.out}, _act, x, w, geometry, random.norm(layer.k), res, relu)


@layers(("tiles",))
def test_fprop_is_deterministic(cuda, layer, dtype):
    outputs, inputs = fprop_case(layer, dtype, True)

    def run():
        out = {k: empty(v, dtype) for k, v in outputs.items()}
        _fprop(cuda, out, *inputs)
        return out

    same_in_every_order(run)


@layers(("tiles",))
def test_statistics_of_large_means(cuda, layer, dtype):
    """Mean 128 (exact in both dtypes), standard deviation 1: Chan's merge, not E[y^2] - E[y]^2."""
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    w = torch.zeros_like(w)
    w[:, 0] = 1.0
    x[:, 0] += 128
    y, stats = empty(layer.out, dtype), torch.empty(3, layer.k)
    cuda.conv_fprop(y, stats, None, None, x, w, geometry, None, None, 1e-5)
    want = y.double().var(dim=(0, 2, 3), unbiased=False)
    assert 0.5 < want.min() <= want.max() < 2
    torch.testing.assert_close(stats[1].double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[2].double(), (want + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@layers(("tiles",))
def test_fprop_propagates_nan_and_inf(cuda, layer, dtype, norm, value):
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    affine = Normalise(*(torch.ones(layer.c) for _ in range(4))) if norm else None
    x[1, 3, 4, 4] = value
    y, stats = empty(layer.out, dtype), torch.empty(3, layer.k)
    cuda.conv_fprop(y, stats, None, None, x, w, geometry, affine, None, 1e-5)
    want = empty(layer.out, dtype).cpu()
    norm_cpu = None if affine is None else Normalise(*(v.cpu() for v in affine))
    reference.conv_fprop(want, None, None, None, x.cpu(), w.cpu(), geometry, norm_cpu, None, 1e-5)
    y, stats = y.cpu(), stats.cpu()
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    clean = norm and value < 0  # relu(-inf) = 0
    assert bool(torch.isfinite(y).all()) == clean
    assert bool(stats[1].isnan().all()) != clean


def test_weights_of_any_strides(cuda):
    layer, dtype = LAYERS["odd"], torch.bfloat16
    outputs, (x, w, geometry, norm) = fprop_case(layer, dtype, True)
    turned = w.transpose(0, 1).contiguous().transpose(0, 1)
    assert turned.stride() != w.stride()
    check(cuda, dtype, outputs, _fprop, x, turned, geometry, norm)


# --- kernels broken on purpose: the host shim must catch it ---------------------------------------

# What the shim says when a primitive is left out of a kernel, or wrong in it (shim::Fault, by
# number); None: nothing, but the result is wrong.
EARLY = "is read (while a copy|before anything)|a copy and read with no"
FAULTS = {
    "no wait for a full stage": (1, EARLY),
    "no wait for a free stage": (2, "copied to (with no barrier|while a copy)|more arrivals"),
    "wrong parity": (3, f"deadlock|{EARLY}|copied to"),
    "fewer bytes expected": (4, "is read while a copy|expects bytes|deadlock"),
    "no arrival at a free stage": (5, "deadlock: .* waits at an mbarrier"),
    "no fence behind mbarrier.init": (6, "a copy before the fence behind mbarrier.init"),
    "no wgmma.fence": (8, "wgmma with no wgmma.fence"),
    "no wait for wgmma": (9, "in flight|before a wgmma was waited for|race"),
    "no __syncwarp": (10, "race: .* with no barrier between"),
    "no named barrier": (11, "race: .* with no barrier between|before anything was written"),
    "copies without the swizzle": (12, None),
    "descriptors without the swizzle": (13, "without the 128-byte swizzle"),
}


@pytest.mark.skipif(not cuda_host.wanted(), reason="a GPU runs the kernels as they are")
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_kernels_are_caught(cuda, fault, order):
    """conv_fprop whose ring turns round several times, with each fault in turn."""
    number, message = FAULTS[fault]
    outputs, inputs = fprop_case(LAYERS["tiles"], torch.bfloat16, True)
    cuda_host.set_order(order)
    cuda_host.module().set_fault(number)
    try:
        with pytest.raises(RuntimeError if message else AssertionError, match=message):
            check(cuda, torch.bfloat16, outputs, _fprop, *inputs)
    finally:
        cuda_host.module().set_fault(0)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, reason", [
    ({"c": 12}, "multiples of 8"), ({"k": 12}, "multiples of 8"), ({"c": 4104}, "4096 at most"),
    ({"dtype": torch.float32}, "dtype"), ({"stride": 2}, "not a 1x1 conv"),
    ({"r": 3}, "not a 1x1 conv"), ({"nchw": True}, "NCHW"),
], ids=str)  # fmt: skip
def test_refuses_with_a_reason(cuda, change, reason):
    c, k, r = (change.get(v, d) for v, d in (("c", 16), ("k", 16), ("r", 1)))
    dtype = change.get("dtype", torch.bfloat16)
    x = torch.zeros(1, c, 4, 4, dtype=dtype)
    if "nchw" not in change:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(k, c, r, r, dtype=dtype)
    stride = change.get("stride", 1)
    assert reason in pointwise.why_not(x, weight, [stride, stride, 0, 0, 1, 1, 1])


def test_takes_what_it_says(cuda):
    x = torch.zeros(1, 16, 4, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert pointwise.why_not(x, torch.zeros(8, 16, 1, 1), [1, 1, 0, 0, 1, 1, 1]) is None
    assert pointwise.missing(x.device) is None


def test_an_unaligned_tensor_is_an_error(cuda):
    layer, dtype = LAYERS["odd"], torch.bfloat16
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    store = torch.empty(x.numel() + 1, dtype=dtype)
    view = store[1:].as_strided(x.shape, x.stride())
    view.copy_(x)
    assert not pointwise.aligned(view) and pointwise.aligned(x, None)
    y = empty(layer.out, dtype)
    with pytest.raises(ValueError, match=r"conv_fprop on .* to 72 channels: .* aligned to 16"):
        cuda.conv_fprop(y, None, None, None, view, w, geometry, None, None, 1e-5)
