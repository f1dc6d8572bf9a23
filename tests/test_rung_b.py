"""The prepared training of a block on rung b: the bits of the unprepared one, on every input."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres.ops import _rung_b, _units

ops = importlib.import_module("fastres.ops.residual_stage")  # the name in fastres.ops is the op
CL = torch.channels_last
FORMATS = {"nhwc": CL, "nchw": torch.contiguous_format}


def projection(c: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


def randomised(module: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.3)
            nn.init.normal_(m.bias, 0, 0.5)
            m.running_mean.normal_()  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return module


BLOCKS = {
    "basic": (32, lambda: BasicBlock(32, 32)),
    "basic, projection": (24, lambda: BasicBlock(24, 40, 2, projection(24, 40, 2))),
    "bottleneck": (64, lambda: Bottleneck(64, 16)),
    "bottleneck, projection": (32, lambda: Bottleneck(32, 16, 2, projection(32, 64, 2))),
    "bottleneck, groups, dilation": (
        64, lambda: Bottleneck(64, 16, groups=4, base_width=64, dilation=2)
    ),
    "bottleneck, C 35": (35, lambda: Bottleneck(35, 9, 1, projection(35, 36, 1))),
}  # fmt: skip
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def step(module: nn.Module, x: Tensor, dz: Tensor, need_x: bool = True) -> dict[str, Tensor]:
    """Everything a training step leaves, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(need_x)
    before = x.detach().clone()
    module.zero_grad()
    z = module(x)
    z.backward(dz)
    assert torch.equal(x.detach(), before)
    out = {"z": z.detach()} | ({"x": x.grad} if need_x else {})
    out |= {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return out | dict(module.named_buffers())  # type: ignore[return-value]


def prepared(model: nn.Module) -> int:
    return len(model._fastres.programs)  # type: ignore[union-attr, arg-type]


def case(name: str, layout: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """(block, input, gradient of the output)."""
    channels, make = BLOCKS[name]
    block = randomised(make(), 3).to(dtype=dtype, memory_format=FORMATS[layout]).train()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d) and dtype != torch.float64:
            m.float()
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, channels, 13, 11, generator=g, dtype=torch.float64).relu()
    x = x.to(dtype).contiguous(memory_format=FORMATS[layout])
    with torch.no_grad():
        shape = copy.deepcopy(block).double()(x.double()).shape
    dz = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return block, x, dz.contiguous(memory_format=FORMATS[layout])


class _Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# every dtype, and in fp32 the other layout and an input without a gradient
FORMS = [*(("nhwc", t, True) for t in DTYPES), ("nchw", "fp32", True), ("nhwc", "fp32", False)]


@pytest.mark.parametrize("layout, dtype, need_x", FORMS)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_bits_are_the_registered_ops(name, layout, dtype, need_x):
    """Three steps, the later ones on the remembered program, against torch.ops.fastres."""
    block, x, dz = case(name, layout, DTYPES[dtype])
    spec_of = fastres.convert(nn.Sequential(copy.deepcopy(block)), fusion="b")[0]
    ours, op = copy.deepcopy(spec_of), copy.deepcopy(spec_of)
    for turn in range(3):
        got = step(ours, x, dz, need_x)
        assert prepared(ours) == 1
        with pytest.MonkeyPatch.context() as patch:  # through the op, whose node is the ladder's
            patch.setattr(fastres.nn, "trains_eagerly", lambda *a: False)
            patch.setattr(ops, "trains_eagerly", lambda *a: False)
            patch.setattr(ops, "plain_eager", lambda *a: False)
            want = step(op, x, dz, need_x)
        assert got.keys() == want.keys() and prepared(op) == 0
        for key, value in want.items():
            assert torch.equal(got[key], value), (turn, key)
            assert got[key].stride() == value.stride() or value.numel() == value.shape[0], key


@pytest.mark.parametrize("name", BLOCKS)
def test_values(name):
    """Against the original in float64, with uninitialised memory poisoned."""
    block, x, dz = case(name, "nhwc", torch.float32)
    truth = step(copy.deepcopy(block).double(), x.double(), dz.double())
    eager = step(copy.deepcopy(block), x, dz)
    fused = fastres.convert(nn.Sequential(block), fusion="b")[0]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8).isnan().all()
        got = step(fused, x, dz)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, want in truth.items():
        scale = want.abs().max()
        ours, theirs = ((v[key].double() - want).abs().max() / scale for v in (got, eager))
        assert ours <= 4 * theirs + 2e-6, (key, ours, theirs)


