"""`fastres.report(model)`: module by module, what is (or would be) fused, by which backend, and why
the rest is not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastres import _winograd, backends, counters, inference, plan
from fastres._layout import is_nhwc
from fastres._spec import Spec, child, spec_obstacle
from fastres.nn import FusedMixin, asked_rung, autocast_dtype
from fastres.ops import Conv
from fastres.ops._choice import Choice, parse
from fastres.ops._ladder import cuda_reason, own_missing, vendor_reason

from ._match import Match, find, original_type

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Row:
    """One module of the report. status: "fused", "would fuse" (before convert), or "left"; reason:
    for "left", why; otherwise how the backend was chosen."""

    path: str
    type: str
    status: str
    kind: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What fastres does with a model. `str()` is the table; `to_dict()` and `to_json()` the same as
    data.

    counters: layout copies and calls that ran unfused since the process started."""

    rows: tuple[Row, ...]
    counters: dict[str, int]

    @property
    def fused(self) -> int:
        """How many blocks and stems run fused."""
        return sum(row.status == "fused" for row in self.rows)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of what is not fused."""
        return tuple(row for row in self.rows if row.status == "left")

    def to_dict(self) -> dict:
        return {
            "fused": self.fused,
            "left": len(self.left),
            "rows": [asdict(row) for row in self.rows],
            "counters": self.counters,
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        header = Row("module", "type", "status", "kind", "backend", "why")
        table = [header, *self.rows]
        fields = ("path", "type", "status", "kind", "backend")
        width = {f: max(len(getattr(row, f)) for row in table) for f in fields}
        lines = [
            "  ".join([*(getattr(row, f).ljust(width[f]) for f in fields), row.reason]).rstrip()
            for row in table
        ]
        would = sum(row.status == "would fuse" for row in self.rows)
        lines.append(f"{self.fused} fused, {would} would fuse, {len(self.left)} left as they are")
        lines += [f"{count} x {event}" for event, count in sorted(self.counters.items())]
        return "\n".join(lines)


def _backend(m: nn.Module) -> tuple[str, str]:
    """(backend, how it was chosen) for a module's device and dtype."""
    p = next(m.parameters())
    try:
        name, why = backends.choose(p.device, p.dtype)
    except backends.BackendError as e:
        return "none", str(e)
    if name == "cpu":
        example = torch.empty(1, 1, 1, 1, dtype=p.dtype)
        reason = inference.usable(example)
        if reason is None:
            why += "; inference on prepacked oneDNN convs (channels_last)"
            if any(w.dim() == 4 and not is_nhwc(w) for w in m.parameters()):
                why += (
                    "; the weights are NCHW: model.to(memory_format=torch.channels_last), and "
                    "inputs likewise, is faster"
                )
        else:
            why += f"; inference not folded: {reason}"
    return name, why


def _by_winograd(backend: str, m: nn.Module, spec: Spec) -> str:
    """Which convs take Winograd's algorithm, given a batch that is large enough."""
    if backend != "cpu":
        return ""
    found = []
    for path, _ in spec.pairs():
        conv = Conv.of(child(m, path))
        k, c, *taps = conv.weight.shape
        dtype, shape = conv.weight.dtype, (64, c * conv.groups, 56, 56)
        if _winograd.why_not("fprop", shape, dtype, k, conv.geometry(), taps) is None:
            found.append(path)
    return f"; {', '.join(found)} by Winograd's algorithm where faster" if found else ""


def _planned(m: Any) -> list[str]:
    """What the plan chose for the calls so far, and why."""
    found = []
    for key, (_, choice, why) in m._fastres.choices.items():
        if (choice, why) == plan.HEURISTIC:
            continue
        shape, mode = "x".join(map(str, key[0])), "training" if key[5] else "inference"
        found.append(f"{mode} on {shape}: {choice} ({why})")
        if key[5] and choice != plan.EAGER:
            found[-1] += _apart(m, parse(choice), key[4] or key[2])
    return found


