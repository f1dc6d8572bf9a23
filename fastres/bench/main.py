"""The run: inputs, verification, timing, report."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastres.bench.machine import Machine
from fastres.bench.options import Case, Options, UsageError, check_memory
from fastres.bench.progress import Progress
from fastres.bench.runner import WorkerError, WorkerProcess, take_turns, turn_iterations
from fastres.bench.variants import EAGER, FASTRES, Variant, not_measured, variants_for
from fastres.bench.verify import Check, checks

FAILED = 1


class Fleet:
    """The worker processes of a run, by variant name; all are ended when the context closes."""

    def __init__(self, options: Options, fixture: Path) -> None:
        self.options, self.fixture = options, fixture
        self.workers: dict[str, WorkerProcess] = {}
        self.dead: dict[str, str] = {}
        self.threads = 0

    def start(self, variants: list[Variant]) -> None:
        """Starts workers for the variants that have none yet, all at once."""
        fresh = [v for v in variants if v.name not in self.workers and v.name not in self.dead]
        for variant in fresh:
            worker = WorkerProcess(variant, self.options.threads)
            self.workers[variant.name] = worker
            with contextlib.suppress(WorkerError):  # receive() below tells
                worker.send(
                    "init",
                    engine=variant.engine,
                    options=self.options.to_dict(),
                    fixture=str(self.fixture),
                )
        for variant in fresh:
            try:
                self.threads = self.workers[variant.name].receive()["threads"]
            except WorkerError as error:
                self.bury(variant.name, str(error))

    def bury(self, name: str, reason: str) -> None:
        """Gives a worker up for the rest of the run."""
        self.dead[name] = reason
        self.workers.pop(name).stop()

    def request(self, name: str, op: str, **fields: Any) -> dict[str, Any]:
        """A request to the worker of a variant; WorkerError also when it is gone."""
        if name not in self.workers:
            raise WorkerError(self.dead.get(name, "not started"))
        return self.workers[name].request(op, **fields)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.stop()


@contextlib.contextmanager
def fleet(options: Options, fixture: Path) -> Iterator[Fleet]:
    """A Fleet that leaves no process behind."""
    made = Fleet(options, fixture)
    try:
        yield made
    finally:
        made.close()


def resolve_device(options: Options) -> Options:
    """Options with device "cpu" or "cuda". Raises UsageError for what the machine has not."""
    import torch

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UsageError("argument --device: cuda, but torch sees no GPU; accepted here: cpu, auto")
    device = options.device if options.device != "auto" else "cuda" if has_gpu else "cpu"
    if options.dtype == "fp16" and device == "cpu":
        raise UsageError("argument --dtype: fp16 needs a GPU; the CPU has fp32 and bf16")
    return replace(options, device=device)


def verify(
    made: Fleet, options: Options, progress: Progress
) -> tuple[list[Check], dict[Case, Any]]:
    """Errors of eager and fastres in every case, and the saved bytes and reports beside them.

    Raises WorkerError when one of the two cannot run.
    """
    rows: list[Check] = []
    facts: dict[Case, Any] = {}
    for case in options.cases():
        replies = {}
        for variant in (EAGER, FASTRES):
            progress.step(f"checking {case.label}: {variant.name}")
            try:
                replies[variant.name] = made.request(
                    variant.name, "check", dtype=case.dtype, mode=case.mode
                )
            except WorkerError as error:
                raise WorkerError(f"{variant.name} could not run {case.label}: {error}") from error
        rows += checks(
            case.dtype, case.mode, replies["eager"]["errors"], replies["fastres"]["errors"]
        )
        facts[case] = {name: reply["facts"] for name, reply in replies.items()}
        facts[case]["errors"] = {name: reply["errors"] for name, reply in replies.items()}
    return rows, facts


def time_case(
    made: Fleet, case: Case, options: Options, facts: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Warms every variant of the case up, lets them take turns, returns the case's result."""
    from fastres.bench.report import case_result

    progress.say(f"{case.label}: warming up")
    reasons: dict[str, tuple[str, str]] = {}
    errors: dict[str, Any] = dict(facts["errors"])
    ready: dict[str, float] = {}
    variants = variants_for(options)
    made.start([v for v in variants if not_measured(v, case, options) is None])
    for variant in variants:
        reason = not_measured(variant, case, options)
        if reason is not None:
            reasons[variant.name] = ("not measured", reason)
            continue
        progress.step(f"{case.label}: warming up {variant.name}")
        try:
            reply = made.request(variant.name, "prepare", dtype=case.dtype, mode=case.mode)
            ready[variant.name] = reply["seconds"]
            if reply["errors"] is not None:
                errors[variant.name] = reply["errors"]
        except WorkerError as error:
            reasons[variant.name] = ("failed", str(error))
    most = f"{options.rounds}" if options.seconds is None else f"up to {options.rounds}"
    turn = 0.25 if options.quick else 0.5
    iters = turn_iterations(min(ready.values(), default=1.0), options.iters, turn)
    progress.say(
        f"{case.label}: {most} rounds of {iters} step{'s' * (iters > 1)}, {', '.join(ready)}"
    )
    times, failed = take_turns(
        {name: made.workers[name] for name in ready},
        options.rounds,
        iters,
        options.seconds,
        on_turn=lambda name: progress.step(f"{case.label}: timing {name}"),
    )
    reasons.update({name: ("failed", reason) for name, reason in failed.items()})
    done = sum(len(seconds) for seconds in times.values())
    progress.step(units=options.rounds * len(ready) - done)
    for name in ready:
        with contextlib.suppress(WorkerError):
            made.request(name, "release")
    ordered = {v.name: times.get(v.name, []) for v in variants}
    saved = {
        name: facts[name]["saved_bytes"]
        for name in ("eager", "fastres")
        if "saved_bytes" in facts[name]
    }
    return case_result(case, options, iters, ordered, reasons, errors, saved)


