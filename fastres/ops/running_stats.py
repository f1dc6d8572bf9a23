"""running = (1 - momentum) * running + momentum * batch, the variance unbiased (var * M / (M - 1)).

Shapes: each entry a (C,) vector, updated in place in its own dtype. The fused ops are functional
and return the batch statistics; this one op applies them, so that torch.compile and torch.export
see the mutation. Source: Ioffe & Szegedy 2015, Alg. 2; the rounding is
torch.nn.functional.batch_norm's."""

from __future__ import annotations

import torch
from torch import Tensor

from ._args import BatchNorm
from ._library import define, plain_eager


def _update_running_stats(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    stats: list[Tensor],
    momenta: list[float],
    counts: list[int],
) -> None:
    for mean, var, st, momentum, m in zip(
        running_means, running_vars, stats, momenta, counts, strict=True
    ):
        unbias = m / (m - 1) if m > 1 else 1.0
        if mean.dtype == var.dtype == st.dtype:
            mean.mul_(1 - momentum).add_(st[0], alpha=momentum)
            var.mul_(1 - momentum).add_(st[1], alpha=momentum * unbias)
            continue
        mean.copy_(momentum * st[0] + (1 - momentum) * mean.to(st.dtype))
        var.copy_(momentum * unbias * st[1] + (1 - momentum) * var.to(st.dtype))


define(
    "update_running_stats(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor[] stats, "
    "float[] momenta, int[] counts) -> ()",
    _update_running_stats,
    lambda *args: None,
)


def update_running_stats(bns: list[BatchNorm], stats: list[Tensor], counts: list[int]) -> None:
    """Count the batch and update the running statistics of those batch norms that are training and
    have some."""
    due = []
    for bn, st, m in zip(bns, stats, counts, strict=True):
        if bn.batches is not None:
            bn.batches.add_(1)
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


@torch.no_grad()
def _average(mean: Tensor, var: Tensor, stats: Tensor, batches: Tensor, m: int) -> None:
    """momentum = 1 / batches, without reading it: no wait for a GPU, no break in a traced graph."""
    momentum = batches.to(stats.dtype).reciprocal()
    mean.copy_(momentum * stats[0] + (1 - momentum) * mean.to(stats.dtype))
    unbias = m / (m - 1) if m > 1 else 1.0
    var.copy_(momentum * unbias * stats[1] + (1 - momentum) * var.to(stats.dtype))
