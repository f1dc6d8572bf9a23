"""bench/: variants that take turns, memory that runs out, graphs, and the baselines."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastres

if not (Path(fastres.__file__).resolve().parents[1] / "bench" / "report.py").is_file():
    pytest.skip("bench/ is part of a checkout", allow_module_level=True)

from bench import cases, peers, session, timing  # noqa: E402


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError("9 GB needed, 1 GB free"),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(error):
    made, tried = session.Session(), []

    def run(batch):
        tried.append(batch)
        if batch > 64:
            raise error
        return batch

    assert made.halving("resnet50-train", 256, run) == 64
    assert tried == [256, 128, 64]
    assert made.halved == ["resnet50-train: out of memory at batch 256, ran batch 64"]
    with pytest.raises(ValueError, match="other"):
        made.halving("x", 2, lambda batch: (_ for _ in ()).throw(ValueError("other")))
    with pytest.raises(MemoryError):
        made.need(1 << 60)


@pytest.mark.parametrize("whose", ["fastres", "eager"])
def test_out_of_memory_in_the_timed_rounds_halves_the_batch(monkeypatch, whose):
    """With pytest-benchmark's own fixture, which is used once only."""
    from pytest_benchmark.fixture import BenchmarkFixture
    from pytest_benchmark.plugin import pytest_benchmark_generate_json

    monkeypatch.setattr(timing.CLOCK, "cuda", False)
    kept: list = []
    options = dict.fromkeys(inspect.signature(BenchmarkFixture).parameters)
    options |= {"add_stats": kept.append, "disabled": False, "min_time": 0, "max_time": 0}
    options["timer"] = SimpleNamespace(target=timing.timer)
    options["node"] = SimpleNamespace(name="case", nodeid="case")
    benchmark = BenchmarkFixture(**options)
    made, calls = session.Session(), {}

    def run(batch):
        def call(name):
            calls[name, batch] = calls.get((name, batch), 0) + 1
            if (name, batch) == (whose, 8) and calls[name, batch] > 6:  # after the warm-up
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        variants = [timing.Variant(n, lambda n=n: call(n)) for n in ("fastres", "eager")]
        monkeypatch.setattr(timing, "warm_up", lambda *a: 1.0)
        timing.take_turns(benchmark, variants, 8.0)
        return variants

    ours, eager = made.halving("case", 8, run)
    assert made.halved == ["case: out of memory at batch 8, ran batch 4"]
    assert calls[whose, 8] == 7 and len(ours.seconds) == len(eager.seconds) >= 5
    found = pytest_benchmark_generate_json(None, kept, False, {}, {})["benchmarks"]
    assert len(kept) == 2 and [f["stats"]["rounds"] for f in found] == [len(ours.seconds)]
    assert [bool(k) for k in kept] == [False, True]


def test_variants_take_turns_and_ratios_are_within_rounds(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.CLOCK, "cuda", False)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def runs(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    class Benchmark:
        """What take_turns needs of pytest-benchmark."""

        def __init__(self):
            data: list[float] = []
            self.stats = SimpleNamespace(stats=SimpleNamespace(data=data), iterations=1)

        def pedantic(self, target, setup, teardown, rounds):
            order.clear()
            for _ in range(rounds):
                setup()
                begin = now[0]
                target()
                self.stats.stats.data.append((now[0] - begin) / self.stats.iterations)
                teardown()

    def broken():
        raise RuntimeError("no such engine")

    variants = [
        timing.Variant("fastres", runs("fastres", 0.1)),
        timing.Variant("eager", runs("eager", 0.3)),
        timing.Variant("broken", broken),
        timing.Variant.missing("peer", "not installed"),
    ]
    timing.take_turns(Benchmark(), variants, 3.0)
    ours, eager, failed, missing = variants
    assert ours.seconds == pytest.approx([0.1] * len(ours.seconds))
    assert len(ours.seconds) == len(eager.seconds) >= timing.MIN_ROUNDS
    assert eager.seconds == pytest.approx([0.3] * len(eager.seconds))
    assert order[:4] == ["fastres", "eager", "eager", "fastres"]
    assert (failed.status, failed.reason) == ("failed", "RuntimeError: no such engine")
    assert (missing.status, missing.seconds) == ("not measured", [])


def test_all_variants_become_graphs_or_none_does():
    def capture(call, repeat):
        if call is unable:
            raise RuntimeError("operation not permitted when stream is capturing")
        return ("replay", call, repeat)

    def able():
        return None

    def unable():
        return None

    both = [timing.Variant("fastres", able), timing.Variant("eager", able, calls=2)]
    gone = timing.Variant.missing("compile", "not there")
    assert timing.graph_all([*both, gone], 8, capture) is None
    assert [v.call for v in both] == [("replay", able, 8)] * 2 and gone.call is None
    assert [v.calls for v in both] == [8, 16] and all(v.graph for v in both) and not gone.graph
    mixed = [timing.Variant("fastres", able), timing.Variant("eager", unable)]
    assert "eager cannot be captured: RuntimeError" in timing.graph_all(mixed, 8, capture)
    assert [v.call for v in mixed] == [able, unable] and not any(v.graph for v in mixed)


def test_full_times_max_autotune_beside_the_default_mode(monkeypatch):
    from bench import peers, test_blocks, test_ops

    modes, resets = [], []

    def compile_(module, mode):
        modes.append(mode)
        if mode is not None and not module.training:
            raise RuntimeError("no such kernel")
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    plain, sets = torch.nn.Conv2d(2, 2, 1), [torch.randn(1, 2, 3, 3, requires_grad=True)]
    case = SimpleNamespace(mode="train", compile=False)

    def block(**options):
        made = session.Session(**options)
        return test_blocks._compiled(case, plain, sets, made, contextlib.nullcontext)

    found = block(full=True)
    assert [v.name for v in found] == ["compile", "compile max-autotune"] == list(peers.COMPILED)
    assert modes == [None, "max-autotune-no-cudagraphs"] and len(resets) == 1
    assert all(v.status == "ok" and v.call is not None for v in found)
    (left,) = block(full=False)
    assert (left.name, left.status) == ("compile", "not measured") and len(modes) == 2
    case.mode = "inference"
    plain.eval()
    default, tuned = block(full=True)
    assert default.status == "ok" and tuned.reason == "RuntimeError: no such kernel"
    assert len(test_ops._compiled(case, plain, sets, session.Session(full=True))) == 1


def test_cudnn_sees_the_strides_of_a_1x1_weight():
    from bench.peers import _nhwc

    weight = torch.randn(6, 5, 1, 1)
    assert _nhwc(weight).stride() == (5, 1, 5, 5) and torch.equal(_nhwc(weight), weight)
    spatial = torch.randn(6, 5, 3, 2)
    assert _nhwc(spatial).stride() == (30, 1, 10, 5) and torch.equal(_nhwc(spatial), spatial)


@pytest.mark.parametrize("asked, compiled", [("", 1), ("compile", 2), ("full", 2)])
def test_compile_is_a_baseline_where_asked(asked, compiled):
    made = session.Session(**({asked: True} if asked else {}))
    some = [c for c in cases.network_cases("cpu") if c.name == "resnet18" and c.batch == 8][:2]
    assert [c.compile for c in some] == [True, False]
    reasons = [peers.not_compiled(made, c, "network") for c in some]
    assert reasons.count(None) == compiled
    assert all("--compile" in r for r in reasons if r)
