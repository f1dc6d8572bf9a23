"""1x1 convolutions of CPU training as matrix products (fastres._pointwise)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastres
from fastres import _pointwise as pointwise
from fastres.ops import _units

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("poisoned")
CL = torch.channels_last
# C, K, height, width, stride
SHAPES = [(8, 16, 5, 7, 1), (24, 35, 7, 7, 2), (3, 64, 1, 1, 1), (64, 8, 6, 5, 3), (16, 1, 4, 4, 1)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(c: int, k: int, h: int, w: int, s: int, dtype: torch.dtype, n: int = 3):
    g = torch.Generator().manual_seed(c * k + h)
    x = torch.randn(n, c, h, w, generator=g).to(dtype).contiguous(memory_format=CL)
    weight = torch.randn(k, c, 1, 1, generator=g).to(dtype)
    y = torch.conv2d(x.double(), weight.double(), stride=s)
    dy = torch.randn(y.shape, generator=g).to(dtype).contiguous(memory_format=CL)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), weight.double(), None, [s, s], [0, 0], [1, 1], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip
    return x, weight, dy, y, dx, dw


def close(got: torch.Tensor, truth: torch.Tensor) -> None:
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[got.dtype]
    torch.testing.assert_close(got.double(), truth, rtol=bound, atol=bound * truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    x, weight, dy, y, dx, dw = make(*shape, DTYPES[dtype])
    stride = (shape[-1],) * 2
    for got, truth in (
        (pointwise.fprop(x, weight, stride), y),
        (pointwise.dgrad(dy, weight, x.shape, stride), dx),
    ):
        assert got.is_contiguous(memory_format=CL)
        close(got, truth)
    close(pointwise.wgrad(dy, x, stride), dw)
    again = pointwise.wgrad(dy, x, stride)
    assert torch.equal(again, pointwise.wgrad(dy, x, stride))


def test_weights_of_any_strides():
    x, weight, dy, y, dx, _ = make(8, 16, 5, 7, 1, torch.float32)
    strided = torch.empty(8, 16, 2, 1).permute(1, 0, 2, 3)[:, :, :1]
    strided.copy_(weight)
    assert not strided.is_contiguous()
    for w in (strided, weight.contiguous(memory_format=CL)):
        close(pointwise.fprop(x, w, (1, 1)), y)
        close(pointwise.dgrad(dy, w, x.shape, (1, 1)), dx)


def test_a_value_that_is_not_finite_stays_with_its_pixel():
    x, weight, dy, *_ = make(8, 16, 5, 7, 1, torch.float32)
    x[1, 2, 3, 4], dy[0, 1, 2, 3] = torch.inf, torch.nan
    y, dx = pointwise.fprop(x, weight, (1, 1)), pointwise.dgrad(dy, weight, x.shape, (1, 1))
    assert y.isfinite().logical_not().any(1).nonzero().tolist() == [[1, 3, 4]]
    assert dx.isfinite().logical_not().any(1).nonzero().tolist() == [[0, 2, 3]]


def test_who_takes_it(monkeypatch):
    plain = (1, 1, 0, 0, 1, 1, 1)
    monkeypatch.setattr(pointwise, "_fast_bf16", lambda: True)
    bf16, fp32 = torch.bfloat16, torch.float32

    def why(what, shape, dtype, k, geometry=plain, taps=(1, 1)):
        return pointwise.why_not(what, shape, dtype, k, geometry, taps)

    assert why("dgrad", (8, 512, 7, 7), bf16, 2048) is None  # 392 pixels
    assert why("dgrad", (8, 1024, 14, 14), bf16, 2048, (2, 2, 0, 0, 1, 1, 1)) is None
    assert why("dgrad", (8, 1024, 14, 14), bf16, 512) is not None
    assert why("dgrad", (4, 512, 28, 28), bf16, 1024, (2, 2, 0, 0, 1, 1, 1)) is not None
    assert why("wgrad", (16, 1024, 14, 14), bf16, 256) is None  # a large weight
    assert why("wgrad", (32, 1024, 14, 14), bf16, 256) is not None
    assert why("wgrad", (32, 512, 28, 28), bf16, 128) is not None
    assert why("fprop", (8, 512, 7, 7), bf16, 2048) is None
    assert why("fprop", (8, 512, 7, 7), fp32, 2048) is not None
    assert why("fprop", (2, 512, 7, 7), fp32, 2048) is None
    assert "padding" in why("fprop", (1, 8, 7, 7), fp32, 8, (1, 1, 1, 1, 1, 1, 1))
    assert "one group" in why("fprop", (1, 8, 7, 7), fp32, 8, (1, 1, 0, 0, 1, 1, 2))
    assert "1x1" in why("fprop", (1, 8, 7, 7), fp32, 8, plain, (3, 3))
    assert "float16" in why("fprop", (1, 8, 7, 7), torch.float16, 8)
    monkeypatch.setattr(pointwise, "_fast_bf16", lambda: False)
    assert "bf16" in why("dgrad", (8, 512, 7, 7), bf16, 2048)


def test_a_block_trains_on_it(monkeypatch):
    """fp32, few pixels: the 1x1 convs of a bottleneck and its projection, no call of a conv."""
    taken: list[str] = []
    for name in ("fprop", "dgrad", "wgrad"):
        call = getattr(pointwise, name)
        monkeypatch.setattr(
            pointwise, name, lambda *a, name=name, call=call: (taken.append(name), call(*a))[1]
        )
    short = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    block = torchvision.models.resnet.Bottleneck(64, 32, 2, short).to(memory_format=CL)
    fused = fastres.convert(nn.Sequential(copy.deepcopy(block)), fusion="b")
    x = torch.randn(2, 64, 6, 6).contiguous(memory_format=CL)
    truth = step(nn.Sequential(copy.deepcopy(block)).double(), x.double())
    eager, ours = step(nn.Sequential(block), x), step(fused, x)
    assert sorted(taken) == ["fprop"] * 3 + ["wgrad"] * 3
    for name, exact in truth.items():
        bound = 4 * (eager[name].double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours[name].double() - exact).abs().max() <= bound, name
    taken.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        step(fused, x)
    assert taken == []


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    z = model(x)
    weights = torch.linspace(-1, 1, z.numel(), dtype=x.dtype).view_as(z)
    (z * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert x.grad is not None
    return {"z": z.detach(), "x": x.grad, **found}  # type: ignore[dict-item]


def test_the_ops_decide_by_pixels():
    x = torch.randn(1, 8, 5, 5).contiguous(memory_format=CL)
    weight = torch.randn(16, 8, 1, 1)
    geometry = [1, 1, 0, 0, 1, 1, 1]
    assert pointwise.runs("fprop", x, weight, geometry)
    assert not pointwise.runs("fprop", x.contiguous()[:, :, :, :4], weight, geometry)  # no NHWC
    assert not pointwise.runs("fprop", torch.randn(8, 8, 5, 5), weight, geometry)
    with fastres.use_backend("reference"):
        assert not pointwise.runs("fprop", x, weight, geometry)
    close(_units.conv_fwd(x, weight, None, geometry), torch.conv2d(x.double(), weight.double()))
