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
from fastres._contract import Shortcut, Sums
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


@pytest.mark.parametrize(
    "name, family", [*RIGHT, *((name, "convs") for name in ON_CPU if name != "cpu")]
)
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
    ("triton", "convs", "conv_fprop_act", 0),
]  # fmt: skip


if cuda_host.wanted():
    BROKEN = [
        ("cuda", "passes", "bn_stats", 0), ("cuda", "passes", "bn_apply", 0),
        ("cuda", "passes", "bn_bwd_reduce", 1), ("cuda", "passes", "bn_bwd_apply", 1),
        ("cuda", "passes", "relu_bwd", 0), ("cuda", "pool", "bn_relu_maxpool", 0),
        ("cuda", "pool", "bn_relu_maxpool_bwd_apply", 0),
        *(("cuda", "convs", f"conv_{k}", 0) for k in ("fprop", "fprop_act", "dgrad", "wgrad")),
    ]  # fmt: skip

    def test_cuda_kernels_are_checked_before_their_first_use(monkeypatch):
        module, x = backend("cuda"), torch.zeros(1, 8, 2, 2)
        with fastres.use_backend("cuda"):
            assert selfcheck.obstacle(x, "passes") is None
            monkeypatch.setattr(module, "bn_relu_maxpool", lambda *args: None)
            reason = selfcheck.obstacle(x, "pool")
        assert "the cuda kernels failed their self-check" in reason

    def test_cuda_convs_run_once_they_passed_their_check():
        module = backend("cuda")
        m = block(16).bfloat16().to(memory_format=torch.channels_last)
        m._fastres.rung = "c2"
        x = torch.randn(2, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            want = m.relu(m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x))))) + x)
        runs = []
        run = module.conv_fprop
        with fastres.use_backend("cuda"), pytest.MonkeyPatch.context() as patch:
            assert selfcheck.obstacle(x, "convs") is None
            patch.setattr(module, "conv_fprop", lambda *args: runs.append(1) or run(*args))
            got = m(x)
        assert len(runs) == 2
        assert (got - want).abs().max() <= 0.03 * want.abs().max()


@pytest.mark.parametrize("precision, label", [("ieee", ""), ("tf32", " tf32")])
def test_the_convs_are_remembered_by_torchs_precision(monkeypatch, cache, precision, label):
    """Set by torch's newer API, after which its legacy flag cannot be read."""
    before = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(selfcheck, "run", lambda *args: None)
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        with fastres.use_backend("triton"):
            assert selfcheck.obstacle(torch.zeros(1, 8, 2, 2), "convs") is None
    finally:
        torch.backends.cudnn.allow_tf32 = before
    kept = [p.read_text() for p in cache.rglob("*") if p.is_file()]
    assert f'triton convs float32 v{selfcheck.VERSION}{label}"' in "".join(kept)


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
    dtype = torch.bfloat16 if (name, family) == ("cuda", "convs") else torch.float32
    assert selfcheck.run(module, CPU, family, dtype) is not None


def _dual(args):
    """The shortcut's own batch norm among a call's arguments."""
    return any(getattr(a, "shortcut", None) is not None for a in args) or any(
        isinstance(a, Shortcut) and a.norm is not None for a in args
    )


