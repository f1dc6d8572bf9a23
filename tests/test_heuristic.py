"""Untuned, a block too small to gain by fusion trains as it was (fastres._heuristic)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastres
from fastres import _heuristic, plan
from fastres._chosen import choice_of

torchvision = pytest.importorskip("torchvision")
BasicBlock, Bottleneck = torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck
CL = torch.channels_last
LIMIT = 1_000_000


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr(_heuristic, "SMALL", LIMIT)


def fused(channels: int, out: int | None = None) -> nn.Module:
    short = None
    if out is not None:
        short = nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))
    block = BasicBlock(channels, out or channels, 1 if out is None else 2, short)
    return fastres.convert(nn.Sequential(block)).to(memory_format=CL)


def batch(n: int, c: int, size: int) -> torch.Tensor:
    return torch.randn(n, c, size, size).contiguous(memory_format=CL)


@pytest.mark.parametrize(
    "channels, out, x, expected",
    [  # outputs of the convs: 2 (3 with a projection) x N x K x H x W
        (12, None, (40, 12, 32, 32), plan.EAGER),  # 0.98 million
        (12, None, (41, 12, 32, 32), "b"),  # 1.01
        (12, 14, (93, 12, 32, 32), plan.EAGER),  # 1.00
        (12, 14, (94, 12, 32, 32), "b"),  # 1.01
        (64, None, (2, 64, 16, 16), "b"),  # small, but Winograd's algorithm runs
    ],
)
def test_the_choice(channels, out, x, expected):
    model = fused(channels, out)
    choice, why = choice_of(model[0], batch(*x[:3]))
    assert choice == expected
    if expected == plan.EAGER:
        assert "heuristic" in why and "million conv outputs" in why and "1.00" in why


def test_autocast_and_winograd_off_are_seen(monkeypatch):
    model, x = fused(72), batch(1, 72, 16)
    assert choice_of(model[0], x)[0] == "b"
    with torch.autocast("cpu", torch.bfloat16):  # too few tiles for Winograd's algorithm in bf16
        assert choice_of(model[0], x.bfloat16())[0] == plan.EAGER
    monkeypatch.setenv("FASTRES_WINOGRAD", "0")
    model = fused(72)
    assert choice_of(model[0], x)[0] == plan.EAGER


def test_a_large_weight_that_runs_as_a_matrix_product_is_worth_it():
    model = fastres.convert(nn.Sequential(Bottleneck(2048, 512))).to(memory_format=CL)
    assert choice_of(model[0], batch(1, 2048, 7))[0] == "b"
    model = fastres.convert(nn.Sequential(Bottleneck(64, 16))).to(memory_format=CL)
    assert choice_of(model[0], batch(1, 64, 7))[0] == plan.EAGER


def test_a_small_block_trains_as_it_was_and_the_report_says_so():
    model = fused(16)
    original = fastres.revert(copy.deepcopy(model))
    x = batch(2, 16, 8)
    z, expected = model(x), original(x)
    assert type(z.grad_fn).__name__ == type(expected.grad_fn).__name__ != "BlockNodeBackward"
    assert torch.equal(z, expected)
    assert "training on 2x16x8x8: eager (heuristic" in str(fastres.report(model))
    z.sum().backward()
    expected.sum().backward()
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_inference_an_explicit_rung_and_a_measurement_are_not_touched(tmp_path, monkeypatch):
    model, x = fused(16), batch(2, 16, 8)
    with torch.no_grad():
        assert choice_of(model[0], x)[0] == "b"
    explicit = fastres.convert(nn.Sequential(BasicBlock(16, 16)), fusion="b").to(memory_format=CL)
    assert choice_of(explicit[0], x) == ("b", "explicit")
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    plan.forget()
    try:
        here = fastres._chosen.plan_key(model[0], x, True)
        plan.current(x.device).add({here: plan.Entry("b", {"b": 1.0}, 1.5)})
        assert choice_of(model[0], x)[1].startswith("cache")
    finally:
        monkeypatch.undo()
        plan.forget()


def test_bad_input_is_the_same_error():
    model = fused(16)
    with pytest.raises(ValueError, match="x has 8 channels"):
        model(batch(2, 8, 8))
    with pytest.raises(ValueError, match="4-d"):
        model(torch.randn(16, 8, 8))


def test_the_limit_is_a_number_of_values():
    def run(text: str) -> subprocess.CompletedProcess[str]:
        code = "from fastres import _heuristic; print(_heuristic.SMALL)"
        env = {**os.environ, "FASTRES_SMALL_BLOCK": text}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run("123").stdout == "123\n"
    assert "FASTRES_SMALL_BLOCK must be a number of values, got '4MB'" in run("4MB").stderr
