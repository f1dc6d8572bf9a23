"""A residual block's training step on rung b in plain eager mode, with everything that follows from
sizes decided beforehand.

The operations of _ladder and _ladder_bwd in the same order, so the same bits. What is left of the
host time is the calls themselves: an unprepared block spends as much again on checks, on the choice
of each conv's algorithm and on lists. It matters wherever a block takes less than a millisecond: on
CPUs for small images, on GPUs at nearly any size (there the host runs ahead, or the GPU waits).

Only blocks whose batch norms all use the statistics of the batch; the others are _ladder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres import backends
from fastres._layout import is_dense, is_nhwc, mask_shape

from ._args import BatchNorm
from ._ladder import Stage
from ._library import plain_backward
from ._units import (
    Backward,
    Fprop,
    backward_of,
    cast,
    dense,
    fprop_of,
    in_dtype,
    in_format,
    stats_dtype,
    vector,
)
from .running_stats import update_running_stats

_NO_SHORTCUT = (None,) * 5
_NO_RESIDUAL = (None,) * 3
_NO_NORM = (None,) * 4

Affine = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, rstd, gamma, beta, as the kernels take them


def _affine(stats: Tensor, gamma: Tensor, beta: Tensor, y: Tensor) -> Affine:
    mean, _, rstd = stats.unbind(0)
    return mean, rstd, vector(gamma, y), vector(beta, y)


class Program:
    """A block on rung b for an input of one shape, strides, dtype and device, and weights likewise.

    Its caller has checked that they fit together, and uses it only while that holds. Which
    algorithm runs a conv is looked up by the strides of its tensors, the one thing that only the
    run shows: a vendor's conv may answer an NHWC input in NCHW."""

    __slots__ = (
        "backend", "backwards", "counts", "dtype", "eps", "fprops", "geometry", "last", "projected",
        "stage",
    )  # fmt: skip

    def __init__(self, x: Tensor, stage: Stage, shapes: list[tuple[int, ...]]) -> None:
        """stage: one block's, on rung b; shapes: of the convs' outputs."""
        self.stage = stage
        self.backend = backends.select(x)
        self.dtype = stats_dtype(x)
        self.last = stage.main[0] - 1
        self.projected = stage.projection[0]
        self.geometry = [stage.of_unit(i) for i in range(len(shapes))]
        self.eps = stage.eps
        self.counts = [n * h * w for n, _, h, w in shapes]
        self.fprops: dict[tuple, tuple[Fprop, bool]] = {}
        self.backwards: dict[tuple, Backward] = {}

    def unit(
        self, i: int, h: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor, Affine, Tensor]:
        """(y, stats (3, K), how to normalise y, the weight as it was read) of conv i on h."""
        key = i, h.stride()
        found = self.fprops.get(key)
        if found is None:
            found = self.fprops[key] = fprop_of(h, weight, self.geometry[i], True)
        run, any_dtype = found
        if not any_dtype:
            weight = cast(weight, h)
        y = run(h, weight)
        if not is_dense(y):
            y = dense(y, "residual_block conv output")
        stats = torch.empty((3, y.shape[1]), dtype=self.dtype, device=y.device)
        mean, var, rstd = stats.unbind(0)
        self.backend.bn_stats(mean, var, rstd, y, self.eps[i])
        return y, stats, (mean, rstd, vector(gamma, y), vector(beta, y)), weight

    def conv_backward(
        self, i: int, dy: Tensor, h: Tensor, weight: Tensor, need_dx: bool, need_dw: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dw) of conv i on h; dw as it was summed."""
        key = i, dy.stride(), h.stride(), weight.dtype, need_dx, need_dw
        run = self.backwards.get(key)
        if run is None:
            run = self.backwards[key] = backward_of(
                dy, h, weight, self.geometry[i], need_dx, need_dw, True, True
            )
        return run(dy, h, weight)

    # --- forward ---

    def forward(
        self, x: Tensor, weights: tuple, gammas: tuple, betas: tuple
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """(z, mask, ys, stats, weights as they were read), units numbered as in Stage."""
        backend, last = self.backend, self.last
        if not is_dense(x):
            x = dense(x, "residual_block")
        ys, all_stats, used = [], [], []
        h = x
        for i in range(last + 1):
            # 1. conv and statistics
            y, stats, affine, weight = self.unit(i, h, weights[i], gammas[i], betas[i])
            ys.append(y)
            all_stats.append(stats)
            used.append(weight)
            # 2. normalise and ReLU, inside the block
            if i < last:
                h = torch.empty_like(y)
                backend.bn_apply(h, None, y, *affine, *_NO_SHORTCUT, True)
        # 3. normalise, add the shortcut, ReLU
        if self.projected:
            i = last + 1
            y_s, stats, res, weight = self.unit(i, x, weights[i], gammas[i], betas[i])
            ys.append(y_s)
            all_stats.append(stats)
            used.append(weight)
            shortcut: tuple = (in_format(y_s, is_nhwc(y), "residual_block shortcut"), *res)
        else:
            shortcut = (in_format(x, is_nhwc(y), "residual_block shortcut"), *_NO_NORM)
        z = torch.empty_like(y)
        mask = torch.empty(mask_shape(y), dtype=torch.uint8, device=y.device)
        backend.bn_apply(z, mask, y, *affine, *shortcut, True)
        return z, mask, ys, all_stats, used

    # --- backward ---

    def backward(
        self,
        dz: Tensor,
        x: Tensor,
        mask: Tensor,
        weights: list[Tensor],
        gammas: list[Tensor],
        betas: list[Tensor],
        ys: list[Tensor],
        stats: list[Tensor],
        need_dx: bool,
        need_dw: list[bool],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor], list[Tensor]]:
        """(dx, dweights, dgammas, dbetas); ys is emptied on the way."""
        backend, last = self.backend, self.last
        if not is_dense(x):
            x = dense(x, "residual_block backward")
        count = len(weights)
        y = ys[last]
        dz = in_format(dz, is_nhwc(y), "residual_block backward")
        dws: list[Tensor | None] = [None] * count
        dgammas, dbetas = [x] * count, [x] * count
        affine = _affine(stats[last], gammas[last], betas[last], y)
        # 1. the last batch norm, and the shortcut's; the shortcut's gradient of x
        dgamma, dbeta = self._vectors(y, 2)
        dgammas[last], dbetas[last] = dgamma, dbeta
        dres = None
        dy = torch.empty_like(y)
        if self.projected:
            j = last + 1
            y_s = in_format(ys[j], is_nhwc(y), "residual_block backward shortcut")
            res_mean, res_rstd, res_gamma, _ = _affine(stats[j], gammas[j], betas[j], y_s)
            (res_dgamma,) = self._vectors(y, 1)
            backend.bn_bwd_reduce(
                dgamma, dbeta, res_dgamma, dz, mask, y, *affine, y_s, res_mean, res_rstd, "mask"
            )
            dgammas[j], dbetas[j] = res_dgamma, dbeta.clone()
            dy_s = torch.empty_like(y)
            backend.bn_bwd_apply(
                dy, dy_s, dz, mask, y, *affine, dgamma, dbeta,
                y_s, res_mean, res_rstd, res_gamma, res_dgamma, "mask", True, True,
            )  # fmt: skip
            del y_s, ys[j:]
            if need_dx or need_dw[j]:
                dres, dws[j] = self.conv_backward(j, dy_s, x, weights[j], need_dx, need_dw[j])
            del dy_s
        else:
            backend.bn_bwd_reduce(dgamma, dbeta, None, dz, mask, y, *affine, *_NO_RESIDUAL, "mask")
            backend.bn_bwd_apply(
                dy, None, dz, mask, y, *affine, dgamma, dbeta, *_NO_SHORTCUT, "mask", True, False
            )
        # 2. main branch, last conv to first
        dx = None
        for i in range(last, -1, -1):
            del y, ys[i:]
            need_dh = i > 0 or need_dx
            # a. the conv's input, formed anew inside the block
            h = x
            if i > 0:
                y = ys[i - 1]
                affine = _affine(stats[i - 1], gammas[i - 1], betas[i - 1], y)
                if need_dw[i]:
                    h = torch.empty_like(y)
                    backend.bn_apply(h, None, y, *affine, *_NO_SHORTCUT, True)
                else:
                    h = y
            # b. the conv
            if need_dh or need_dw[i]:
                dx, dws[i] = self.conv_backward(i, dy, h, weights[i], need_dh, need_dw[i])
            else:
                dx = None
            if i == 0:
                break
            # c. the batch norm before it, over the gradient
            assert dx is not None
            dy = in_format(dx, is_nhwc(y), "residual_block backward")
            dgamma, dbeta = dgammas[i - 1], dbetas[i - 1] = self._vectors(y, 2)
            backend.bn_bwd_reduce(
                dgamma, dbeta, None, dy, None, y, *affine, *_NO_RESIDUAL, "recompute"
            )
            backend.bn_bwd_apply(
                dy, None, dy, None, y, *affine, dgamma, dbeta, *_NO_SHORTCUT, "recompute", True,
                False,
            )  # fmt: skip
        # 3. + the shortcut's
        if dx is not None:
            if dres is not None:
                dx = in_format(dx, is_nhwc(dres), "residual_block backward shortcut").add_(dres)
            else:
                dx = in_format(dx, is_nhwc(dz), "residual_block backward shortcut")
                backend.relu_bwd(dx, dx, dz, mask)
        return dx, dws, dgammas, dbetas

    def _vectors(self, y: Tensor, count: int) -> list[Tensor]:
        """Per-channel vectors; no two share storage, as they become gradients."""
        return [torch.empty(y.shape[1], dtype=self.dtype, device=y.device) for _ in range(count)]


class BlockNode(torch.autograd.Function):
    """The autograd node: apply(program, bns, refuse, x, *weights, *gammas, *betas).

    bns: whose running statistics to update; refuse: what answers a backward that is itself to be
    differentiated, with the arguments of torch.ops.fastres.residual_stage_bwd."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, bns: list[BatchNorm], refuse: Callable, x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        n = len(bns)
        weights = tensors[:n]
        z, mask, ys, stats, used = program.forward(x, weights, tensors[n : 2 * n], tensors[2 * n :])
        update_running_stats(bns, stats, program.counts)
        ctx.program, ctx.refuse = program, refuse
        # Weights cast for autocast are kept, as autocast itself keeps them: a second cast in the
        # backward is 3% of a bf16 step where weights are as large as activations
        ctx.dtypes = [w.dtype for w in weights]
        ctx.save_for_backward(x, mask, *used, *tensors[n:], *ys, *stats)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple:
        program, dtypes = ctx.program, ctx.dtypes
        n = len(dtypes)
        saved = ctx.saved_tensors
        x, mask = saved[:2]
        weights, gammas, betas, ys, stats = [list(saved[2 + k * n :][:n]) for k in range(5)]
        needs = ctx.needs_input_grad
        need_dx, need_dw = needs[3], list(needs[4 : 4 + n])
        if not plain_backward(dz):
            # create_graph: the registered op records a node that refuses to be differentiated
            stage = program.stage
            config = stage.main, stage.projection, stage.geometry, stage.training, stage.fusion
            dx, dws, dgammas, dbetas = ctx.refuse(
                dz, x, [], [mask], weights, gammas, betas, ys, stats, *config, need_dx, need_dw
            )
        else:
            # What autograd would keep until this returns, unless retain_graph: now only these lists
            # hold it, and let go as the backward goes.
            del saved
            ctx.maybe_clear_saved_tensors()
            dx, dws, dgammas, dbetas = program.backward(
                dz, x, mask, weights, gammas, betas, ys, stats, need_dx, need_dw
            )
        return (
            None, None, None,
            dx if need_dx else None,
            *[
                in_dtype(dw, dtype) if need else None
                for dw, dtype, need in zip(dws, dtypes, need_dw, strict=True)
            ],
            *[in_dtype(d, g.dtype) for d, g in zip(dgammas, gammas, strict=True)],
            *[in_dtype(d, b.dtype) for d, b in zip(dbetas, betas, strict=True)],
        )  # fmt: skip
