"""What the run-book does on a card and not in a dry run, with torch.cuda stood in for: tensors are
on the CPU, a capture runs its calls (and puts back what they changed: on a GPU nothing runs), a
replay runs them again. And a machine that takes the module of an earlier one, as it is."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import graphs

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "gpu").is_dir():
    pytest.skip("bench/ is part of a checkout", allow_module_level=True)

from bench.gpu import cases as lib  # noqa: E402
from bench.gpu import checks, device, kernels, nets, networks, record, work  # noqa: E402


class Cuda:
    """torch.cuda of a card that is not there."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.changed: list[Tensor] = []  # by a capture's calls
        self.replay = lambda: None
        self.pool = object()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: self.did.append("wait"))
        card = SimpleNamespace(L2_cache_size=1 << 20)
        fakes = {
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.replay()),
            "Event": Event, "Stream": lambda: stream, "current_stream": lambda: stream,
            "device": lambda where: contextlib.nullcontext(),
            "empty_cache": lambda: self.did.append("empty"),
            "get_device_properties": lambda number: card,
            "get_rng_state": lambda where: torch.get_rng_state(),
            "graph": self.graph, "graph_pool_handle": lambda: self.pool,
            "max_memory_allocated": lambda: 700, "memory_allocated": lambda: 200,
            "reset_peak_memory_stats": lambda: self.did.append("reset"),
            "set_rng_state": lambda state, where: torch.set_rng_state(state),
            "stream": lambda s: contextlib.nullcontext(), "synchronize": lambda: None,
        }  # fmt: skip
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def graph(self, captured, pool=None):
        assert pool in (None, self.pool)
        before = [t.detach().clone() for t in self.changed]
        self.did.append("capture")
        yield
        with torch.no_grad():
            for tensor, value in zip(self.changed, before, strict=True):
                tensor.copy_(value)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at) + 1e-6


class Card(device.Device):
    """Device of a real run, but for where its tensors are and whether they still can be used."""

    def __init__(self) -> None:
        super().__init__(dry=False)
        self.type, self.torch = "cpu", torch.device("cpu")

    def broken(self) -> str | None:
        return None


