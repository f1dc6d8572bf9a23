"""The self-check at first use: right kernels pass quickly, wrong ones are not used."""

from __future__ import annotations

import json
import time

import cuda_host
import pytest
import torch
from common import BACKENDS, backend

import fastres
from fastres import counters, plan, selfcheck
from fastres.nn import FastBasicBlock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "ENABLED", True)
    plan.forget()
    selfcheck.forget()
    yield tmp_path
    plan.forget()
    selfcheck.forget()


ON_CPU = [name for name in BACKENDS if name != "cuda" or cuda_host.wanted()]
RIGHT = [(name, family) for name in ON_CPU for family in ("passes", "pool")]


@pytest.mark.parametrize("name, family", [*RIGHT, ("triton", "convs")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_kernels_pass(name, family, dtype):
    assert selfcheck.run(backend(name), CPU, family, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_does_not_matter(dtype):
    module = backend("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert selfcheck.run(module, CPU, "passes") is None
            assert selfcheck.run(module, CPU, "pool") is None
    finally:
        torch.set_default_dtype(before)


def test_is_quick():
    module = backend("cpu")
    start = time.perf_counter()
    assert selfcheck.run(module, CPU, "passes") is None
    assert selfcheck.run(module, CPU, "pool") is None
    assert time.perf_counter() - start < 2


BROKEN = [
    ("cpu", "passes", "bn_stats", 0), ("cpu", "passes", "bn_apply", 0),
    ("cpu", "passes", "bn_bwd_reduce", 1), ("cpu", "passes", "bn_bwd_apply", 1),
    ("cpu", "passes", "add_relu", 0), ("cpu", "passes", "relu_bwd", 0),
    ("cpu", "pool", "bn_relu_maxpool", 0), ("cpu", "pool", "bn_relu_maxpool_bwd_apply", 0),
    ("triton", "convs", "conv_fprop", 0), ("triton", "convs", "conv_dgrad", 0),
    ("triton", "convs", "conv_wgrad", 0), ("triton", "convs", "conv_bwd_pointwise", 2),
]  # fmt: skip


@pytest.mark.parametrize("name, family, kernel, output", BROKEN)
def test_a_wrong_kernel_fails(name, family, kernel, output, monkeypatch):
    """One output of one kernel off in one element."""
    module = backend(name)
    right = getattr(module, kernel)

    def wrong(*args):
        right(*args)
        out = args[output]
        out[(1, 2, 0, 0)[: out.dim()] if out.dim() == 4 else 3] += out[~out.isnan()].abs().max()

    monkeypatch.setattr(module, kernel, wrong)
    assert selfcheck.run(module, CPU, family) is not None


def test_a_kernel_that_leaves_an_output_unwritten_fails(monkeypatch):
    monkeypatch.setattr(backend("cpu"), "add_relu", lambda *args: None)
    assert "add_relu: output 0 is off by nan" in selfcheck.run(backend("cpu"), CPU, "passes")


def test_a_kernel_that_raises_fails(monkeypatch):
    def boom(*args):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(backend("cpu"), "relu_bwd", boom)
    assert selfcheck.run(backend("cpu"), CPU, "passes") == (
        "relu_bwd failed: RuntimeError: no kernel image"
    )


def test_a_pass_is_remembered_and_a_failure_is_not(cache, monkeypatch, caplog):
    module = backend("cpu")
    x = torch.zeros(1, 8, 2, 2)
    runs = []
    run = selfcheck.run
    monkeypatch.setattr(selfcheck, "run", lambda *args: runs.append(args) or run(*args))
    assert selfcheck.obstacle(x, "passes") is None
    assert selfcheck.obstacle(x, "passes") is None
    assert len(runs) == 1
    (file,) = cache.glob("checked-*.json")
    assert json.loads(file.read_text())["passed"] == ["cpu passes float32"]
    selfcheck.forget()  # another process
    assert selfcheck.obstacle(x, "passes") is None and len(runs) == 1

    monkeypatch.setattr(module, "bn_relu_maxpool", lambda *args: None)
    reason = selfcheck.obstacle(x, "pool")
    assert "the cpu kernels failed their self-check on" in reason and reason in caplog.text
    assert json.loads(file.read_text())["passed"] == ["cpu passes float32"]
    assert selfcheck.obstacle(x.double(), "pool") is None  # the reference runs that


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"identity": {}, "passed": ["cpu passes float32"]}']
)
def test_a_corrupt_or_foreign_memory_is_not_trusted(cache, text, monkeypatch):
    backend("cpu")
    who = plan.identity("cpu")
    selfcheck._file(who).write_text(text)
    runs = []
    monkeypatch.setattr(selfcheck, "run", lambda *args: runs.append(args))
    assert selfcheck.obstacle(torch.zeros(1, 8, 2, 2), "passes") is None and len(runs) == 1


def block() -> FastBasicBlock:
    torch.manual_seed(0)
    return FastBasicBlock(8, 8)


def test_a_module_whose_kernels_fail_runs_the_original(monkeypatch):
    backend("cpu")
    m, x = block(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        want = m.relu(m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x))))) + x)
    monkeypatch.setattr(backend("cpu"), "bn_apply", lambda *args: None)
    before = dict(counters.events())
    assert torch.equal(m(x), want)
    (event,) = counters.events().keys() - before.keys()
    assert "FastBasicBlock ran unfused: the cpu kernels failed their self-check" in event


def test_an_explicit_rung_whose_kernels_fail_is_an_error(monkeypatch):
    backend("triton")
    m = block()
    m._fastres.rung = "c1"
    verdict = selfcheck._verdict
    monkeypatch.setattr(
        selfcheck, "_verdict", lambda *a: "conv_fprop is off" if a[2] == "convs" else verdict(*a)
    )
    x = torch.randn(2, 8, 5, 5)
    with fastres.use_backend("triton"), pytest.raises(fastres.BackendError, match="c1.*is off"):
        m(x)


def test_a_module_that_passes_runs_fused():
    m, x = block(), torch.randn(2, 8, 5, 5, requires_grad=True)
    assert type(m(x).grad_fn).__name__ == "_EagerNodeBackward"
