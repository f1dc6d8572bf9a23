"""Every kernel of the backend on the layer shapes of the ResNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastres import _native
from fastres.roofline import ConvShape

from . import kernels, shapes
from .cases import Case
from .session import DTYPES, Session, record
from .timing import OURS, Variant, in_turn, rotations, take_turns, timer

SUITE = "kernel"
SECONDS = 0.3
KERNELS = {kernel.name: kernel for kernel in kernels.KERNELS}


@pytest.mark.benchmark(timer=timer)
def test_kernel(case: Case, benchmark: Any, bench_session: Session) -> None:
    """Checked against the reference in float64, then timed next to eager and a copy."""
    benchmark.group = f"{case.suite}: {case.family}"
    bench_session.halving(case.id, case.batch, lambda n: _run(case, n, benchmark, bench_session))


def _run(case: Case, batch: int, benchmark: Any, session: Session) -> None:
    kernel, backend, device = KERNELS[case.name], session.backend_module(), session.device
    conv = isinstance(case.shape, ConvShape)
    shape = shapes.of_batch(case.shape, batch) if conv else (batch, *case.shape)
    moved = kernel.moved(shape, case.dtype)
    session.need(4 * moved.bytes + 24 * moved.bytes // (4 if case.dtype == "fp32" else 2))
    operands = kernels.make_operands(kernel, shape, DTYPES[case.dtype], device)
    reason = kernels.why_not(kernel, backend, operands)
    if reason is not None:
        pytest.skip(reason)
    check = kernels.check(kernel, backend, operands)
    session.measure_machine(case.dtype)
    count = 2 if session.tiny else rotations(operands.bytes(), device)
    sets = [operands, *(operands.copy() for _ in range(count - 1))]
    variants = [Variant(OURS, in_turn(lambda o: kernel.call(backend, o), sets))]
    if kernel.eager is None:
        reason = "torch has no such kernel alone: bn_bwd and stem.backward are compared whole"
        variants.append(Variant.missing("eager", reason))
    else:
        variants.append(Variant("eager", in_turn(kernel.eager, sets)))
    if not conv:
        variants.append(Variant("copy", _copy(moved.bytes, device, session.tiny)))
    with torch.no_grad():
        take_turns(benchmark, variants, session.seconds(SECONDS), repeat=count)
    record(
        benchmark, session, variants, [(moved.bytes, moved.flops)],
        id=case.id, suite=case.suite, family=case.family, name=case.name, shape=case.label,
        dtype=case.dtype, mode=case.mode, batch=batch, asked_batch=case.batch,
        backend=session.backend, rung=None, saved_bytes=None, saved_ratio=None, peak_bytes=None,
        check=check, notes=[], rotated_sets=count,
    )  # fmt: skip


def _copy(moved: int, device: str, tiny: bool) -> Any:
    """A copy that reads and writes as many bytes as the kernel together."""
    half = max(64, moved // 2 // 64 * 64)
    count = 2 if tiny else rotations(2 * half, device)
    sets = [
        (torch.ones(half, dtype=torch.uint8, device=device),
         torch.empty(half, dtype=torch.uint8, device=device))
        for _ in range(count)
    ]  # fmt: skip
    if device == "cuda":
        return in_turn(lambda pair: pair[1].copy_(pair[0]), sets)
    copy = _native.module().copy  # memcpy on the kernels' own threads
    return in_turn(lambda pair: copy(pair[1].data_ptr(), pair[0].data_ptr(), half), sets)