@pytest.fixture
def cuda(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a card is there")
    found = Cuda()
    found.install(monkeypatch)
    return found


@pytest.fixture
def card(cuda, monkeypatch):
    """With the dry run's networks and cases, and few rounds."""
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # as a dry run: more would wait for each other
    small, dry_cases = networks.network, kernels.all_cases(True)
    monkeypatch.setattr(nets, "network", lambda name, dry: small(name, True))
    monkeypatch.setattr(nets, "SIZE", networks.DRY_SIZE)
    monkeypatch.setattr(nets, "ROUNDS", 3)
    monkeypatch.setattr(nets, "CHECKED", 2)
    monkeypatch.setattr(nets, "MEMORY_BATCH", 2)
    monkeypatch.setattr(kernels, "all_cases", lambda dry: dry_cases)
    monkeypatch.setattr(kernels, "ROUNDS", 3)
    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(record, "smi", lambda: {"uuid": "GPU-1"})
    yield Card()
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


def test_operands_rotate_past_the_cache(card):
    assert [card.sets(n) for n in (1, 1 << 20, 1 << 19, 1 << 30)] == [device.MAX_SETS, 3, 5, 2]
    assert card.peak(lambda: None) == 500


def test_a_network_is_timed_eagerly_and_as_graphs_of_one_pool(card, cuda, tmp_path, monkeypatch):
    pools, real = [], fastres.graph

    def graph(*args, pool, **kwargs):
        pools.append(pool)
        return real(*args, pool=pool, **kwargs)

    monkeypatch.setattr(fastres, "graph", graph)
    config = nets.Config("resnet50", 2, "train", (nets.EAGER, nets.RUNGS[0], nets.CUDA[1]))
    names = [f"{config.name}|{v.name}" for v in config.variants[1:]]
    checked = nets.train_job(card, names[0])
    assert checked["checks"] and all(c["quantity"] for c in checked["checks"])
    with pytest.raises(RuntimeError, match="cuda"):
        nets.train_job(card, names[1])
    rec = record.Record(tmp_path, "train", False, 60.0, "a test")
    answers = {name: {"ok": True} for name in names}
    rows = {
        r["variant"]: r
        for r in nets.measure(card, rec, config, answers, {"bandwidth": 1e10, "rate": 1e10})
    }
    assert {name: r["status"] for name, r in rows.items()} == {
        "eager bf16": "ok", "eager bf16 +graph": "ok", "fastres b": "ok",
        "fastres b +graph": "ok", "fastres cuda c2": "failed",
    }  # fmt: skip
    assert pools == [None, cuda.pool, cuda.pool]  # the worker's is its own
    ours = rows["fastres b"]
    assert 0 < ours["us_q1"] <= ours["us"] and ours["img/s"] == pytest.approx(
        2e6 / ours["us"], 1e-4
    )
    assert ours["against"]["best baseline"]["name"] == "eager bf16" and ours["percent"] > 0


def test_memory_is_read_off_the_allocator(card, tmp_path):
    rec = record.Record(tmp_path, "memory", False, 60.0, "a test")
    nets.memory(card, rec)
    rows = {r["variant"]: r for r in rec.rows if r["model"] == "resnet18"}
    assert {r["peak"] for r in rows.values() if "peak" in r} == {500}
    assert rows["fastres b"]["saved_x"] < rows["eager bf16"]["saved_x"] == 1
    assert "error" in rows["fastres cuda c2"] and rec.found["clocks"] == [{"uuid": "GPU-1"}]


def test_a_kernel_is_timed_as_a_graph_over_its_sets(card, cuda):
    case = next(c for c in kernels.all_cases(False) if c.op == "wgrad")
    verdicts = kernels.run_job(card, case.name)["variants"]
    good = [v for v, verdict in verdicts.items() if verdict["ok"]]
    assert good == ["fused", "vendor"] and "not supported" in verdicts["cuda"]["error"]
    sets = card.sets(lib.operands(case, lib.Maker(card.torch, kernels.DTYPE, 1)).bytes())
    found = kernels.measure(card, case, good, {"bandwidth": 1e10, "rate": 1e10})
    assert set(found["variants"]) == set(good) and not found["failed"]
    assert found["sets"] == sets >= 2 and cuda.did.count("capture") == len(good)
    ours = found["variants"]["fused"]
    assert ours["method"] == "graph" and ours["GB/s"] > 0 and ours["percent"] > 0


def test_a_step_is_captured_as_the_first_and_replayed_as_the_next(cuda, monkeypatch):
    """fastres.graph on a card: the same parameters and statistics as the plain steps."""
    plain = nn.Sequential(
        fastres.nn.ConvBNReLU(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    graphed = copy.deepcopy(plain)
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, graphed))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    loss_fn = nn.functional.cross_entropy
    cuda.changed = [*graphed.parameters(), *graphed.buffers()]
    monkeypatch.setattr(graphs, "_check_sample", lambda model, tensors: torch.device("cuda"))
    real = torch.cuda.graph

    def graph(captured, pool=None):  # by now the warm-up made the optimizer's state
        cuda.changed += [t for s in b.state.values() for t in s.values() if t is not None]
        return real(captured, pool)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    train = fastres.graph(graphed, (x, y), loss_fn=loss_fn, optimizer=b, pool=cuda.pool)
    assert train.captured and cuda.did == ["wait", "wait", "capture"]
    for mine, theirs in zip(
        graphed.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)  # nothing moved yet
    cuda.replay = lambda: train._output.copy_(train._call(*train._inputs))
    for i in range(3):
        a.zero_grad()
        loss = loss_fn(plain(x + i), y)
        loss.backward()
        a.step()
        torch.testing.assert_close(train(x + i, y), loss.detach())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], value, msg=name)
    with pytest.raises(ValueError, match="input 0 has shape"):
        train(x[:2], y)


# --- a bare machine -------------------------------------------------------------------------------


