"""Residual blocks, converted on each rung the backend can run, next to the original block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import roofline
from fastres.bench.saved import saved_bytes
from fastres.ops.residual_stage import check_fusion

from . import peers, shapes
from .cases import Case
from .session import DTYPES, Session, record
from .test_ops import judged, stepper, verified
from .timing import OURS, Variant, in_turn, rotations, take_turns, timer

SUITE = "block"
SECONDS = 1.0


@pytest.mark.benchmark(timer=timer)
def test_block(case: Case, benchmark: Any, bench_session: Session) -> None:
    """Checked by the library's own verify, then timed; below fp32 under autocast."""
    benchmark.group = f"{case.suite}: {case.family}"
    bench_session.halving(case.id, case.batch, lambda n: _run(case, n, benchmark, bench_session))


def block_of(label: str) -> nn.Module:
    """The block as its network has it, with random weights and statistics."""
    import torchvision

    model, _, path = label.partition(".")
    with torch.device("meta"):
        block = getattr(torchvision.models, model)().get_submodule(path)
    block = block.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in block.modules():
            if isinstance(m, nn.Conv2d):
                fan = m.weight[0].numel()
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * fan**-0.5)
            elif isinstance(m, nn.BatchNorm2d):
                m.reset_parameters()
                m.reset_running_stats()
                m.weight.add_(0.3 * (torch.rand(m.weight.shape, generator=generator) - 0.5))
    return block


def work(
    block: nn.Module, shape: tuple[int, ...], dtype: str, mode: str, rung: str
) -> list[tuple[int, int]]:
    """(bytes, FLOPs) of each kernel of one call, its input's gradient included."""
    n, c, h, w = shape
    net = nn.Sequential(nn.Conv2d(3, c, 1), copy.deepcopy(block).to("meta"))
    found = roofline.model(net, (n, 3, h, w), dtype, rung, mode != "inference")
    kernels = [k for k in found.kernels if k.path.split(".")[0] == "1" and k.phase != "optimiser"]
    if mode == "forward":
        kernels = [k for k in kernels if k.phase == "forward"]
    return [(k.bytes, k.flops) for k in kernels]


def _run(case: Case, batch: int, benchmark: Any, session: Session) -> None:
    device, dtype = session.device, DTYPES[case.dtype]
    shape = (batch, *case.shape)
    rung = case.rung or "b"
    plain = block_of(case.name).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    session.need(60 * 8 * batch * case.shape[0] * case.shape[1] * case.shape[2])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).relu_().to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def context() -> Any:
        return peers.autocast(device, dtype)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        with context():
            return module(x)

    with session.on_backend():
        try:
            check_fusion("bench", rung, x)
        except fastres.BackendError as error:
            pytest.skip(f"rung {rung}: {error}")
        fused = fastres.convert(copy.deepcopy(plain), fusion=rung, strict=True)
        check = session.check_once(
            (case.name, shape, case.dtype, rung),
            lambda: judged(verified(plain, fused, x, dtype, True, call), case.name),
        )
        session.measure_machine(case.dtype)
        count = 2 if session.tiny else rotations(8 * x.numel() * x.element_size(), device)
        sets = [x.clone(memory_format=torch.preserve_format) for _ in range(count)]
        variants = [
            Variant(OURS, in_turn(stepper(fused, fused, case.mode, context), sets)),
            Variant("eager", in_turn(stepper(plain, plain, case.mode, context), sets)),
            *_compiled(case, plain, sets, session, context),
        ]
        saved = {}
        if case.mode == "train":
            for name, module in (("fastres", fused), ("eager", plain)):
                saved[name] = saved_bytes(
                    module, lambda m=module: call(m, x.detach().requires_grad_()), x
                )
        take_turns(benchmark, variants, session.seconds(SECONDS), repeat=count)
    counted = rung if case.mode != "inference" or device == "cuda" else "folded"
    record(
        benchmark, session, variants, work(plain, shape, case.dtype, case.mode, counted),
        id=case.id, suite=case.suite, family=case.family, name=case.name, shape=case.label,
        dtype=case.dtype, mode=case.mode, batch=batch, asked_batch=case.batch,
        backend=session.backend, rung=counted, saved_bytes=saved.get("fastres"),
        saved_ratio=saved["fastres"] / saved["eager"] if saved else None, peak_bytes=None,
        check=check, notes=[f"{m} x {k}" for m, k in _block(case.name).users], rotated_sets=count,
    )  # fmt: skip


def _block(label: str) -> shapes.Block:
    return next(block for block in shapes.blocks() if block.label == label)


def _compiled(
    case: Case, plain: nn.Module, sets: list[Tensor], session: Session, context: Callable[[], Any]
) -> list[Variant]:
    def build(mode: str | None) -> Callable[[], Any]:
        freeze = case.mode == "inference" and session.device == "cpu"
        call = peers.compiled(plain, mode, freeze)
        step = stepper(call.module, call, case.mode, context, torch.no_grad)
        step(sets[0])
        return in_turn(step, sets)

    left = peers.not_compiled(session, case, "block")
    return peers.compiles(session.full, left, build)
