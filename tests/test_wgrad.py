"""Weight gradients of bf16 convolutions on the CPU (fastres._wgrad, csrc/cpu/conv_wgrad.cpp)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastres
from fastres import _heuristic, _native, _wgrad, plan
from fastres.ops import _units

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("poisoned")
CL = torch.channels_last
PLAIN = (1, 1, 1, 1, 1, 1, 1)  # stride, padding, dilation, groups
RUNS = _native.why_missing() is None and _native.module().conv_wgrad_runs()
needs_kernel = pytest.mark.skipif(not RUNS, reason="no AVX512_BF16, or no C++ kernels")

# N, C, H, W, K, (R, S), geometry
SHAPES = [
    (2, 32, 5, 7, 12, (1, 1), (1, 1, 0, 0, 1, 1, 1)),
    (4, 17, 9, 6, 13, (3, 3), PLAIN),  # tails of both channels
    (3, 40, 7, 7, 97, (3, 3), PLAIN),  # the last pair half empty; more than one block of dy
    (1, 16, 6, 6, 5, (3, 3), PLAIN),
    (4, 48, 14, 14, 24, (3, 3), (2, 2, 1, 1, 1, 1, 1)),
    (2, 33, 13, 11, 31, (1, 1), (2, 3, 0, 0, 1, 1, 1)),  # pixels that a stride leaves out
    (2, 16, 8, 9, 6, (1, 1), (1, 2, 2, 1, 1, 1, 1)),  # and padding without a value
    (5, 20, 12, 10, 7, (5, 3), (1, 2, 2, 0, 1, 1, 1)),
    (2, 16, 9, 9, 8, (3, 3), (1, 1, 2, 2, 2, 2, 1)),  # dilation
    (2, 16, 2, 2, 8, (7, 7), (1, 1, 3, 3, 1, 1, 1)),  # taps that meet no pixel
    (2, 16, 50, 48, 18, (3, 3), PLAIN),  # parts of a pair
    (9, 24, 20, 22, 10, (3, 3), (2, 2, 1, 1, 1, 1, 1)),  # and of several
    (10, 1024, 12, 12, 1040, (1, 1), (1, 1, 0, 0, 1, 1, 1)),  # chunks of pairs of images
    (2, 800, 24, 24, 290, (3, 3), PLAIN),  # chunks of rows
    (2, 256, 3, 3, 1024, (1, 1), (1, 1, 0, 0, 1, 1, 1)),  # dw past the caches
    (4, 128, 4, 4, 300, (3, 3), PLAIN),
]


def make(n, c, h, w, k, taps, geometry):
    """(dy, x, the gradient in float64, the sum of its terms' sizes)"""
    g = torch.Generator().manual_seed(c * k + h)
    sh, sw, ph, pw, dh, dw, _ = geometry
    x = torch.randn(n, c, h, w, generator=g).bfloat16().contiguous(memory_format=CL)
    weight = torch.zeros(k, c, *taps, dtype=torch.float64)
    where = [sh, sw], [ph, pw], [dh, dw]
    shape = torch.conv2d(x[:1].double(), weight, None, *where).shape[2:]
    dy = torch.randn(n, k, *shape, generator=g).bfloat16().contiguous(memory_format=CL)

    def truth(dy, x):
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *where, False, [0, 0], 1, [False, True, False]
        )[1]

    dy64, x64 = dy.double(), x.double()
    return dy, x, truth(dy64, x64), truth(dy64.abs(), x64.abs())


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape):
    *_, taps, geometry = shape
    dy, x, truth, size = make(*shape)
    dw = _wgrad.wgrad(dy, x, taps, geometry)
    assert dw.dtype == torch.float32 and dw.is_contiguous(memory_format=CL)
    # sums of fp32: their terms are exact, bf16 times bf16
    assert ((dw.double() - truth).abs() <= 2e-6 * size).all()


