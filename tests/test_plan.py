"""The plan: precedence, files (sorted, atomic, corrupt, foreign), tuning, rejection, the report."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import logging
import os
import signal
import time

import pytest
import torch
from torch import nn

import fastres
from fastres import backends, plan, tuning
from fastres._chosen import choice_of
from fastres.plan import EAGER, Entry, Key

torchvision = pytest.importorskip("torchvision")
WHO = {"device": "a card", "driver": "1", "fastres": "0", "torch": "2", "triton": "3"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of its own for each test."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    plan.forget()
    yield tmp_path
    plan.forget()


def key(**changes) -> Key:
    values = {
        "block": "3x3 8>8 b", "shape": (2, 8, 4, 4), "dtype": "float32", "layout": "channels_last",
        "mode": "training",
    }  # fmt: skip
    return Key(**{**values, **changes})


def entry(choice="b", ratio=1.5, **rest) -> Entry:
    return Entry(choice, {EAGER: 3.0, "b": 2.0}, ratio, **rest)


def network() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=4)
    return fastres.convert(model.to(memory_format=torch.channels_last))


def sample(n=2, size=33) -> torch.Tensor:
    return torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_round_trips_sorted():
    entries = {
        key(mode=m, shape=(n, 8, 4, 4)): entry() for m in ("training", "inference") for n in (9, 2)
    }
    text = plan.encode(WHO, entries, "abc")
    assert plan.decode(text) == (WHO, entries)
    assert text == plan.encode(WHO, dict(reversed(entries.items())), "abc")
    rows = json.loads(text)["entries"]
    assert [(r["shape"][0], r["mode"]) for r in rows] == [
        (2, "inference"), (2, "training"), (9, "inference"), (9, "training")
    ]  # fmt: skip


WRONG: list[dict] = [
    {"ratio": "fast"}, {"ratio": float("nan")}, {"ratio": True}, {"milliseconds": {"eager": None}},
    {"rejected": {"b": 3}}, {"measured": None},
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 99}', '{"schema": 1}', "\x00\x01",
     json.dumps({"schema": 1, "identity": WHO, "entries": [{"choice": "b"}]}),
     plan.encode(WHO, {key(): entry("fastest")}, None),
     *(plan.encode(WHO, {key(): dataclasses.replace(entry(), **wrong)}, None) for wrong in WRONG)],
    ids=["empty", "cut", "list", "schema", "no entries", "binary", "no key", "unknown choice",
         *map(str, WRONG)],
)  # fmt: skip
def test_a_corrupt_file_is_set_aside(cache, caplog, text):
    path = cache / "plan-x.json"
    path.write_text(text)
    assert plan.read(path, WHO) == {}
    assert not path.exists() and len(list(cache.glob("plan-x.json.corrupt-*"))) == 1
    assert "is corrupt" in caplog.text and "set aside" in caplog.text
    plan.merge(path, WHO, {key(): entry()})
    assert plan.read(path, WHO) == {key(): entry()}


def test_a_plan_that_cannot_be_saved_holds_in_this_process(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "file"))
    here = plan.Plan(WHO)
    for n in (1, 2):
        here.add({key(shape=(n, 8, 4, 4)): entry()})
    assert here.lookup(key(shape=(2, 8, 4, 4))) is not None and "File exists" in here.unsaved
    assert caplog.text.count("cannot be saved") == 1 and "FASTRES_CACHE" in caplog.text
    from fastres import cli

    assert cli.main(["tune", "resnet18", "--batch", "2", "--size", "32"]) == 2


def test_other_kernels_are_another_identity(monkeypatch, tmp_path):
    before = plan._kernels_digest()
    (tmp_path / "_launch.py").write_text("# other kernels")
    import importlib.util

    spec = importlib.util.find_spec("fastres.kernels")
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    plan.identity.cache_clear()
    plan._kernels_digest.cache_clear()
    try:
        assert plan.identity("cpu")["kernels"] != before
    finally:
        plan.identity.cache_clear()
        plan._kernels_digest.cache_clear()


def test_a_plan_of_another_version_is_left_aside_with_a_line(cache, caplog):
    """Its name differs, so it is never read as this version's."""
    old = WHO | {"torch": "0.9"}
    plan.merge(plan.cache_file(old), old, {key(): entry()})
    elsewhere = WHO | {"device": "another"}
    plan.merge(plan.cache_file(elsewhere), elsewhere, {key(): entry()})
    assert plan.Plan(WHO).empty
    assert caplog.text.count("left aside, it was measured with another torch (0.9, here") == 1
    assert "driver" not in caplog.text and plan.cache_file(old).exists()
    caplog.clear()
    plan.merge(plan.cache_file(WHO), WHO, {key(): entry()})
    assert not plan.Plan(WHO).empty and not caplog.text
    plan.cache_file(WHO).unlink()
    plan.cache_file(old).write_text("{")
    assert plan.Plan(WHO).empty and not caplog.text


