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

from bench.gpu.child import PARTIAL, ROOT
from bench.gpu.record import now, read_json, write_json
from bench.gpu.stages import (
    BY_NAME,
    CALL_SECONDS,
    CALLS,
    DRY_LIMIT,
    LENT_SECONDS,
    NAMES,
    SOFT,
    STAGES,
    START_SECONDS,
    Stage,
    allowance,
    of_call,
)
from bench.gpu.state import FILE, UsageError, open_state, say

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
GRACE = 8.0  # seconds between asking a stage to stop and killing it
LEAST = 20.0  # seconds of budget under which no stage is started


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with an exit code of its own."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="The GPU run-book; docs/gpu.md."
    )
    default = os.environ.get("OUT") or str(Path("bench") / "results" / "gpu")
    parser.add_argument("--stages", metavar="A,B", help="only these (default: all, in order)")
    parser.add_argument("--out", default=default, help="folder for the JSON files (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on: skip what is done in --out")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all stages together")
    parser.add_argument("--call", type=int, metavar="N", help="the stages of call N, see --calls")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument("--calls", action="store_true", help="print the plan of calls and exit")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no GPU")
    return parser.parse_args(argv)


def chosen(text: str | None, call: int | None = None) -> list[Stage]:
    if call is not None:
        if text is not None:
            raise UsageError("argument --call: goes without --stages")
        if call not in CALLS:
            known = ", ".join(map(str, CALLS))
            raise UsageError(f"argument --call: unknown call {call}; known: {known}")
        return of_call(call)
    if text is None:
        return list(STAGES)
    names = [n.strip() for n in text.split(",") if n.strip()]
    unknown = [n for n in names if n not in BY_NAME]
    if unknown or not names:
        what = f"unknown stage {unknown[0]!r}" if unknown else "no stage"
        raise UsageError(f"argument --stages: {what}; known: {', '.join(NAMES)}")
    return [s for s in STAGES if s.name in names]


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
    before = _stamp(out / f"{stage.group}.json")
    process = subprocess.Popen(argv, env=env, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        found["status"] = {0: "done", PARTIAL: "partial"}.get(code, "failed")
        if code < 0:
            found["error"] = f"its process died: {signal.Signals(-code).name}"
        elif code not in (0, PARTIAL):
            found["error"] = f"exit code {code}"
    except subprocess.TimeoutExpired:
        found |= {"status": "timeout", "error": f"stopped after {seconds:.0f} s"}
    except KeyboardInterrupt as how:
        found["status"] = "interrupted"
        found["exit"] = TERMINATED if isinstance(how, Terminated) else INTERRUPTED
    finally:
        stop(process)
    found["seconds"] = round(time.monotonic() - started, 1)
    settle(stage, out, found, before)
    return found


def _stamp(file: Path) -> tuple[int, int] | None:
    """Another one after each write_json."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def settle(stage: Stage, out: Path, found: dict[str, Any], before: tuple | None) -> None:
    """A stage that was killed left its results as "running", or wrote nothing, and what is there is
    an earlier run's: say how it ended. before: the file's stamp at its start."""
    file = out / f"{stage.group}.json"
    whole = read_json(file)
    own = whole.get("stages", {}).get(stage.name)
    if own is None:
        return
    silent = _stamp(file) == before
    if own.get("error") and not silent:
        found["error"] = own["error"]
    if silent or own.get("status") == "running" or found["status"] == "timeout":
        own |= {"status": found["status"], "error": found.get("error")}
        write_json(file, whole)


def print_plan() -> None:
    """Which stages go in which call, and what travels between the calls."""
    for call in CALLS:
        stages = of_call(call)
        what = ", ".join(f"{s.name} {s.limit}" for s in stages if s.call == call)
        again = "" if call == CALLS[0] else " --resume"
        print(f"call {call} (at most {CALL_SECONDS} s): {what}")
        print(f"    python -m bench.gpu --call {call}{again}")
    n, whole = len(CALLS), len(CALLS) * (CALL_SECONDS + START_SECONDS)
    print(
        f"\n{n} calls and {n} starts of a machine ({START_SECONDS} s each) are {whole:,} s of the "
        f"{LENT_SECONDS:,} that it\nis lent for. Where a start took longer, give the last call "
        "what is left by --budget; where the\nmachine stayed warm, a call may have up to 560. No "
        "call has time for a second build: one takes\nup to 130 s from its last stages."
    )
    print(
        "\nA stage that ends early leaves its time to those after it, at last to those that an\n"
        "earlier call did not finish. Where the machine is bare at each call, bring the folder\n"
        "of results back after it and put it there again before the next: the JSON files say\n"
        "what is done, module/ spares the build. docs/gpu.md"
    )


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        if options.list:
            for s in STAGES:
                print(f"{s.name:<10} {s.limit:>4} s  {s.group + '.json':<15} {s.about}")
            return 0
        if options.calls:
            print_plan()
            return 0
        stages = chosen(options.stages, options.call)
        if options.budget is not None and not options.budget > 0:
            raise UsageError(f"argument --budget: must be positive, got {options.budget:g}")
        if not options.dry_run and (why := no_gpu()) is not None:
            raise UsageError(f"no GPU: {why}. --dry-run runs every stage on the CPU")
        out = Path(options.out)
        state = open_state(out, options.resume, options.dry_run)
        if options.call is not None:
            # a call that was killed never heard of its last stages
            done = {n for n, s in state["stages"].items() if s["status"] == "done"}
            left = set(NAMES) - done if options.resume else set()
            stages = of_call(options.call, left)
    except UsageError as error:
        say(str(error))
        return BAD_INPUT
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return run_all(stages, out, state, options)
    except KeyboardInterrupt as how:  # between two stages
        return TERMINATED if isinstance(how, Terminated) else INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # once: the stage is being stopped
    raise Terminated


def save_state(out: Path, state: dict[str, Any]) -> None:
    """What --resume reads; without it a run goes on, and its table still tells how it ended."""
    try:
        write_json(out / FILE, state)
    except OSError as error:
        say(f"{FILE} cannot be written: {error}")


def run_all(
    stages: list[Stage], out: Path, state: dict[str, Any], options: argparse.Namespace
) -> int:
    done = {s.name for s in stages if state["stages"].get(s.name, {}).get("status") == "done"}
    todo = [s for s in stages if s.name not in done or s.always]
    if options.budget is not None:
        budget = options.budget
    elif options.dry_run:
        budget = float("inf")
    else:
        budget = CALL_SECONDS if options.call is not None else sum(s.limit for s in todo)
    end = time.monotonic() + budget
    code = None
    for stage in stages:
        if stage not in todo:
            print(f"== {stage.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        limit = min(DRY_LIMIT, left) if options.dry_run else allowance(todo, left)
        todo.remove(stage)
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
            code = found["exit"]
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
    return int(bad) if code is None else code