def measure(made: Fleet, case: Case, machine: Machine, progress: Progress) -> None:
    """Copy bandwidth and matrix product rate, in eager's process; its end is told elsewhere."""
    progress.step(f"{case.label}: measuring the machine")
    with contextlib.suppress(WorkerError):
        machine.add(case.dtype, made.request(EAGER.name, "machine", dtype=case.dtype))


def units_of_work(options: Options) -> int:
    """Steps of the progress bar: inputs, checks, the machine twice a case, warm-ups, turns."""
    turns = sum(
        1
        for case in options.cases()
        for v in variants_for(options)
        if not_measured(v, case, options) is None
    )
    return 1 + 4 * len(options.cases()) + turns * (1 + options.rounds)


def print_checks(rows: list[Check], passed: bool) -> None:
    """One line when all passed; otherwise each line that did not."""
    if passed:
        worst = max(rows, key=lambda row: row.fastres / row.limit)
        print(
            f"verified against float64: {len(rows)} checks pass; the closest is {worst.dtype} "
            f"{worst.mode} {worst.quantity} ({worst.measure}): {worst.fastres:.1e}, eager "
            f"{worst.eager:.1e}, limit {worst.limit:.1e}"
        )
        return
    for row in rows:
        if not row.passed:
            print(
                f"FAIL {row.dtype} {row.mode} {row.quantity} ({row.measure} error against "
                f"float64): fastres {row.fastres:.2e}, eager {row.eager:.2e}, limit {row.limit:.2e}"
            )


def run(options: Options, argv: list[str]) -> int:
    """The whole command; returns the exit code."""
    from rich.console import Console

    from fastres.bench import environment, report
    from fastres.bench.truth import make_fixture

    options = resolve_device(options)
    forward = options.device == "cpu" or options.weights is None  # statistics settle on the CPU
    check_memory(options.batch, options.size, forward)
    with (
        tempfile.TemporaryDirectory(prefix="fastres-bench-") as folder,
        Progress(units_of_work(options)) as progress,
    ):
        fixture = Path(folder) / "fixture.pt"
        progress.say("photographs, model and float64 answers")
        inputs = make_fixture(options, fixture)
        progress.step()
        with fleet(options, fixture) as made:
            progress.say("checking fastres against eager and float64")
            made.start([EAGER, FASTRES])
            try:
                rows, facts = verify(made, options, progress)
            except WorkerError as error:
                print(f"FAIL {error}")
                return FAILED
            passed = all(row.passed for row in rows)
            if not passed:
                print_checks(rows, passed)
                return FAILED
            machine = Machine()
            cases = []
            for case in options.cases():
                measure(made, case, machine, progress)
                cases.append(time_case(made, case, options, facts[case], progress))
                measure(made, case, machine, progress)
        report.add_roofline(cases, options, machine)
        env = environment.gather(options.device, made.threads)
    result = {
        "schema_version": report.SCHEMA_VERSION,
        "command": shlex.join(["fastres", *argv]),
        "options": options.to_dict(),
        "inputs": inputs,
        "environment": env,
        "verification": [row.to_dict() for row in rows],
        "report": next((f["fastres"].get("report") for f in facts.values()), None),
        "cases": cases,
    }
    line = environment.one_line(env)
    console = Console(width=None if sys.stdout.isatty() else 150)
    print_checks(rows, passed)
    report.print_result(result, console, line)
    saved = save(result, options, line)
    ours = [row for case in cases for row in case["variants"] if row["name"] == "fastres"]
    return 0 if saved and all(row["status"] == "ok" for row in ours) else FAILED


def save(result: dict[str, Any], options: Options, line: str) -> bool:
    """Writes JSON and chart, and says where; of a JSON that finds no room a copy elsewhere."""
    from fastres.bench import chart, report

    spare = str(Path(tempfile.gettempdir()) / f"{Path(options.json).stem}-{os.getpid()}.json")
    written: list[str] = []
    errors: list[str] = []
    for what, file, write in (
        ("--json", options.json, report.write_json),
        ("--json, instead", spare, report.write_json),
        ("--png", str(options.png), lambda result, file: chart.draw(result, file, line)),
    ):
        if file == spare and not errors:
            continue
        try:
            write(result, file)
            written.append(file)
        except OSError as error:
            errors.append(f"argument {what}: cannot write '{file}': {error.strerror or error}")
    if written:
        print(f"wrote {' and '.join(written)}")
    for text in errors:
        print(f"fastres: error: {text}", file=sys.stderr)
    return not errors
