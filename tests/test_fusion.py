"""`fusion=` from the user's side: convert, the modules, the report; whole networks on Triton."""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import torch
from common import backend
from torch import Tensor, nn

import fastres
from fastres.nn import FastBottleneck
from fastres.ops import _choice, _ladder, _rung_b

torchvision = pytest.importorskip("torchvision")


def network(kind: str, stages: int = 4) -> nn.Module:
    """A ResNet; the blocks of a stage differ from kind to kind."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    torch.manual_seed(0)
    block, layers, extra = {
        "basic": (BasicBlock, [2, 1, 1, 1], {}),
        "bottleneck": (Bottleneck, [2, 1, 1, 1], {"width_per_group": 16}),
        "grouped": (Bottleneck, [2, 1, 1, 1], {"groups": 4, "width_per_group": 4}),
    }[kind]
    model = ResNet(block, layers, num_classes=10, **extra)
    for i in range(stages + 1, 5):
        setattr(model, f"layer{i}", nn.Sequential())
    model.fc = nn.Linear(64 * 2 ** (stages - 1) * block.expansion, 10)
    return model.to(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers of a training step."""
    model.train()
    loss = nn.functional.cross_entropy(model(x), torch.arange(x.shape[0]))
    loss.backward()
    out = {"loss": loss.detach()[None]}
    out |= {n: p.grad for n, p in model.named_parameters()}
    return out | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def sample(dtype=torch.float32) -> Tensor:
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind, rung", [("basic", None), ("bottleneck", "d"), ("grouped", None)])
def test_a_network_trains_on_triton(kind, rung, monkeypatch, no_vendor):
    """Every op on the Triton kernels, the stem's conv too, by use_backend alone or with a rung:
    within twice eager's error of float64, by gradient."""
    kernels = backend("triton")
    calls: dict[str, int] = {}

    def counted(name, run, *args):
        calls[name] = calls.get(name, 0) + 1
        run(*args)

    for name in ("conv_fprop", "conv_dgrad", "conv_wgrad", "conv_bwd_pointwise"):
        monkeypatch.setattr(kernels, name, functools.partial(counted, name, getattr(kernels, name)))
    model = network(kind, stages=2)  # the interpreter takes a minute for four
    truth = step(copy.deepcopy(model).double(), sample(torch.float64))
    eager = step(copy.deepcopy(model), sample())
    fastres.convert(model, fusion=rung)
    no_vendor()
    with fastres.use_backend("triton"):
        got = step(model, sample())
    assert calls["conv_fprop"] > 0 and calls["conv_wgrad"] > 0
    assert ("conv_bwd_pointwise" in calls) == (rung == "d" and kind != "basic")

    def error(v: Tensor, want: Tensor) -> float:
        return float((v.double() - want).norm() / want.norm())

    worst = max(error(eager[n], truth[n]) for n in truth)
    for n, want in truth.items():
        assert error(got[n], want) <= 2 * max(error(eager[n], want), worst / 4), n


@pytest.mark.parametrize("rung", _choice.RUNGS)
def test_convert_runs_each_layer_as_one_stage(rung, monkeypatch):
    """From c1 up the blocks of a layer are one node; on b each block is its own."""
    stages: list[int] = []
    forward = _ladder.forward

    def counted(x, *args):
        stages.append(len(args[5].main))
        return forward(x, *args)

    def counted_block(program, *args):
        stages.append(len(program.stage.main))
        return prepared(program, *args)

    prepared = _rung_b.Program.forward
    monkeypatch.setattr(_rung_b.Program, "forward", counted_block)
    module = importlib.import_module("fastres.ops.residual_stage")
    monkeypatch.setattr(module, "forward", counted)
    model = network("bottleneck").double()
    truth = step(copy.deepcopy(model), sample(torch.float64))
    with fastres.use_backend("reference"):
        got = step(fastres.convert(model, fusion=rung), sample(torch.float64))
    assert stages == ([1] * 5 if rung == "b" else [2, 1, 1, 1])
    for n, want in truth.items():
        torch.testing.assert_close(got[n], want, rtol=1e-8, atol=1e-11, msg=n)


def test_a_hook_on_a_block_keeps_its_tensors():
    model = fastres.convert(network("bottleneck").double(), fusion="d")
    seen: list[Tensor] = []
    model.layer1[0].register_forward_hook(lambda m, args, z: seen.append(z))
    truth = step(fastres.revert(copy.deepcopy(model)), sample(torch.float64))
    with fastres.use_backend("reference"):
        got = step(model, sample(torch.float64))
    assert len(seen) == 2 and seen[1].shape == (2, 256, 9, 9)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got["conv1.weight"], truth["conv1.weight"], rtol=1e-8, atol=1e-11)


def test_the_rung_can_be_changed_and_goes_with_revert():
    model = fastres.convert(network("basic"), fusion="c1")
    assert model.layer1[0]._fastres.rung == "c1"
    fastres.convert(model)
    assert model.layer1[0]._fastres.rung == "c1"
    fastres.convert(model, fusion="b")
    assert model.layer1[0]._fastres.rung == "b"
    assert copy.deepcopy(model).layer1[0]._fastres.rung == "b"
    assert fastres.convert(fastres.revert(model)).layer1[0]._fastres.rung is None


