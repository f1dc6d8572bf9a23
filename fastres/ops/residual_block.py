"""A whole residual block as one autograd node (He et al. 2015, figures 2 and 5).

    h_0 = x;   y_i = conv_i(h_{i-1});   h_i = relu(bn_i(y_i)), i < K
    z = relu(bn_K(y_K) + s),   s = x, or bn_s(conv_s(x))

K = 2 is the basic block, K = 3 the bottleneck; any K >= 1 works. Saved for the backward: x, the raw
conv outputs y_i, (mean, var, rstd) a batch norm, one bit an element of z. The normalised h_i are
recomputed in the backward, one read and one write each, which is what brings saved bytes of a
ResNet-50 below 0.8 of eager's.

Traffic beyond the convs, per tensor: forward reads y twice (statistics, normalise), writes h or z
once; backward reads dz and y twice, writes dy once over dz, and one extra pass recomputes h. An
identity shortcut's gradient is added to the first conv's in one in-place pass under the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import backends
from fastres._layout import is_nhwc

from ._args import BatchNorm, Conv, check_activation, check_bn, check_conv, conv_out_shape
from ._library import define, plain_eager, refuse_double_backward
from ._units import (
    GEOMETRY,
    Norm,
    Shortcut,
    alloc_mask,
    alloc_stats,
    alloc_vectors,
    bn_statistics,
    conv_bwd,
    conv_fwd,
    dense,
    in_format,
    needs_grad,
    normalise,
    normalise_bwd,
    vector,
)
from .running_stats import update_running_stats


class Unit(NamedTuple):
    """One conv and its batch norm."""

    conv: Conv
    bn: BatchNorm


def _geometry(flat: list[int], i: int) -> list[int]:
    return flat[GEOMETRY * i : GEOMETRY * (i + 1)]


def _residual_block(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    geometry: list[int],
    training: list[bool],
    eps: list[float],
    projection: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    x = dense(x, "residual_block")
    units = len(weights)
    main = units - projection
    ys: list[Tensor] = []
    stats: list[Tensor] = []

    def conv_unit(i: int, h: Tensor) -> tuple[Tensor, Norm]:
        y = dense(
            conv_fwd(h, weights[i], None, _geometry(geometry, i)), "residual_block conv output"
        )
        st = bn_statistics(y, training[i], running_means[i], running_vars[i], eps[i])
        ys.append(y)
        stats.append(st)
        return y, Norm(st, vector(gammas[i], y), vector(betas[i], y))

    # 1. main branch; without a backward to come the normalised tensor overwrites the raw one
    h = x
    for i in range(main):
        y, norm = conv_unit(i, h)
        if i < main - 1:
            h, _ = normalise(y, norm, relu=True, out=None if save else y)
    # 2. shortcut
    if projection:
        y_s, norm_s = conv_unit(main, x)
        shortcut = Shortcut(in_format(y_s, is_nhwc(y), "residual_block shortcut"), norm_s)
    else:
        shortcut = Shortcut(in_format(x, is_nhwc(y), "residual_block shortcut"))
    # 3. normalise, add, ReLU
    z, mask = normalise(y, norm, True, save, shortcut, out=None if save else y)
    return z, mask, ys if save else [], stats


def _residual_block_fake(
    x,
    weights,
    gammas,
    betas,
    running_means,
    running_vars,
    geometry,
    training,
    eps,
    projection,
    save,
):
    x = dense(x, "residual_block")
    main = len(weights) - projection
    ys = []
    h = x
    for i in range(len(weights)):
        h = conv_fwd(x if i == main else h, weights[i], None, _geometry(geometry, i))
        ys.append(dense(h, "residual_block conv output"))
    z = torch.empty_like(ys[main - 1])
    return z, alloc_mask(z, save), ys if save else [], [alloc_stats(y) for y in ys]


def _residual_block_bwd(
    dz: Tensor,
    mask: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    ys: list[Tensor],
    stats: list[Tensor],
    geometry: list[int],
    training: list[bool],
    projection: bool,
    need_dx: bool,
    need_dw: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    x = dense(x, "residual_block backward")
    units = len(weights)
    main = units - projection
    norms = [Norm(stats[i], vector(gammas[i], x), vector(betas[i], x)) for i in range(units)]
    y = ys[main - 1]
    dz = in_format(dz, is_nhwc(y), "residual_block backward")
    dws, dgammas, dbetas = ([stats[0].new_empty(0)] * units for _ in range(3))

    def conv_unit_bwd(i: int, dy: Tensor, h: Tensor, need_dh: bool) -> Tensor | None:
        dh, dw = conv_bwd(dy, h, weights[i], _geometry(geometry, i), need_dh, need_dw[i])
        if dw is not None:
            dws[i] = dw
        return dh

    # 1. the last batch norm, and the shortcut's, in the same two passes
    shortcut = None
    if projection:
        y_s = in_format(ys[main], is_nhwc(y), "residual_block backward shortcut")
        shortcut = Shortcut(y_s, norms[main])
    grads = normalise_bwd(
        dz, mask, y, norms[main - 1], "mask", training[main - 1], shortcut,
        res_training=projection and training[main],
    )  # fmt: skip
    dgammas[main - 1], dbetas[main - 1] = grads.dgamma, grads.dbeta
    dy = grads.dx
    # 2. main branch, last conv to first; dy is written over the conv's input gradient
    for i in range(main - 1, 0, -1):
        h, _ = normalise(ys[i - 1], norms[i - 1], relu=True)
        dh = conv_unit_bwd(i, dy, h, need_dh=True)
        assert dh is not None
        dh = in_format(dh, is_nhwc(ys[i - 1]), "residual_block backward")
        g = normalise_bwd(
            dh, None, ys[i - 1], norms[i - 1], "recompute", training[i - 1], inplace=True
        )
        dgammas[i - 1], dbetas[i - 1] = g.dgamma, g.dbeta
        dy = g.dx
    dx = conv_unit_bwd(0, dy, x, need_dx)
    # 3. shortcut
    if projection:
        assert grads.dres is not None and grads.res_dgamma is not None
        dgammas[main], dbetas[main] = grads.res_dgamma, grads.dbeta.clone()
        dx_s = conv_unit_bwd(main, grads.dres, x, need_dx)
        if dx is not None and dx_s is not None:
            dx = dx.add_(dx_s)
    elif dx is not None:
        dx = in_format(dx, is_nhwc(y), "residual_block backward shortcut")
        backends.select(dx).relu_bwd(dx, dx, dz, mask)
    return stats[0].new_empty(0) if dx is None else dx, dws, dgammas, dbetas


def _residual_block_bwd_fake(
    dz, mask, x, weights, gammas, betas, ys, stats, geometry, training, projection, need_dx, need_dw
):
    x = dense(x, "residual_block backward")
    none = stats[0].new_empty(0)
    main = len(weights) - projection
    dx = none
    dws = []
    for i, w in enumerate(weights):
        h = ys[i - 1] if 0 < i < main else x
        dh, dw = conv_bwd(ys[i], h, w, _geometry(geometry, i), need_dx and i == 0, need_dw[i])
        dx = dh if dh is not None else dx
        dws.append(none.clone() if dw is None else dw)
    vectors = [alloc_vectors(y, 2) for y in ys]
    return (
        none.clone() if not need_dx else dx,
        dws,
        [v[0] for v in vectors],
        [v[1] for v in vectors],
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weights, gammas, betas, _, _, ctx.geometry, ctx.training, _, ctx.projection, ctx.save = (
        inputs
    )
    _, mask, ys, stats = output
    ctx.units = len(weights)
    ctx.mark_non_differentiable(mask, *ys, *stats)
    ctx.save_for_backward(mask, x, *weights, *gammas, *betas, *ys, *stats)


def _backward(ctx, dz, *_):
    if not ctx.save:
        raise RuntimeError("fastres::residual_block was called with save=False; it has no backward")
    mask, x, *rest = ctx.saved_tensors
    n = ctx.units
    weights, gammas, betas, ys, stats = (list(rest[i * n : (i + 1) * n]) for i in range(5))
    need_x, need_w = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
    dx, dws, dgammas, dbetas = torch.ops.fastres.residual_block_bwd(
        dz, mask, x, weights, gammas, betas, ys, stats, ctx.geometry, ctx.training, ctx.projection,
        need_x, need_w,
    )  # fmt: skip
    return (
        dx if need_x else None,
        [dw if need else None for dw, need in zip(dws, need_w, strict=True)],
        [d.to(g.dtype) for d, g in zip(dgammas, gammas, strict=True)],
        [d.to(b.dtype) for d, b in zip(dbetas, betas, strict=True)],
        [None] * n, [None] * n, None, None, None, None, None,
    )  # fmt: skip


define(
    "residual_block_bwd(Tensor dz, Tensor mask, Tensor x, Tensor[] weights, Tensor[] gammas, "
    "Tensor[] betas, "
    "Tensor[] ys, Tensor[] stats, int[] geometry, bool[] training, bool projection, bool need_dx, "
    "bool[] need_dw) -> (Tensor dx, Tensor[] dweights, Tensor[] dgammas, Tensor[] dbetas)",
    _residual_block_bwd,
    _residual_block_bwd_fake,
    *refuse_double_backward("residual_block"),
)
define(
    "residual_block(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] "
    "running_means, "
    "Tensor[] running_vars, int[] geometry, bool[] training, float[] eps, bool projection, bool "
    "save) "
    "-> (Tensor z, Tensor mask, Tensor[] ys, Tensor[] stats)",
    _residual_block,
    _residual_block_fake,
    _setup,
    _backward,
)


def _columns(tensors: Any, n: int) -> Any:
    """(weights, gammas, betas, running means, running variances) from the flat arguments."""
    return tuple(list(tensors[i * n : (i + 1) * n]) for i in range(5))


class _EagerNode(torch.autograd.Function):
    """The op's node without the dispatcher: what plain eager training runs.

    Through torch.library a block costs 0.6 ms of host time forward and 1.0 ms backward (lists of
    tensors are flattened and rebuilt in Python), this way a fraction. Same implementation, same
    backward; torch.compile, export and dispatch modes go through the registered op."""

    @staticmethod
    def forward(ctx, config, x, *tensors):
        geometry, training, eps, projection, update = config
        n = len(training)
        weights, gammas, betas, means, variances = _columns(tensors, n)
        z, mask, ys, stats = _residual_block(
            x, weights, gammas, betas, means, variances, geometry, training, eps, projection, True
        )
        update(stats)
        ctx.config = geometry, training, projection
        ctx.save_for_backward(mask, x, *tensors[: 3 * n], *ys, *stats)
        return z

    @staticmethod
    def backward(ctx, dz):
        geometry, training, projection = ctx.config
        n = len(training)
        mask, x, *rest = ctx.saved_tensors
        weights, gammas, betas, ys, stats = _columns(rest, n)
        need_x, need_w = ctx.needs_input_grad[1], list(ctx.needs_input_grad[2 : 2 + n])
        # under create_graph the registered op records a node that refuses to be differentiated
        op = (
            torch.ops.fastres.residual_block_bwd if torch.is_grad_enabled() else _residual_block_bwd
        )
        dx, dws, dgammas, dbetas = op(
            dz, mask, x, weights, gammas, betas, ys, stats, geometry, training, projection, need_x,
            need_w,
        )  # fmt: skip
        return (
            None,
            dx if need_x else None,
            *(dw if need else None for dw, need in zip(dws, need_w, strict=True)),
            *(d.to(g.dtype) for d, g in zip(dgammas, gammas, strict=True)),
            *(d.to(b.dtype) for d, b in zip(dbetas, betas, strict=True)),
            *([None] * (2 * n)),
        )


def residual_block(x: Tensor, units: list[Unit], shortcut: Unit | None = None) -> Tensor:
    """relu(bn_K(conv_K(... relu(bn_1(conv_1(x))))) + s), s = x or bn_s(conv_s(x)): one autograd
    node.

    x: (N, C, H, W), float32, bfloat16 or float16 (float64 by the reference), channels_last or
    contiguous. units: the K >= 1 convs (without bias) with their batch norms; weights of another
    dtype are used in x's. shortcut: the projection's conv and batch norm; None for the identity,
    which needs the output to have x's shape. Running statistics of training batch norms are updated
    in place. Returns z in the convs' output layout. Raises ValueError or TypeError that names the
    argument, before anything is computed."""
    op = "residual_block"
    check_activation(op, "x", x)
    if not units:
        raise ValueError(f"{op}: units is empty; at least one conv and batch norm is needed")
    shape: tuple[int, ...] = tuple(x.shape)
    shapes = []
    for i, unit in enumerate(units):
        shape = _check_unit(f"units[{i}]", x, shape, unit)
        shapes.append(shape)
    if shortcut is not None:
        short = _check_unit("shortcut", x, tuple(x.shape), shortcut)
        shapes.append(short)
        if short != shape:
            raise ValueError(f"{op}: the shortcut gives {short}, the main branch {shape}")
    elif shape != tuple(x.shape):
        raise ValueError(
            f"{op}: an identity shortcut needs the block to keep x's shape {tuple(x.shape)}, but "
            f"it gives {shape}; "
            "pass shortcut=Unit(conv, bn)"
        )
    every = [*units, shortcut] if shortcut is not None else list(units)
    weights = [u.conv.weight for u in every]
    affines = [u.bn.affine(s[1], x) for u, s in zip(every, shapes, strict=True)]
    running = [u.bn.running(s[1], x) for u, s in zip(every, shapes, strict=True)]
    gammas, betas = [a[0] for a in affines], [a[1] for a in affines]
    geometry = [g for u in every for g in u.conv.geometry()]
    training = [u.bn.training for u in every]
    eps = [u.bn.eps for u in every]
    means, variances = [r[0] for r in running], [r[1] for r in running]
    save = needs_grad(x, *weights, *gammas, *betas)
    projection = shortcut is not None
    bns = [u.bn for u in every]
    counts = [s[0] * s[2] * s[3] for s in shapes]

    def update(stats: list[Tensor]) -> None:
        update_running_stats(bns, stats, counts)

    columns = (weights, gammas, betas, means, variances)
    if not plain_eager(x, *weights):
        z, _, _, stats = torch.ops.fastres.residual_block(
            x, *columns, geometry, training, eps, projection, save
        )
        update(stats)
    elif save:
        config = (geometry, training, eps, projection, update)
        z = _EagerNode.apply(config, x, *(t for column in columns for t in column))
    else:
        with torch.no_grad():
            z, _, _, stats = _residual_block(x, *columns, geometry, training, eps, projection, save)
            update(stats)
    return z


def _check_unit(name: str, x: Tensor, in_shape: tuple[int, ...], unit: Unit) -> tuple[int, ...]:
    op = f"residual_block: {name}"
    check_conv(op, x, unit.conv)
    if unit.conv.bias is not None:
        raise ValueError(f"{op}: a conv bias before a batch norm is not supported here")
    shape = conv_out_shape(op, in_shape, unit.conv)
    check_bn(op, shape, x, unit.bn)
    return shape
