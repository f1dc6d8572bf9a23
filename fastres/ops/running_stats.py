"""running = (1 - momentum) * running + momentum * batch, the variance unbiased (var * M / (M - 1)).

Shapes: each entry a (C,) vector, updated in place in its own dtype. The fused ops are functional
and return the batch statistics; this one op applies them, so that torch.compile and torch.export
see the mutation. Source: Ioffe & Szegedy 2015, Alg. 2; the rounding is
torch.nn.functional.batch_norm's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import _native

from ._args import BatchNorm
from ._library import define, plain_eager


def _update_running_stats(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    stats: list[Tensor],
    momenta: list[float],
    counts: list[int],
) -> None:
    rows = list(zip(running_means, running_vars, stats, momenta, counts, strict=True))
    if len({id(t) for t in running_means}) < len(rows):  # one batch norm twice: in turn
        for mean, var, st, momentum, m in rows:
            _update_running_stats([mean], [var], [st], [momentum], [m])
        return
    # a launch for each group of tensors, not four for each batch norm: a GPU's host time
    kept: dict[float, list[Tensor]] = {}  # by what is left of the old value
    added: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # by what the new one is scaled by
    for mean, var, st, momentum, m in rows:
        unbias = m / (m - 1) if m > 1 else 1.0
        if mean.dtype == var.dtype == st.dtype:
            batch_mean, batch_var, _ = st.unbind(0)
            kept.setdefault(1 - momentum, []).extend((mean, var))
            for running, batch, scale in (
                (mean, batch_mean, momentum), (var, batch_var, momentum * unbias),
            ):  # fmt: skip
                into, values = added.setdefault(scale, ([], []))
                into.append(running)
                values.append(batch)
            continue
        mean.copy_(momentum * st[0] + (1 - momentum) * mean.to(st.dtype))
        var.copy_(momentum * unbias * st[1] + (1 - momentum) * var.to(st.dtype))
    for scale, tensors in kept.items():
        torch._foreach_mul_(tensors, scale)
    for scale, (tensors, values) in added.items():
        torch._foreach_add_(tensors, values, alpha=scale)


define(
    "update_running_stats(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor[] stats, "
    "float[] momenta, SymInt[] counts) -> ()",
    _update_running_stats,
    lambda *args: None,
)


def update_running_stats(bns: list[BatchNorm], stats: list[Tensor], counts: list[int]) -> None:
    """Count the batch and update the running statistics of those batch norms that are training and
    have some."""
    if _update_on_cpu(bns, stats, counts):
        return
    due = []
    batches = [bn.batches for bn in bns if bn.batches is not None]
    if len({id(t) for t in batches}) < len(batches):  # one batch norm twice
        for t in batches:
            t.add_(1)
    elif batches:
        torch._foreach_add_(batches, 1)
    for bn, st, m in zip(bns, stats, counts, strict=True):
        if not bn.training or bn.running_mean is None or bn.running_var is None:
            continue
        if bn.momentum is None and bn.batches is not None:
            _average(bn.running_mean, bn.running_var, st.detach(), bn.batches, m)
        else:  # torch's momentum without a count is 0
            due.append((bn.running_mean, bn.running_var, st.detach(), float(bn.momentum or 0), m))
    if due:
        columns = [list(column) for column in zip(*due, strict=True)]
        if plain_eager(*columns[0], *columns[2]):
            with torch.no_grad():
                _update_running_stats(*columns)
        else:
            torch.ops.fastres.update_running_stats(*columns)


def _update_on_cpu(bns: list[BatchNorm], stats: list[Tensor], counts: list[int]) -> bool:
    """All of it in one call of C++, a tenth of the host time of single ops; False, with nothing
    done, where some tensor is not what that takes."""
    if not plain_eager(*stats) or not stats[0].is_cpu or _native.why_missing() is not None:
        return False
    entries, touched = [], []
    for bn, st, m in zip(bns, stats, counts, strict=True):
        mean, var, batches = bn.running_mean, bn.running_var, bn.batches
        if not bn.training or mean is None or var is None:
            if batches is not None:
                return False
            continue
        if bn.momentum is None or not (_plain_fp32(mean) and _plain_fp32(var) and _plain_fp32(st)):
            return False
        count = 0
        if batches is not None:
            if batches.dtype != torch.int64 or not batches.is_cpu:
                return False
            touched.append(batches)
            count = batches.data_ptr()
        touched += [mean, var]
        entries.append((
            mean.data_ptr(), var.data_ptr(), st.data_ptr(), mean.shape[0], bn.momentum,
            m / (m - 1) if m > 1 else 1.0, count,
        ))  # fmt: skip
    if any([type(t) is not Tensor or t.is_inference() for t in touched]):
        return False
    _native.module().update_running_stats(entries)
    torch.autograd.graph.increment_version(touched)
    return True


def _plain_fp32(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.is_cpu and t.is_contiguous()


@torch.no_grad()
def _average(mean: Tensor, var: Tensor, stats: Tensor, batches: Tensor, m: int) -> None:
    """momentum = 1 / batches, without reading it: no wait for a GPU, no break in a traced graph."""
    momentum = batches.to(stats.dtype).reciprocal()
    mean.copy_(momentum * stats[0] + (1 - momentum) * mean.to(stats.dtype))
    unbias = m / (m - 1) if m > 1 else 1.0
    var.copy_(momentum * unbias * stats[1] + (1 - momentum) * var.to(stats.dtype))
