"""`fastres.tune`: measure every candidate for every block of a model, and remember the fastest.

A candidate is the original forward ("eager") or a rung of the fusion ladder. Before it is timed its
numbers are compared with the original's by `fastres.convert.verify`, on this device, in a process
of its own where it might crash. Timing is interleaved: in each round every candidate runs once, in
rotating order, and what counts is the median over rounds of eager's time over the candidate's. A
candidate is chosen over eager only when it is faster by more than the noise, so that a tuned model
is not slower than the original."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastres import _tune_cuda, backends, plan
from fastres._chosen import autocast_dtype, plan_key
from fastres.bench.stats import rotation, spread
from fastres.convert import revert
from fastres.convert._match import Match, find
from fastres.convert.verify import check_sample, compare_block
from fastres.memory import exhausted
from fastres.nn import FusedMixin, ResidualBlockMixin
from fastres.ops._choice import PASSES, RUNGS, parse, with_pass
from fastres.plan import EAGER, Entry, Key

MODES = ("training", "inference")
MIN_ROUNDS = 5
MAX_ROUNDS = 100
MIN_SECONDS = 2e-3  # of one timed batch of calls: well above the clock's and a launch's noise
CHILD_SECONDS = 300.0  # for the check of one candidate in a process of its own
START_SECONDS = 120.0  # for that process to start, torch's import; for self-checks: they compile
CHILD = ("-m", "fastres._tune_child")
STARTED = "started"  # in the place of a candidate: from here on it has its seconds
CHECKING = "checking"  # the same: its self-checks, which have START_SECONDS
LOST = "lost the device"  # how the answer of a candidate begins after which nothing runs there
NOT_LOADED = ""  # in the place of a candidate: the block cannot be sent there

log = logging.getLogger("fastres")


class TimeLimit(Exception):
    """The time is up in the middle of a block."""


class Progress(Protocol):
    """What tune reports to; `fastres.bench.progress.Progress` is one."""

    def expect(self, total: int) -> None: ...

    def say(self, text: str) -> None: ...

    def step(self, text: str | None = None, units: int = 1) -> None: ...


@dataclass(frozen=True)
class Target:
    """One distinct block of a model and what reaches it."""

    path: str
    module: nn.Module
    match: Match
    x: Tensor
    key: Key
    dtype: torch.dtype | None  # autocast's, where it is on

    @property
    def training(self) -> bool:
        return self.key.mode == "training"


@dataclass(frozen=True)
class Tuning:
    """What `tune` found: an entry for each distinct block; the blocks that it did not get to within
    its limit. `str()` is the table."""

    entries: dict[Key, Entry]
    paths: dict[Key, str]
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for key in sorted(self.entries):
            entry = self.entries[key]
            shape = "x".join(map(str, key.shape))
            lines.append(
                f"{self.paths[key]:<12} {key.mode:<9} {shape:<18} {key.dtype:<9} "
                f"{entry.choice:<6} {entry}"
            )
        if self.left:
            lines.append(f"not measured, for lack of time: {', '.join(self.left)}")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    sample: Tensor,
    *,
    modes: tuple[str, ...] = MODES,
    seconds: float = 60.0,
    isolate: bool | None = None,
    progress: Progress | None = None,
    per_conv: bool = False,
    limit: float | None = None,
    candidate_seconds: float = CHILD_SECONDS,
    missing: bool = False,
    each: Callable[[str, Key, Entry], None] | None = None,
) -> Tuning:
    """Measure the candidates for each distinct block of a converted model on `sample`, save the
    choices in the user's cache (fastres.plan), and use them unless a packaged table has the block.

    sample: a batch (N, C, H, W) as the model will see it: the choices hold for its shapes, and for
    the autocast state tune is called in. modes: "training" (forward and backward), "inference", or
    both. seconds: about how long to time, after checks and compilation. isolate: check candidates
    in a process of their own (default: on CUDA), so that a crash rejects the candidate. per_conv:
    also try, inside the fastest rung with fused convs, the vendor's kernel for each pass of each
    conv, and on Hopper every tile of the CUDA C++ ones, and take what was faster (choices as "c2
    vendor conv2.wgrad cuda conv1.fprop=pointwise-128x64"); some ten candidates more for each block,
    with the tiles some forty. limit: seconds after which nothing new is begun, checks and
    compilation included; the blocks not done by then are left as they are and listed in the
    result's `left`. candidate_seconds: how long the check of one candidate in a process of its own
    may take before it is rejected. missing: only the blocks that have no measurement on this
    machine yet, as after an interruption. each: called with (path, key, entry) as soon as a block
    is done. The model is not changed. What was measured before an interruption is kept. In a
    distributed job all ranks call it; rank 0 measures.

    A candidate's process starts fresh: the calling script is not run again, and needs no
    `if __name__ == "__main__"`. A block with a class of the script itself is checked in this
    process; the log says so.

    Raises TypeError, ValueError for a bad argument, and for a model without a converted block."""
    check_sample("tune", model, sample)
    unknown = [m for m in modes if m not in MODES]
    if unknown or not modes:
        raise ValueError(f"tune: modes must be some of {MODES}, got {modes!r}")
    times = {"seconds": seconds, "limit": limit, "candidate_seconds": candidate_seconds}
    for name, value in times.items():
        if value is not None and not value > 0:
            raise ValueError(f"tune: {name} must be positive, got {value}")
    if not any(isinstance(m, FusedMixin) for m in model.modules()):
        raise ValueError(
            "tune: the model has no converted block; call fastres.convert(model) first"
        )
    if backends.forced() == "cuda":
        raise ValueError(
            'tune: not under use_backend("cuda"): a plan is for the kernels that run by '
            "themselves, and takes the cuda backend's convs where they are faster; call tune "
            "outside of it"
        )
    _tune_cuda.lost = None
    deadline = math.inf if limit is None else time.monotonic() + limit
    device = sample.device
    current = plan.current(device)
    entries: dict[Key, Entry] = {}
    paths: dict[Key, str] = {}
    left: tuple[str, ...] = ()
    distributed = torch.distributed
    leads = not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0
    )
    if leads:
        targets = [t for mode in modes for t in distinct(model, sample, mode == "training")]
        if missing:
            targets = [t for t in targets if current.lookup(t.key) is None]
        if progress is not None:
            progress.expect(len(targets))
        share = seconds / max(len(targets), 1)
        isolate = device.type == "cuda" if isolate is None else isolate
        for i, target in enumerate(targets):
            if progress is not None:
                progress.say(f"{i + 1} of {len(targets)}: {target.path} {target.key.mode}")
            fair = max(deadline - time.monotonic(), 0) / (len(targets) - i)
            try:
                _in_time(deadline)
                entry = measure(
                    target, min(share, fair), isolate, per_conv, deadline, candidate_seconds
                )
            except TimeLimit:
                left = tuple(f"{t.path} {t.key.mode}" for t in targets[i:])
                break
            entries[target.key] = entry
            paths[target.key] = target.path
            current.add({target.key: entry})
            if each is not None:
                each(target.path, target.key, entry)
            if progress is not None:
                progress.step()
    covered = len(entries.keys() & current.packaged.keys())
    if covered:
        text = "fastres.tune: %d of %d blocks are in the package's table, which comes first"
        log.warning(text, covered, len(entries))
    plan.synchronise(device)
    return Tuning(entries, paths, left)


def distinct(model: nn.Module, sample: Tensor, training: bool) -> list[Target]:
    """The distinct converted blocks, with the input that reaches each."""
    converted = copy.deepcopy(model)
    if model.training != training:  # otherwise the user's own mix of frozen batch norms
        converted.train(training)
    scratch = revert(copy.deepcopy(converted))  # a broken kernel must not stop the others
    matches = {
        path: match
        for path, _, match in find(scratch)
        if isinstance(match, Match)
        and isinstance(converted.get_submodule(path), FusedMixin)
        and match.spec.branch is None  # nothing to choose there
    }
    targets: dict[Key, Target] = {}

    def record(path: str) -> Callable:
        def hook(m: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            key = plan_key(converted.get_submodule(path), x, training)
            if key not in targets:
                x = x.clone(memory_format=torch.preserve_format)
                original = converted.get_submodule(path)
                targets[key] = Target(
                    path or "(stem)", original, matches[path], x, key, autocast_dtype(x)
                )

        return hook

    for path in matches:
        scratch.get_submodule(path).register_forward_pre_hook(record(path))
    with torch.no_grad():
        scratch(sample)
    return list(targets.values())


def candidates(target: Target) -> list[str]:
    """eager first, then the rungs that the backend can run here."""
    backend = backends.select(target.x)
    convs = hasattr(backend, "conv_fprop") and backend.conv_missing(target.x.device) is None
    nhwc = target.key.layout == "channels_last"
    names = [name for name, r in RUNGS.items() if not r.conv or (convs and nhwc)]
    if not isinstance(target.module, ResidualBlockMixin):  # d is c2, behind a pool c2 is c1
        names = [n for n in names if n in ("b", "c1") or (n == "c2" and not _pooled(target.module))]
    return [EAGER, *names, *_tune_cuda.whole(target, names)]


def _pooled(stem: nn.Module) -> bool:
    return getattr(stem, "pool", None) is not None


def call_of(target: Target, candidate: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The block's forward as the candidate runs it."""
    call = target.match.original
    if candidate != EAGER:
        call = target.match.mixin.fused_forward  # type: ignore[attr-defined]
    return call


def copy_for(target: Target, candidate: str) -> nn.Module:
    """A copy of the block on the candidate."""
    module = copy.deepcopy(target.module)
    if candidate != EAGER:
        fusion: Any = module._fastres
        fusion.rung = candidate
    return module


# --- numbers --------------------------------------------------------------------------------------


def check(target: Target, candidate: str) -> str | None:
    """None when the candidate computes what the original does on this device, otherwise how far off
    it is."""
    fused, eager = copy_for(target, candidate), call_of(target, EAGER)
    modes = (True, False) if target.training else (False,)  # one value a channel: no training
    result = compare_block(
        copy_for(target, EAGER), eager, fused, call_of(target, candidate), target.x, modes
    )
    return None if result.ok else f"wrong: {result.worst}"


def explain(error: Exception) -> str:
    if exhausted(error):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def attempt(target: Target, candidate: str) -> str | None:
    """check, where an exception is an answer."""
    try:
        return check(target, candidate)
    except Exception as e:
        return explain(e)


def run_child(
    folder: Path, names: list[str], seconds: float, deadline: float = math.inf
) -> tuple[dict[str, str | None], str | None]:
    """What `fastres._tune_child` answers, and how it ended if not well: a crash or a hang is an
    answer, not an end. Each answer may take `seconds`, the child's start and self-checks
    START_SECONDS where that is more; TimeLimit after `deadline`."""
    answers, errors = folder / "answers", folder / "errors"
    answers.write_text("")
    where = os.pathsep.join(p or os.getcwd() for p in sys.path)
    env = {**os.environ, "PYTHONPATH": where, "PYTHONSAFEPATH": "1"}
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *CHILD, str(folder), *names],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
        )  # fmt: skip
    ending, start = None, max(seconds, START_SECONDS)
    try:
        size, last, most = 0, time.monotonic(), start
        while ending is None:
            try:
                code = process.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if now > deadline:
                raise TimeLimit
            if answers.stat().st_size > size:
                size, last = answers.stat().st_size, now
                most = start if _checking(_lines(answers)) else seconds
            elif now - last > most:
                ending = f"no answer in {most:.0f} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if ending is None and code:
        said = errors.read_text(errors="replace").strip().splitlines() if code > 0 else []
        ending = f"crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        ending += f": {said[-1]}" if said else ""
    lines = _lines(answers)
    if ending is not None and _checking(lines):
        ending += ", in a self-check"
    return {n: reason for n, reason in lines if n not in (STARTED, CHECKING)}, ending


