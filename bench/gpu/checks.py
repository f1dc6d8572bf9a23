"""Stages `build`, `doctor`, `tests` and `sanitizer`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu.child import ROOT
from bench.gpu.device import Device, table
from bench.gpu.pool import parallel_workers
from bench.gpu.record import Record

# what compiles nothing or little first: there may be no time for the last
TESTS = (
    "test_cuda_conv.py", "test_cuda_pointwise.py", "test_cuda_ladder.py", "test_cuda_tiles.py",
    "test_bn_stats.py", "test_bn_apply.py", "test_bn_bwd.py", "test_add_relu.py",
    "test_bn_relu_maxpool.py", "test_graph.py", "test_fusion.py", "test_ladder.py",
    "test_ladder_choices.py", "test_conv.py", "test_conv_limits.py", "test_triton_cuts.py",
    "test_cuda_build.py",
)  # fmt: skip
ON_GPU = (
    # the C++ kernels of the CPU have no business here
    "triton or cuda or cuts or conv or fusion or graph or two_runs"
)
DRY_TESTS = ("test_bn_stats.py", "test_bn_stats_fwd_uses_eps")
# one test of each kernel family, on small shapes: a sanitizer slows a kernel 10 to 100 times
SANITIZED = {
    "test_bn_stats.py": (
        "test_bn_stats_fwd_matches_reference[triton-bf16-nhwc-2x35x7x7]",
        "test_bn_stats_fwd_matches_reference[cuda-bf16-nhwc-5x264x5x4]",
    ),
    "test_bn_apply.py": (
        "test_bn_apply_fwd_matches_reference[triton-bf16-nhwc-2x35x7x7-normalised]",
        "test_bn_apply_fwd_matches_reference[cuda-bf16-nhwc-5x264x5x4-normalised]",
    ),
    "test_bn_bwd.py": (
        "test_bn_bwd_reduce_bwd_matches_reference[triton-bf16-nhwc-2x35x7x7-mask-normalised]",
        "test_bn_bwd_apply_bwd_matches_reference[triton-bf16-nhwc-2x35x7x7-mask-normalised]",
        "test_bn_bwd_reduce_bwd_matches_reference[cuda-bf16-nhwc-5x264x5x4-mask-normalised]",
        "test_bn_bwd_apply_bwd_matches_reference[cuda-bf16-nhwc-2x35x7x7-mask-normalised]",
    ),
    "test_bn_relu_maxpool.py": (
        "test_bn_relu_maxpool_bwd_matches_reference[triton-bf16-nhwc-2x35x7x7-k3s2p1]",
        "test_bn_relu_maxpool_bwd_matches_reference[cuda-bf16-nhwc-2x72x9x7-k3s2p1]",
    ),
    "test_add_relu.py": ("test_add_relu_fwd_matches_reference[cuda-bf16-nhwc-2x35x7x7]",),
    "test_conv.py": (
        "test_fprop[bf16-3x3-odd-norm]",
        "test_fprop[bf16-1x1-norm]",
        "test_fprop_writes_the_block_output[bf16-1x1-dual]",
        "test_dgrad[bf16-3x3-s2-bn-True-none-recompute]",
        "test_wgrad[bf16-3x3-odd-bn-True-True]",
        "test_bwd_pointwise[bf16-1x1-bn-False-mask-dual]",
    ),
    "test_cuda_conv.py": (
        "test_fprop[cuda-bf16-3x3-many-plain]",
        "test_fprop[cuda-bf16-1x1-wide-norm]",
        "test_dgrad[cuda-bf16-3x3-s2-bn-False-mask-dual]",
        "test_wgrad_of_every_shape[cuda-bf16-3x3-s2]",
    ),
    "test_cuda_pointwise.py": (
        "test_fprop[cuda-bf16-tiles-norm]",
        "test_fprop_writes_the_block_output[cuda-bf16-tiles-dual]",
        "test_fprop_act[cuda-bf16-tiles-True-True]",
        "test_dgrad[cuda-bf16-back-bn-True-mask-dual]",
        "test_wgrad[cuda-bf16-tiles-bn-True-True]",
    ),
    "test_cuda_tiles.py": (  # not the tiles that these shapes would have by themselves
        "test_every_tile_matches_the_reference[fprop-pointwise-128x128]",
        "test_every_tile_matches_the_reference[dgrad-cutlass-128x128-pair]",
        "test_every_tile_matches_the_reference[wgrad-cutlass-128x64]",
    ),
}
MODULE, BUILD_INFO = "module", "_build_info.txt"  # of the native module, beside the results
MODULE_BYTES = 16 << 20
TOOL_SECONDS = 10.0  # under which no tool is started
TOOLS = (
    ("memcheck", r"ERROR SUMMARY: (\d+) error"),
    ("racecheck", r"RACECHECK SUMMARY: (\d+) hazard"),
)


def build(device: Device, record: Record) -> None:
    """`pip install -e .` where fastres and its kernels cannot be imported, or not those of these
    sources. What it built goes to module/ beside the results, and is taken from there by a later
    run on a bare machine."""
    before, sources = record.before.get("module", {}), _digest(*_sources())
    folder = record.file.parent / MODULE
    elsewhere = Path(tempfile.gettempdir())  # where only what is installed is found
    installed = _why_not(elsewhere) is None and before.get("sources", sources) == sources

    def say(state: str) -> None:
        table("build", ("what", "state"), [("fastres", state)])

    if device.dry:
        record.set(installed=installed, ran=None)
        return say("is installed" if installed else "is not installed (dry run)")
    if installed:
        record.set(installed=True, ran=None, module=before or {"sources": sources})
        return say("is installed")
    if before.get("sources") == sources and carried(folder, before):
        for name, place in _module_files().items():
            shutil.copy2(folder / name, place)
        link = ROOT / "fastres/kernels"  # what an installation maps, for processes that tune starts
        if not link.exists():
            link.symlink_to("../kernels")
        reason = _why_not(ROOT)
        record.set(installed=reason is None, ran=None, module=before)
        if reason is not None:
            raise RuntimeError(f"the module in {folder} does not load here: {reason}")
        return say(f"taken from {folder}")
    argv = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps",
            "--disable-pip-version-check", "-e", str(ROOT)]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=record.time_left())
    log = (done.stdout + done.stderr)[-4000:]
    reason = _why_not(elsewhere)
    record.set(installed=reason is None, ran=argv, log=log)
    if reason is not None:
        print(log)
        # the stages after this one need no C++ module, and find kernels/ in the checkout
        raise RuntimeError(f"the installation failed; going on from the checkout: {reason}")
    record.set(module={"sources": sources, **keep_module(folder)})
    say("installed")


def _why_not(cwd: Path) -> str | None:
    """Why fastres and its kernels cannot be imported there; None when they can."""
    probe = [sys.executable, "-c", "import fastres._C, fastres.kernels"]
    done = subprocess.run(probe, cwd=cwd, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown"])[-1]


def _sources() -> list[Path]:
    """What the native module is built from."""
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    made = "__pycache__"  # by csrc's own tests
    there = (p for p in (ROOT / "csrc").rglob("*") if p.is_file() and made not in p.parts)
    return [*files, *sorted(there)]


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _module_files() -> dict[str, Path]:
    """{name in module/: place in the checkout} of the native module and what it was built with."""
    module = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    folder = ROOT / "fastres"
    return {module: folder / module, BUILD_INFO: folder / "_build_info.json"}


def keep_module(folder: Path) -> dict[str, Any]:
    """Copies the module's files to `folder`: {"files": digests}. A module larger than what may come
    back from a machine stays, and is built again."""
    files = _module_files()
    if any(not p.exists() or p.stat().st_size > MODULE_BYTES for p in files.values()):
        return {}
    folder.mkdir(exist_ok=True)
    for name, place in files.items():
        shutil.copy2(place, folder / name)
    return {"files": {name: _digest(folder / name) for name in files}}


def carried(folder: Path, before: dict[str, Any]) -> bool:
    """Whether an earlier run's module in `folder` is whole and for this Python."""
    files = before.get("files", {})
    return all(
        (folder / n).is_file() and _digest(folder / n) == files.get(n) for n in _module_files()
    )