def _rung(m: nn.Module) -> str:
    """Which rung was asked for, and which convs run on the vendor's kernels there, and why."""
    fusion: Any = getattr(m, "_fastres", None)
    rung = None if fusion is None else asked_rung(fusion)
    if rung is None:
        if fusion is None:
            return ""
        missing = own_missing()
        text = "" if missing is None else f"; the convs are the vendor's: {missing}"
        planned = [f"; {text}" for text in _planned(m)]
        rung, why = plan.HEURISTIC
        return "".join([text, *planned, f"; {'otherwise ' if planned else ''}rung {rung} ({why})"])
    text = f'; fusion "{rung}"'
    p = next(m.parameters())
    choice = parse(rung)
    if not choice.rung.conv:
        return text
    try:
        backend = backends.select(p)
    except backends.BackendError as e:
        return f"{text}: {e}"
    if not hasattr(backend, "conv_fprop"):
        return f"{text} cannot run here: the {backend.NAME} backend has no fused convolutions"
    reason = backend.conv_missing(p.device) or cuda_reason(choice, p)
    if reason is not None:
        return f"{text} cannot run here: {reason}"
    where = []
    for path, _ in fusion.spec.pairs():
        conv = Conv.of(child(m, path))
        x = torch.empty((1, conv.weight.shape[1] * conv.groups, 8, 8), dtype=p.dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        reason = vendor_reason(backend, x, conv.weight, conv.geometry())
        if reason is not None:
            where.append(f"{path} on the vendor's conv ({reason})")
        elif hasattr(backend, "conv_kernels"):
            kernels = backend.conv_kernels(x, conv.weight, conv.geometry())
            where.append(f"{path} on {kernels}")
    if any(w.dim() == 4 and not is_nhwc(w) for w in m.parameters()):
        text += (
            "; the weights are NCHW and copied in every call: "
            "model.to(memory_format=torch.channels_last)"
        )
    text = ", ".join([f"{text} on channels_last activations, others are an error", *where])
    return text + _apart(m, choice, autocast_dtype(p) or p.dtype)


def _apart(m: Any, choice: Choice, dtype: torch.dtype) -> str:
    """Which of a block's convs a joint rung does not give one kernel for dgrad and wgrad, by
    reason; the layers as they are now. (A conv that is the vendor's in any case is not listed.)"""
    if not (choice.rung.joint and m.fuses_block):
        return ""
    p = next(m.parameters())
    try:
        backend: Any = backends.select(p)
    except backends.BackendError:  # the row says so
        return ""
    if not hasattr(backend, "conv_fprop") or backend.conv_missing(p.device) is not None:
        return ""
    found: dict[str, list[str]] = {}
    for i, (path, norm) in enumerate(m._fastres.spec.pairs()):
        conv, bn = Conv.of(child(m, path)), child(m, norm)
        name = f"conv{i + 1}" if i < len(m._fastres.spec.units) else "shortcut"
        passes = f"{name}.dgrad", f"{name}.wgrad"
        shape = 1, conv.weight.shape[1] * conv.groups, 8, 8
        x = torch.empty(shape, dtype=dtype, device=p.device, memory_format=torch.channels_last)
        if vendor_reason(backend, x, conv.weight, conv.geometry()) is not None:
            continue
        frozen = not bn.training and bn.running_mean is not None
        if choice.vendor.intersection(passes):
            reason: str | None = "the choice gives a pass to the vendor"
        elif any(choice.tile(name) is not None for name in passes):
            reason = "the choice gives a pass to the cuda backend"
        elif not conv.weight.requires_grad:
            reason = "the weight needs no gradient"
        else:
            reason = backend.conv_bwd_pointwise_why_not(x, conv.weight, conv.geometry(), frozen)
        if reason is not None:
            found.setdefault(reason, []).append(path)
    if not found:
        return ""
    reasons = "; ".join(f"{', '.join(paths)}: {reason}" for reason, paths in found.items())
    return f"; dgrad and wgrad not in one kernel in {str(dtype).removeprefix('torch.')} ({reasons})"


def report(model: nn.Module) -> Report:
    """Say, module by module, what is fused, or before `convert` would be, by which backend, and why
    the rest is not.

    Rows are the blocks and stems a model family knows, and every normalisation layer outside of
    them. Raises TypeError when model is not a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    rows: list[Row] = []
    covered: set[int] = set()
    missed: set[int] = set()
    for path, m, match in find(model):
        name = original_type(m).__name__
        if not isinstance(match, Match):
            rows.append(Row(path or "(model)", name, "left", "", "", match))
            missed.update(id(c) for c in m.modules())
            continue
        rejected = m.__dict__.get("_fastres_rejected")
        if rejected is not None:
            rows.append(Row(path or "(model)", name, "left", match.kind, "", rejected))
            missed.update(id(m.get_submodule(p)) for p, _ in match.spec.covered())
            continue
        covered.update(id(m.get_submodule(p)) for p, _ in match.spec.covered())
        backend, why = _backend(m)
        why += _by_winograd(backend, m, match.spec) + _rung(m)
        if match.spec.branch is not None:
            kind = type(child(m, match.spec.branch)).__name__
            why += f"; {match.spec.branch} ({kind}) is called, the convs are fused one by one"
        status = "fused" if isinstance(m, FusedMixin) else "would fuse"
        rows.append(Row(path or "(model)", name, status, match.kind, backend, why))
    for path, m in model.named_modules():
        own = getattr(m, "_fastres", None) if original_type(m).__module__ == "fastres.nn" else None
        if own is not None:
            reason = spec_obstacle(m, own.spec)
            covered.update(id(m.get_submodule(p)) for p, _ in own.spec.covered())
            backend, why = _backend(m) if reason is None else ("", reason)
            why += "" if reason else _by_winograd(backend, m, own.spec) + _rung(m)
            rows.append(
                Row(
                    path or "(model)",
                    type(m).__name__,
                    "left" if reason else "fused",
                    "block",
                    backend,
                    why,
                )
            )
        elif isinstance(m, NORMS) and id(m) not in covered and id(m) not in missed:
            rows.append(
                Row(
                    path,
                    type(m).__name__,
                    "left",
                    "",
                    "",
                    "not part of a block that a model family knows",
                )
            )
    return Report(tuple(rows), counters.events())