def _lines(answers: Path) -> list[tuple[str, str | None]]:
    return [tuple(json.loads(line)) for line in answers.read_text().split("\n")[:-1]]


def _checking(lines: list[tuple[str, str | None]]) -> bool:
    return bool(lines) and lines[-1][0] == CHECKING


def _isolated(
    target: Target, names: list[str], deadline: float, seconds: float
) -> dict[str, str | None]:
    """rejections in a process of their own, a new one after each that crashed. Nothing where the
    block cannot get there."""
    found: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory(prefix="fastres-tune-") as name:
        folder = Path(name)
        try:
            torch.save({"target": target, "backend": backends.forced()}, folder / "block.pt")
        except (AttributeError, TypeError, RuntimeError, pickle.PicklingError) as e:
            found[NOT_LOADED] = explain(e)
        while NOT_LOADED not in found and (left := [n for n in names if n not in found]):
            batch, limit = _tune_cuda.batch(left, seconds)
            answers, ending = run_child(folder, batch, limit, deadline)
            found |= answers
            lost = [n for n in batch if (found.get(n) or "").startswith(LOST)]
            if not lost and ending is None and answers:
                continue
            first = lost[-1] if lost else next((n for n in batch if n not in found), batch[-1])
            ending = ending or "no answer"
            reason = found.setdefault(first, ending) or ending
            found |= _tune_cuda.give_up(first, reason, [n for n in left if n not in found])
    if NOT_LOADED in found:
        log.warning(
            "fastres.tune: %s is checked in this process, not in one of its own: %s",
            target.path, found[NOT_LOADED],
        )  # fmt: skip
        return {}
    return found