def doctor(device: Device, record: Record) -> None:
    from fastres import doctor as library

    found = library.examine()
    kernels = importlib.import_module("fastres.kernels")
    missing = kernels.conv_missing(device.torch)
    from fastres import _cuda

    hopper = _cuda.why_missing() or _cuda.conv_missing(device.torch)
    state = missing or "have tiles for this device"
    record.set(doctor=found, convolutions=state, cuda_convolutions=hopper or "on")
    print(library.text(found))
    rows = [(name, why or "on") for name, why in found["backends"].items()]
    more = [("convolutions", missing or "on"), ("CUDA C++ convolutions", hopper or "on")]
    table("doctor", ("backend", "state"), [*rows, *more])


def pytest_environment() -> dict[str, str]:
    """Ours, without a pytest-xdist worker's variables, by which pytest would believe it is one."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def tests(device: Device, record: Record) -> None:
    """pytest; outcomes are counted from a log that survives a time limit."""
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_log", "--tb=short",
            "-p", "no:cacheprovider"]  # fmt: skip
    if device.dry:
        argv += ["-k", f"{DRY_TESTS[1]} and triton", str(ROOT / "tests" / DRY_TESTS[0])]
    else:
        argv += ["-k", ON_GPU, *(str(ROOT / "tests" / t) for t in TESTS)]
        if importlib.util.find_spec("xdist") is not None:
            # compiling is what takes the time
            argv += ["-n", str(parallel_workers(False, 14)), "--max-worker-restart", "50"]
        else:
            record.note("pytest-xdist is not installed: one process, most will not be reached")
    record.set(ran=" ".join(argv[1:]))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        env = pytest_environment()
        env["FASTRES_TEST_LOG"] = str(log)
        passed = record.before.get("passed", [])
        log.write_text("".join(json.dumps({"test": t, "outcome": "passed"}) + "\n" for t in passed))
        if passed:
            (Path(folder) / "done").write_text(json.dumps(passed))
            env["FASTRES_TEST_DONE"] = str(Path(folder) / "done")
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        try:
            code = process.wait(max(record.time_left(), 1))
        except subprocess.TimeoutExpired:
            code = None
            record.unfinished("stopped by its time limit: what ran until then counts")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
        lines = log.read_text().splitlines() if log.exists() else []
    record.keep(lambda row: False)  # the log has what passed before, the rest ran again
    outcomes: dict[str, Counter] = {}
    by_backend: dict[str, dict[str, Counter]] = {}  # docs/capabilities.md reads it
    for line in lines:
        found = json.loads(line)
        file, _, test = found["test"].partition("::")
        outcomes.setdefault(Path(file).name, Counter())[found["outcome"]] += 1
        cuda = "cuda" in re.split(r"[\[\]-]", test) or "test_cuda_" in Path(file).name
        backend = "cuda" if cuda else "triton"
        files = by_backend.setdefault(backend, {})
        files.setdefault(Path(file).name, Counter())[found["outcome"]] += 1
        if found["outcome"] == "failed":
            record.add(test=f"{Path(file).name}::{test}", error=found["error"])
    record.set(
        outcomes={k: dict(v) for k, v in outcomes.items()},
        by_backend={b: {k: dict(v) for k, v in f.items()} for b, f in by_backend.items()},
        passed=sorted({f["test"] for f in map(json.loads, lines) if f["outcome"] == "passed"}),
        exit_code=code,
    )
    kinds = ("passed", "failed", "skipped")
    rows = [(name, *(c[k] for k in kinds)) for name, c in sorted(outcomes.items())]
    total = sum(outcomes.values(), Counter())
    for row in record.rows[:30]:
        print(f"  FAILED {row['test']}: {row['error'][:160]}")
    table("tests", ("file", *kinds), [*rows, ("all", *(total[k] for k in kinds))])
    if total["failed"] or not total["passed"]:
        said = f"{total['failed']} failed, {total['passed']} passed"
        if not record.partial:
            raise RuntimeError(said)
        record.note(said)


def sanitizer(device: Device, record: Record) -> None:
    """memcheck and racecheck over one test of each kernel family."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None or device.dry:
        record.note("compute-sanitizer: " + ("a dry run has no GPU" if device.dry else "not found"))
        table("sanitizer", ("tool", "state"), [("compute-sanitizer", "not run")])
        return
    kept = record.keep(lambda row: row.get("complete", False))
    rows = [(row["tool"], row["errors"], row["state"]) for row in kept]
    for name, pattern in (t for t in TOOLS if t[0] not in {row["tool"] for row in kept}):
        if record.time_left() < TOOL_SECONDS:
            rows.append((name, None, "no time left"))
            record.unfinished(f"{name}: no time left")
            continue
        limit = record.time_left() / (2 if name == "memcheck" else 1)
        row = record.add(**sanitized(tool, name, pattern, limit))
        rows.append((name, row["errors"], row["state"]))
        if not row["complete"] and not row["refused"]:
            record.unfinished(f"{name}: {row['state']}")
    table("sanitizer", ("tool", "errors", "state"), rows)
    if any(count for _, count, _ in rows):
        raise RuntimeError("; ".join(f"{name}: {count} errors" for name, count, _ in rows if count))