def test_a_foreign_file_is_ignored_and_says_why(cache, caplog):
    path = cache / "plan-x.json"
    path.write_text(plan.encode({**WHO, "driver": "0.9"}, {key(): entry()}, None))
    assert plan.read(path, WHO) == {}
    assert "measured with another driver (0.9, here 1)" in caplog.text and path.exists()


def test_merging_keeps_what_others_wrote(cache):
    path = cache / "deep" / "plan-x.json"
    plan.merge(path, WHO, {key(): entry()})
    plan.merge(path, WHO, {key(mode="inference"): entry("eager", 1.0)})
    plan.merge(path, WHO, {key(): entry("c1", 2.0)})
    found = plan.read(path, WHO)
    assert found == {key(): entry("c1", 2.0), key(mode="inference"): entry("eager", 1.0)}
    assert [p.name for p in path.parent.glob("*.tmp")] == []


def _write_many(folder: str, first: int) -> None:
    from pathlib import Path

    for n in range(first, first + 20):
        plan.merge(Path(folder) / "plan-x.json", WHO, {key(shape=(n + 1, 8, 4, 4)): entry()})


def test_two_processes_may_write_at_once(cache):
    import multiprocessing

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_write_many, args=(str(cache), n)) for n in (0, 100)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    assert len(plan.read(cache / "plan-x.json", WHO)) == 40


def test_a_failed_write_leaves_the_old_file(cache, monkeypatch):
    path = cache / "plan-x.json"
    plan.merge(path, WHO, {key(): entry()})

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        plan.merge(path, WHO, {key(): entry("c1")})
    assert plan.read(path, WHO) == {key(): entry()}
    assert list(cache.glob("*.tmp")) == []


# --- precedence -----------------------------------------------------------------------------------


def test_explicit_then_table_then_cache_then_heuristic(cache, tmp_path_factory, monkeypatch):
    model, x = network(), torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    block = model.layer1[0].train()
    assert choice_of(block, x) == plan.HEURISTIC

    who = plan.identity("cpu")
    here = fastres._chosen.plan_key(block, x, True)
    plan.merge(plan.cache_file(who), who, {here: entry(EAGER, 1.0)})
    plan.forget()
    choice, why = choice_of(block, x)
    assert choice == EAGER and why.startswith("cache: measured 1.00x eager")

    tables = tmp_path_factory.mktemp("tables")
    (tables / "this.json").write_text(plan.encode(who, {here: entry("b", 1.5)}, None))
    (tables / "other.json").write_text(plan.encode(WHO, {here: entry("d", 9.0)}, None))
    (tables / "broken.json").write_text("{")
    monkeypatch.setattr(plan, "TABLES", tables)
    plan.forget()
    choice, why = choice_of(block, x)
    assert choice == "b" and why.startswith("table: measured 1.50x eager")
    assert (tables / "broken.json").exists()

    fastres.convert(model, fusion="b")
    assert choice_of(block, x) == ("b", "explicit")