def test_a_bare_machine_runs_the_module_that_was_brought_back(tmp_path, monkeypatch):
    """No installation: an interpreter that has torch and no fastres, a checkout, the results'
    folder. Then a process that a stage starts, as fastres.tune starts its own."""
    module = pytest.importorskip("fastres._C", reason="the native module was not built")
    site = Path(torch.__file__).resolve().parents[1]
    if (site / "fastres").exists():
        pytest.skip("fastres is installed as a copy, which the other interpreter would find")
    clone, out = tmp_path / "clone", tmp_path / "out"
    left = shutil.ignore_patterns("_C.*", "_build_info.json", "__pycache__", "kernels")
    for name in ("fastres", "csrc"):
        shutil.copytree(ROOT / name, clone / name, ignore=left)
    shutil.copytree(ROOT / "kernels", clone / "kernels")
    for name in ("CMakeLists.txt", "setup.py"):
        shutil.copy2(ROOT / name, clone)
    monkeypatch.setattr(checks, "ROOT", clone)
    monkeypatch.setattr(checks, "MODULE_BYTES", 1 << 30)  # a build for all cards
    monkeypatch.setattr(record, "environment", lambda dry: {"commit": "c"})
    out.mkdir()
    # 1. what the first call brought back
    places = checks._module_files()
    for name, place in places.items():
        built = Path(module.__file__) if name.startswith("_C") else None
        shutil.copy2(built or Path(module.__file__).parent / "_build_info.json", place)
    kept = checks.keep_module(out / checks.MODULE)
    first = record.Record(out, "build", True, 60.0, "a test")
    first.set(module={"sources": checks._digest(*checks._sources()), **kept})
    first.save("done")
    for place in places.values():
        place.unlink()
    # 2. another machine
    venv.create(tmp_path / "python", with_pip=False)
    python = tmp_path / "python" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(site))  # a path's .pth files are not read: no fastres
    assert checks._why_not(tmp_path) == "ModuleNotFoundError: No module named 'fastres'"
    rec = record.Record(out, "build", True, 60.0, "a test")
    checks.build(SimpleNamespace(dry=False), rec)
    assert rec.found["installed"] and rec.found["ran"] is None
    # 3. a process of a process
    child = (
        "import json, sys, fastres._C as c, fastres.kernels as k; "
        "open(sys.argv[1] + '/answers', 'a').write(json.dumps([c.__file__, k.__file__]) + '\\n')"
    )
    stage = (
        "import pathlib, sys; from fastres import tuning; "
        f"tuning.CHILD = ('-c', {child!r}); "
        "print(tuning.run_child(pathlib.Path(sys.argv[1]), [], 60.0))"
    )
    env = {**os.environ, "PYTHONPATH": f"{clone}{os.pathsep}{site}"}  # as main.run_stage
    done = subprocess.run(
        [str(python), "-c", stage, str(tmp_path)],
        cwd=clone,
        env=env,
        capture_output=True,
        text=True,
    )
    where = json.loads((tmp_path / "answers").read_text())
    assert done.returncode == 0 and done.stdout.endswith(", None)\n"), done.stdout + done.stderr
    assert [Path(p).parent for p in where] == [clone / "fastres", clone / "fastres" / "kernels"]


def test_every_conv_of_the_cpp_kernels_has_its_flops():
    """The rate that is asked of each conv; bytes only where one kernel forms the operands."""
    convs = [c for c in kernels.all_cases(False) if c.c2 and c.op in ("fprop", "dgrad", "wgrad")]
    assert {c.op for c in convs} == {"fprop", "dgrad", "wgrad"}
    for case in convs:
        vendor = work.moved(case, "vendor", "bf16")
        for v in set(lib.variants(case)) & {"cuda", "cutlass"}:
            assert work.flops(case, v, "bf16") == vendor.flops > 0, case
        alone = work.moved(case, "cuda", "bf16") is not None
        assert alone == (case.shape.pointwise or (case.h, case.dy) == ("none", "none"))


def test_the_card_is_on_record(monkeypatch):
    from fastres.bench import environment

    asked = []

    def nvidia_smi(argv):
        asked.append(argv[1])
        return ", ".join(k.upper() for k in record.SMI.split(",")) + "\nsecond card"

    monkeypatch.setattr(environment, "command_output", nvidia_smi)
    found = record.smi()
    assert found["uuid"] == "UUID" and found["driver_version"] == "DRIVER_VERSION"
    assert "uuid" in asked[0] and found["pci.bus_id"] == "PCI.BUS_ID"


def test_the_timer_of_a_gpu_calls_what_torch_has(monkeypatch):
    """Warms up on a stream of its own, captures a graph, times its replay between two events."""
    did, now = [], [0.0]

    class Graph:
        def replay(self) -> None:
            did.append("replay")
            now[0] += 0.5

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end) -> float:
            return 1e3 * (end.at - self.at)

    @contextlib.contextmanager
    def capture(graph, pool):
        did.append("capture")
        yield
        did.append("captured")

    stream = SimpleNamespace(wait_stream=lambda other: did.append("wait"))
    fakes = {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": lambda: stream,
        "current_stream": lambda: stream, "synchronize": lambda: None,
        "stream": lambda s: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)

    def call() -> None:
        did.append("call")
        now[0] += 0.25

    timer = device.CudaTimer()
    shot = timer.shot([call], seconds=1.0)
    assert did == ["wait", "call", "call", "wait", "call", "capture", *["call"] * 4, "captured"]
    assert (shot.calls, shot.method, shot.run()) == (4, "graph", 0.125) and did[-1] == "replay"
    plain = timer.shot([call, call], seconds=1.0, graph=False)
    assert (plain.calls, plain.method, plain.run()) == (4, "events", 0.25)
