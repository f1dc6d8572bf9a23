"""Whole networks, training steps and inference, next to eager and the peers."""

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
from fastres.convert.verify import compare

from . import networks, peers
from .cases import Case
from .session import DTYPES, Session, record
from .test_ops import at_precision, judged
from .timing import CLOCK, OURS, Variant, take_turns, timer

SUITE = "network"
SECONDS = 3.0
VERIFY_IMAGES = 2
VERIFY_SIZE = 96  # pixels; with --full those that are timed: float64 convolutions are slow
TINY_SIZE = 64


@pytest.mark.benchmark(timer=timer)
def test_network(case: Case, benchmark: Any, bench_session: Session) -> None:
    """Checked by the library's own verify, then timed; bf16 and fp16 under autocast."""
    benchmark.group = f"{case.suite}: {case.family}"
    bench_session.halving(case.id, case.batch, lambda n: _run(case, n, benchmark, bench_session))


def _run(case: Case, batch: int, benchmark: Any, session: Session) -> None:
    device, dtype, train = session.device, DTYPES[case.dtype], case.mode == "train"
    size = min(networks.size_of(case.name), TINY_SIZE if session.tiny else 224)
    rung = "b" if train or device == "cuda" else "folded"
    shape = (batch, 3, size, size)

    def context() -> Any:
        return peers.autocast(device, dtype)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        with context():
            return module(x)

    plain, few = networks.prepared(case.name, size, device)
    traffic = roofline.model(plain, shape, case.dtype, rung, train, case.name)
    session.need(_bytes_held(plain, shape, case.dtype, train))
    if not session.full and size > VERIFY_SIZE:
        few = networks.photographs(VERIFY_IMAGES, VERIFY_SIZE).to(device)
    sample = few[:VERIFY_IMAGES]
    x = networks.photographs(batch, size).to(device)
    labels = torch.arange(batch, device=device) % networks.classes_of(case.name)
    with session.on_backend():
        fused = fastres.convert(copy.deepcopy(plain))
        check = session.check_once(
            (case.name, case.dtype, size),
            lambda: judged(
                at_precision(compare(plain, call, fused, call, sample, network=True), dtype),
                case.name,
            ),
        )
        session.measure_machine(case.dtype)
        saved = {}
        if train:
            for name, module in ((OURS, fused), ("eager", plain)):
                saved[name] = saved_bytes(module.train(), lambda m=module: call(m, x), x)
        steps = {
            OURS: _step(case, fused, fused, x, labels, context, torch.inference_mode),
            "eager": _step(case, plain, plain, x, labels, context, torch.inference_mode),
        }
        peak = {name: _peak(step) for name, step in steps.items()}
        variants = [Variant(name, step) for name, step in steps.items()]
        variants += _compiled(case, plain, x, labels, context, session)
        if not train and device == "cpu":
            variants += _peers(case, plain, x, session)
        # A GradScaler asks the device whether to step, which a graph cannot.
        graphs = not (train and case.dtype == "fp16")
        take_turns(benchmark, variants, session.seconds(SECONDS), graphs=graphs)
    session.measure_machine(case.dtype)
    record(
        benchmark, session, variants, [(k.bytes, k.flops) for k in traffic.kernels], images=True,
        id=case.id, suite=case.suite, family=case.family, name=case.name, shape=f"{size} px",
        dtype=case.dtype, mode=case.mode, batch=batch, asked_batch=case.batch,
        backend=session.backend, rung=rung, saved_bytes=saved.get(OURS),
        saved_ratio=saved[OURS] / saved["eager"] if saved else None,
        peak_bytes=peak if CLOCK.cuda else None, check=check, notes=networks.unfused(fused),
    )  # fmt: skip


def _bytes_held(model: nn.Module, shape: tuple[int, ...], dtype: str, train: bool) -> int:
    """About what eager needs: in training every tensor that its forward writes."""
    found = roofline.model(model, shape, dtype, "a", train)
    written = [k.write_bytes for k in found.kernels if k.phase == "forward"]
    return int(1.3 * sum(written)) if train else 6 * max(written)


def _step(
    case: Case,
    model: nn.Module,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    context: Callable[[], Any],
    no_grad: Callable[[], Any],
) -> Callable[[], Any]:
    model.train(case.mode == "train")
    if case.mode == "train":
        return networks.training_step(call, model, x, labels, context, case.dtype == "fp16")

    def inference() -> Tensor:
        with no_grad(), context():
            return call(x)

    return inference


def _peak(step: Callable[[], Any]) -> int:
    """Bytes that one step holds at most, on a GPU, with the model; 0 elsewhere."""
    if not CLOCK.cuda:
        return 0
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def _compiled(
    case: Case,
    plain: nn.Module,
    x: Tensor,
    labels: Tensor,
    context: Callable[[], Any],
    session: Session,
) -> list[Variant]:
    def build(mode: str | None) -> Callable[[], Any]:
        freeze = case.mode == "inference" and session.device == "cpu"
        call = peers.compiled(plain, mode, freeze)
        step = _step(case, call.module, call, x, labels, context, torch.no_grad)
        step()
        return step

    left = peers.not_compiled(session, case, "network")
    return peers.compiles(session.full, left, build)


def _peers(case: Case, plain: nn.Module, x: Tensor, session: Session) -> list[Variant]:
    found = []
    for name, make in (("onnxruntime", peers.onnxruntime), ("openvino", peers.openvino)):
        if session.full or (case.name in ("resnet18", "resnet50") and not session.tiny):
            found.append(make(plain, x, case.dtype))
        else:
            found.append(Variant.missing(name, "of this network with --full only"))
    return found
