"""The GPU run-book on the CPU: every stage in a dry run, failures, resuming, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import report
from bench.gpu import checks, numbers, probes, record
from bench.gpu import main as runbook
from bench.gpu import page as gpu_page
from bench.gpu.stages import MOST, NAMES, STAGES
from bench.gpu.state import open_state
from fastres import _cuda_cutlass

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups")


def run(*args: str, fail: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "FASTRES_GPU_TEST_FAIL": fail}
    env.pop("OUT", None)
    argv = [sys.executable, "-m", "bench.gpu", *args]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def state(out: Path) -> dict:
    return json.loads((out / "state.json").read_text())["stages"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One dry run of everything."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    return out, run("--dry-run", "--out", str(out))


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(dry):
    out, done = dry
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {k: v["status"] for k, v in state(out).items()} == dict.fromkeys(NAMES, "done")
    assert "stage       status        seconds" in done.stdout


@pytest.mark.slow
def test_files_are_few_small_and_carry_their_machine(dry):
    out, _ = dry
    files = [p for p in out.rglob("*")]
    assert len(files) <= 8 and all(p.parent == out for p in files)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", p.name) for p in files)
    assert sum(p.stat().st_size for p in files) < 16 << 20
    for stage in STAGES:
        whole = json.loads((out / f"{stage.group}.json").read_text())
        assert (whole["schema"], whole["kind"]) == (record.SCHEMA, "fastres-gpu")
        found = whole["stages"][stage.name]
        assert found["status"] == "done" and found["dry_run"] is True
        assert found["command"] == f"python -m bench.gpu --stages {stage.name} --dry-run"
        env = found["environment"]
        assert {"date", "commit", "torch", "cuda", "triton", "device", "python"} <= set(env)


@pytest.mark.slow
def test_kernels_are_checked_timed_and_measured_against_the_roofline(dry):
    out, _ = dry
    own = json.loads((out / "kernels.json").read_text())["stages"]["kernels"]
    rows = own["rows"]
    ops = {row["op"] for row in rows}
    assert {"fprop", "dgrad", "wgrad", "dgrad_wgrad", "backward", "bn_stats", "bn_apply"} <= ops
    for row in rows:
        for name, verdict in row["checks"].items():
            assert verdict["ok"] or "not supported" in verdict["error"], (row["case"], name)
        for variant in row["variants"].values():
            assert 0 < variant["us_q1"] <= variant["us"] <= variant["us_q3"]
    fused = [r["variants"]["fused"] for r in rows if "fused" in r["variants"]]
    assert all(v["bytes"] > 0 and v["flops"] > 0 and v["percent"] > 0 for v in fused)
    assert len(rows) == own["expected"]["cases"]
    shares = own["stream_copy_percent"]
    assert all(e["shapes"] == e["of"] for n, e in shares.items() if n.endswith("(triton)"))
    assert all(e["us"] and e["layers"] == e["of"] for e in own["backward_us"].values())
    every = own["conv_sum_us"]["all"]  # a build without the kernels takes no conv
    assert every["convs"] == 0 and (every["of"] > 0) == (_cuda_cutlass.built() is None)
    decided = [r for r in rows if r["op"] == "backward"]
    assert decided and all({"b", "c1", "c2"} <= set(r["variants"]) for r in decided)
    assert all(set(r["variants"]["c2"]["against"]) == {"b"} for r in decided)


@pytest.mark.slow
def test_networks_are_timed_eagerly_and_as_graphs(dry):
    out, _ = dry
    train = json.loads((out / "train.json").read_text())["stages"]["train"]
    rows = train["rows"]
    names = {r["variant"] for r in rows if r["status"] == "ok"}
    assert train["expected"].keys() == {"resnet50|2|train"}
    assert names == set(train["expected"]["resnet50|2|train"])
    assert {"eager bf16", "eager bf16 +graph", "fastres b", "fastres b +graph"} <= names
    assert {"fastres cuda c2", "fastres cuda c2 +graph"} <= names
    assert all(r["img/s"] > 0 and "eager bf16" in r["against"] for r in rows)
    slow = json.loads((out / "train.json").read_text())["stages"]["autotune"]["rows"]
    assert {"eager bf16", "compile-max bf16", "fastres cuda b"} <= {r["variant"] for r in slow}
    own = json.loads((out / "inference.json").read_text())["stages"]["memory"]
    memory = own["rows"]
    assert own["expected"] == {"rows": len(memory)}
    assert memory[1]["variant"] == "fastres b" and memory[1]["saved"] < memory[0]["saved"]


@pytest.mark.slow
def test_the_report_renders_every_stage_and_says_that_it_was_a_dry_run(dry, tmp_path):
    out, _ = dry
    shutil.copytree(out, tmp_path / "results" / "gpu")
    page = tmp_path / "page.md"
    count, files = report.write(tmp_path / "results", page)
    text = page.read_text()
    assert count == len({s.group for s in STAGES})
    tuned = json.loads((out / "probes.json").read_text())["stages"]["tune"]
    n, tiled = len(tuned["rows"]), sum(r["path"] in probes.TILED for r in tuned["rows"])
    assert 0 < tiled < n and tuned["expected"] == {"blocks": n, "tiled": tiled}
    said = f"Measured: {n} of {n}, of the network's distinct blocks; "
    assert said + f"pass by pass: {tiled} of {tiled}.\n" in text
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert set(headings) == {f"### {gpu_page.TITLES[name]}" for name in NAMES}
    assert text.count(gpu_page.DRY) == len(NAMES)
    for stage in NAMES:
        assert f"`python -m bench.gpu --stages {stage} --dry-run`" in text
    for cell in (
        "| `fprop` |",
        "| **fastres b +graph** |",
        "| **the network** |",
        "| `layer1.0` |",
    ):
        assert cell in text
    charts = {"kernels-roofline", "train-train-throughput", "inference-memory"}
    assert {f"gpu-{chart}.png" for chart in charts} <= set(files)
    omitted = text[text.index(report.OMITTED) :]
    assert omitted.count(".json`") == 1 and "`state.json`: is the list of a run-book" in omitted


def test_a_failing_stage_does_not_stop_the_rest_and_resume_repeats_only_it(tmp_path):
    """And the build, which a machine may have lost."""
    out, names = tmp_path / "out", ("build", "doctor", "sanitizer")
    args = ("--dry-run", "--out", str(out), "--stages", ",".join(names))
    done = run(*args, fail="build:crash,sanitizer:raise")
    assert done.returncode == 1
    assert [state(out)[s]["status"] for s in names] == ["failed", "done", "failed"]
    assert "SIGSEGV" in state(out)["build"]["error"]
    assert "asked to fail" in state(out)["sanitizer"]["error"]
    stages = json.loads((out / "checks.json").read_text())["stages"]
    assert [stages[s]["status"] for s in names] == ["failed", "done", "failed"]
    before = state(out)["doctor"]
    again = run(*args)
    assert again.returncode == 2 and "has results already; --resume" in again.stderr
    resumed = run(*args, "--resume")
    assert resumed.returncode == 0 and "== doctor: done before" in resumed.stdout
    assert state(out)["doctor"] == before
    assert [state(out)[s]["status"] for s in names] == ["done"] * 3


def test_a_hanging_stage_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_GPU_TEST_FAIL", "doctor:hang")
    monkeypatch.setattr(runbook, "DRY_LIMIT", 4)
    monkeypatch.setattr(runbook, "GRACE", 0.5)
    out = tmp_path / "out"
    code = runbook.main(["--dry-run", "--out", str(out), "--stages", "doctor"])
    assert code == 1
    assert state(out)["doctor"]["status"] == "timeout"
    assert state(out)["doctor"]["error"] == "stopped after 4 s"


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_keeps_what_was_measured(tmp_path, how, code):
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out)]
    env = {**os.environ, "FASTRES_GPU_TEST_FAIL": "build:wait"}
    process = subprocess.Popen(
        [*argv, "--stages", "build,doctor"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while "measured" not in read(out / "checks.json") and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(60) == code
    assert state(out)["build"]["status"] == "interrupted" and "doctor" not in state(out)
    build = json.loads(read(out / "checks.json"))["stages"]["build"]
    assert build["status"] == "interrupted" and build["rows"] == [{"measured": 1}]
    assert build["environment"]["torch"] and "stopped; what was measured" in build["notes"][-1]


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_a_full_disk_fails_a_stage_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    ran = []

    def run_stage(stage, *args):
        ran.append(stage.name)
        return full() if stage.name == "build" else {"status": "done", "seconds": 1}

    monkeypatch.setattr(runbook, "run_stage", run_stage)
    args = ["--dry-run", "--out", str(tmp_path), "--stages", "build,doctor"]
    options = runbook.parse(args)
    state = open_state(tmp_path, False, True)
    monkeypatch.setattr(runbook, "write_json", full)
    assert runbook.run_all(runbook.chosen("build,doctor"), tmp_path, state, options) == 1
    said = capsys.readouterr()
    assert ran == ["build", "doctor"] and "failed" in said.out and "No space left" in said.out
    assert "state.json cannot be written" in said.err


def test_a_spent_budget_is_said(tmp_path, capsys):
    args = ["--dry-run", "--out", str(tmp_path), "--stages", "build,doctor", "--budget", "0.1"]
    assert runbook.main(args) == 1
    assert capsys.readouterr().out.count("the budget is spent") == 2


@pytest.mark.parametrize("args, message", [
    (["--stages", "kernel"], r"unknown stage 'kernel'; known: build, doctor, kernels, tests"),
    (["--stages", ","], r"no stage; known: build"),
    (["--budget", "0", "--dry-run"], r"argument --budget: must be positive, got 0"),
    (["--out", __file__, "--dry-run"], r"is not a folder"),
    (["--call", "4", "--dry-run"], r"argument --call: unknown call 4; known: 1, 2, 3"),
    (["--call", "1", "--stages", "build"], r"argument --call: goes without --stages"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(args, message, capsys):
    assert runbook.main(args) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_no_gpu_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runbook.main(["--out", str(tmp_path / "out")]) == 2
    assert re.search(r"no GPU: .*--dry-run runs every stage", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_is_not_resumed_as_a_real_one(tmp_path, capsys, monkeypatch):
    old = {"schema": 1, "kind": "fastres-gpu-state", "dry_run": True, "stages": {}}
    (tmp_path / "state.json").write_text(json.dumps(old))
    monkeypatch.setattr(runbook, "no_gpu", lambda: None)
    assert runbook.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "mixes a dry run with a real one" in capsys.readouterr().err


def test_list(capsys):
    assert runbook.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(s.limit <= MOST == 480 for s in STAGES)
    assert len({s.group for s in STAGES}) + 1 + 2 <= 8  # state.json; the module and its facts


def test_the_sanitizers_tests_exist():
    """Of Triton's kernels and of the C++ ones, Hopper's convolutions among them."""
    env = {**os.environ, "FASTRES_TEST_CUDA_HOST": "1"}  # collects what a GPU would run
    files = [str(ROOT / "tests" / file) for file in checks.SANITIZED]
    argv = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:xdist", *files]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    found = set(done.stdout.splitlines())
    for file, tests in checks.SANITIZED.items():
        assert {f"tests/{file}::{t}" for t in tests} <= found, done.stdout[-2000:]


def test_a_wrong_result_is_named_and_not_ok():
    import torch

    from bench.gpu.kernels import judge

    want = torch.randn(8, 8)
    assert judge({"y": (want.clone(), want)})["ok"]
    for bad in (want * 1.1, torch.full_like(want, float("nan"))):
        rms = 0.1 if bad.isfinite().all() else float("nan")
        right = {"x": (want, want), "z": (want, want)}
        for pairs in ({"y": (bad, want), **right}, {**right, "y": (bad, want)}):
            verdict = judge(pairs)
            assert not verdict["ok"] and verdict["error"].startswith("wrong: y: rms error")
            assert verdict["errors"]["rms"] == pytest.approx(rms, rel=1e-3, nan_ok=True)


def conv_row(op: str, c2: int, **us: float) -> dict:
    return {
        "op": op,
        "case": f"{op}/a",
        "c2": c2,
        "variants": {v: {"us": t} for v, t in us.items()},
    }


def test_the_sums_that_decide_about_the_hopper_convolutions():
    from bench.gpu.numbers import conv_sums

    rows = [
        conv_row("fprop", 3, cuda=10.0, vendor=9.0, passes=20.0),
        conv_row("fprop", 0, cuda=1e6, vendor=1.0, passes=1.0),  # of inference, or rung d
        conv_row("fprop", 1, vendor=50.0, passes=90.0),  # of images
        conv_row("dgrad", 2, cuda=10.0, vendor=10.0, passes=30.0),
        conv_row("wgrad", 2, cuda=20.0, vendor=10.0),
        conv_row("backward", 2, b=1.0),
    ]
    sums = conv_sums(rows, {"fprop": 4, "dgrad": 2, "wgrad": 2})
    fprop = sums["fprop"]
    assert (fprop["cuda"], fprop["vendor"], fprop["passes"]) == (30, 27, 60)
    assert (fprop["x vendor"], fprop["x passes"], fprop["convs"]) == (0.9, 2.0, 3)
    assert [sums[k]["of"] for k in ("fprop", "dgrad", "wgrad", "all")] == [4, 2, 2, 8]
    assert fprop["left_out"] == sums["all"]["left_out"] == ["fprop/a"]
    assert sums["wgrad"]["passes"] == 20 and sums["wgrad"]["x passes"] == 0.5
    assert sums["all"]["cuda"] == 90 and sums["all"]["x passes"] == 140 / 90
    assert conv_sums([], {})["all"]["x vendor"] is conv_sums([], {})["all"]["of"] is None


def test_a_verdict_is_over_all_expected_cases_or_not_complete():
    from bench.gpu.numbers import backward_sums, said

    assert said(0.96, 0.95, 52, 52) == "0.96, reached"
    assert said(0.94, 0.95, 52, 52) == "0.94, NOT reached"
    assert said(0.96, 0.95, 51, 52) == "0.96, not complete: 51 of 52"
    assert said(0.96, 0.95, 52, None) == "0.96, not complete: 52 of an unknown number"
    assert said(None, 0.95, 0, 52) == "not measured"
    backward = [
        {"op": "backward", "count": n, "variants": {v: {"us": t} for v, t in us.items()}}
        for n, us in ((3, {"b": 2.0, "c1": 1.0, "c2": 1.0, "d": 0.5}), (1, {"b": 4.0, "c2": 3.0}))
    ]
    assert backward_sums(backward, 4) == {
        "b": {"us": 10.0, "layers": 4, "of": 4}, "c1": {"us": None, "layers": 3, "of": 4},
        "c2": {"us": 6.0, "layers": 4, "of": 4}, "d": {"us": 4.5, "layers": 4, "of": 4},
    }  # fmt: skip
    # a layer whose row never got into the file
    assert {e["us"] for e in backward_sums(backward[:1], 4).values()} == {None}


def test_the_streaming_kernels_share_of_copy_bandwidth():
    from bench.gpu.numbers import stream_shares

    def row(op: str, **speeds: float) -> dict:
        return {"op": op, "variants": {v: {"GB/s": s} for v, s in speeds.items()}}

    rows = [row("bn_stats", ours=3800, cuda=2000), row("bn_stats", cuda=4000), row("fprop", ours=9)]
    expected = {"bn_stats (triton)": 3, "add_relu (cuda)": 1}
    assert stream_shares(rows, 4e12, expected) == {
        "bn_stats (triton)": {"shapes": 1, "of": 3, "min": 95, "median": 95, "reach": 1},
        "add_relu (cuda)": {"shapes": 0, "of": 1, "min": None, "median": None, "reach": 0},
        "bn_stats (cuda)": {"shapes": 2, "of": None, "min": 50, "median": 75, "reach": 1},
    }


def test_each_conv_of_the_network_is_in_the_sums_once():
    """ResNet-50 has 53 convs, and no dgrad of the images. They come before other forms, after the
    streaming kernels."""
    from bench.gpu.kernels import all_cases, expected

    cases = all_cases(False)
    found = {op: sum(c.c2 for c in cases if c.op == op) for op in ("fprop", "dgrad", "wgrad")}
    assert found == {"fprop": 53, "dgrad": 52, "wgrad": 53}
    of = expected(cases)
    taken = 52 if _cuda_cutlass.built() is None else 0  # the C++ kernels do not take the images
    assert of["convs"] == {"fprop": taken, "dgrad": taken, "wgrad": taken} and of["layers"] == 52
    shapes = sum(c.op == "bn_stats" for c in cases)
    assert of["streams"]["bn_stats (cuda)"] == of["roofline"]["bn_stats"] == shapes == 12
    forms = {"triton": 13} | ({"cuda": 12} if taken else {})
    assert of["cases"] == len(cases) and of["forms"]["fprop/stats"] == forms
    worth = [
        0 if c.op not in numbers.CONV_OPS else 2 if c.op == "backward" else 1 if c.c2 else 3
        for c in cases
    ]
    assert worth == sorted(worth) and set(worth) == {0, 1, 2, 3}


def test_a_job_that_crashes_costs_itself_only(monkeypatch):
    from bench.gpu import pool

    code = (
        "import sys, json, os\n"
        "for line in sys.stdin:\n"
        "    name = json.loads(line)\n"
        "    if name == 'crash': os.abort()\n"
        "    if name == 'hang': import time; time.sleep(60)\n"
        "    print(json.dumps({'name': name, 'ok': True}), flush=True)\n"
    )

    def start(self, stage, dry):
        argv = [sys.executable, "-c", code]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""

    monkeypatch.setattr(pool._Worker, "__init__", start)
    names = ["a", "crash", "b", "hang", "c"]
    found = pool.run_jobs("kernels", names, True, 1, 3.0, 60.0)
    assert [found[n]["ok"] for n in names] == [True, False, True, False, True]
    assert found["crash"]["error"] == "its process died: SIGABRT"
    assert found["hang"]["error"] == "no answer within 3 s"
    assert "no time left" in pool.run_jobs("kernels", ["a"], True, 1, 3.0, 0.0)["a"]["error"]
    cut = pool.run_jobs("kernels", ["hang"], True, 1, 30.0, 0.5)["hang"]["error"]
    assert cut == "not checked: no time left after 0 s"  # not the job's own doing


def worker(monkeypatch, code: str):
    """A worker of the pool that runs `code`."""
    from bench.gpu import pool

    def start(self, stage, dry):
        argv = [sys.executable, "-S", "-c", code]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""

    monkeypatch.setattr(pool._Worker, "__init__", start)
    return pool, pool._Worker("kernels", True)


def test_half_an_answer_at_the_deadline_is_none(monkeypatch):
    """And its worker, which lives, is not waited for."""
    code = "import sys, time; input(); print('{', end='', flush=True); time.sleep(20)"
    pool, asked = worker(monkeypatch, code)
    clock = iter([0.0, 0.0, 0.0])  # the deadline passes after the first part
    fake = SimpleNamespace(monotonic=lambda: next(clock, 100.0))
    monkeypatch.setattr(pool, "time", fake)
    assert asked.ask("a", 10.0) == {"ok": False, "error": "no answer within 10 s"}
    assert not asked.alive


def test_a_worker_that_closes_its_answers_is_stopped(monkeypatch):
    code = "import os, time; input(); os.close(1); time.sleep(20)"
    pool, asked = worker(monkeypatch, code)
    monkeypatch.setattr(pool, "CLOSE_SECONDS", 0.2)
    answer = asked.ask("a", 10.0)
    assert answer["error"] == "its process lives, but answers no more: killed" and not asked.alive


@pytest.fixture
def probing(tmp_path, monkeypatch):
    """A stage's record whose time is up when the test says so, and what the probes need of a
    device."""
    from bench.gpu import probes
    from fastres import plan

    monkeypatch.setattr(record, "environment", lambda dry: {})
    monkeypatch.setattr(probes, "table", lambda *args: None)
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    shot = SimpleNamespace(run=lambda: 1e-3)
    dev = SimpleNamespace(
        dry=False, type="cpu", torch="cpu", empty=lambda: None, broken=lambda: None,
        timer=SimpleNamespace(shot=lambda calls, seconds, graph: shot),
    )  # fmt: skip

    def make(stage: str) -> record.Record:
        return record.Record(tmp_path, stage, True, 60.0, "a test")

    plan.forget()
    yield probes, dev, make
    plan.forget()


def test_what_cudnn_was_not_asked_is_not_unsupported(probing, monkeypatch):
    import torch

    probes, dev, make = probing
    rec, built = make("cudnn"), []
    shape = dict(x=(1, 8, 8, 8), K=8, C=8, S=3, padding=(1, 1))
    shapes = [SimpleNamespace(**shape, R=3, stride=(n, n)) for n in (1, 2)]

    def build(module, handle, form, s, dtype):
        built.append((form, s.stride[0], dtype))
        if form == "conv+genstats":
            raise RuntimeError("no engine")
        if len(built) == 11 and not rec.before:  # in the middle of fp16's first shape
            rec.deadline = 0.0
        return lambda: None

    fake = SimpleNamespace(create_handle=int, backend_version=lambda: 9, __version__="1")
    monkeypatch.setattr(probes, "frontend", lambda: (fake, None))
    monkeypatch.setattr(probes, "conv_shapes", lambda dry: shapes)
    monkeypatch.setattr(probes, "build_graph", build)
    probes.cudnn(dev, rec)
    bf16, fp16 = "bfloat16", "float16"
    assert [(r["dtype"], r["shape"]["stride"][0]) for r in rec.rows[::4]] == [
        (bf16, 1), (bf16, 2), (fp16, 1), (fp16, 2)
    ]  # fmt: skip
    assert [r["supported"] for r in rec.rows[:8]] == [True, False, True, True] * 2
    assert [r["supported"] for r in rec.rows[8:]] == [True, False, True, None] + [None] * 4
    assert "not tried: 5 of 16, for lack of time" in rec.found["notes"]
    counts = numbers.cudnn_counts(rec.rows, 2)
    lines = {(form, name): (all_, down) for form, name, all_, down, *_ in counts}
    assert [line[4] for line in counts] == ["2 of 2"] * 4 + ["1 of 2"] * 3 + ["0 of 2"]
    assert lines["conv", bf16] == ("2/2", "1/1") and lines["conv", fp16] == ("1/1", "0/0")
    assert lines["conv+genstats", fp16] == ("0/1", "0/0")
    assert lines["conv+scale-bias-relu", fp16] == ("0/0", "0/0")
    assert rec.partial
    rec.save("partial")
    built.clear()
    rec = make("cudnn")
    probes.cudnn(dev, rec)
    assert {dtype for _, _, dtype in built} == {torch.float16} and len(rec.rows) == 16
    assert rec.partial is False and [r["supported"] for r in rec.rows[8:]] == [
        True, False, True, True
    ] * 2  # fmt: skip


def test_an_interrupted_tune_keeps_its_blocks(probing, tmp_path, monkeypatch):
    """The blocks of probes.TILED come first, pass by pass."""
    import torch
    from torchvision.models.resnet import BasicBlock, ResNet

    from fastres import plan, tuning

    probes, dev, make = probing
    dev.dry = True
    rec = make("tune")
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).to(memory_format=torch.channels_last)
    monkeypatch.setattr(probes, "network", lambda name, dry: net)
    limits, tiled = [], []

    def measure(target, seconds, isolate, per_conv, deadline, candidate_seconds):
        limits.append(deadline - time.monotonic())
        tiled.append((target.x.shape[1], per_conv))
        if len(limits) == 3:
            raise KeyboardInterrupt
        return plan.Entry("b", {"eager": 2.0, "b": 1.0}, 2.0)

    monkeypatch.setattr(tuning, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        probes.tune(dev, rec)
    found = json.loads((tmp_path / "probes.json").read_text())["stages"]["tune"]
    written = found["rows"]
    assert found["expected"] == {"blocks": 5, "tiled": 1}
    assert [r["choice"] for r in written] == ["b", "b"] and all(0 < s <= 60 for s in limits)
    assert tiled == [(64, True), (3, False), (64, False)]  # layer2.0, the stem, layer1.0
    assert [(r["path"], r["per_conv"]) for r in written] == [("layer2.0", True), ("(stem)", False)]
    assert limits[0] <= probes.TILED_SHARE * 60 < min(limits[1:])
    plan.forget()  # another process
    rec = make("tune")
    rec.deadline = 0.0
    monkeypatch.setattr(tuning, "measure", lambda *args: (_ for _ in ()).throw(tuning.TimeLimit()))
    probes.tune(dev, rec)
    assert [r["choice"] for r in rec.rows] == ["b", "b"] and rec.partial
    left = [f"layer{i}.0 training" for i in (1, 3, 4)]
    assert rec.found["notes"][-1].startswith("not measured, for lack of time: ")
    assert rec.found["notes"][-1].endswith(", ".join(left))
