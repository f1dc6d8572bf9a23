"""What a session of `pytest bench/` knows: device, options, the machine's speed, what was left out;
and the record of a case, which becomes its `extra_info`.

    id, suite, family, name, shape, dtype, mode, batch, asked_batch, device, backend, rung
    bytes, flops           of one call, by fastres.roofline's formulas
    seconds                median of one call
    gb_s, tflop_s, img_per_s, percent_of_roofline
    baselines: [{name, status, reason, seconds: [by round], ratio: {median, q1, q3} or null,
                 img_per_s}]    ratio: how many times faster than the baseline ours is
    saved_bytes, saved_ratio, peak_bytes: of training, or null
    check                  what was compared with float64, and the worst of it
    cuda_graph, notes"""

from __future__ import annotations

import contextlib
import importlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import ModuleType
from typing import Any

import torch

from fastres import backends, memory
from fastres.bench.machine import Machine, measure
from fastres.bench.stats import speed_ratios
from fastres.memory import exhausted

from .timing import CLOCK, OURS, Variant

SCHEMA_VERSION = 1
KIND = "fastres pytest-benchmark"
MACHINE_EVERY = 60.0  # seconds after which the machine's speed is measured once more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WrongResult(AssertionError):
    """What was to be timed computes something else."""


@dataclass
class Session:
    """One run. seconds: of timing a case; tiny: shapes that only show that the code works;
    compile: torch.compile beside every case that has one."""

    device: str = "cpu"
    full: bool = False
    tiny: bool = False
    backend: str = "cpu"
    only: Sequence[str] = ()
    compile: bool = False
    case_seconds: float | None = None
    machine: Machine = field(default_factory=Machine)
    measured_at: dict[str, float] = field(default_factory=dict)
    checked: dict[Any, dict[str, Any]] = field(default_factory=dict)
    halved: list[str] = field(default_factory=list)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # suite -> chosen, all
    began: float = field(default_factory=time.time)
    rows: list[dict[str, Any]] = field(default_factory=list)  # the extra_info of each case
    unsaved: str = ""  # why the JSON is not where it was asked for

    def seconds(self, usual: float) -> float:
        """How long to time a case; 0 with --tiny."""
        return usual if self.case_seconds is None else self.case_seconds

    def backend_module(self) -> ModuleType:
        """The backend whose kernels are timed. Skips when it cannot run here."""
        import pytest

        reason = backends.unavailable(self.backend)
        if reason is not None:
            pytest.skip(f"backend {self.backend}: {reason}")
        return importlib.import_module(backends.MODULES[self.backend])

    @contextlib.contextmanager
    def on_backend(self) -> Iterator[None]:
        """Runs fastres's ops on the backend that was asked for."""
        self.backend_module()
        with backends.use_backend(self.backend):
            yield

    def need(self, what: int) -> None:
        """MemoryError when the CPU has not so many bytes free: Linux would end the process instead
        of refusing. A GPU refuses by itself."""
        free = memory.available() if self.device == "cpu" else None
        if free is not None and what > 0.7 * free:
            raise MemoryError(f"{what / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")

    def threads(self) -> int:
        return torch.get_num_threads()

    def measure_machine(self, dtype: str) -> None:
        """Copy bandwidth and matrix product rate, now and then. fp16 products on a CPU are
        emulated and take minutes: kernels there move bytes only."""
        dtype = "fp32" if self.device == "cpu" and dtype == "fp16" else dtype
        now = time.monotonic()
        if now - self.measured_at.get(dtype, -MACHINE_EVERY) < MACHINE_EVERY:
            return
        self.machine.add(dtype, measure(self.device, dtype, 0.01 if self.tiny else 0.2))
        self.measured_at[dtype] = time.monotonic()

    def roofline_seconds(self, kernels: Sequence[tuple[int, int]], dtype: str) -> float | None:
        """sum over kernels of max(bytes / bandwidth, flops / rate), None where not measured."""
        bandwidth, rate = self.machine.bandwidth, self.machine.rate.get(dtype)
        if not bandwidth or (rate is None and any(flops for _, flops in kernels)):
            return None
        return sum(max(b / bandwidth, f / rate if f and rate else 0.0) for b, f in kernels)

    def check_once(self, key: Any, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a check, made once for all cases that share it."""
        if key not in self.checked:
            self.checked[key] = check()
        return self.checked[key]

    def halving(self, label: str, batch: int, run: Callable[[int], Any]) -> Any:
        """`run(batch)`, with half the batch after each time that memory runs out, which is said in
        the summary and the record (`asked_batch`)."""
        asked = batch
        while True:
            try:
                result = run(batch)
                break
            except Exception as error:
                if not exhausted(error) or batch == 1:
                    raise
                error.__traceback__ = error.__context__ = None  # their frames hold the tensors
            batch //= 2
            release()
        if batch != asked:
            self.halved.append(f"{label}: out of memory at batch {asked}, ran batch {batch}")
        return result


def record(
    benchmark: Any,
    session: Session,
    variants: Sequence[Variant],
    kernels: Sequence[tuple[int, int]],
    **facts: Any,
) -> None:
    """Writes a case's extra_info. kernels: (bytes, FLOPs) of each kernel of one call."""
    ours = next(v for v in variants if v.name == OURS)
    seconds = median(ours.seconds) if ours.seconds else None
    batch, dtype = facts["batch"], facts["dtype"]
    images = facts.pop("images", False)
    moved, flops = sum(b for b, _ in kernels), sum(f for _, f in kernels)
    baselines = []
    for variant in variants:
        if variant is ours:
            continue
        usable = bool(variant.seconds) and len(variant.seconds) == len(ours.seconds)
        baselines.append(
            {
                "name": variant.name,
                "status": variant.status,
                "reason": variant.reason,
                "seconds": variant.seconds,
                "ratio": (
                    speed_ratios(ours.seconds, variant.seconds).to_dict() if usable else None
                ),
                "img_per_s": batch / median(variant.seconds) if usable and images else None,
            }
        )
    benchmark.extra_info.update(
        {
            **facts,
            "device": session.device,
            "bytes": moved,
            "flops": flops,
            "kernels": [list(k) for k in kernels],
            "seconds": seconds,
            "gb_s": moved / seconds / 1e9 if seconds else None,
            "tflop_s": flops / seconds / 1e12 if seconds and flops else None,
            "img_per_s": batch / seconds if seconds and images else None,
            "percent_of_roofline": percent(session, kernels, dtype, seconds),
            "baselines": baselines,
            "cuda_graph": ours.graph,
        }
    )
    session.rows.append(benchmark.extra_info)


def percent(
    session: Session, kernels: Sequence[Sequence[int]], dtype: str, seconds: float | None
) -> float | None:
    """The roofline's time in percent of ours."""
    least = session.roofline_seconds([(b, f) for b, f in kernels], dtype)
    return 100 * least / seconds if least is not None and seconds else None


def header(session: Session, argv: Sequence[str]) -> dict[str, Any]:
    """The block `fastres` of the JSON."""
    from fastres.bench import environment

    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "command": shlex.join(["pytest", *argv]),
        "environment": environment.gather(session.device, session.threads()),
        "machine": {"bandwidth": session.machine.bandwidth, "rate": session.machine.rate},
        "options": {
            "full": session.full,
            "compile": session.compile,
            "tiny": session.tiny,
            "case_seconds": session.case_seconds,
            "backend": session.backend,
        },
        "cases": {suite: {"run": n, "of": m} for suite, (n, m) in session.counts.items()},
        "halved": session.halved,
        "wall_seconds": time.time() - session.began,
    }