# (backend, family, kernel, the form that is broken: picks the calls, and the arguments to spoil)
FORMS = {
    "dual shortcut forward": ("cpu", "passes", "bn_apply", lambda a: a[8] is not None, 0),
    "mask bits": ("cpu", "passes", "bn_apply", lambda a: a[1] is not None, 1),
    "in place": ("cpu", "passes", "bn_apply", lambda a: a[0] is a[2], 0),
    "recompute, reduce": ("cpu", "passes", "bn_bwd_reduce", lambda a: a[-1] == "recompute", 0),
    "dual, reduce": ("cpu", "passes", "bn_bwd_reduce", lambda a: a[2] is not None, 2),
    "recompute, apply": ("cpu", "passes", "bn_bwd_apply", lambda a: a[16] == "recompute", 0),
    "dres of x": ("cpu", "passes", "bn_bwd_apply", lambda a: a[1] is not None and a[11] is None, 1),
    "dres of bn": ("cpu", "passes", "bn_bwd_apply", lambda a: a[11] is not None, 1),
    "frozen": ("cpu", "passes", "bn_bwd_apply", lambda a: not a[17], 0),
    "add_relu's bits": ("cpu", "passes", "add_relu", lambda a: a[1] is not None, 1),
    "relu_bwd onto dy": ("cpu", "passes", "relu_bwd", lambda a: a[1] is not None, 0),
    "side output": ("triton", "convs", "conv_fprop", lambda a: a[2] is not None, 2),
    "side output's bits": ("triton", "convs", "conv_fprop", lambda a: a[3] is not None, 3),
    "dual prologue": ("triton", "convs", "conv_fprop", _dual, 0),
    "act": ("triton", "convs", "conv_fprop_act", lambda a: a[5] is not None and a[6], 0),
    "dres and gate, joint": (
        "triton", "convs", "conv_bwd_pointwise", lambda a: a[9] and a[3].mask is not None, 0
    ),
    "dual sums, joint": ("triton", "convs", "conv_bwd_pointwise", _dual, 1),
    "frozen conv": ("triton", "convs", "conv_dgrad", lambda a: a[5] and not a[5].training, 0),
    "recompute, dgrad": ("triton", "convs", "conv_dgrad", lambda a: a[7] and a[7].mask is None, 0),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_wrong_fails(form, monkeypatch):
    """Each form of a kernel that the ladder runs, broken alone: a few elements of one output."""
    name, family, kernel, chosen, output = FORMS[form]
    module = backend(name)
    right, hits = getattr(module, kernel), []

    def wrong(*args):
        right(*args)
        if chosen(args):
            hits.append(1)
            out = args[output]
            out = out.res_dgamma if isinstance(out, Sums) else out
            flat = out.permute(0, 2, 3, 1).reshape(-1) if out.dim() == 4 else out.view(-1)
            if out.dtype == torch.uint8:
                flat[3] ^= 4
            else:
                out[(0, 1, 0, 0)[: out.dim()] if out.dim() == 4 else 1] += out.abs().max()

    monkeypatch.setattr(module, kernel, wrong)
    assert selfcheck.run(module, CPU, family) is not None and hits


@pytest.mark.parametrize("kernel", ["conv_fprop", "conv_dgrad", "conv_wgrad"])
@pytest.mark.parametrize("form", ["groups", "images"])
def test_kernels_of_groups_and_of_images_are_checked(kernel, form, monkeypatch):
    """They are code of their own: the others' being right says nothing of them."""
    if (kernel, form) == ("conv_dgrad", "images"):
        pytest.skip("images take the dgrad of all convs")
    module = backend("triton")
    run = getattr(module, kernel)

    def wrong(out, *args):
        run(out, *args)
        geometry = next(a for a in args if isinstance(a, list))
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 4]
        if geometry[-1] > 1 if form == "groups" else any(t.shape[1] == 3 for t in tensors):
            out[:, 2] *= 1.2  # channel 1 is gated away

    monkeypatch.setattr(module, kernel, wrong)
    reason = selfcheck.run(module, CPU, "convs")
    assert reason is not None and f"conv of {form}" in reason


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
    assert json.loads(file.read_text())["passed"] == ["cpu passes float32 v5"]
    selfcheck.forget()  # another process
    assert selfcheck.obstacle(x, "passes") is None and len(runs) == 1

    monkeypatch.setattr(module, "bn_relu_maxpool", lambda *args: None)
    reason = selfcheck.obstacle(x, "pool")
    assert "the cpu kernels failed their self-check on" in reason and reason in caplog.text
    assert json.loads(file.read_text())["passed"] == ["cpu passes float32 v5"]
    assert selfcheck.obstacle(x.double(), "pool") is None  # the reference runs that


def test_a_full_disk_is_left_as_it_was(cache, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    backend("cpu")
    monkeypatch.setattr(type(cache), "replace", full)
    assert selfcheck.obstacle(torch.zeros(1, 8, 2, 2), "passes") is None
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"identity": {}, "passed": ["cpu passes float32 v5"]}']
)
def test_a_corrupt_or_foreign_memory_is_not_trusted(cache, text, monkeypatch):
    backend("cpu")
    who = plan.identity("cpu")
    selfcheck._file(who).write_text(text)
    runs = []
    monkeypatch.setattr(selfcheck, "run", lambda *args: runs.append(args))
    assert selfcheck.obstacle(torch.zeros(1, 8, 2, 2), "passes") is None and len(runs) == 1


def block(channels: int = 8) -> FastBasicBlock:
    torch.manual_seed(0)
    return FastBasicBlock(channels, channels)


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
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    with fastres.use_backend("triton"), pytest.raises(fastres.BackendError, match="c1.*is off"):
        m(x)


def test_a_module_that_passes_runs_fused():
    m, x = block(), torch.randn(2, 8, 5, 5, requires_grad=True)
    assert type(m(x).grad_fn).__name__ == "BlockNodeBackward"
