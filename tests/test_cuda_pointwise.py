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
    FORMS,
    Layer,
    Random,
    _act,
    _dgrad,
    _fprop,
    _wgrad,
    check,
    empty,
    fprop_case,
    gradient_case,
    gradient_outputs,
    poison,  # noqa: F401 (a fixture of every test here)
    previous_of,
    residual_of,
)

from fastres import _cuda_pointwise as pointwise
from fastres import _reference_backend as reference
from fastres._contract import Gradient, Normalise, NormGradient, Shortcut
from fastres._layout import mask_shape

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
    "back": layer(3, 24, 11, 13, 72),
    "wide": layer(2, 40, 9, 10, 136),
    "deep": layer(1, 328, 5, 5, 264),
}
FEW = ("odd", "tiles")


def layers(names=tuple(LAYERS)):
    return pytest.mark.parametrize(
        "layer, dtype",
        [pytest.param(LAYERS[n], t, id=f"cuda-{d}-{n}") for d, t in HALVES.items() for n in names],
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


@pytest.mark.parametrize("kind", ["identity", "dual", "identity no mask", "dual no z"])
@layers(("few", "tiles", "deep"))
def test_fprop_writes_the_block_output(cuda, layer, dtype, kind):
    outputs, (x, w, geometry, norm) = fprop_case(layer, dtype, True)
    random = Random(dtype, "block", layer)
    res = random.activation(*x.shape)
    shortcut = Shortcut(res, random.norm(layer.c) if "dual" in kind else None)
    if "no z" not in kind:
        outputs["z"] = tuple(x.shape)
        if "no mask" not in kind:
            outputs["mask"] = mask_shape(x)
    check(cuda, dtype, outputs, _fprop, x, w, geometry, norm, shortcut)


def test_as_many_channels_as_it_takes_leave_a_ring(cuda):
    """The vectors of two norms over 4096 channels beside tiles of 256 columns left one stage, which
    waited for itself."""
    most, dtype = layer(1, 4096, 2, 2, 136), torch.bfloat16
    outputs, (x, w, geometry, norm) = fprop_case(most, dtype, True)
    random = Random(dtype, "block", most)
    shortcut = Shortcut(random.activation(*x.shape), random.norm(most.c))
    outputs |= {"z": tuple(x.shape), "mask": mask_shape(x)}
    check(cuda, dtype, outputs, _fprop, x, w, geometry, norm, shortcut)


@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (False, False)])
@layers((*FEW, "wide"))
def test_fprop_act(cuda, layer, dtype, residual, relu):
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


# --- dgrad, wgrad ---------------------------------------------------------------------------------

# Beside test_conv's: bits without a batch norm; a batch norm in training whose g is gated, with all
# of the epilogue; frozen, its gate recomputed.
MORE_FORMS = [
    *FORMS,
    ("none", True, "plain", "none"),
    ("bn", True, "mask", "dual"),
    ("frozen", False, "none", "recompute"),
]


@pytest.mark.parametrize("form", MORE_FORMS, ids=lambda f: "-".join(map(str, f)))
@layers(("few", "back", "deep"))
def test_dgrad(cuda, layer, dtype, form):
    mode, masked, residual, previous = form
    random, x, w, g, bn = gradient_case(layer, dtype, mode, masked)
    dres, prev = residual_of(random, x, residual), previous_of(random, x, previous)
    outputs = gradient_outputs(x, previous)
    check(cuda, dtype, outputs, _dgrad, g, w, layer.geometry, bn, dres, prev)


@pytest.mark.parametrize("mode, masked, norm", [
    ("none", False, False), ("none", False, True), ("none", True, True), ("bn", False, True),
    ("bn", True, True), ("bn", True, False), ("frozen", True, False), ("frozen", False, True),
], ids=str)  # fmt: skip
@layers(("few", "tiles", "deep"))
def test_wgrad(cuda, layer, dtype, mode, masked, norm):
    random, x, w, g, bn = gradient_case(layer, dtype, mode, masked)
    affine = random.norm(layer.c) if norm else None
    outputs = {"dw": tuple(w.shape)}
    check(cuda, dtype, outputs, _wgrad, g, x, layer.geometry, bn, affine)


@layers(("tiles",))
def test_wgrad_writes_the_weights_own_strides(cuda, layer, dtype):
    _, x, w, g, _ = gradient_case(layer, dtype, "none", False)
    dw = torch.empty_like(w).transpose(0, 1).contiguous().transpose(0, 1)
    want = torch.empty_like(w)
    cuda.conv_wgrad(dw, g, x, layer.geometry, None, None)
    cuda.conv_wgrad(want, g, x, layer.geometry, None, None)
    assert dw.stride() != want.stride()
    assert_same_bits("dw", dw.contiguous(), want)


