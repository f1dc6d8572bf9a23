"""The GPU run-book over several calls: what goes in which, and what a later one finds done."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import checks, child, probes, record
from bench.gpu import main as runbook
from bench.gpu.stages import (
    BY_NAME,
    CALL_SECONDS,
    CALLS,
    LENT_SECONDS,
    MOST,
    NAMES,
    STAGES,
    START_SECONDS,
    allowance,
    of_call,
)
from bench.gpu.state import open_state


def on_a_card(monkeypatch, run_stage):
    """The run-book believes that there is one, and runs its stages by run_stage."""
    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(record, "smi", lambda: None)
    monkeypatch.setattr(runbook, "run_stage", run_stage)
    monkeypatch.setattr(runbook, "no_gpu", lambda: None)


def ended(monkeypatch, code: int, stage=lambda: None):
    """A stage's process that does `stage` and ends with `code`."""

    def start(*args, **kwargs):
        stage()
        return SimpleNamespace(pid=-1, wait=lambda seconds: code)

    monkeypatch.setattr(runbook.subprocess, "Popen", start)
    monkeypatch.setattr(runbook, "stop", lambda process: None)


def test_three_calls_hold_all_stages(capsys):
    """In 1,800 s, the starts of the machine included."""
    assert len(CALLS) == 3 and 3 * (CALL_SECONDS + START_SECONDS) <= LENT_SECONDS == 1800
    assert START_SECONDS >= 60 and CALL_SECONDS <= 560
    for call in CALLS:
        own = of_call(call)
        assert own[0].name == "build"
        assert sum(s.limit for s in own if s.call == call) <= CALL_SECONDS
    assert {s.name for call in CALLS for s in of_call(call)} == set(NAMES)
    assert runbook.main(["--calls"]) == 0
    said = capsys.readouterr().out
    assert all(f"{s.name} {s.limit}" in said for s in STAGES)
    assert "python -m bench.gpu --call 1\n" in said and "--call 2 --resume\n" in said
    assert "3 calls and 3 starts of a machine (100 s each) are 1,800 s of the 1,800" in said
    assert [s.name for s in runbook.chosen(None, 3)] == [s.name for s in of_call(3)]


def test_a_stage_that_left_something_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_GPU_TEST_FAIL", "sanitizer:partial")
    monkeypatch.setattr(child.signal, "signal", lambda *args: None)
    assert child.run("sanitizer", str(tmp_path), 60.0, True) == child.PARTIAL
    found = json.loads((tmp_path / "checks.json").read_text())["stages"]["sanitizer"]
    assert found["status"] == "partial" and "asked to leave something" in found["notes"]
    ended(monkeypatch, child.PARTIAL)
    args = ["--dry-run", "--out", str(tmp_path), "--stages", "sanitizer", "--resume"]
    assert runbook.main(args) == 1
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["stages"]["sanitizer"]["status"] == "partial"