def sanitized(tool: str, name: str, pattern: str, seconds: float) -> dict[str, Any]:
    """One tool's row. complete: every test passed, or skipped itself; errors: None unless the tool
    counted some or looked at all of them."""
    only = [f"{file}::{test}" for file, tests in SANITIZED.items() for test in tests]
    argv = [tool, "--tool", name, "--target-processes", "all", "--error-exitcode", "99",
            sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_log", "-p",
            "no:cacheprovider", *(str(ROOT / "tests" / file) for file in SANITIZED)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log, said = Path(folder) / "log", Path(folder) / "said"
        env = pytest_environment() | {
            "FASTRES_TEST_ONLY": json.dumps(only), "FASTRES_TEST_LOG": str(log),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }  # fmt: skip
        with said.open("wb") as output:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=output,
                                       start_new_session=True)  # fmt: skip
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # the tool's own children, too: one would run on beside the next
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = said.read_text(errors="replace")
        lines = log.read_text().splitlines() if log.exists() else []
    ran = Counter(json.loads(line)["outcome"] for line in lines)
    found = re.findall(pattern, text)
    count = sum(map(int, found)) if found else None
    complete = (
        code == 0 and count == 0 and ran["passed"] > 0
        and ran["passed"] + ran["skipped"] == len(only)
    )  # fmt: skip
    refused = re.search(r"(Device not supported|Unable to find|not supported)", text)
    refused = refused if code is not None and count is None and not ran else None
    if refused is not None:
        state = f"the tool refuses: {refused.group(1)}"
    else:
        outcomes = ", ".join(f"{ran[k]} {k}" for k in ("passed", "failed", "skipped") if ran[k])
        how = f"exit code {code}" if code is not None else "stopped by its time limit"
        state = f"{outcomes or 'no test ran'}, of {len(only)}; {how}"
    return {
        "tool": name, "errors": count if complete or count else None, "state": state,
        "complete": complete, "refused": refused is not None, "tail": text[-3000:],
    }  # fmt: skip