def test_the_report_names_the_rung_and_what_keeps_a_conv_from_it(monkeypatch):
    model = fastres.convert(network("grouped"), fusion="c2")
    row = next(r for r in fastres.report(model).rows if r.path == "layer1.1")
    assert 'fusion "c2" cannot run here: the cpu backend has no fused convolutions' in row.reason
    with fastres.use_backend("reference"):
        row = next(r for r in fastres.report(model).rows if r.path == "layer1.1")
        assert row.reason.endswith('fusion "c2" on channels_last activations, others are an error')
        monkeypatch.setattr(
            "fastres._reference_backend.conv_why_not",
            lambda x, w, geometry: "no groups" if geometry[-1] > 1 else None,
        )
        row = next(r for r in fastres.report(model).rows if r.path == "layer1.1")
        assert row.reason.endswith("error, conv2 on the vendor's conv (no groups)")
        model.to(memory_format=torch.contiguous_format)
        row = next(r for r in fastres.report(model).rows if r.path == "layer1.1")
        assert "the weights are NCHW and copied in every call" in row.reason


def test_the_report_names_the_convs_that_rung_d_does_not_join(monkeypatch):
    model = fastres.convert(network("bottleneck", stages=1), fusion="d")

    def said(path: str = "layer1.0") -> str:
        reason = {r.path: r.reason for r in fastres.report(model).rows}[path]
        return reason.partition("; dgrad and wgrad not in one kernel ")[2]

    assert said() == ""  # it cannot run here at all
    with fastres.use_backend("reference"):
        assert said("(model)") == ""
        assert said() == "in float32 (conv2: not a 1x1 conv of stride 1)"
        fastres.convert(model, fusion="d vendor shortcut.wgrad")
        model.layer1[0].conv1.weight.requires_grad_(False)
        assert said() == (
            "in float32 (conv1: the weight needs no gradient; conv2: not a 1x1 conv of stride 1; "
            "downsample.0: the choice gives a pass to the vendor)"
        )
        fastres.convert(model, fusion="c2")
        assert said() == ""


def test_the_report_asks_the_table_of_the_device(gpu, monkeypatch):
    """In the dtype of autocast; behind a frozen batch norm."""
    backend("triton")
    from fastres.kernels import _conv_bwd_pointwise, _conv_config

    for module in (_conv_config, _conv_bwd_pointwise):
        monkeypatch.setattr(module, "arch_of", lambda device: _conv_config.ARCHS["sm_80"])
    model = fastres.convert(network("bottleneck", stages=1), fusion="d")
    device = next(model.parameters()).device.type
    with fastres.use_backend("triton"), torch.autocast(device, torch.bfloat16):
        assert (
            fastres.report(model)
            .rows[1]
            .reason.endswith("in bfloat16 (conv2: not a 1x1 conv of stride 1)")
        )
        model.layer1[0].bn1.eval()
        model.layer1[0].bn3.eval()
        reason = fastres.report(model).rows[1].reason
        assert reason.endswith(
            "conv3: 256 output channels: dy of a frozen batch norm takes dw's registers)"
        )
        model.layer1[0].conv3.weight.data = torch.zeros(1024, 16, 1, 1)
        assert (
            "conv3: 1024 output channels: a program cannot hold"
            in fastres.report(model).rows[1].reason
        )
        monkeypatch.setattr(backend("triton"), "conv_missing", lambda device: "no table")
        assert fastres.report(model).rows[1].reason.endswith('fusion "d" cannot run here: no table')


def test_a_rung_that_cannot_run_is_an_error_that_changes_nothing():
    model = fastres.convert(network("basic"), fusion="d")
    before = {n: b.clone() for n, b in model.named_buffers() if n.startswith("layer")}
    with pytest.raises(fastres.BackendError, match=r'fusion="d" needs fused convolutions'):
        model(sample())
    assert all(torch.equal(b, model.get_buffer(n)) for n, b in before.items())


def test_a_batch_that_is_not_channels_last_is_an_error_on_a_rung_with_convs():
    model = network("basic").double().to(memory_format=torch.contiguous_format)
    fastres.convert(model, fusion="c1")
    with fastres.use_backend("reference"):
        with pytest.raises(fastres.BackendError, match=r'fusion="c1" takes channels_last'):
            model(sample(torch.float64).contiguous())
        truth = step(fastres.revert(copy.deepcopy(model)), sample(torch.float64))
        got = step(model.to(memory_format=torch.channels_last), sample(torch.float64).contiguous())
    for n, want in truth.items():
        torch.testing.assert_close(got[n], want, rtol=1e-8, atol=1e-11, msg=n)


@pytest.mark.parametrize("call", [
    lambda: fastres.convert(nn.Linear(1, 1), fusion="c3"),
    lambda: FastBottleneck(64, 16, fusion="c3"),
])  # fmt: skip
def test_an_unknown_rung(call):
    with pytest.raises(ValueError, match=r"unknown fusion 'c3'; known: b, c1, c2, d"):
        call()


def test_a_module_on_a_rung():
    torch.manual_seed(0)
    block = FastBottleneck(64, 16, fusion="d").double()
    plain = copy.deepcopy(block)
    x = (
        sample(torch.float64)[:, :1, :9, :9].expand(-1, 64, -1, -1)
        * torch.randn(1, 64, 1, 1).double()
    )
    x = x.contiguous(memory_format=torch.channels_last)
    with fastres.use_backend("reference"):
        z = block(x)
    torch.testing.assert_close(z, plain_forward(plain, x), rtol=1e-9, atol=1e-11)


def plain_forward(m: FastBottleneck, x: Tensor) -> Tensor:
    h = m.relu(m.bn1(m.conv1(x)))
    h = m.relu(m.bn2(m.conv2(h)))
    return m.relu(m.bn3(m.conv3(h)) + x)