def test_a_stage_whose_results_found_no_room_is_not_done(tmp_path, monkeypatch, capsys):
    def full(file, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(child.signal, "signal", lambda *args: None)
    monkeypatch.setattr(record, "write_json", full)
    assert child.run("sanitizer", str(tmp_path), 60.0, True) == child.FAILED
    said = capsys.readouterr().out
    assert said.count("checks.json cannot be written: [Errno 28] No space left on device") == 1


@pytest.mark.parametrize("before", ["failed", "partial", "done"])
def test_a_stage_that_died_at_its_start_has_its_own_error(tmp_path, monkeypatch, before):
    """Not that of the run before it, whose rows stay."""
    rec = record.Record(tmp_path, "sanitizer", True, 60.0, "a test")
    rec.add(tool="memcheck")
    rec.set(error="out of memory")
    rec.save(before)
    ended(monkeypatch, -11)
    found = runbook.run_stage(BY_NAME["sanitizer"], tmp_path, True, 60.0)
    assert (found["status"], found["error"]) == ("failed", "its process died: SIGSEGV")
    own = json.loads((tmp_path / "checks.json").read_text())["stages"]["sanitizer"]
    assert (own["status"], own["error"]) == ("failed", "its process died: SIGSEGV")
    assert own["rows"] == [{"tool": "memcheck"}]


def test_a_stage_that_fails_as_before_says_so(tmp_path, monkeypatch):
    """Though what it writes is there already, word by word."""

    def stage():
        file.write_text(text)

    file = tmp_path / "checks.json"
    rec = record.Record(tmp_path, "sanitizer", True, 60.0, "a test")
    rec.set(error="no such tool")
    rec.save("failed")
    text = file.read_text()
    ended(monkeypatch, child.FAILED, stage)
    found = runbook.run_stage(BY_NAME["sanitizer"], tmp_path, True, 60.0)
    assert (found["status"], found["error"]) == ("failed", "no such tool")
    assert file.read_text() == text


def test_a_build_is_repeated_in_every_call(tmp_path, monkeypatch, capsys):
    ran = []

    def run_stage(stage, out, dry, limit):
        ran.append(stage.name)
        record.Record(out, stage.name, dry, limit, "a test").save("done")
        return {"status": "done", "seconds": 1}

    on_a_card(monkeypatch, run_stage)
    for call in CALLS:
        args = ["--out", str(tmp_path), "--call", str(call)]
        assert runbook.main(args if call == 1 else [*args, "--resume"]) == 0
    assert ran.count("build") == 3 and sorted(set(ran)) == sorted(NAMES)
    assert len(ran) == len(NAMES) + 2
    assert (
        f"at most {CALL_SECONDS} s" not in capsys.readouterr().out
    )  # what the others need is kept for them


def test_a_later_call_ends_with_what_an_earlier_one_left(tmp_path, monkeypatch):
    ran, left = [], {"kernels", "tests"}

    def run_stage(stage, out, dry, limit):
        ran.append((stage.name, limit))
        record.Record(out, stage.name, dry, limit, "a test").save("done")
        how = "failed" if stage.name == "tests" else "partial"
        return {"status": how if stage.name in left else "done", "seconds": 1}

    on_a_card(monkeypatch, run_stage)
    assert runbook.main(["--out", str(tmp_path), "--call", "1"]) == 1
    ran.clear()
    left.discard("kernels")
    assert runbook.main(["--out", str(tmp_path), "--call", "2", "--resume"]) == 1
    own = [s.name for s in of_call(2)]
    assert [name for name, _ in ran] == [*own, "kernels", "tests"]
    assert all(seconds >= s.limit for s, (_, seconds) in zip(of_call(2), ran, strict=False))
    ran.clear()
    assert runbook.main(["--out", str(tmp_path), "--call", "3", "--resume"]) == 1
    assert [name for name, _ in ran] == [*(s.name for s in of_call(3)), "tests"]


def test_a_later_call_runs_what_a_killed_one_never_began(tmp_path, monkeypatch):
    ran = []

    def run_stage(stage, out, dry, limit):
        ran.append(stage.name)
        if stage.name == "kernels" and ran.count("build") == 1:
            raise SystemExit(137)  # the machine takes the call away
        record.Record(out, stage.name, dry, limit, "a test").save("done")
        return {"status": "done", "seconds": 1}

    on_a_card(monkeypatch, run_stage)
    with pytest.raises(SystemExit):
        runbook.main(["--out", str(tmp_path), "--call", "1"])
    ran.clear()
    ran.append("build")
    assert runbook.main(["--out", str(tmp_path), "--call", "2", "--resume"]) == 0
    assert ran[1:] == [*(s.name for s in of_call(2)), "kernels", "tests"]


def test_a_stage_is_given_what_those_before_it_left():
    first, second, third = stages = of_call(2)[:3]
    planned = sum(s.limit for s in stages)
    assert allowance(stages, planned) == first.limit
    assert allowance(stages, planned + 40) == first.limit + 40
    assert allowance(stages[1:], 1000) == MOST
    assert allowance(stages, first.limit - 10) == first.limit - 10
    assert allowance([third], 30) == 30


def test_a_broken_list_of_stages_is_made_anew_from_the_results(tmp_path, capsys):
    def stage(status: str) -> dict:
        return {"status": status, "dry_run": True, "seconds": 1.0, "rows": []}

    made = {"build": stage("done"), "tests": stage("partial")}
    whole = {"schema": 1, "kind": "fastres-gpu", "stages": made}
    (tmp_path / "checks.json").write_text(json.dumps(whole))
    (tmp_path / "kernels.json").write_text("{")
    (tmp_path / "state.json").write_text('{"schema": 1, "stages"')
    found = open_state(tmp_path, True, True)["stages"]
    assert {k: v["status"] for k, v in found.items()} == {"build": "done", "tests": "partial"}
    said = capsys.readouterr().err
    for name in ("state.json", "kernels.json"):
        (aside,) = tmp_path.glob(f"{name}.corrupt-*")
        assert f"{name} cannot be read" in said and f"set aside as {aside.name}" in said
    assert said.count("\n") == 2 and not (tmp_path / "kernels.json").exists()
    # a stage whose results are gone is not done
    listed = {"build": {"status": "done"}, "kernels": {"status": "done"}}
    old = {"schema": 1, "kind": "fastres-gpu-state", "dry_run": True, "stages": listed}
    (tmp_path / "state.json").write_text(json.dumps(old))
    assert set(open_state(tmp_path, True, True)["stages"]) == {"build", "tests"}


@pytest.mark.parametrize("name, whole, message", [
    ("state.json", {"schema": 9, "kind": "fastres-gpu-state"}, r"state.json is version 9 of"),
    ("train.json", {"schema": 9, "kind": "fastres-gpu"}, r"train.json is version 9 .* version 1$"),
    ("train.json", {"schema": 1, "kind": "other"}, r"train.json is of kind 'other'"),
])  # fmt: skip
def test_results_of_another_version_are_refused_by_name(tmp_path, capsys, name, whole, message):
    text = json.dumps(whole | {"dry_run": True, "stages": {}})
    (tmp_path / name).write_text(text)
    assert runbook.main(["--dry-run", "--out", str(tmp_path), "--resume"]) == 2
    assert re.search(message, capsys.readouterr().err.strip())
    assert (tmp_path / name).read_text() == text


def test_rows_of_an_unfinished_run_are_taken_over_by_the_same_commit_only(tmp_path, monkeypatch):
    def at(commit: str) -> record.Record:
        env = {"date": "d", "commit": commit, "torch": "2.14.1", "uuid": "GPU-1"}
        monkeypatch.setattr(record, "environment", lambda dry: env)
        return record.Record(tmp_path, "kernels", True, 60.0, "a test")

    first = at("a")
    first.add(case="x", good=True)
    first.add(case="y", good=False)
    first.save("partial")
    second = at("a")
    assert json.loads((tmp_path / "kernels.json").read_text())["stages"]["kernels"]["rows"]
    assert [r["case"] for r in second.keep(lambda row: row["good"])] == ["x"]
    second.add(case="z", good=True)
    assert [r["case"] for r in second.rows] == ["x", "z"]
    assert second.found["kept"] == [{"rows": 1, "date": "d", "uuid": "GPU-1"}]
    second.save("partial")
    for other in ("b", "unknown"):
        third = at(other)
        assert third.keep(lambda row: True) == []
        assert (
            f"written over, it had another commit ({'a' if other == 'b' else 'b'}"
            in (third.found["notes"][0])
        )
        third.add(case="w")
        third.save("partial")


@pytest.mark.parametrize("how", ["failed", "interrupted", "partial"])
def test_a_stage_that_ends_before_it_goes_on_leaves_the_earlier_runs_rows(
    tmp_path, monkeypatch, how
):
    """Out of memory while the network is made; Ctrl-C; no frontend of cuDNN this time."""

    def stage(device, rec):
        if how != "partial":
            raise {"failed": MemoryError("full"), "interrupted": KeyboardInterrupt()}[how]

    monkeypatch.setattr(record, "environment", lambda dry: {"commit": "c"})
    monkeypatch.setattr(child.signal, "signal", lambda *args: None)
    monkeypatch.setattr(probes, "tune", stage)
    monkeypatch.setattr(checks, "tests", stage)
    for name, found in (("tune", {"shapes": 2}), ("tests", {"passed": ["a"]})):
        first = record.Record(tmp_path, name, True, 60.0, "a test")
        first.set(**found, error="the first")
        first.note("one")
        first.add(block="x")
        first.save("failed")
        code = child.run(name, str(tmp_path), 60.0, True)
        assert code == {"failed": 1, "interrupted": 130, "partial": child.PARTIAL}[how]
        whole = json.loads(first.file.read_text())["stages"][name]
        assert whole["rows"] == [{"block": "x"}] and found.items() <= whole.items()
        assert whole["status"] == how and whole["notes"][0] == "one"
        assert whole.get("error") == ("MemoryError: full" if how == "failed" else None)
        again = record.Record(tmp_path, name, True, 60.0, "a test")
        assert again.keep(lambda row: True) == [{"block": "x"}]


def test_a_network_that_lacks_a_variant_for_want_of_time_is_measured_again(tmp_path, monkeypatch):
    from bench.gpu import nets

    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(nets, "machine", lambda device: {})
    monkeypatch.setattr(nets, "checked", lambda *args: {})
    dev = SimpleNamespace(dry=False, empty=lambda: None, triton=contextlib.nullcontext)
    asked, late = [], True

    def measure(device, rec, config, answers, found):
        asked.append(config.name)
        why = {"error": "not checked: no time left"} if late and config.batch == 32 else {}
        whose = {k: getattr(config, k) for k in nets.CONFIG}
        kept = config.variants[:1] if late and config.batch == 1 else config.variants
        return [rec.add(**whose, variant=v.name, status="failed", **why) for v in kept]

    monkeypatch.setattr(nets, "measure", measure)
    rec = record.Record(tmp_path, "train", False, 60.0, "a test")
    nets.train(dev, rec)
    assert rec.partial and asked == [c.name for c in nets.TRAIN]
    rec.save("partial")
    asked.clear()
    late = False
    rec = record.Record(tmp_path, "train", False, 60.0, "a test")
    nets.train(dev, rec)
    # those, and what an earlier run left before it timed the variants that run
    again = [c for c in nets.TRAIN if c.batch in (1, 32)]
    assert asked == [c.name for c in again] and {c.batch for c in again} == {1, 32}
    assert not rec.partial and len(rec.rows) == sum(len(c.variants) for c in nets.TRAIN)


@pytest.fixture
def timing(tmp_path, monkeypatch):
    """A record, and a device whose networks fail where `fails` names them."""
    from bench.gpu import nets

    fails = set()

    def net(device, config, v):
        if v.name in fails:
            raise MemoryError("full")

        def graphed(pool):
            if v.graph in fails:
                raise RuntimeError("capture")
            return lambda: None

        model = SimpleNamespace(
            eager=lambda: nets.torch.ones(1), graphed=graphed, model=v.name, x=None,
            kernels=contextlib.nullcontext, autocast=contextlib.nullcontext,
        )  # fmt: skip
        return model

    shot = SimpleNamespace(run=lambda: 1e-3)
    dev = SimpleNamespace(
        dry=False, empty=lambda: None, broken=lambda: None, pool=lambda: None,
        triton=contextlib.nullcontext, peak=lambda call: 30,
        timer=SimpleNamespace(shot=lambda calls, seconds, graph: shot),
    )  # fmt: skip
    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(nets, "Net", net)
    monkeypatch.setattr(nets, "roofs", lambda *args: {})
    return nets, dev, fails, record.Record(tmp_path, "memory", True, 60.0, "a test")


def test_a_graph_that_is_not_captured_leaves_the_plain_variant(timing):
    """And eager bf16, when it fails, leaves the others without a ratio to it."""
    nets, dev, fails, rec = timing
    fails |= {"eager bf16", "eager fp16 +graph"}
    config = nets.Config("resnet50", 32, "train", (nets.EAGER, nets.HALF, nets.RUNGS[0]))
    ready = {f"{config.name}|fastres b": {"ok": True}}
    rows = {r["variant"]: r for r in nets.measure(dev, rec, config, ready, {})}
    assert {name: r["status"] for name, r in rows.items()} == {
        "eager bf16": "failed", "eager fp16": "ok", "eager fp16 +graph": "failed",
        "fastres b": "ok", "fastres b +graph": "ok",
    }  # fmt: skip
    assert len(rec.rows) == len(rows)
    assert set(rows["fastres b"]["against"]) == {"best baseline", "best baseline or graph"}


def test_without_eager_no_variant_stands_in_for_it(timing, tmp_path, monkeypatch):
    from fastres.bench import saved

    nets, dev, fails, rec = timing
    sizes = {"eager bf16": 40, "fastres b": 10}
    monkeypatch.setattr(saved, "saved_bytes", lambda model, call, x: sizes.get(model, 20))
    fails.add("eager bf16")
    nets.memory(dev, rec)
    rows = {r["variant"]: r for r in rec.rows if r["model"] == "resnet50"}
    assert rows["fastres b"]["saved"] == 10 and "full" in rows["eager bf16"]["error"]
    assert {r["saved_x"] for r in rows.values() if "saved" in r} == {None}
    rec.save("failed")
    fails.clear()  # the next run has them all
    again = record.Record(tmp_path, "memory", True, 60.0, "a test")
    nets.memory(dev, again)
    rows = {r["variant"]: r for r in again.rows if r["model"] == "resnet50"}
    assert (rows["fastres b"]["saved_x"], rows["fastres b"]["peak_x"]) == (0.25, 1.0)


def test_networks_that_found_no_memory_side_by_side_are_checked_alone(tmp_path, monkeypatch):
    from bench.gpu import nets

    asked = []

    def run_jobs(stage, names, dry, workers, seconds, limit):
        asked.append((tuple(names), workers))
        full = workers > 1 and any("fastres" in n for n in names)
        answers = {n: {"name": n, "ok": True} for n in names}
        return answers | (
            {names[-1]: {"ok": False, "error": "OutOfMemoryError: CUDA"}} if full else {}
        )

    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(nets, "run_jobs", run_jobs)
    monkeypatch.setattr(nets, "parallel_workers", lambda dry, most: most)
    config = nets.Config("resnet50", 256, "train", (nets.EAGER, nets.COMPILE, *nets.RUNGS))
    rec = record.Record(tmp_path, "train", True, 60.0, "a test")
    found = nets.checked(SimpleNamespace(dry=False), rec, "train", (config,))
    names = [f"resnet50|256|train|{v.name}" for v in (nets.COMPILE, *nets.RUNGS)]
    assert asked == [(tuple(names), 8), ((names[-1],), 1)]
    assert len(found) == 5 and all(answer["ok"] for answer in found.values())


def test_tests_that_passed_before_are_not_run_again(tmp_path, monkeypatch):
    from bench.gpu import pytest_log

    (tmp_path / "done").write_text(json.dumps(["tests/a.py::x"]))
    monkeypatch.setenv("FASTRES_TEST_DONE", str(tmp_path / "done"))
    items = [SimpleNamespace(nodeid=f"tests/a.py::{name}") for name in "xy"]
    pytest_log.pytest_collection_modifyitems(None, items)
    assert [i.nodeid for i in items] == ["tests/a.py::y"]


def test_a_file_that_skips_itself_skips_its_tests(tmp_path, monkeypatch):
    """On a card that its kernels are not for, say."""
    from bench.gpu import pytest_log

    monkeypatch.setenv("FASTRES_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FASTRES_TEST_ONLY", json.dumps(["test_a.py::x", "test_a.py::y", "b.py::x"]))
    for skipped, file in ((True, "test_a.py"), (False, "b.py")):
        pytest_log.pytest_collectreport(SimpleNamespace(skipped=skipped, nodeid=f"tests/{file}"))
    found = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(f["test"], f["outcome"]) for f in found] == [
        ("test_a.py::x", "skipped"), ("test_a.py::y", "skipped")
    ]  # fmt: skip


