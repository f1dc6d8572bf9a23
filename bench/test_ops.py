"""Every public op next to the same maths in eager PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.bench.saved import saved_bytes
from fastres.convert.verify import ATTEMPTS, FLOOR, Verification, compare, compare_block

from . import ops, peers
from .cases import Case
from .session import DTYPES, Session, WrongResult, record
from .timing import OURS, Variant, in_turn, rotations, take_turns, timer

SUITE = "op"
SECONDS = 0.3


@pytest.mark.benchmark(timer=timer)
def test_op(case: Case, benchmark: Any, bench_session: Session) -> None:
    """Checked by the library's own verify, then timed next to eager (and, --full, compile)."""
    benchmark.group = f"{case.suite}: {case.family}"
    bench_session.halving(case.id, case.batch, lambda n: _run(case, n, benchmark, bench_session))


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def at_precision(result: Verification, dtype: torch.dtype) -> Verification:
    """The comparison with the floor of the dtype that was computed in: under autocast parameters
    and buffers are fp32, but what they get was rounded to bf16 or fp16 before."""
    floor = FLOOR[dtype]
    return Verification(tuple(replace(d, floor=max(d.floor, floor)) for d in result.differences))


def judged(result: Verification, what: str) -> dict[str, Any]:
    """The record of a comparison that passed; WrongResult otherwise."""
    if not result.ok:
        raise WrongResult(f"{what}: wrong result: {result.worst}")
    return {
        "against": "the original in float64 (fastres.convert.verify)",
        "tensors": len(result.differences),
        "worst": str(result.worst),
        "excess": result.worst.excess,
    }


def verified(
    plain: nn.Module,
    fused: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    network: bool,
    call: Callable = _call,
) -> Verification:
    """verify of a block; below fp32 a conv's outputs lie at the other side of a ReLU here and
    there, so that gradients are judged by their RMS, as those of a network are."""
    if dtype == torch.float32 or not network:
        return compare_block(plain, call, fused, call, x)
    for attempt in range(ATTEMPTS):
        shaken = x * (1 + attempt / 64)
        found = at_precision(compare(plain, call, fused, call, shaken, network=True), dtype)
        if found.ok:
            break
    return found


def _run(case: Case, batch: int, benchmark: Any, session: Session) -> None:
    device, dtype = session.device, DTYPES[case.dtype]
    shape = (batch, *case.shape)
    work = ops.work(case.name, shape, case.dtype, case.mode)
    session.need(40 * 8 * batch * case.shape[0] * case.shape[1] * case.shape[2])
    with session.on_backend():
        plain, fused, x = ops.pair(case.name, shape, dtype, device)
        convs = "conv" in case.name or "residual" in case.name
        check = session.check_once(
            (case.name, shape, case.dtype),
            lambda: judged(verified(plain, fused, x, dtype, convs), case.name),
        )
        session.measure_machine(case.dtype)
        one = x.numel() * x.element_size()
        count = 2 if session.tiny else rotations(6 * one, device)
        sets = [x.clone(memory_format=torch.preserve_format) for _ in range(count)]
        steps: dict[str, Callable[[Tensor], Any]] = {
            OURS: stepper(fused, fused, case.mode), "eager": stepper(plain, plain, case.mode),
        }  # fmt: skip
        variants = [Variant(name, in_turn(step, sets)) for name, step in steps.items()]
        variants += _compiled(case, plain, sets, session)
        if case.mode == "inference" and case.name.startswith("conv"):
            variants.append(_cudnn(plain, x))
        saved = {}
        if case.mode == "train":
            for name, module in (("fastres", fused), ("eager", plain)):
                saved[name] = saved_bytes(module.train(), lambda m=module: m(x.detach()), x)
        take_turns(benchmark, variants, session.seconds(SECONDS), repeat=count)
    ratio = saved["fastres"] / saved["eager"] if saved.get("eager") else None
    record(
        benchmark, session, variants, work,
        id=case.id, suite=case.suite, family=case.family, name=case.name, shape=case.label,
        dtype=case.dtype, mode=case.mode, batch=batch, asked_batch=case.batch,
        backend=session.backend, rung=None, saved_bytes=saved.get("fastres"), saved_ratio=ratio,
        peak_bytes=None, check=check, notes=[], rotated_sets=count,
    )  # fmt: skip


def stepper(
    module: nn.Module,
    call: Callable[[Tensor], Tensor],
    mode: str,
    context: Callable[[], Any] = contextlib.nullcontext,
    no_grad: Callable[[], Any] = torch.inference_mode,
) -> Callable[[Tensor], Any]:
    """One call of a mode: "inference", "forward" (train mode), or "train" (forward, backward)."""
    module.train(mode != "inference")
    parameters = list(module.parameters())
    ones: dict[str, Tensor] = {}

    def inference(x: Tensor) -> Any:
        with no_grad(), context():
            return call(x)

    def forward(x: Tensor) -> Any:
        with context():
            return call(x.detach().requires_grad_())

    def train(x: Tensor) -> None:
        x = x.detach().requires_grad_()
        with context():
            z = call(x)
        if "dz" not in ones:
            ones["dz"] = torch.randn_like(z)
        z.backward(ones["dz"])
        for p in parameters:
            p.grad = None

    return {"inference": inference, "forward": forward, "train": train}[mode]


def _compiled(case: Case, plain: nn.Module, sets: list[Tensor], session: Session) -> list[Variant]:
    def build(mode: str | None) -> Callable[[], Any]:
        call = peers.compiled(plain, mode, case.mode == "inference" and session.device == "cpu")
        step = stepper(call.module, call, case.mode, no_grad=torch.no_grad)
        step(sets[0])
        return in_turn(step, sets)

    # an op is one conv at most, which max-autotune leaves alone in training
    return peers.compiles(False, peers.not_compiled(session, case, "op"), build)


def _cudnn(plain: Any, x: Tensor) -> Variant:
    bn = plain.bn
    scale = (bn.weight * (bn.running_var + bn.eps).rsqrt()).detach()
    shift = (bn.bias - bn.running_mean * scale).detach()
    residual = plain.residual.detach() if hasattr(plain, "residual") else None
    if hasattr(plain, "rbn"):
        return Variant.missing("cudnn graph", "no graph for a shortcut with its own batch norm")
    return peers.cudnn_conv(
        x, plain.weight.detach(), [1, 1, 1, 1, 1, 1, 1], scale, shift, residual,
        plain.name != "conv_bn",
    )  # fmt: skip
