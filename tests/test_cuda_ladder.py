"""The fusion ladder on the CUDA C++ backend, through `convert`: on a Hopper GPU, and on the host
shim (tests/test_cuda_host.py). Thin, as the kernels have their own tests: one network on each rung,
whose convs are pointwise, CUTLASS's (3x3, a strided projection) and, grouped, the vendor's."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from common import cuda_convs
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, resnet18

import fastres
from fastres import _cuda, _cuda_cutlass, _cuda_pointwise

CONVS = ("conv_fprop", "conv_dgrad", "conv_wgrad")


@pytest.fixture
def cuda(gpu):
    return cuda_convs()


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each kernel family ran each pass."""
    found: Counter = Counter()
    for module in (_cuda_pointwise, _cuda_cutlass):
        for name in CONVS:
            run, family = getattr(module, name), module.__name__.rpartition("_")[2]

            def counted(*args, run=run, what=f"{family} {name}"):
                found[what] += 1
                return run(*args)

            monkeypatch.setattr(module, name, counted)
    return found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Conv2d(64, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    blocks = Bottleneck(64, 16), Bottleneck(64, 16, 2, projection), Bottleneck(64, 16, groups=2)
    return nn.Sequential(*blocks).half().to(memory_format=torch.channels_last)


def sample() -> Tensor:
    x = torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    return x.half().contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = model(x)
    z.double().square().mean().backward()
    return {"z": z.detach(), "dx": x.grad} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("rung", ["c1", "c2", "d", None], ids=lambda r: f"cuda-{r or 'default'}")
def test_a_network_trains_on_each_rung(cuda, calls, rung):
    model = network()
    truth = step(copy.deepcopy(model).double(), sample().double())
    eager = step(copy.deepcopy(model), sample())
    fastres.convert(model, fusion=rung)
    with fastres.use_backend("cuda"):
        got = step(model, sample())
    # of 10 convs, 6 are 1x1 of stride 1, the grouped one is the vendor's
    want = {"pointwise": 6, "cutlass": 3}
    assert calls == {f"{f} {name}": n for f, n in want.items() for name in CONVS}

    def error(v: Tensor, want: Tensor) -> float:
        return float((v.double() - want).norm() / want.norm())

    worst = max(error(eager[n], truth[n]) for n in truth)
    for n, want in truth.items():  # 48 pixels behind layer 2: a few gates that flip are 3%
        assert error(got[n], want) <= max(2 * error(eager[n], want), worst), n


def test_inference_runs_on_its_convs(cuda, monkeypatch):
    model, x, ran = network().eval(), sample(), []
    for module in (_cuda_pointwise, _cuda_cutlass):
        run = module.conv_fprop_act
        monkeypatch.setattr(
            module, "conv_fprop_act", lambda *a, run=run, m=module: (ran.append(m), run(*a))
        )
    with torch.no_grad():
        truth, eager = copy.deepcopy(model).double()(x.double()), model(x)
        with fastres.use_backend("cuda"):
            got = fastres.convert(model)(x)
    assert (ran.count(_cuda_pointwise), ran.count(_cuda_cutlass)) == (6, 3)
    assert (got.double() - truth).norm() <= 2 * (eager.double() - truth).norm()


def test_a_stem_of_images_is_the_vendors(cuda, calls):
    """3 channels; the blocks behind it are the kernels'."""
    torch.manual_seed(0)
    model = resnet18(num_classes=4).half().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 32).half().contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fastres.use_backend("cuda"):
        want = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        fastres.convert(model)
        reason = fastres.report(model).rows[0].reason
        model.layer2, model.layer3, model.layer4 = (torch.nn.Identity() for _ in range(3))
        model.avgpool = model.layer1 = torch.nn.Identity()
        model.fc = torch.nn.Identity()
        z = model(x)
    assert "conv1 on the vendor's conv (channels 3 and 64" in reason and not calls
    torch.testing.assert_close(z.view_as(want), want, rtol=5e-3, atol=5e-3)


def test_the_report_says_what_each_conv_runs_on(cuda):
    model = fastres.convert(network())
    with fastres.use_backend("cuda"):
        rows = [r.reason for r in fastres.report(model).rows]
    assert all('fusion "c2"' in r and "conv1 on the pointwise kernels" in r for r in rows)
    assert "conv2 on CUTLASS's kernels (not a 1x1 conv of stride 1 and one group)" in rows[0]
    assert "downsample.0 on CUTLASS's kernels" in rows[1]
    assert "conv2 on the vendor's conv (groups=2: the kernels take one group)" in rows[2]


def test_a_card_without_its_convs_keeps_the_vendors_and_says_so(cuda, calls, monkeypatch):
    monkeypatch.setattr(_cuda, "conv_missing", lambda device: "an A100 is sm_80")
    model = fastres.convert(network())
    with fastres.use_backend("cuda"):
        step(model, sample())
        rows = [r.reason for r in fastres.report(model).rows]
    assert not calls and all("the convs are the vendor's: an A100 is sm_80" in r for r in rows)


def test_a_batch_that_is_not_channels_last_is_an_error(cuda):
    model = fastres.convert(network())
    with (
        fastres.use_backend("cuda"),
        pytest.raises(fastres.BackendError, match=r'use_backend\("cuda"\).*channels_last'),
    ):
        model(sample().contiguous())
