"""Environment of the test run, set before torch or triton is imported by a test."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # `from common import ...`
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import cuda_host  # noqa: E402
import pytest  # noqa: E402

# No user's plan decides what the tests run.
os.environ["FASTRES_CACHE"] = tempfile.mkdtemp(prefix="fastres-tests-")
# Small blocks are what the tests train: fused, but where a test says otherwise.
os.environ["FASTRES_SMALL_BLOCK"] = "0"
# Tests break kernels on purpose; tests/test_selfcheck.py turns this on.
os.environ["FASTRES_SELFCHECK"] = "0"

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

# Triton reads this when it is first imported. With a GPU the kernels run on the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# xdist workers are processes: together they should not ask for more threads than there are cores.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


class OnGpu(TorchFunctionMode):
    """New tensors are made on the GPU; random ones are drawn by their CPU generator, then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        drawn = kwargs.get("generator") is not None
        kwargs["device"] = "cpu" if drawn else "cuda"
        made = func(*args, **kwargs)
        return made.to("cuda") if drawn else made


@pytest.fixture
def gpu():
    """The one place where a test of the GPU kernels gets its device: the GPU where there is one.

    Without TF32: the tests of fp32 compare fp32."""
    from fastres.kernels import interpreting

    if not torch.cuda.is_available() or interpreting() or cuda_host.wanted():
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with OnGpu():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _gpu_for_triton(request):
    """Every test with a parameter that names a GPU backend takes `gpu`."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    named = [n for v in params.values() for n in (v, getattr(v, "backend", None))]
    if "triton" in named or "cuda" in named:
        request.getfixturevalue("gpu")


@pytest.fixture
def no_vendor(monkeypatch):
    """A call, from which on every way to a vendor's conv, or to the C++ kernels, fails the test."""

    def fail(*args, **kwargs):
        pytest.fail("a vendor's conv, or another backend, ran")

    def arm() -> None:
        from fastres import _cpu, _reference_conv
        from fastres.ops import (
            _ladder,
            _ladder_bwd,
            _one_conv,
            _rung_b,
            _units,
            conv_bn,
            residual_stage,
        )

        for module in (_units, _ladder, _ladder_bwd, _one_conv, _rung_b, conv_bn, residual_stage):
            for name in ("conv_fwd", "conv_bwd", "fprop_of", "backward_of"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, fail)
        for owner, names in (
            (_cpu, ("bn_stats", "bn_apply", "bn_bwd_reduce", "bn_relu_maxpool")),
            (_reference_conv, ("_conv", "_conv_bwd")),
            (torch, ("conv2d", "convolution")),
            (torch.nn.functional, ("conv2d",)),
            (torch.nn.Conv2d, ("_conv_forward",)),
            (torch.ops.aten, ("convolution", "convolution_backward")),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, fail)

    return arm


@pytest.fixture
def poisoned():
    """Fresh memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
