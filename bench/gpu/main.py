"""The command line of the run-book."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.child import ROOT
from bench.gpu.record import SCHEMA, STATE_KIND, now, read_json, write_json
from bench.gpu.stages import BY_NAME, DRY_LIMIT, NAMES, SOFT, STAGES, Stage

BAD_INPUT, INTERRUPTED = 2, 130
GRACE = 8.0  # seconds between asking a stage to stop and killing it
LEAST = 20.0  # seconds of budget under which no stage is started


class UsageError(Exception):
    """One line for the user; exit code 2."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="The GPU run-book; docs/gpu.md."
    )
    default = os.environ.get("OUT") or str(Path("bench") / "results" / "gpu")
    parser.add_argument("--stages", metavar="A,B", help="only these (default: all, in order)")
    parser.add_argument("--out", default=default, help="folder for the JSON files (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on: skip what is done in --out")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all stages together")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no GPU")
    return parser.parse_args(argv)


def chosen(text: str | None) -> list[Stage]:
    if text is None:
        return list(STAGES)
    names = [n.strip() for n in text.split(",") if n.strip()]
    unknown = [n for n in names if n not in BY_NAME]
    if unknown or not names:
        what = f"unknown stage {unknown[0]!r}" if unknown else "no stage"
        raise UsageError(f"argument --stages: {what}; known: {', '.join(NAMES)}")
    return [s for s in STAGES if s.name in names]


def open_state(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The state to go on from. Raises UsageError rather than write over results."""
    file = out / "state.json"
    if out.exists() and not out.is_dir():
        raise UsageError(f"argument --out: {out} is not a folder")
    before = read_json(file)
    if file.exists() and not options.resume:
        raise UsageError(f"argument --out: {out} has results already; --resume goes on with them")
    if before and (before.get("schema"), before.get("dry_run")) != (SCHEMA, options.dry_run):
        raise UsageError(
            f"argument --resume: {file} is of another version, or mixes a dry run with a real one"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        state = {
            "schema": SCHEMA, "kind": STATE_KIND, "dry_run": options.dry_run,
            "stages": before.get("stages", {}),
        }  # fmt: skip
        write_json(file, state)
    except OSError as error:
        raise UsageError(f"argument --out: cannot write to {out}: {error}") from error
    return state


def no_gpu() -> str | None:
    """Why there is no GPU to run on; None when there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return "torch sees none" if built else f"torch {torch.__version__} was built without CUDA"


def stop(process: subprocess.Popen) -> None:
    """Asks a stage and its workers to stop, then makes them."""
    for sig, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, sig)
            process.wait(wait)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlived their stage


def run_stage(stage: Stage, out: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """Runs one stage in a process group of its own: {"status", "seconds", ...}."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), env.get("PYTHONPATH")) if p)
    env["PYTHONUNBUFFERED"] = "1"
    if dry:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        env.pop("TRITON_INTERPRET", None)
    argv = [sys.executable, "-m", "bench.gpu.child", "run", stage.name, str(out.resolve())]
    argv += [str(seconds * SOFT), *(["dry"] if dry else [])]
    started = time.monotonic()
    found: dict[str, Any] = {"started": now(), "limit": seconds}
    process = subprocess.Popen(argv, env=env, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        found["status"] = "done" if code == 0 else "failed"
        if code < 0:
            found["error"] = f"its process died: {signal.Signals(-code).name}"
        elif code:
            found["error"] = f"exit code {code}"
    except subprocess.TimeoutExpired:
        found |= {"status": "timeout", "error": f"stopped after {seconds:.0f} s"}
    except KeyboardInterrupt:
        found["status"] = "interrupted"
    finally:
        stop(process)
    found["seconds"] = round(time.monotonic() - started, 1)
    settle(stage, out, found)
    return found


def settle(stage: Stage, out: Path, found: dict[str, Any]) -> None:
    """A stage that was killed left its results as "running": say how it ended."""
    file = out / f"{stage.group}.json"
    whole = read_json(file)
    own = whole.get("stages", {}).get(stage.name)
    if own is None:
        return
    if own.get("error"):
        found["error"] = own["error"]
    if own.get("status") == "running" or found["status"] == "timeout":
        own |= {"status": found["status"], "error": found.get("error")}
        write_json(file, whole)


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        if options.list:
            for s in STAGES:
                print(f"{s.name:<10} {s.limit:>4} s  {s.group + '.json':<15} {s.about}")
            return 0
        stages = chosen(options.stages)
        if options.budget is not None and not options.budget > 0:
            raise UsageError(f"argument --budget: must be positive, got {options.budget:g}")
        if not options.dry_run and (why := no_gpu()) is not None:
            raise UsageError(f"no GPU: {why}. --dry-run runs every stage on the CPU")
        out = Path(options.out)
        state = open_state(out, options)
    except UsageError as error:
        print(f"python -m bench.gpu: {error}", file=sys.stderr)
        return BAD_INPUT
    return run_all(stages, out, state, options)


def save_state(out: Path, state: dict[str, Any]) -> None:
    """What --resume reads; without it a run goes on, and its table still tells how it ended."""
    try:
        write_json(out / "state.json", state)
    except OSError as error:
        print(f"python -m bench.gpu: state.json cannot be written: {error}", file=sys.stderr)


def run_all(
    stages: list[Stage], out: Path, state: dict[str, Any], options: argparse.Namespace
) -> int:
    end = None if options.budget is None else time.monotonic() + options.budget
    interrupted = False
    for stage in stages:
        if state["stages"].get(stage.name, {}).get("status") == "done":
            print(f"== {stage.name}: done before", flush=True)
            continue
        limit = float(DRY_LIMIT if options.dry_run else stage.limit)
        if end is not None:
            limit = min(limit, end - time.monotonic())
        if limit < (1 if options.dry_run else LEAST):
            state["stages"][stage.name] = {"status": "skipped", "error": "the budget is spent"}
            continue
        print(f"== {stage.name}: {stage.about} (at most {limit:.0f} s)", flush=True)
        try:
            found = run_stage(stage, out, options.dry_run, limit)
        except OSError as error:  # a full disk ends this stage, not the rest
            found = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        state["stages"][stage.name] = found
        save_state(out, state)
        if found["status"] == "interrupted":
            interrupted = True
            break
    save_state(out, state)
    print("\nstage       status        seconds")
    bad = False
    for stage in stages:
        found = state["stages"].get(stage.name, {"status": "not run"})
        bad |= found["status"] != "done"
        line = f"{stage.name:<10}  {found['status']:<12}  {found.get('seconds', 0):>7}"
        print(f"{line}  {found.get('error') or ''}".rstrip())
    print(f"results in {out}", flush=True)
    return INTERRUPTED if interrupted else int(bad)