@needs_kernel
def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    for shape in SHAPES[2], SHAPES[10], SHAPES[12]:
        dy, x, *_ = make(*shape)
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(_wgrad.wgrad(dy, x, *shape[-2:]))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_kernel
def test_a_value_that_is_not_finite_stays_with_its_channels():
    shape = (3, 40, 7, 7, 13, (3, 3), PLAIN)
    dy, x, *_ = make(*shape)
    x[2, 5, 3, 3], dy[2, 7, 2, 4] = torch.inf, torch.nan
    bad = ~_wgrad.wgrad(dy, x, *shape[-2:]).isfinite()
    assert bad[:, 5].all() and bad[7].all()
    bad[:, 5] = bad[7] = False
    assert not bad.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "float32"),
        ({"geometry": (1, 1, 1, 1, 1, 1, 2)}, "group"),
        ({"shape": (4, 3, 14, 14)}, "16 input channels"),
        ({"shape": (3, 256, 14, 14)}, "odd batch"),
        ({"shape": (9, 256, 14, 14)}, None),
        ({"taps": (1, 1), "k": 1024}, None),
        ({"taps": (1, 1), "k": 64}, None),
    ],
)
def test_who_takes_it(monkeypatch, change, reason):
    monkeypatch.setattr(_wgrad, "unable", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # more ask the kernel
    call = {
        "shape": (4, 256, 14, 14), "dtype": torch.bfloat16, "k": 256, "geometry": PLAIN,
        "taps": (3, 3), **change,
    }  # fmt: skip
    why = _wgrad.why_not(**call)
    assert why is None if reason is None else reason in why
    monkeypatch.setattr(_wgrad, "unable", lambda: "no such CPU")
    assert _wgrad.why_not(**call) is not None


@needs_kernel
@pytest.mark.parametrize(
    ("shape", "k", "threads", "reason"),
    [
        # 1.2 MB of sums: 4 parts
        ((64, 128, 56, 56), 256, 8, None),
        ((64, 128, 56, 56), 256, 9, "4 jobs for 9 threads"),
        # one chunk: 4 x 11 tiles of the weight under 9 taps
        ((4, 128, 7, 7), 128, 64, None),
        ((64, 128, 56, 56), 256, 2, None),
    ],
)
def test_what_too_few_threads_can_share_is_left(monkeypatch, shape, k, threads, reason):
    monkeypatch.setattr(_wgrad, "unable", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _wgrad.why_not(shape, torch.bfloat16, k, PLAIN, (3, 3)) == reason


def test_a_block_of_many_weights_is_fused_for_it(monkeypatch):
    """ResNet-18's last stage on 8 images has too few outputs for fusion to pay by itself."""
    calls = (((8, 512, 7, 7), 512, (3, 3), PLAIN),) * 2
    monkeypatch.setattr(_wgrad, "unable", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # more ask the kernel
    ask = _heuristic.of_block.__wrapped__
    assert ask(calls, torch.bfloat16, True, True, 700_000) == plan.HEURISTIC
    assert ask(calls, torch.bfloat16, False, True, 700_000)[0] == plan.EAGER  # NCHW
    monkeypatch.setattr(_wgrad, "unable", lambda: "no such CPU")
    assert ask(calls, torch.bfloat16, True, True, 700_000)[0] == plan.EAGER


@needs_kernel
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_block_trains_on_it(monkeypatch, weights):
    """Under autocast dw reaches the fp32 weight as it was summed, not by way of bf16; a bf16
    weight's is rounded once."""
    taken = []
    monkeypatch.setattr(_wgrad, "unable", lambda: None)
    call = _wgrad.wgrad
    monkeypatch.setattr(_wgrad, "wgrad", lambda *a: (taken.append(a[1].shape[1]), call(*a))[1])
    torch.manual_seed(0)
    short = nn.Sequential(nn.Conv2d(128, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
    block = torchvision.models.resnet.Bottleneck(128, 128, 2, short).to(memory_format=CL)
    if weights == "bf16":
        block = block.bfloat16()
    fused = fastres.convert(nn.Sequential(copy.deepcopy(block)), fusion="b")
    x = torch.randn(2, 128, 12, 12).bfloat16().contiguous(memory_format=CL)
    exact = step(nn.Sequential(copy.deepcopy(block)).double(), x.double())
    eager, ours = step(nn.Sequential(block), x), step(fused, x)
    assert taken == [128] * 4
    for name, truth in exact.items():
        assert ours[name].dtype == eager[name].dtype
        bound = 2 * (eager[name].double() - truth).abs().max() + 2**-9 * truth.abs().max()
        assert (ours[name].double() - truth).abs().max() <= bound, name
    dw = ours["0.conv2.weight"]
    assert torch.equal(dw, dw.bfloat16().to(dw.dtype)) == (weights == "bf16")


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        z = model(x)
    weights = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view_as(z)
    (z * weights.to(z.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.dim() == 4}


def test_only_what_it_takes(monkeypatch):
    monkeypatch.setattr(_wgrad, "unable", lambda: None)
    monkeypatch.setattr(_wgrad, "why_not", lambda *_: None)
    _wgrad._runs.cache_clear()
    x = torch.randn(2, 128, 6, 6).bfloat16()
    nhwc = x.contiguous(memory_format=CL)
    weight = torch.randn(128, 128, 3, 3)
    assert _wgrad.runs(nhwc, nhwc, weight, PLAIN)
    assert not _wgrad.runs(x, x, weight, PLAIN)
    assert not _wgrad.runs(nhwc.float(), nhwc, weight, PLAIN)
    with fastres.use_backend("reference"):
        assert not _wgrad.runs(nhwc, nhwc, weight, PLAIN)
    _wgrad._runs.cache_clear()


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["nchw", "nhwc"])
def test_the_fake_gradient_has_its_strides(size, layout):
    """Inductor asserts them. An image of one pixel is NCHW and NHWC at once."""
    weight = torch.randn(32, 32, 3, 3).bfloat16().contiguous(memory_format=layout)
    x = torch.randn(2, 32, size, size).bfloat16().contiguous(memory_format=layout)
    dy = torch.randn(2, 32, size, size).bfloat16().contiguous(memory_format=layout)

    def dw(dy, x, weight):
        return _units.conv_bwd(dy, x, weight, list(PLAIN), False, True)[1]

    real = dw(dy, x, weight)
    with FakeTensorMode() as mode:
        fake = dw(*map(mode.from_tensor, (dy, x, weight)))
    assert real.stride() == fake.stride()
