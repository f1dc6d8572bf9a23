"""The stem on every rung: conv, batch norm, ReLU and perhaps a max-pool on the backend's own conv;
and whole networks under use_backend("triton"), which runs no vendor's conv at all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from common import TOLERANCES, backend
from torch import Tensor, nn

import fastres
from fastres.ops import BatchNorm, Conv, conv_bn_add_relu, conv_bn_relu, conv_bn_relu_maxpool

CL = torch.channels_last
FUSIONS = (
    "b", "c1", "c2", "d", "c1 vendor stem.fprop", "c2 vendor stem.wgrad",
    "c2 vendor stem.dgrad stem.fprop",
)  # fmt: skip


class Stem(nn.Module):
    """conv, batch norm, ReLU and perhaps a max-pool in plain torch."""

    def __init__(self, pool: bool, bias: bool = False, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = (7, 2, 3) if pool else (3, 1, 1)
        self.conv = nn.Conv2d(channels, 16, *size, bias=bias)
        self.bn = nn.BatchNorm2d(16)
        self.pool = pool
        with torch.no_grad():
            for v in (self.bn.weight, self.bn.bias, self.bn.running_mean):
                v.copy_(torch.randn(16))
            self.bn.running_var.copy_(torch.rand(16) + 0.5)
        self.to(memory_format=CL)

    def forward(self, x: Tensor, fusion: str | None = "plain") -> Tensor:
        if fusion == "plain":
            z = F.relu(self.bn(self.conv(x)))
            return F.max_pool2d(z, 3, 2, 1) if self.pool else z
        conv, bn = Conv.of(self.conv), BatchNorm.of(self.bn)
        if self.pool:
            return conv_bn_relu_maxpool(x, conv, bn, fusion=fusion)
        return conv_bn_relu(x, conv, bn, fusion=fusion)


def images(dtype=torch.float64, channels: int = 3, size: tuple[int, int] = (21, 18)) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, *size, generator=g, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=CL)


def step(stem: Stem, x: Tensor, need_x: bool, *fusion) -> dict[str, Tensor]:
    """z, the gradients and the buffers."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(need_x)
    z = stem(x, *fusion)
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z.backward(g.to(z.dtype))
    out = {"z": z.detach()} | {n: p.grad for n, p in stem.named_parameters()}
    out |= {n: b.clone() for n, b in stem.named_buffers() if b.is_floating_point()}
    return out | ({"x": x.grad} if need_x else {})


@pytest.mark.parametrize("training, bias, need_x", list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_every_rung_is_exact_in_float64(pool, fusion, training, bias, need_x):
    stem = Stem(pool, bias).double().train(training)
    truth = step(copy.deepcopy(stem), images(), need_x)
    with fastres.use_backend("reference"):
        got = step(stem, images(), need_x, fusion)
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_without_a_backward(pool, fusion, training):
    stem = Stem(pool).double().train(training)
    want = copy.deepcopy(stem)(images())
    with torch.no_grad(), fastres.use_backend("reference"):
        torch.testing.assert_close(stem(images(), fusion), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", ["c1", "c2"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_a_conv_that_the_backend_refuses_stays_with_the_vendor(pool, fusion, training, monkeypatch):
    """As a block's does: images on the cuda backend."""
    from fastres import _reference_backend as module

    monkeypatch.setattr(module, "conv_why_not", lambda x, weight, geometry: "few channels")
    for name in ("conv_fprop", "conv_fprop_act", "conv_dgrad", "conv_wgrad"):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("the backend's own conv ran"))
    stem = Stem(pool).double().train(training)
    truth = step(copy.deepcopy(stem), images(), True)
    with fastres.use_backend("reference"):
        got = step(copy.deepcopy(stem), images(), True, fusion)
        with torch.no_grad():
            z = stem(images(), fusion)
    torch.testing.assert_close(z, truth["z"], rtol=1e-9, atol=1e-10)
    for name, want in truth.items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-10, msg=name)


def test_the_residual_form_in_inference():
    stem = Stem(False, channels=16).double().eval()
    x = images(channels=16)
    res = x.flip(0)
    want = F.relu(stem.bn(stem.conv(x)) + res)
    with torch.no_grad(), fastres.use_backend("reference"):
        z = conv_bn_add_relu(x, Conv.of(stem.conv), BatchNorm.of(stem.bn), res, fusion="c2")
    torch.testing.assert_close(z, want, rtol=1e-9, atol=1e-10)


def test_the_registered_ops():
    """opcheck: schema, fake implementation, autograd registration, on the reference's convs."""
    o, x = torch.ops.fastres, images().requires_grad_()
    for pool in (True, False):
        stem = Stem(pool).double()
        conv, bn = Conv.of(stem.conv), stem.bn
        vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        args = x, conv.weight, None, conv.geometry(), *vectors, True, 1e-5
        with fastres.use_backend("reference"):
            if pool:
                found = torch.library.opcheck(
                    o.conv_bn_relu_maxpool.default, (*args, 3, 2, 1, "c1")
                )
            else:
                rest = None, None, None, None, None, False, 0.0, True, True, "c2"
                found = torch.library.opcheck(o.conv_bn_act.default, (*args, *rest))
        assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("fusion", ["c1", "c2 vendor stem.wgrad"])