def rejections(
    target: Target,
    names: list[str],
    isolate: bool,
    deadline: float = math.inf,
    seconds: float = CHILD_SECONDS,
) -> dict[str, str | None]:
    """For each candidate why it is not timed; None when it may be. seconds: of one candidate in a
    process of its own."""
    found: dict[str, str | None] = {EAGER: None}
    left = [n for n in names if n != EAGER]
    if isolate and left:
        found |= _isolated(target, left, deadline, seconds)
    for name in left:
        if name not in found:
            _in_time(deadline)
            found[name] = attempt(target, name)
    return {name: found[name] for name in names}


def _in_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeLimit


# --- time -----------------------------------------------------------------------------------------


def step_of(target: Target, candidate: str) -> Callable[[], None]:
    """One forward, and in training one backward, of the candidate."""
    module, call = copy_for(target, candidate), call_of(target, candidate)
    needs_x = isinstance(target.module, ResidualBlockMixin)
    x = target.x.clone(memory_format=torch.preserve_format)
    if not target.training:

        def infer() -> None:
            with torch.no_grad():
                call(module, x)

        return infer
    x.requires_grad_(needs_x)
    dz = torch.empty(0)

    def train() -> None:
        nonlocal dz
        z = call(module, x)
        if dz.shape != z.shape:
            dz = torch.randn_like(z)
        z.backward(dz)
        module.zero_grad(set_to_none=True)
        x.grad = None

    return train