def test_a_bare_machine_takes_the_module_that_was_brought_back(tmp_path, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    for file in ("csrc/a.cu", "CMakeLists.txt", "setup.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    suffix = checks.importlib.machinery.EXTENSION_SUFFIXES[0]
    module, info = root / "fastres" / f"_C{suffix}", root / "fastres" / "_build_info.json"
    module.parent.mkdir()
    ran, importable = [], [False]

    def call(argv, **kwargs):
        ran.append(argv)
        if "pip" in argv:
            module.write_text("built")
            info.write_text("{}")
            importable[0] = True
        linked = (root / "fastres/kernels").is_symlink() and module.exists()
        found = importable[0] or (kwargs.get("cwd") == root and linked)
        return SimpleNamespace(returncode=int(not found), stdout="", stderr="no module")

    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(checks, "ROOT", root)
    monkeypatch.setattr(checks.subprocess, "run", call)

    def build() -> record.Record:
        out.mkdir(exist_ok=True)
        ran.clear()
        rec = record.Record(out, "build", False, 60.0, "a test")
        checks.build(SimpleNamespace(dry=False), rec)
        rec.save("done")
        return rec

    def pip() -> bool:
        return any("pip" in argv for argv in ran)

    assert build().found["installed"] and pip()
    assert {p.name for p in (out / "module").iterdir()} == {module.name, "_build_info.txt"}
    (root / "csrc" / "__pycache__").mkdir()
    (root / "csrc" / "__pycache__" / "a.pyc").write_text("made by a test there")
    build()
    assert not pip()  # the same machine
    for file in (module, info):
        file.unlink()
    importable[0] = False
    build()
    assert not pip() and module.read_text() == "built" and info.read_text() == "{}"
    module.unlink()
    (out / "module" / module.name).write_text("cut")
    build()
    assert pip() and module.read_text() == "built"
    (root / "csrc" / "a.cu").write_text("changed")
    build()
    assert pip()  # importable, but not of these sources


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """The stage with a shell script as compute-sanitizer, given as text: (record, its rows)."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.setattr(record, "environment", lambda dry: {"commit": "c"})
    monkeypatch.setattr(checks, "SANITIZED", {"test_a.py": ("x", "y")})
    monkeypatch.setattr(checks, "TOOL_SECONDS", 0.0)
    log = """ran() { echo '{"test": "t", "outcome": "'$1'"}' >> $FASTRES_TEST_LOG; }\n"""

    def run(script: str, seconds: float = 60.0) -> tuple[record.Record, dict]:
        tool.write_text(f"#!/bin/sh\n{log}{script}\n")
        tool.chmod(0o755)
        rec = record.Record(tmp_path, "sanitizer", True, seconds, "a test")
        try:
            checks.sanitizer(SimpleNamespace(dry=False), rec)
        except RuntimeError as error:
            rec.set(error=str(error))
        rec.save("partial" if rec.partial else "done")
        return rec, {row["tool"]: row for row in rec.rows}

    return run


SUMMARY = "echo ERROR SUMMARY: 0 errors; echo RACECHECK SUMMARY: 0 hazards"


@pytest.mark.parametrize("script, state", [
    (f"{SUMMARY}; exit 5", "no test ran, of 2; exit code 5"),
    (f"ran passed; ran failed; {SUMMARY}; exit 1", "1 passed, 1 failed, of 2; exit code 1"),
    (f"ran passed; {SUMMARY}", "1 passed, of 2; exit code 0"),
    (f"ran skipped; ran skipped; {SUMMARY}", "2 skipped, of 2; exit code 0"),
], ids=("none-collected", "failed", "cut", "skipped"))  # fmt: skip
def test_a_sanitizer_that_did_not_see_every_test_is_repeated(sanitizer, script, state):
    rec, rows = sanitizer(script)
    assert rec.partial and f"memcheck: {state}" in rec.found["notes"]
    assert {(r["errors"], r["state"]) for r in rows.values()} == {(None, state)}
    rec, rows = sanitizer(f"ran passed; ran skipped; {SUMMARY}")
    assert not rec.partial and set(rows) == {"memcheck", "racecheck"}
    assert {r["errors"] for r in rows.values()} == {0}
    assert {r["state"] for r in rows.values()} == {"1 passed, 1 skipped, of 2; exit code 0"}
    assert sanitizer("exit 1")[1] == rows  # kept


def test_a_sanitizer_that_is_stopped_takes_its_tests_along(sanitizer, tmp_path):
    file = tmp_path / "pid"
    only = f"[ $2 = memcheck ] || {{ ran passed; ran passed; {SUMMARY}; exit; }}"
    rec, rows = sanitizer(f"{only}; ran passed; sleep 60 & echo $! > {file}; wait", 1.0)
    assert rows["memcheck"]["state"] == "1 passed, of 2; stopped by its time limit"
    assert rows["memcheck"]["errors"] is None and rec.partial
    assert rows["racecheck"]["complete"]
    child_of_tool = int(file.read_text())
    for _ in range(100):
        stat = Path(f"/proc/{child_of_tool}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("it runs on")


def test_errors_that_a_sanitizer_counts_fail_the_stage(sanitizer):
    rec, rows = sanitizer("ran passed; ran failed; echo ERROR SUMMARY: 3 errors; exit 99")
    assert rec.found["error"] == "memcheck: 3 errors"
    assert rows["memcheck"]["errors"] == 3 and not rows["memcheck"]["complete"] and rec.partial
    rec, rows = sanitizer("echo Device not supported; exit 1")
    assert {r["state"] for r in rows.values()} == {"the tool refuses: Device not supported"}
    assert not rec.partial  # nothing that a repetition would change
