"""`fastres.tune`: measure every candidate for every block of a model, and remember the fastest.

A candidate is the original forward ("eager") or a rung of the fusion ladder. Before it is timed its
numbers are compared with the original's by `fastres.convert.verify`, on this device, in a process
of its own where it might crash. Timing is interleaved: in each round every candidate runs once, in
rotating order, and what counts is the median over rounds of eager's time over the candidate's. A
candidate is chosen over eager only when it is faster by more than the noise, so that a tuned model
is not slower than the original."""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastres import backends, plan
from fastres.bench.stats import rotation, spread
from fastres.convert import revert
from fastres.convert._match import Match, find
from fastres.convert.verify import check_sample, compare_block
from fastres.nn import FusedMixin, ResidualBlockMixin, autocast_dtype, plan_key
from fastres.ops._ladder import PASSES, RUNGS, parse, with_vendor
from fastres.plan import EAGER, Entry, Key

MODES = ("training", "inference")
MIN_ROUNDS = 5
MAX_ROUNDS = 100
MIN_SECONDS = 2e-3  # of one timed batch of calls: well above the clock's and a launch's noise
CHILD_SECONDS = 300.0


class Progress(Protocol):
    """What tune reports to; `fastres.bench.progress.Progress` is one."""

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
    """What `tune` found: an entry for each distinct block. `str()` is the table."""

    entries: dict[Key, Entry]
    paths: dict[Key, str]

    def __str__(self) -> str:
        lines = []
        for key in sorted(self.entries):
            entry = self.entries[key]
            shape = "x".join(map(str, key.shape))
            lines.append(
                f"{self.paths[key]:<12} {key.mode:<9} {shape:<18} {key.dtype:<9} "
                f"{entry.choice:<6} {entry}"
            )
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
) -> Tuning:
    """Measure the candidates for each distinct block of a converted model on `sample`, save the
    choices in the user's cache (fastres.plan), and use them from now on.

    sample: a batch (N, C, H, W) as the model will see it: the choices hold for its shapes, and for
    the autocast state tune is called in. modes: "training" (forward and backward), "inference", or
    both. seconds: about how long to time, after checks and compilation. isolate: check candidates
    in a process of their own (default: on CUDA), so that a crash rejects the candidate. per_conv:
    also try, inside the fastest rung with fused convs, the vendor's kernel for each pass of each
    conv, and take what was faster (choices as "c2 vendor conv2.wgrad"); some ten candidates more
    for each block. The model
    is not changed. What was measured before an interruption is kept. In a distributed job all
    ranks call it; rank 0 measures.

    Raises TypeError, ValueError for a bad argument, and for a model without a converted block."""
    check_sample("tune", model, sample)
    unknown = [m for m in modes if m not in MODES]
    if unknown or not modes:
        raise ValueError(f"tune: modes must be some of {MODES}, got {modes!r}")
    if not seconds > 0:
        raise ValueError(f"tune: seconds must be positive, got {seconds}")
    if not any(isinstance(m, FusedMixin) for m in model.modules()):
        raise ValueError(
            "tune: the model has no converted block; call fastres.convert(model) first"
        )
    if backends.forced() == "cuda":  # nothing in a plan tells whose kernels were measured
        raise ValueError(
            'tune: not under use_backend("cuda"): the plan is read by the Triton kernels, which '
            "run by themselves; call tune outside of it"
        )
    device = sample.device
    current = plan.current(device)
    found = Tuning({}, {})
    distributed = torch.distributed
    leads = not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0
    )
    if leads:
        targets = [t for mode in modes for t in distinct(model, sample, mode == "training")]
        share = seconds / max(len(targets), 1)
        isolate = device.type == "cuda" if isolate is None else isolate
        for target in targets:
            if progress is not None:
                progress.say(f"{target.path} {target.key.mode}")
            entry = measure(target, share, isolate, per_conv)
            found.entries[target.key] = entry
            found.paths[target.key] = target.path
            current.add({target.key: entry})
            if progress is not None:
                progress.step()
    plan.synchronise(device)
    return found