def test_the_key_tells_calls_apart():
    model = network()
    block, other = model.layer1[0].train(), model.layer2[0].train()
    x = torch.randn(2, 64, 9, 9)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    keys = {
        fastres._chosen.plan_key(block, x, True),
        fastres._chosen.plan_key(block, nhwc, True),
        fastres._chosen.plan_key(block, nhwc, False),
        fastres._chosen.plan_key(other, nhwc, True),
        fastres._chosen.plan_key(block, nhwc[:1], True),
        fastres._chosen.plan_key(block.eval(), nhwc, True),
    }
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(fastres._chosen.plan_key(block, nhwc, False))
    assert len(keys) == 7
    assert fastres._chosen.plan_key(block, x, True) == fastres._chosen.plan_key(
        model.layer1[1].eval(), x, True
    )
    assert fastres._chosen.signature(other, other._fastres.spec) == (
        "3x3 64>128 s2 b, 3x3 128>128 b + 1x1 64>128 s2 b"
    )


def test_a_planned_eager_block_runs_the_original(monkeypatch):
    model, x = network().train(), sample()
    fastres.counters.reset()
    want = copy.deepcopy(fastres.revert(copy.deepcopy(model)))(x)
    found: list[str] = []
    monkeypatch.setattr(plan.Plan, "empty", False)
    monkeypatch.setattr(
        plan.Plan, "lookup", lambda self, k: found.append(k.block) or (EAGER, "test")
    )
    z = model(x)
    assert torch.equal(z, want)  # not close: the very same ops
    assert len(found) == 6 and found[0].startswith("stem 7x7 3>64 s2")
    assert "training on 2x64x9x9: eager (test)" in str(fastres.report(model))


# --- tuning ---------------------------------------------------------------------------------------


def test_tune_measures_each_distinct_block_once_and_is_used(cache):
    model, x = network(), sample()
    before = {n: b.clone() for n, b in model.state_dict().items()}
    found = fastres.tune(model, x, seconds=0.5)
    # stem, layer1 (two alike), layer2 to 4; training and inference
    assert len(found.entries) == 10
    assert all(torch.equal(b, before[n]) for n, b in model.state_dict().items())
    for k, e in found.entries.items():
        assert e.choice in (EAGER, "b") and set(e.milliseconds) == {EAGER, "b"}, (k, e)
        assert e.ratio >= 1.0 and not e.rejected
    files = list(cache.glob("plan-*.json"))
    assert len(files) == 1 and len(json.loads(files[0].read_text())["entries"]) == 10
    plan.forget()
    model.train()(x)
    text = str(fastres.report(model))
    assert "training on 2x64x9x9" in text and "cache: measured" in text


def test_a_wrong_candidate_is_rejected(monkeypatch):
    """Break a kernel on purpose: its rung must not be timed."""
    from fastres import _cpu

    right = _cpu.bn_apply

    def wrong(z, *args):
        right(z, *args)
        z.mul_(1.01)

    monkeypatch.setattr(_cpu, "bn_apply", wrong)
    model, x = network(), sample()
    found = fastres.tune(model, x, modes=("training",), seconds=0.1, isolate=False)
    blocks = {k: e for k, e in found.entries.items() if not k.block.startswith("stem")}
    for e in blocks.values():
        assert e.choice == EAGER and e.rejected["b"].startswith("wrong: "), e
    assert "rejected b: wrong" in str(found)


def test_inference_is_not_held_against_what_training_refuses():
    """One value a channel: batch norm cannot train on it."""
    found = fastres.tune(network(), sample(1, 32), modes=("inference",), seconds=0.1)
    assert any(k.shape[2:] == (1, 1) or k.shape[2:] == (2, 2) for k in found.entries)
    for k, e in found.entries.items():
        assert set(e.milliseconds) == {EAGER, "b"} and not e.rejected, (k, e)