def test_under_compile_without_a_graph_break(fusion):
    model, x = fastres.convert(Cifar().double(), fusion=fusion), images()
    with fastres.use_backend("reference"):
        want = train(copy.deepcopy(model), x)
        got = train(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for name, value in want.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}" if name not in got else name], value)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fusion", [None, "c1"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_stem_on_triton(pool, dtype, fusion, no_vendor):
    backend("triton")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    stem = Stem(pool)
    stem.conv.to(dtype)
    truth = step(copy.deepcopy(stem).double(), images(dtype).double(), True)
    eager = step(copy.deepcopy(stem), images(dtype), True)
    no_vendor()
    with fastres.use_backend("triton"):
        got = step(stem, images(dtype), True, fusion)
    for name, want in truth.items():

        def error(v: Tensor, want=want) -> float:
            return float((v.double() - want).norm() / want.norm())

        limit = 2 * error(eager[name]) + 4 * TOLERANCES[dtype]
        assert error(got[name]) <= limit, name


# --- networks (test_fusion.py has torchvision's) --------------------------------------------------


class Cifar(nn.Module):
    """A ResNet for 32 x 32 images, its stem a fastres.nn.ConvBNReLU."""

    def __init__(self) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        torch.manual_seed(0)
        self.stem = fastres.nn.ConvBNReLU(3, 16, 3, padding=1)
        down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.layers = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2, down))
        self.fc = nn.Linear(32, 10)
        self.to(memory_format=CL)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers of a training step; the logits in inference after it."""
    loss = F.cross_entropy(model.train()(x), torch.arange(x.shape[0]))
    loss.backward()
    out = {"loss": loss.detach()[None]} | {n: p.grad for n, p in model.named_parameters()}
    out |= {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    with torch.no_grad():
        return out | {"logits": model.eval()(x)}


@pytest.mark.usefixtures("gpu")
def test_a_cifar_network_trains_on_triton_without_a_vendors_conv(no_vendor):
    backend("triton")
    x, model = images(torch.float32, size=(10, 9)), Cifar()
    truth = train(copy.deepcopy(model).double(), x.double())
    with fastres.use_backend("reference"):
        eager = train(copy.deepcopy(model), x)
    fastres.convert(model)
    no_vendor()
    with fastres.use_backend("triton"):
        got = train(model, x)

    def error(v: Tensor, want: Tensor) -> float:
        return float((v.double() - want).norm() / want.norm())

    worst = max(error(eager[n], truth[n]) for n in truth)
    for n, want in truth.items():
        assert error(got[n], want) <= 2 * max(error(eager[n], want), worst / 4), n


def network() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).to(memory_format=CL)


def test_what_cannot_run_there_is_an_error():
    """NCHW images to an NCHW model, and a pass or rung that does not exist; never another
    backend's conv."""
    backend("triton")
    model, x = fastres.convert(network()), images(torch.float32)
    model.to(memory_format=torch.contiguous_format)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with fastres.use_backend("triton"):
        with pytest.raises(
            fastres.BackendError, match=r'use_backend\("triton"\), which runs every'
        ):
            model(x.contiguous())
        with pytest.raises(ValueError, match="unknown fusion 'e'"):
            conv_bn_relu(x, Conv.of(model.conv1), BatchNorm.of(model.bn1), fusion="e")
    assert all(torch.equal(b, model.get_buffer(n)) for n, b in before.items())
    with pytest.raises(fastres.BackendError, match='fusion="c1" needs fused convolutions'):
        conv_bn_relu(x, Conv.of(model.conv1), BatchNorm.of(model.bn1), fusion="c1")
    with pytest.raises(ValueError, match=r"'stem.prop' is not a pass"):
        fastres.convert(model, fusion="c1 vendor stem.prop")


def test_rung_b_by_name_keeps_the_vendors_convs():
    """The one request under which use_backend("triton") leaves convs alone: it names them."""
    kernels = backend("triton")
    model, x = fastres.convert(network(), fusion="b"), images(torch.float32)
    with pytest.MonkeyPatch.context() as patch, fastres.use_backend("triton"):
        patch.setattr(kernels, "conv_fprop", lambda *a: pytest.fail("not the vendor's"))
        model(x)


def test_the_report_says_which_convs_are_whose():
    backend("triton")
    model = fastres.convert(network())
    with fastres.use_backend("triton"):
        rows = {r.path: r.reason for r in fastres.report(model).rows}
    assert 'fusion "c2" on channels_last' in rows["(model)"]
    assert 'fusion "c2" on channels_last' in rows["layer1.0"]
    assert "fusion" not in {r.path: r.reason for r in fastres.report(model).rows}["layer1.0"]


def test_nchw_images_of_an_nhwc_model_are_copied_and_counted():
    """What a vendor's conv does without a word: images are small beside what follows."""
    backend("triton")
    model, x = fastres.convert(network(), fusion="c1").eval(), images(torch.float32)
    fastres.counters.reset()
    with torch.no_grad(), fastres.use_backend("triton"):
        want = model.fused_forward(x)
        assert not any("images" in event for event in fastres.counters.events())
        got = model.fused_forward(x.contiguous())
    assert torch.equal(got, want)
    event = "conv_bn_relu_maxpool: a batch of images: a tensor copied to NHWC"
    assert fastres.counters.events()[event] == 1