def _timed(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _rounds(seconds: float) -> Iterator[int]:
    """Round numbers until the time is up, but at least MIN_ROUNDS."""
    end = time.monotonic() + seconds
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.monotonic() > end:
            return
        yield number


def _prepare(
    target: Target,
    names: list[str],
    isolate: bool,
    steps: dict[str, Callable[[], None]],
    deadline: float,
    candidate_seconds: float,
) -> dict[str, str]:
    """Check candidates and make their steps; why not, where one is wrong or cannot run."""
    rejected = {}
    found = rejections(target, names, isolate, deadline, candidate_seconds)
    for name, reason in found.items():
        if reason is None:
            _in_time(deadline)
            try:
                steps[name] = step_of(target, name)
                steps[name]()  # compile, allocate
                steps[name]()
            except (RuntimeError, MemoryError) as e:
                if not exhausted(e):
                    raise
                reason = "out of memory"
                steps.pop(name, None)
        if reason is not None:
            rejected[name] = reason
    return rejected


def _race(
    steps: dict[str, Callable[[], None]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, in every round."""
    first = next(iter(steps.values()))
    repeats = max(1, int(MIN_SECONDS / max(_timed(first, 1, device), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in _rounds(seconds):
        for name in rotation(list(steps), number):
            times[name].append(_timed(steps[name], repeats, device))
    return times


def measure(
    target: Target,
    seconds: float,
    isolate: bool,
    per_conv: bool = False,
    deadline: float = math.inf,
    candidate_seconds: float = CHILD_SECONDS,
) -> Entry:
    """Check every candidate, time those that are right, choose. Raises TimeLimit rather than begin
    anything after `deadline`, on time.monotonic's clock."""
    steps: dict[str, Callable[[], None]] = {}
    device = target.x.device
    limits = deadline, candidate_seconds
    rejected = _prepare(target, candidates(target), isolate, steps, *limits)
    if EAGER not in steps:
        raise RuntimeError(f"tune: the original {target.path} itself cannot run: {rejected[EAGER]}")
    times = _race(steps, seconds, device)
    fused = [name for name in times if name != EAGER and parse(name).rung.conv]
    if per_conv and fused:
        base = min(fused, key=lambda name: statistics.median(times[name]))
        mixed = refine(target, base, steps[base], seconds, isolate, rejected, *limits)
        if mixed != base:
            wrong = _prepare(target, [mixed], isolate, steps, *limits)
            rejected |= wrong
            if not wrong:
                times = _race(steps, seconds, device)
    return choose(times, rejected)


def passes_of(target: Target) -> list[str]:
    """Every pass of the block's convs, as `fastres.ops._ladder.parse` names them."""
    if not isinstance(target.module, ResidualBlockMixin):  # images need no gradient
        return ["stem.fprop", *(["stem.wgrad"] if target.training else [])]
    spec = target.match.spec
    convs = [f"conv{i + 1}" for i in range(len(spec.units))]
    convs += [] if spec.shortcut is None else ["shortcut"]
    return [f"{c}.{p}" for c in convs for p in (PASSES if target.training else PASSES[:1])]


def refine(
    target: Target,
    base: str,
    step: Callable[[], None],
    seconds: float,
    isolate: bool,
    rejected: dict[str, str],
    deadline: float = math.inf,
    candidate_seconds: float = CHILD_SECONDS,
) -> str:
    """`base` with those passes on the vendor's kernels, or on another tile of the cuda backend's,
    that make it faster, each alone, by more than the noise. What they make together is for the
    caller to measure."""
    steps = {base: step}
    passes = passes_of(target)
    ways = _tune_cuda.ways(target, parse(base), passes)
    names = {with_pass(base, n, to, passes): (n, to) for n in passes for to in ways[n]}
    rejected |= _prepare(target, list(names), isolate, steps, deadline, candidate_seconds)
    times = _race(steps, seconds, target.x.device)
    best: dict[str, tuple[float, str]] = {}
    for candidate, (name, to) in names.items():
        ratio = _faster(times[base], times[candidate]) if candidate in times else None
        if ratio is not None and ratio > best.get(name, (1.0, ""))[0]:
            best[name] = ratio, to
    for name, (_, to) in best.items():
        base = with_pass(base, name, to, passes)
    return base


def _faster(before: list[float], after: list[float]) -> float | None:
    """The median ratio within a round, if that is above 1 by more than the noise: its lower
    quartile is not below 0.99."""
    ratio = spread([b / a for b, a in zip(before, after, strict=True)])
    return ratio.median if ratio.median > 1 and ratio.q1 >= 0.99 else None


def choose(times: dict[str, list[float]], rejected: dict[str, str]) -> Entry:
    """The candidate with the best median ratio to eager within a round, if that is above 1 by more
    than the noise (its lower quartile is not below 0.99); otherwise eager."""
    choice, best = EAGER, 1.0
    for name, seconds in times.items():
        if name == EAGER:
            continue
        ratio = _faster(times[EAGER], seconds)
        if ratio is not None and ratio > best:
            choice, best = name, ratio
    return Entry(
        choice=choice,
        milliseconds={n: round(1e3 * statistics.median(t), 4) for n, t in sorted(times.items())},
        ratio=round(best, 3),
        rejected=rejected,
        measured=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