def test_a_candidate_that_raises_is_rejected(monkeypatch):
    from fastres import _cpu

    monkeypatch.setattr(_cpu, "bn_apply", lambda *a: (_ for _ in ()).throw(RuntimeError("no such")))
    found = fastres.tune(network(), sample(), modes=("training",), seconds=0.1, isolate=False)
    assert any("RuntimeError: no such" in e.rejected.get("b", "") for e in found.entries.values())


@pytest.mark.parametrize(
    "times, choice",
    [
        ({EAGER: [2.0] * 5, "b": [1.0] * 5, "c1": [0.9] * 5}, "c1"),
        ({EAGER: [1.0] * 5, "b": [1.1] * 5}, EAGER),
        ({EAGER: [1.0, 1.0, 1.0, 1.0, 1.0], "b": [2.0, 1.3, 0.9, 0.9, 0.9]}, EAGER),  # noise
        ({EAGER: [1.0, 2.0, 4.0], "b": [0.9, 1.8, 3.6]}, "b"),  # drifting clocks
    ],
)
def test_choosing(times, choice):
    assert tuning.choose(times, {}).choice == choice


@pytest.mark.parametrize("wrong", [False, True])
def test_tune_chooses_pass_by_pass(cache, monkeypatch, wrong):
    """Inside the fastest rung the passes that are faster alone go to the vendor, if what they make
    together is right and faster; the choice is saved, read and run."""
    from fastres import backends
    from fastres.ops import _ladder

    monkeypatch.setattr(backends, "choose", lambda device, dtype: ("reference", "a test"))
    monkeypatch.setattr(backends, "_selected", {})
    slow = {EAGER: 3.0, "b": 2.0, "c1": 1.0, "c2": 1.5, "d": 1.5}
    gains = {"conv2.wgrad": 0.3, "shortcut.fprop": 0.2}
    raced: list[list[str]] = []

    def race(steps, seconds, device):
        raced.append(list(steps))
        cost = {}
        for name in steps:
            base, _, passes = name.partition(" vendor ")
            cost[name] = slow[base] + sum(-gains.get(p, -0.1) for p in passes.split())
        return {name: [c] * 5 for name, c in cost.items()}

    monkeypatch.setattr(tuning, "_race", race)
    both = "c1 vendor conv2.wgrad shortcut.fprop"
    if wrong:
        right = tuning.check
        monkeypatch.setattr(
            tuning, "check", lambda t, name: "wrong: z" if name == both else right(t, name)
        )
    model, x = network(), sample()
    (target,) = [t for t in tuning.distinct(model, x, True) if t.path == "layer2.0"]
    entry = tuning.measure(target, 0.1, False, per_conv=True)
    singles = [f"c1 vendor {p}" for p in tuning.passes_of(target)]
    assert raced[:2] == [[EAGER, "b", "c1", "c2", "d"], ["c1", *singles]]
    assert len(singles) == 9  # two convs and a projection
    if wrong:
        assert entry.choice == "c1" and entry.rejected == {both: "wrong: z"} and len(raced) == 2
        return
    assert raced[2] == [EAGER, "b", "c1", "c2", "d", both]
    assert entry.choice == both and entry.ratio == 6.0 and entry.milliseconds[both] == 500.0
    plan.current(x.device).add({target.key: entry})
    plan.forget()  # from the file
    vendor = []
    conv_fwd = _ladder.conv_fwd
    monkeypatch.setattr(
        _ladder, "conv_fwd", lambda *a: (vendor.append(a[1].shape), conv_fwd(*a))[1]
    )
    model.layer2[0].train()(target.x.requires_grad_())
    assert vendor == [model.layer2[0].downsample[0].weight.shape]
    assert f"training on {'x'.join(map(str, target.x.shape))}: {both}" in str(fastres.report(model))