def summary(session: Session) -> list[str]:
    """A line for each case: what pytest-benchmark's own table has no columns for."""
    if not session.rows:
        return []
    lines = [
        f"{'case':<62} {'time':>10} {'GB/s':>7} {'TFLOP/s':>8} {'roof':>5}  "
        "x baseline [quartiles], in the same rounds"
    ]
    for row in session.rows:
        if row["seconds"] is None:
            lines.append(f"{row['id']:<62} checked, not timed")
            continue
        seconds = row["seconds"]
        took = f"{seconds * 1e6:,.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"
        flops = f"{row['tflop_s']:.3f}" if row["tflop_s"] else "-"
        roof = percent(session, row["kernels"], row["dtype"], seconds)
        ratios = []
        for base in row["baselines"]:
            r = base["ratio"]
            if r is None:
                short = "failed" if base["status"] == "failed" else "-"
                ratios.append(f"{base['name']} {short}")
            else:
                ratios.append(f"{base['name']} {r['median']:.2f} [{r['q1']:.2f}-{r['q3']:.2f}]")
        lines.append(
            f"{row['id']:<62} {took:>10} {row['gb_s']:7.1f} {flops:>8} "
            f"{'-' if roof is None else f'{roof:.0f}%':>5}  {', '.join(ratios)}"
        )
    rates = ", ".join(f"{d} {r / 1e12:.3f}" for d, r in session.machine.rate.items())
    lines.append(
        f"roof: of copy bandwidth {session.machine.bandwidth / 1e9:.1f} GB/s and matrix product "
        f"TFLOP/s {rates}, the best of this session; {time.time() - session.began:.0f} s in all"
    )
    return lines


def driver() -> str | None:
    """Version of the GPU's driver."""
    from fastres.bench.environment import command_output

    return command_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def release() -> None:
    """Gives a case's memory back, so that cases do not add up."""
    import gc

    gc.collect()
    if CLOCK.cuda:
        torch.cuda.empty_cache()