@layers(("tiles",))
def test_the_backward_is_deterministic(cuda, layer, dtype):
    random, x, w, g, bn = gradient_case(layer, dtype, "bn", True)
    dres, prev = residual_of(random, x, "mask"), previous_of(random, x, "dual")
    norm = random.norm(layer.c)

    def run():
        shapes = {**gradient_outputs(x, "dual"), "dw": tuple(w.shape)}
        out = {k: empty(v, dtype) for k, v in shapes.items()}
        _dgrad(cuda, out, g, w, layer.geometry, bn, dres, prev)
        _wgrad(cuda, out, g, x, layer.geometry, bn, norm)
        return out

    same_in_every_order(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@layers(("tiles",))
def test_the_backward_propagates_nan_and_inf(cuda, layer, dtype, value):
    """From dz where its bit is 1; a gated one, and y behind a frozen batch norm, do no harm."""
    random, x, w, g, _ = gradient_case(layer, dtype, "none", True)
    mask = torch.full_like(g.mask, 0xFF)
    pixel = (1 * layer.h + 4) * layer.w + 5
    g.dz[1, 3, 4, 5] = value
    g.dz[2, 9, 0, 0] = value
    mask[2 * layer.h * layer.w, 1] &= 0xFD  # channel 9 of that pixel
    pixel = 1 * layer.h * layer.w + 4 * layer.w + 5
    dx, dw = empty(x.shape, dtype), torch.empty_like(w)
    cuda.conv_dgrad(dx, None, Gradient(g.dz, mask), w, layer.geometry, None, None, None)
    bad = ~torch.isfinite(dx.permute(0, 2, 3, 1).reshape(-1, layer.c))
    assert bad[pixel].all() and bad.sum() == layer.c
    frozen = NormGradient(
        torch.full_like(g.dz, value), random.norm(layer.k), torch.ones(layer.k),
        torch.ones(layer.k), False,
    )  # fmt: skip
    for bn in (None, frozen):
        cuda.conv_wgrad(dw, Gradient(g.dz, mask), x, layer.geometry, bn, None)
        bad = ~torch.isfinite(dw[:, :, 0, 0])
        assert bad[3].all() and bad.sum() == layer.c


# --- kernels broken on purpose: the host shim must catch it ---------------------------------------

# What the shim says when a primitive is left out of a kernel, or wrong in it (shim::Fault, by
# number); None: nothing, but the result is wrong.
EARLY = "is read (while a copy|before anything)|a copy and read with no"
FAULTS = {
    "no wait for a full stage": (1, EARLY),
    "no wait for a free stage": (2, "copied to (with no barrier|while a copy)|more arrivals"),
    "wrong parity": (3, f"deadlock|{EARLY}|copied to"),
    "fewer bytes expected": (4, f"{EARLY}|expects bytes|deadlock"),
    "no arrival at a free stage": (5, "deadlock: .* waits at an mbarrier"),
    "no fence behind mbarrier.init": (6, "a copy before the fence behind mbarrier.init"),
    "no fence.proxy.async": (7, "with no fence.proxy.async since"),
    "no wgmma.fence": (8, "wgmma with no wgmma.fence"),
    "no wait for wgmma": (9, "in flight|before a wgmma was waited for|race"),
    "no __syncwarp": (10, "race: .* with no barrier between"),
    "no named barrier": (11, "race: .* with no barrier between|before anything was written"),
    "copies without the swizzle": (12, None),
    "descriptors without the swizzle": (13, "without the 128-byte swizzle"),
}


@pytest.mark.skipif(not cuda_host.wanted(), reason="a GPU runs the kernels as they are")
@pytest.mark.parametrize(
    "fault, op",
    [(f, op) for f in FAULTS for op in ("fprop", "dgrad", "wgrad")
     if not (f == "no fence.proxy.async" and op != "wgrad")
     and not (f == "no __syncwarp" and op == "wgrad")],
)  # fmt: skip
def test_broken_kernels_are_caught(cuda, fault, op):
    """Kernels whose rings turn round several times, with each fault in turn, in several orders."""
    number, message = FAULTS[fault]
    dtype = torch.bfloat16
    this = LAYERS["back" if op == "dgrad" else "tiles"]
    outputs, inputs = fprop_case(this, dtype, True)
    call = _fprop
    if op != "fprop":
        random, x, w, g, bn = gradient_case(this, dtype, "bn", True)
        outputs, inputs, call = gradient_outputs(x, "dual"), (g, w, this.geometry, bn), _dgrad
        inputs = (*inputs, residual_of(random, x, "mask"), previous_of(random, x, "dual"))
    if op == "wgrad":
        outputs, inputs = {"dw": tuple(w.shape)}, (g, x, this.geometry, bn, random.norm(this.c))
        call = _wgrad
    check(cuda, dtype, outputs, call, *inputs)
    for order in (0, 1, 2):
        cuda_host.set_order(order)
        cuda_host.module().set_fault(number)
        try:
            with pytest.raises(RuntimeError if message else AssertionError, match=message):
                check(cuda, dtype, outputs, call, *inputs)
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