def test_a_choice_without_a_gain_stays_a_rung(monkeypatch):
    from fastres import backends

    monkeypatch.setattr(backends, "choose", lambda device, dtype: ("reference", "a test"))
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(
        tuning, "_race", lambda steps, *a: {n: [2.0 if n == EAGER else 1.0] * 5 for n in steps}
    )
    (target,) = [t for t in tuning.distinct(network(), sample(), False) if t.path == "layer2.0"]
    entry = tuning.measure(target, 0.1, False, per_conv=True)
    assert entry.choice == "b"
    assert tuning.passes_of(target) == ["conv1.fprop", "conv2.fprop", "shortcut.fprop"]


@pytest.mark.parametrize("choice", ["e", "c2 vendor conv1", "b vendor conv1.fprop"])
def test_an_unknown_choice_in_a_file_is_corrupt(choice):
    text = plan.encode({"device": "x"}, {key(): entry(choice)}, None)
    with pytest.raises(plan.PlanFileError, match="unknown choice"):
        plan.decode(text)


def test_an_interruption_keeps_what_was_measured(monkeypatch, cache):
    measure, calls = tuning.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(tuning, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastres.tune(network(), sample(), seconds=0.1)
    (file,) = cache.glob("plan-*.json")
    assert len(json.loads(file.read_text())["entries"]) == 2
    asked = []
    monkeypatch.setattr(tuning, "measure", lambda target, *args: asked.append(target) or entry())
    found = fastres.tune(network(), sample(), seconds=0.1, missing=True)
    assert len(asked) == len(found.entries) == 8  # of 10
    assert not fastres.tune(network(), sample(), missing=True).entries


def test_a_limit_leaves_the_rest_and_each_block_is_told(cache, monkeypatch):
    """Nothing is kept of a block in the middle of which the time was up."""
    measure, told = tuning.measure, []

    def slow(target, *args):
        if len(told) == 2:
            raise tuning.TimeLimit
        return measure(target, *args)

    monkeypatch.setattr(tuning, "measure", slow)
    found = fastres.tune(
        network(), sample(), modes=("training",), seconds=0.1, limit=600,
        each=lambda path, key, entry: told.append((path, key, entry)),
    )  # fmt: skip
    assert [(found.paths[k], k, e) for k, e in found.entries.items()] == told and len(told) == 2
    assert found.left == tuple(f"layer{i}.0 training" for i in (2, 3, 4))
    assert "not measured, for lack of time: layer2.0 training, layer3.0" in str(found)
    (file,) = cache.glob("plan-*.json")
    assert len(json.loads(file.read_text())["entries"]) == 2


def test_a_spent_limit_measures_nothing(cache):
    found = fastres.tune(network(), sample(), modes=("inference",), limit=1e-9)
    assert not found.entries and len(found.left) == 5 and not list(cache.glob("plan-*"))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fastres.tune(nn.Linear(1, 1), sample()), ValueError, "no converted block"),
        (lambda: fastres.tune(network(), None), TypeError, "must be a Tensor"),
        (lambda: fastres.tune(network(), sample().double()), ValueError, "they must agree"),
        (lambda: fastres.tune(network(), sample(), modes=("eval",)), ValueError, "modes must be"),
        (lambda: fastres.tune(network(), sample(), seconds=0), ValueError, "seconds must be"),
        (lambda: fastres.tune(network(), sample(), limit=0), ValueError, "limit must be"),
        (
            lambda: fastres.tune(network(), sample(), candidate_seconds=-1),
            ValueError,
            "candidate_seconds must be positive, got -1",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


TUNE = ("tune", "resnet18", "--batch", "1", "--size", "32", "--mode", "inference")


def test_the_command_passes_its_limits_on_and_keeps_what_sigterm_leaves(cache, monkeypatch, capsys):
    from fastres import cli

    calls = []

    def measure(target, seconds, isolate, per_conv, deadline, candidate_seconds):
        calls.append((deadline - time.monotonic(), candidate_seconds))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return entry()

    monkeypatch.setattr(tuning, "measure", measure)
    with pytest.raises(SystemExit) as end:
        cli.main([*TUNE, "--limit", "500", "--candidate-seconds", "7"])
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert all(400 < left < 500 and child == 7 for left, child in calls)
    (file,) = cache.glob("plan-*.json")
    assert len(json.loads(file.read_text())["entries"]) == 2
    said = capsys.readouterr().err
    total = int(said.partition("] 1 of ")[2].partition(":")[0])
    assert total >= 8 and f"] 3 of {total}: " in said
    assert f"2 blocks are saved in {file}; --missing goes on with the others" in said
    assert cli.main([*TUNE, "--missing"]) == 0 and len(calls) == 3 + total - 2
    count = len(calls)
    assert cli.main([*TUNE, "--missing"]) == 0 and len(calls) == count
    assert "nothing is missing" in capsys.readouterr().out
    for option in ("--limit", "--candidate-seconds"):
        assert cli.main([*TUNE, option, "0"]) == 2
        assert f"argument {option}: '0' is not a positive number of s" in capsys.readouterr().err


def test_what_cuda_kernels_take_is_not_filed_for_tritons(cache, monkeypatch):
    monkeypatch.setattr(backends, "forced", lambda: "cuda")
    with pytest.raises(ValueError, match=r'not under use_backend\("cuda"\).*outside of it'):
        fastres.tune(network(), sample(), seconds=0.1)
    assert not list(cache.glob("plan-*.json"))


def test_all_ranks_follow_rank_0(cache, tmp_path):
    """Two processes with different caches agree after convert, but for kernels that the build of
    one of them does not have."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    store = str(tmp_path / "store")
    ranks = [
        spawn.Process(target=_rank, args=(r, store, str(tmp_path / f"cache{r}"), queue))
        for r in (0, 1)
    ]
    for r in ranks:
        r.start()
    found = dict(queue.get(timeout=120) for _ in ranks)
    for r in ranks:
        r.join(60)
    *choices, said = zip(*(found[r] for r in (0, 1)), strict=True)
    assert choices == [("eager", "eager"), ("c2 cuda all", "b")]
    assert said[0] == [] and len(said[1]) == 1 and "no nvcc; ignored, install fas" in said[1][0]


def _rank(rank: int, store: str, folder: str, queue) -> None:
    os.environ["FASTRES_CACHE"] = folder
    torch.set_num_threads(1)
    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    model = network().train()
    who = plan.identity("cpu")
    here, there = (fastres._chosen.plan_key(model.layer1[0], x, t) for t in (True, False))
    entries = {here: entry([EAGER, "b"][rank]), there: entry(["c2 cuda all", "c1"][rank])}
    plan.merge(plan.cache_file(who), who, entries)
    plan.forget()
    from test_cuda_tiles import Native

    cuda = importlib.import_module("fastres._cuda")
    cuda.use_host(Native() if rank == 0 else None)
    cuda.built = lambda: "fastres._C was built without them: no nvcc"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastres").addHandler(handler)
    fastres.convert(model)
    with torch.no_grad():
        inference = choice_of(model.layer1[0], x)[0]
    queue.put((rank, (choice_of(model.layer1[0], x)[0], inference, said)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_the_plans_overhead_is_measured_over_every_lookup(tmp_path, capsys):
    from bench import plan_overhead

    file = tmp_path / "overhead.json"
    argv = ["--model", "resnet18", "--repeats", "3", "--json", str(file)]
    assert plan_overhead.main(argv) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [r["lookups"] >= 9 for r in rows] == [True] * 4  # 8 blocks and the stem
    assert all(0 < r["q1"] <= r["us"] <= r["q3"] for r in rows)
    assert "resnet18" in capsys.readouterr().out
