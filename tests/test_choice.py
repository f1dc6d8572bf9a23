"""Choices that name the `cuda` backend's convolutions, on a native module that notes what it is
called with: what a call asks of Python and of that module, and torch.compile."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_cuda_tiles import (  # noqa: F401 (native: a fixture)
    POINT,
    TALL,
    Native,
    blocks,
    native,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fastres
from fastres import _cuda, _cuda_tiles
from fastres.ops import _choice, _ladder


def test_a_second_call_reads_no_name_and_asks_for_no_list(native):  # noqa: F811
    """Host time at small batches: 4 bottlenecks took 2.1 ms of it for 0.7 ms."""
    tiles = f"conv1.fprop={POINT[0]} conv2.dgrad={TALL} conv2.fprop={TALL} conv3.wgrad"
    model, x = blocks()
    fastres.convert(model, fusion=f"c2 vendor conv1.wgrad cuda {tiles}")
    counts = []
    for _ in range(2):
        model(x.requires_grad_()).float().sum().backward()
        counts.append((_choice._kept.cache_info().misses, native.listed))
    assert counts[0] == counts[1] and native.listed > 0
    ran = [args[-5] for name, args in native.launched if name == "conv_fprop"]
    assert ran == [2, 2]


def test_configs_without_the_kernels_is_an_error(monkeypatch):
    monkeypatch.setattr(_cuda, "_host", None)
    monkeypatch.setattr(_cuda, "built", lambda: "fastres._C was built without them: no nvcc")
    x, w = blocks()[1], torch.empty(16, 64, 1, 1)
    with pytest.raises(fastres.BackendError, match=r"configs: .*without them: no nvcc"):
        _cuda_tiles.configs("fprop", x, w, [1, 1, 0, 0, 1, 1, 1])


def test_what_one_build_lacks_is_not_said_of_another(native, monkeypatch):  # noqa: F811
    """Answers are kept; tests take the kernels away, and stand others in for them."""
    choice, x = _choice.parse(f"c2 cuda conv1.fprop={TALL}"), blocks()[1]
    like = torch.empty(16, 64, 1, 1, dtype=x.dtype), [1, 1, 0, 0, 1, 1, 1]
    assert _cuda.conv_why_not(x, *like) is None and _ladder.cuda_reason(choice, x) is None
    refusing = Native()
    refusing.conv_why_not = lambda *_: "too large"
    monkeypatch.setattr(_cuda, "_host", refusing)
    assert _cuda.conv_why_not(x, *like) == "too large"
    monkeypatch.setattr(_cuda, "_host", None)
    said = []
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype)
    for why in ("no nvcc", "no CUTLASS"):
        monkeypatch.setattr(_cuda, "built", lambda why=why: why)
        said.append((_cuda.conv_why_not(x, *like), _ladder.cuda_reason(choice, on_gpu)))
    assert said == [("no nvcc",) * 2, ("no CUTLASS",) * 2]


def test_code_for_a_family_runs_on_its_newer_members():
    """FASTRES_CUDA_ARCHS=100f: sm_103 too, but neither an older member nor another family."""
    for capability, runs in (((10, 0), True), ((10, 3), True), ((9, 0), False), ((12, 0), False)):
        reason = _cuda.driver_obstacle(12080, 12090, capability, "100f ptx80")
        assert runs == (reason is None)
    assert _cuda.driver_obstacle(12080, 12090, (10, 0), "103f ptx80") is not None
    assert _cuda.driver_obstacle(12080, 12090, (10, 3), "100a ptx80") is not None


def compiled(fusion: str):
    """(module, the same compiled for any batch size, what counts compilations). aot_eager: the ops'
    fake implementations are what matters."""
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    model = fastres.convert(blocks()[0], fusion=fusion)
    return model, torch.compile(model, dynamic=True, fullgraph=True, backend=count), count


def test_a_compiled_choice_takes_any_batch(native, recwarn):  # noqa: F811
    """Sizes are open to the fake implementations, and stay so: the second is not compiled."""
    fusion = f"c2 vendor conv1.wgrad cuda all conv2.dgrad={TALL}"
    (model, step, count), x = compiled(fusion), blocks()[1]
    for batch in (x, torch.cat([x, x, x])):
        seen, ran = count.frame_count, []
        for call in (model, step):
            native.launched.clear()
            h = batch.detach().requires_grad_()
            z = call(h)
            z.float().sum().backward()
            grads = [h.grad, *(p.grad for p in model.parameters())]
            model.zero_grad()
            launches = Counter((name, args[-5]) for name, args in native.launched)
            ran.append((launches, [(t.shape, t.stride()) for t in (z, *grads)]))
        assert ran[0] == ran[1] and ran[0][0]["conv_dgrad", 2] == 1
    assert 0 < seen == count.frame_count
    assert not [w.message for w in recwarn if "lru_cache" in str(w.message)]


def test_a_compiled_choice_that_cannot_be_met_is_an_error(native, monkeypatch):  # noqa: F811
    """Where the ops run: a model may be exported for a device that is not here."""
    monkeypatch.setattr(_cuda, "_host", None)
    monkeypatch.setattr(_cuda, "built", lambda: "fastres._C was built without them: no nvcc")
    _, step, count = compiled("c2 cuda all")
    with (
        torch.no_grad(),
        pytest.raises(fastres.BackendError, match=r"kernels take CUDA tensors, not cpu"),
    ):
        step(blocks()[1])
    assert count.frame_count and not native.launched