def distinct(model: nn.Module, sample: Tensor, training: bool) -> list[Target]:
    """The distinct converted blocks, with the input that reaches each."""
    converted = copy.deepcopy(model)
    if model.training != training:  # otherwise the user's own mix of frozen batch norms
        converted.train(training)
    scratch = revert(copy.deepcopy(converted))  # a broken kernel must not stop the others
    matches = {
        path: match
        for path, _, match in find(scratch)
        if isinstance(match, Match) and isinstance(converted.get_submodule(path), FusedMixin)
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
    return [EAGER, *names]


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
    fused = copy_for(target, candidate)
    eager = call_of(target, EAGER)
    result = compare_block(
        copy_for(target, EAGER), eager, fused, call_of(target, candidate), target.x
    )
    return None if result.ok else f"wrong: {result.worst}"


def _child(packed: bytes, autocast: tuple | None, pipe: Any) -> None:
    """check in a process of its own."""
    target, candidate = torch.load(io.BytesIO(packed), weights_only=False)
    context = contextlib.nullcontext() if autocast is None else torch.autocast(*autocast)
    with context:
        pipe.send(check(target, candidate))


def isolated(work: Callable, args: tuple, seconds: float = CHILD_SECONDS) -> str | None:
    """work(*args, pipe) in a process of its own, and what it sends: a crash, an exception or a hang
    is an answer, not an end."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not mine.poll(seconds):
            process.kill()
            process.join()
            return f"no answer in {seconds:.0f} s"
        answer = mine.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        return f"crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
    process.join()
    return answer


def reject(target: Target, candidate: str, isolate: bool) -> str | None:
    """Why the candidate is not timed; None when it may be."""
    if candidate == EAGER:
        return None
    if isolate:
        buffer = io.BytesIO()
        try:
            torch.save((target, candidate), buffer)
        except (AttributeError, TypeError, RuntimeError):
            isolate = False  # a class that cannot be pickled: checked here
        else:
            autocast = None if target.dtype is None else (target.x.device.type, target.dtype)
            return isolated(_child, (buffer.getvalue(), autocast))
    try:
        return check(target, candidate)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]


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
    target: Target, name: str, isolate: bool, steps: dict[str, Callable[[], None]]
) -> str | None:
    """Check a candidate and make its step; why not, where it is wrong or cannot run."""
    reason = reject(target, name, isolate)
    if reason is None:
        try:
            steps[name] = step_of(target, name)
            steps[name]()  # compile, allocate
            steps[name]()
        except torch.OutOfMemoryError:
            reason = "out of memory"
            steps.pop(name, None)
    return reason


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


def measure(target: Target, seconds: float, isolate: bool, per_conv: bool = False) -> Entry:
    """Check every candidate, time those that are right, choose."""
    rejected: dict[str, str] = {}
    steps: dict[str, Callable[[], None]] = {}
    device = target.x.device
    for name in candidates(target):
        reason = _prepare(target, name, isolate, steps)
        if reason is not None:
            rejected[name] = reason
    if EAGER not in steps:
        raise RuntimeError(f"tune: the original {target.path} itself cannot run: {rejected[EAGER]}")
    times = _race(steps, seconds, device)
    fused = [name for name in times if name != EAGER and parse(name).rung.conv]
    if per_conv and fused:
        base = min(fused, key=lambda name: statistics.median(times[name]))
        mixed = refine(target, base, steps[base], seconds, isolate, rejected)
        if mixed != base:
            reason = _prepare(target, mixed, isolate, steps)
            if reason is None:
                times = _race(steps, seconds, device)
            else:
                rejected[mixed] = reason
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
) -> str:
    """`base` with those passes left to the vendor that make it faster, each alone, by more than the
    noise. What they make together is for the caller to measure."""
    steps = {base: step}
    for name in passes_of(target):
        reason = _prepare(target, with_vendor(base, [name]), isolate, steps)
        if reason is not None:
            rejected[with_vendor(base, [name])] = reason
    times = _race(steps, seconds, target.x.device)
    better = [name for name in times if name != base and _faster(times[base], times[name])]
    return with_vendor(base, [name.split()[-1] for name in better])


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
