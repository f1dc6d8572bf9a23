"""Inference on the ladder: batch norms on running statistics are made ready once, and anew when
anything that they were made from changes."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from common import backend
from torch import nn

import fastres
from fastres.nn import FastBottleneck
from fastres.ops import _fixed, _ladder

CASES = [
    ("reference", torch.float64, "b"),
    ("reference", torch.float64, "d"),
]


def block(dtype: torch.dtype, rung: str) -> FastBottleneck:
    torch.manual_seed(0)
    m = FastBottleneck(32, 8, fusion=rung).to(dtype).to(memory_format=torch.channels_last)
    for bn in (m.bn1, m.bn2, m.bn3):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            bn.weight.uniform_(0.5, 2)
            bn.bias.normal_()
    return m.eval()


def sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, 32, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)


def expected(m: FastBottleneck, x: torch.Tensor) -> torch.Tensor:
    m, x = copy.deepcopy(m).double(), x.double()
    h = m.bn1(m.conv1(x)).relu()
    h = m.bn2(m.conv2(h)).relu()
    return (m.bn3(m.conv3(h)) + x).relu()


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """One entry for each time that running statistics are made ready."""
    count: list[int] = []
    for module in (_fixed, _ladder):
        run = module.running_statistics
        monkeypatch.setattr(
            module, "running_statistics", lambda *a, run=run: (count.append(1), run(*a))[1]
        )
    return count


def replaced(m):
    m.bn2.running_var = m.bn2.running_var * 3


def loaded(m):
    m.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in m.state_dict().items()})


def by_data(m):
    m.bn1.running_mean.data.add_(1.0)
    fastres.invalidate(m)


def trained(m):
    m.bn1.train()
    m(sample(m.conv1.weight.dtype))
    m.eval()


def another_parameter(m):
    m.bn3.weight = nn.Parameter(m.bn3.weight.detach() * 2)


CHANGES = {
    "running_mean": lambda m: m.bn1.running_mean.add_(1.0),
    "running_var": lambda m: m.bn3.running_var.mul_(2.0),
    "gamma": lambda m: m.bn2.weight.data_ptr() and m.bn2.weight.mul_(-1.5),
    "beta": lambda m: m.bn2.bias.add_(1.0),
    "eps": lambda m: setattr(m.bn2, "eps", 0.5),
    "a new buffer": replaced,
    "a new parameter": another_parameter,
    "parameter.data = ...": lambda m: setattr(m.bn1.weight, "data", m.bn1.weight.data * 2),
    "load_state_dict": loaded,
    ".data and invalidate": by_data,
    "a training step": trained,
}


@pytest.mark.parametrize(
    "name, dtype, rung, change",
    [
        *((*case, change) for change in CHANGES for case in CASES),
        ("triton", torch.float32, "c1", "running_var"),
    ],
)
def test_made_once_and_anew_after_a_change(name, dtype, rung, change, made):
    if name == "triton":
        backend(name)
    m, x = block(dtype, rung), sample(dtype)
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-9} if name == "reference" else {"rtol": 1e-4, "atol": 1e-4}
    )
    with torch.no_grad(), fastres.use_backend(name):
        for _ in range(3):
            torch.testing.assert_close(m(x).double(), expected(m, x), **tolerance)
        assert len(made) == 3  # one for each batch norm
        before = m(x)
        CHANGES[change](m)
        del made[:]
        z = m(x)
        assert not torch.allclose(z, before)
        torch.testing.assert_close(z.double(), expected(m, x), **tolerance)
        assert len(made) >= 1 or change in ("gamma", "beta")
        del made[:]
        m(x)
        assert not made


def test_a_copy_and_a_training_forward_make_their_own(made):
    m, x = block(torch.float64, "c1"), sample(torch.float64)
    with fastres.use_backend("reference"):
        with torch.no_grad():
            m(x)
            other = copy.deepcopy(m)
            other.bn1.running_mean.add_(1.0)
            torch.testing.assert_close(other(x), expected(other, x))
            torch.testing.assert_close(m(x), expected(m, x))
        del made[:]
        m(x).sum().backward()  # frozen batch norms with a backward
        assert len(made) == 3


@pytest.mark.parametrize("outer", [torch.inference_mode, contextlib.nullcontext])
def test_under_inference_mode(outer, made):
    """What is made there serves a later no_grad forward; inference tensors cannot be watched."""
    x = sample(torch.float64)
    m = block(torch.float64, "c1")
    with fastres.use_backend("reference"), torch.no_grad():
        with outer():
            m(x)
        m(x)
        assert len(made) == 3
        with torch.inference_mode():
            m.bn1.running_mean = m.bn1.running_mean.clone()
            for shift in (0.0, 1.0):
                m.bn1.running_mean.add_(shift)
                torch.testing.assert_close(m(x), expected(m, x))


def test_nothing_is_kept_of_a_model_that_is_gone():
    with fastres.use_backend("reference"), torch.no_grad():
        m = block(torch.float64, "c1")
        keys = {id(bn.running_var) for bn in (m.bn1, m.bn2, m.bn3)}
        m(sample(torch.float64))
        assert keys <= set(_fixed._entries)
        del m
        gc.collect()
    assert not keys & set(_fixed._entries)