def test_what_is_new_is_checked_and_prepared_anew():
    """Another size, layout, weight or affine; each a program of its own, and the old ones hold."""
    block, x, dz = case("basic", "nhwc", torch.float32)
    model = fastres.convert(nn.Sequential(block), fusion="b")[0]
    want = step(model, x, dz)["x"]
    x2 = torch.cat([x, x]).contiguous(memory_format=CL)
    assert step(model, x2, torch.cat([dz, dz]).contiguous(memory_format=CL))["z"].shape[0] == 6
    assert prepared(model) == 2
    # (NCHW: the vendor's convs sum in another order)
    torch.testing.assert_close(step(model, x.contiguous(), dz)["x"], want, rtol=1e-4, atol=1e-4)
    assert prepared(model) == 3
    torch.testing.assert_close(step(model, x, dz)["x"], want, rtol=0, atol=0)
    assert prepared(model) == 3
    model.bn1.weight = nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match=r"bn.weight must have shape \(32,\)"):
        model(x)
    model.bn1.weight = nn.Parameter(torch.ones(32))
    model.conv2.weight = nn.Parameter(torch.randn(32, 32, 5, 5))
    with pytest.raises(ValueError, match="identity shortcut"):
        model(x)
    model.conv2.weight = nn.Parameter(torch.randn(32, 32, 3, 3, device="meta"))
    with pytest.raises(ValueError, match="is on meta, but x is on cpu"):
        model(x)


def test_one_value_a_channel_is_torchs_error():
    model = fastres.convert(nn.Sequential(BasicBlock(32, 32)), fusion="b")[0]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 32, 1, 1))
    assert prepared(model) == 0


def test_frozen_batch_norms_and_frozen_models_are_the_ladders(monkeypatch):
    monkeypatch.setattr(_rung_b.Program, "__init__", lambda *a: pytest.fail("prepared"))
    block, x, dz = case("basic", "nhwc", torch.float32)
    model = fastres.convert(nn.Sequential(block), fusion="b")[0]
    model.bn1.eval()
    step(model, x, dz)
    model.train().requires_grad_(False)
    assert not model(x).requires_grad
    with torch.no_grad():
        model(x)


def test_weights_that_need_no_gradient_get_none():
    block, x, dz = case("bottleneck, projection", "nhwc", torch.float32)
    want = step(copy.deepcopy(block), x, dz)
    model = fastres.convert(nn.Sequential(block), fusion="b")[0]
    for frozen in (model.conv1, model.conv2, model.downsample[0], model.bn3):
        frozen.requires_grad_(False)
    for need_x in (True, False):
        got = step(model, x, dz, need_x)
        assert "conv1.weight" not in got and model.conv1.weight.grad is None
        for key, value in got.items():
            if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(value, want[key], rtol=1e-4, atol=1e-4)


def test_a_vendor_that_answers_in_nchw(monkeypatch):
    """Looked up by strides, so that a Program does not trust the layout of another call."""
    convolution = torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *a: convolution(*a).contiguous())
    backward = _units._convolution_backward

    def nchw(*args):
        dx, dw, db = backward(*args)
        return None if dx is None else dx.contiguous(), dw, db

    monkeypatch.setattr(_units, "_convolution_backward", nchw)
    for name in ("basic, projection", "bottleneck"):
        block, x, dz = case(name, "nhwc", torch.float64)
        truth = step(copy.deepcopy(block), x, dz)
        model = fastres.convert(nn.Sequential(block), fusion="b")[0]
        for key, value in step(model, x, dz).items():
            torch.testing.assert_close(value, truth[key], rtol=1e-9, atol=1e-11)


def test_a_second_derivative_is_refused_and_a_second_backward_runs():
    block, x, dz = case("basic", "nhwc", torch.float32)
    model = fastres.convert(nn.Sequential(block), fusion="b")[0]
    x.requires_grad_()
    (dx,) = torch.autograd.grad(model(x), x, dz, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()
    z = model(x)
    once = torch.autograd.grad(z, x, dz, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(z, x, dz)[0], once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z, x, dz)


def test_a_dispatch_mode_sees_the_ops():
    block, x, dz = case("basic", "nhwc", torch.float32)
    model = fastres.convert(nn.Sequential(block), fusion="b")[0]
    with _Watched():
        step(model, x, dz)
    assert prepared(model) == 0


def test_copies_and_pickles_start_empty():
    block, x, dz = case("basic", "nhwc", torch.float32)
    model = fastres.convert(nn.Sequential(block), fusion="b")[0]
    want = step(copy.deepcopy(model), x, dz)["x"]
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert prepared(model) == 1 and prepared(twin) == 0
        assert torch.equal(step(twin, x, dz)["x"], want)


def test_a_functional_call_is_checked_every_time():
    unit = fastres.ops.Unit(
        fastres.ops.Conv(torch.randn(8, 8, 3, 3, requires_grad=True), None, (1, 1), (1, 1)),
        fastres.ops.BatchNorm(torch.ones(8), torch.zeros(8), training=True),
    )
    x = torch.randn(2, 8, 5, 5)
    z = ops.residual_block(x, [unit])
    assert type(z.grad_fn).__name__ == "BlockNodeBackward"
    with pytest.raises(ValueError, match="x has 6 channels"):
        ops.residual_block(x[:, :6], [unit])
