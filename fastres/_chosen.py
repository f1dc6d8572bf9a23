"""What a call of a fused module runs on: the rung asked for, the plan's choice or the heuristic's,
and whether the kernels it takes are trusted on the device in front of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _heuristic, _winograd, backends, inference, plan, selfcheck
from ._layout import is_nhwc
from ._members import Uncopied
from ._spec import Spec, child
from ._watch import Routes
from .ops import BatchNorm, Block, Conv, Unit
from .ops._choice import parse
from .ops._ladder import check_fusion, own_rung
from .ops._rung_b import Program
from .ops.residual_stage import check_block

CHOICES_KEPT = 64  # input shapes of a module whose plan entries are remembered


class Programs(Uncopied, dict[tuple, Program]):
    """A block's prepared training."""


@dataclass
class Fusion:
    """What `convert` attaches to a module: the spec, the rung of the fusion ladder that was asked
    for (None: the default), where in the model it was found, and the folded weights of its
    convs."""

    spec: Spec
    rung: str | None = None
    path: str = ""
    choices: dict[tuple, tuple[int, str, str]] = field(default_factory=dict)
    cache: inference.Cache = field(default_factory=inference.Cache)
    programs: Programs = field(default_factory=Programs)
    linear: inference.LinearCache = field(default_factory=inference.LinearCache)
    routes: Routes = field(default_factory=Routes)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast runs convolutions on x in; None when autocast is off or leaves x alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in ("cpu", "cuda"):
        return None  # (torch 2.11's compiler does not trace torch.amp.is_autocast_available)
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def signature(module: nn.Module, spec: Spec) -> str:
    """The layers of a block as a plan knows them: '1x1 64>64 b, 3x3 64>64 s2 b + 1x1 64>256 s2 b',
    b: batch statistics, f: frozen ones."""

    def layer(pair: tuple[str, str]) -> str:
        conv, bn = child(module, pair[0]), child(module, pair[1])
        r, s = conv.kernel_size
        parts = [f"{r}x{s} {conv.in_channels}>{conv.out_channels}"]
        for letter, value, usual in (
            ("s", conv.stride, (1, 1)),
            ("d", conv.dilation, (1, 1)),
            ("p", conv.padding, ((r - 1) // 2, (s - 1) // 2)),
        ):
            if tuple(value) != usual:
                parts.append(letter + "x".join(str(v) for v in dict.fromkeys(value)))
        if conv.groups != 1:
            parts.append(f"g{conv.groups}")
        return " ".join([*parts, "b" if bn.training or bn.running_mean is None else "f"])

    text = ", ".join(layer(pair) for pair in spec.units)
    return text if spec.shortcut is None else f"{text} + {layer(spec.shortcut)}"


def plan_key(module: Any, x: Tensor, training: bool) -> plan.Key:
    """What a choice for this call of a fused module is filed under."""
    spec = module._fastres.spec
    text = signature(module, spec)
    if not module.fuses_block:
        text = f"stem {text}"
    return plan.Key.of(text, x, autocast_dtype(x) or x.dtype, training)


def asked_rung(fusion: Fusion) -> str | None:
    """The rung that `convert`, or else a `use_backend` with convs of its own, asks for."""
    return own_rung() if fusion.rung is None else fusion.rung


def refusal(name: str, fusion: Fusion, reason: str) -> str | None:
    """What to say where `reason` keeps a module of class `name` from what was asked for, by
    fusion= or use_backend; None where nothing was."""
    asked, drop = [], []
    if fusion.rung is not None:
        asked.append(f'fusion="{fusion.rung}"')
        drop.append("drop fusion= (fastres.revert, then fastres.convert without it)")
    if backends.forced():
        asked.append(f'use_backend("{backends.forced()}")')
        drop.append("leave use_backend")
    if not asked:
        return None
    where = f"{name} at {fusion.path!r}" if fusion.path else name
    return (
        f"{where}: {' under '.join(asked)} cannot run: {reason}; change that, or "
        f"{' and '.join(drop)} to run the original forward there"
    )


def choice_of(module: Any, x: Tensor) -> tuple[str, str]:
    """(rung or plan.EAGER, why) for this call; explicit > table > cache > heuristic."""
    fusion: Fusion = module._fastres
    rung = asked_rung(fusion)
    if rung is not None:
        return rung, "explicit"
    if torch.compiler.is_compiling() or x.dtype == torch.float64 or backends.forced():
        return plan.HEURISTIC  # nothing is measured there
    if fusion.spec.branch is not None:
        return plan.HEURISTIC  # nor there
    current = plan.current(x.device)
    training = torch.is_grad_enabled()
    if current.empty and not (training and x.is_cpu):
        return plan.HEURISTIC
    flags = tuple([child(module, bn).training for _, bn in fusion.spec.pairs()])
    fast = (x.shape, x.stride(), x.dtype, x.device, autocast_dtype(x), training, flags)
    known = fusion.choices.get(fast)
    if known is None or known[0] != current.version:
        if len(fusion.choices) >= CHOICES_KEPT:
            fusion.choices.clear()
        found = None if current.empty else current.lookup(plan_key(module, x, training))
        choice, why = _unmeasured(module, x, training) if found is None else found
        known = fusion.choices[fast] = (current.version, choice, why)
    return known[1], known[2]


def _unmeasured(module: Any, x: Tensor, training: bool) -> tuple[str, str]:
    """(choice, why) where the plan knows nothing."""
    if not (training and x.is_cpu and module.fuses_block and x.dim() == 4):
        return plan.HEURISTIC
    calls = tuple(
        (shape, conv.weight.shape[0], tuple(conv.weight.shape[2:]), tuple(conv.geometry()))
        for _, shape, conv in conv_calls(module, x)
    )
    dtype, winograd = autocast_dtype(x) or x.dtype, _winograd.switched_off() is None
    return _heuristic.of_block(calls, dtype, is_nhwc(x), winograd, _heuristic.SMALL)


def unit_of(module: nn.Module, pair: tuple[str, str]) -> Unit:
    return Unit(Conv.of(child(module, pair[0])), BatchNorm.of(child(module, pair[1])))


def block_of(module: nn.Module, spec: Spec) -> Block:
    """The units a module stands for at this moment."""
    units = [unit_of(module, pair) for pair in spec.units]
    return Block(units, None if spec.shortcut is None else unit_of(module, spec.shortcut))


def modules_of(module: nn.Module, spec: Spec) -> list[inference.Pair]:
    return [(child(module, conv), child(module, bn)) for conv, bn in spec.pairs()]


def conv_calls(module: Any, x: Tensor) -> list[tuple[str, tuple[int, ...], Conv]]:
    """(name, input's shape, conv) of each conv of a fused block or stem on x; names as in a
    choice."""
    spec = module._fastres.spec
    if not module.fuses_block:
        ((conv, _),) = modules_of(module, spec)
        return [("stem", tuple(x.shape), Conv.of(conv))]
    block: Any = module
    units, shortcut = block_of(block, spec)
    shapes: list[tuple[int, ...]] = []
    check_block("residual_block", x, tuple(x.shape), units, shortcut, shapes)
    inputs = [tuple(x.shape), *shapes[: len(units) - 1]]
    names = [f"conv{i + 1}" for i in range(len(units))]
    calls = [(n, s, u.conv) for n, s, u in zip(names, inputs, units, strict=True)]
    return calls if shortcut is None else [*calls, ("shortcut", tuple(x.shape), shortcut.conv)]


def unproven(x: Tensor, *families: str, backend: str | None = None) -> str | None:
    """Why these families of kernels (of x's backend) are not trusted on x's device; None when they
    are."""
    if torch.compiler.is_compiling():
        return None
    for family in families:
        reason = selfcheck.obstacle(x, family, backend)
        if reason is not None:
            return reason
    return None


def checked_rung(op: str, rung: str | None, x: Tensor) -> str:
    """check_fusion, and an error where the convs of an explicit rung failed their self-check."""
    rung = check_fusion(op, rung, x)
    choice = parse(rung)
    reason = unproven(x, "convs") if choice.rung.conv else None
    if reason is None and choice.cuda:
        reason = unproven(x, "convs", backend="cuda")
    if reason is not None:
        raise backends.BackendError(f'{op}: fusion="{rung}" cannot run: {reason}')
    return rung
