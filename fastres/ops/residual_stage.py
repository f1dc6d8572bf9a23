"""A stage: residual blocks one after another, as one autograd node (He et al. 2015, figures 2, 5).

    h_0 = x;   y_i = conv_i(h_{i-1});   h_i = relu(bn_i(y_i)), i < K
    z = relu(bn_K(y_K) + s),   s = x, or bn_s(conv_s(x));   the next block's x is z

K = 2 is the basic block, K = 3 the bottleneck; any K >= 1 works. Saved for the
backward: x, the blocks' outputs, the raw conv outputs y_i, (mean, var, rstd) a batch norm, one bit
an element of z. The normalised h_i are recomputed in the backward, which is what brings saved bytes
of a ResNet-50 below 0.8 of eager's. `fusion` is the rung of the ladder: see
fastres/ops/_ladder.py and fastres.roofline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import backends
from fastres._layout import is_dense

from ._args import (
    BatchNorm,
    Conv,
    check_activation,
    check_bn,
    check_conv,
    check_like,
    check_raw,
    conv_out_shape,
    raw_bn,
    raw_conv,
)
from ._choice import parse
from ._fixed import fixed_norm
from ._ladder import (
    Stage,
    check_fusion,
    conv_output,
    forward,
    fuses,
    vendor_output,
    weight_like,
)
from ._ladder_bwd import backward
from ._library import define, plain_backward, plain_eager, refuse_double_backward
from ._rung_b import BlockNode, Program
from ._units import (
    GEOMETRY,
    alloc_mask,
    alloc_stats,
    alloc_vectors,
    cast,
    conv_bwd,
    conv_fwd,
    dense,
    in_dtype,
    needs_grad,
)
from .running_stats import update_running_stats


class Unit(NamedTuple):
    """One conv and its batch norm."""

    conv: Conv
    bn: BatchNorm


class Block(NamedTuple):
    """A residual block: K >= 1 units, and the projection of the shortcut (None: the identity)."""

    units: list[Unit]
    shortcut: Unit | None = None


def _residual_stage(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    main: list[int],
    projection: list[bool],
    geometry: list[int],
    training: list[bool],
    eps: list[float],
    fusion: str,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    stage = Stage(main, projection, geometry, training, eps, fusion)
    return forward(x, weights, gammas, betas, running_means, running_vars, stage, save)


def _fuses(stage: Stage, x: Tensor, weight: Tensor, i: int, which: str) -> bool:
    """Whether a pass of unit i runs on the backend's own conv, for fake tensors."""
    return parse(stage.fusion).rung.conv and fuses(backends.select(x), stage, x, weight, i, which)


def _residual_stage_fake(
    x,
    weights,
    gammas,
    betas,
    running_means,
    running_vars,
    main,
    projection,
    geometry,
    training,
    eps,
    fusion,
    save,
):
    stage = Stage(main, projection, geometry, training, eps, fusion)
    x = dense(x, "residual_block")
    ys, zs = [], []

    def conv(i, h):
        if _fuses(stage, h, weights[i], i, "fprop"):
            y = conv_output(h, cast(weights[i], h), stage.of_unit(i))
        else:
            y = conv_fwd(h, weights[i], None, stage.of_unit(i))
            y = vendor_output(y, h, parse(fusion).rung.conv)
        ys.append(y)
        return ys[-1]

    for first, count, proj in zip(stage.first_units(), main, projection, strict=True):
        h = x
        for i in range(first, first + count):
            h = conv(i, h)
        if proj:
            conv(first + count, x)
        x = torch.empty_like(h)
        zs.append(x)
    stats = [alloc_stats(y) for y in ys]
    if not save:
        return x, [], [], [], stats
    return x, zs[:-1], [alloc_mask(z, True) for z in zs], ys, stats


def _residual_stage_bwd(
    dz: Tensor,
    x: Tensor,
    zs: list[Tensor],
    masks: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    ys: list[Tensor],
    stats: list[Tensor],
    main: list[int],
    projection: list[bool],
    geometry: list[int],
    training: list[bool],
    fusion: str,
    need_dx: bool,
    need_dw: list[bool],
    consume: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    stage = Stage(main, projection, geometry, training, [], fusion)
    return backward(
        dz, x, zs, masks, weights, gammas, betas, ys, stats, stage, need_dx, need_dw, consume
    )


def _residual_stage_bwd_fake(
    dz,
    x,
    zs,
    masks,
    weights,
    gammas,
    betas,
    ys,
    stats,
    main,
    projection,
    geometry,
    training,
    fusion,
    need_dx,
    need_dw,
):
    stage = Stage(main, projection, geometry, training, [], fusion)
    none = stats[0].new_empty(0)
    inputs = [dense(x, "residual_block backward"), *zs]
    dx = none
    dws = [none] * len(weights)
    for b, first in enumerate(stage.first_units()):
        for i in range(first, first + main[b] + projection[b]):
            of_x = i == first or i == first + main[b]
            h = inputs[b] if of_x else ys[i - 1]
            need_dh = need_dx and i == 0
            our_dx = need_dh and _fuses(stage, h, weights[i], i, "dgrad")
            our_dw = need_dw[i] and _fuses(stage, h, weights[i], i, "wgrad")
            asked = need_dh and not our_dx, need_dw[i] and not our_dw
            dh, dw = conv_bwd(ys[i], h, weights[i], stage.of_unit(i), *asked)
            if our_dx:
                dh = torch.empty_like(h)
            if our_dw:
                dw = weight_like(cast(weights[i], h)).to(weights[i].dtype)
            dx = dh if dh is not None else dx
            dws[i] = none.clone() if dw is None else dw
    vectors = [alloc_vectors(y, 2) for y in ys]
    return (
        none.clone() if not need_dx else dx,
        dws,
        [v[0] for v in vectors],
        [v[1] for v in vectors],
    )


def check_stage(
    x, weights, gammas, betas, running_means, running_vars, main, projection, geometry, training,
    eps, fusion, save, op="residual_stage",
) -> list[tuple[int, ...]]:  # fmt: skip
    """The arguments of torch.ops.fastres.residual_stage fit together; the shape of each conv's
    output."""
    check_activation(op, "x", x)
    count = sum(main) + sum(projection)
    columns = {
        "weights": weights, "gammas": gammas, "betas": betas, "running_means": running_means,
        "running_vars": running_vars, "training": training, "eps": eps,
        "geometry": [geometry[i : i + GEOMETRY] for i in range(0, len(geometry), GEOMETRY)],
    }  # fmt: skip
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"{op}: {name} must have one entry a conv, {count}, got {len(column)}")
    if len(main) != len(projection) or min(main, default=0) < 1:
        raise ValueError(f"{op}: main is {main}, projection {projection}; one entry a block each")
    check_fusion(op, fusion, x)
    norms = zip(gammas, betas, running_means, running_vars, training, strict=True)
    units = [
        Unit(raw_conv(op, w, None, g), raw_bn(*norm))
        for w, g, norm in zip(weights, columns["geometry"], norms, strict=True)
    ]
    shapes: list[tuple[int, ...]] = []
    shape = tuple(x.shape)
    for count, projected in zip(main, projection, strict=True):
        block, units = units[: count + projected], units[count + projected :]
        shape = check_block(op, x, shape, block[:count], block[-1] if projected else None, shapes)
    return shapes


def check_stage_bwd(
    dz, x, zs, masks, weights, gammas, betas, ys, stats, main, projection, geometry, training,
    fusion, need_dx, need_dw,
) -> None:  # fmt: skip
    """As check_stage, of torch.ops.fastres.residual_stage_bwd."""
    op = "residual_stage_bwd"
    count = len(weights)
    # the running statistics and eps are not read again: anything of their shape will do
    shapes = check_stage(
        x, weights, gammas, betas, gammas, gammas, main, projection, geometry, training,
        [0.0] * count, fusion, True, op,
    )  # fmt: skip
    lists = {"ys": ys, "stats": stats, "need_dw": need_dw}
    for name, column in lists.items():
        if len(column) != count:
            raise ValueError(f"{op}: {name} must have one entry a conv, {count}, got {len(column)}")
    if len(masks) != len(main) or len(zs) != len(main) - 1:
        raise ValueError(
            f"{op}: {len(main)} blocks need {len(main)} masks and {len(main) - 1} zs, got "
            f"{len(masks)} and {len(zs)}"
        )
    for i, (y, st, shape) in enumerate(zip(ys, stats, shapes, strict=True)):
        check_like(op, f"ys[{i}]", y, x, shape)
        check_raw(op, y, stats={f"stats[{i}]": st})
        if not is_dense(y):
            raise ValueError(f"{op}: ys[{i}] must be dense, got strides {tuple(y.stride())}")
    first = 0
    for b, z in enumerate([*zs, dz]):
        y = ys[first + main[b] - 1]
        name = f"zs[{b}]" if b < len(zs) else "dz"
        check_raw(op, y, {name: z}, masks={f"masks[{b}]": masks[b]})
        if not is_dense(z) and z is not dz:
            raise ValueError(f"{op}: {name} must be dense, got strides {tuple(z.stride())}")
        first += main[b] + projection[b]


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weights, gammas, betas, _, _, *config, _, ctx.fusion, ctx.save = inputs
    ctx.config = config
    _, zs, masks, ys, stats = output
    ctx.units, ctx.blocks = len(weights), len(masks)
    ctx.mark_non_differentiable(*zs, *masks, *ys, *stats)
    ctx.save_for_backward(x, *zs, *masks, *weights, *gammas, *betas, *ys, *stats)


def _saved(tensors: Any, units: int, blocks: int) -> tuple:
    """(x, zs, masks, weights, gammas, betas, ys, stats) from the flat saved tensors."""
    at = 2 * blocks
    return (
        tensors[0],
        list(tensors[1:blocks]),
        list(tensors[blocks:at]),
        *_columns(tensors[at:], units),
    )


def _columns(tensors: Any, n: int) -> Any:
    """The five lists of n tensors in the flat arguments."""
    return tuple(list(tensors[i * n : (i + 1) * n]) for i in range(5))


def _backward(ctx, dz, *_):
    if not ctx.save:
        raise RuntimeError("fastres::residual_stage was called with save=False; it has no backward")
    saved = _saved(ctx.saved_tensors, ctx.units, ctx.blocks)
    gammas, betas = saved[4:6]
    n = ctx.units
    need_x, need_w = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
    dx, dws, dgammas, dbetas = torch.ops.fastres.residual_stage_bwd(
        dz, *saved, *ctx.config, ctx.fusion, need_x, need_w
    )
    return (
        dx if need_x else None,
        [dw if need else None for dw, need in zip(dws, need_w, strict=True)],
        [d.to(g.dtype) for d, g in zip(dgammas, gammas, strict=True)],
        [d.to(b.dtype) for d, b in zip(dbetas, betas, strict=True)],
        [None] * n, [None] * n, *([None] * 7),
    )  # fmt: skip


define(
    "residual_stage_bwd(Tensor dz, Tensor x, Tensor[] zs, Tensor[] masks, Tensor[] weights, "
    "Tensor[] gammas, Tensor[] betas, Tensor[] ys, Tensor[] stats, int[] main, bool[] projection, "
    "int[] geometry, bool[] training, str fusion, bool need_dx, bool[] need_dw) "
    "-> (Tensor dx, Tensor[] dweights, Tensor[] dgammas, Tensor[] dbetas)",
    _residual_stage_bwd,
    _residual_stage_bwd_fake,
    *refuse_double_backward("residual_stage"),
    check_stage_bwd,
)
define(
    "residual_stage(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] "
    "running_means, Tensor[] running_vars, int[] main, bool[] projection, int[] geometry, "
    "bool[] training, float[] eps, str fusion, bool save) "
    "-> (Tensor z, Tensor[] zs, Tensor[] masks, Tensor[] ys, Tensor[] stats)",
    _residual_stage,
    _residual_stage_fake,
    _setup,
    _backward,
    check_stage,
)


class _EagerNode(torch.autograd.Function):
    """The op's node without the dispatcher: what plain eager training runs.

    Through torch.library a block costs 0.6 ms of host time forward and 1.0 ms backward (lists of
    tensors are flattened and rebuilt in Python), this way a fraction. Same implementation, same
    backward; torch.compile, export and dispatch modes go through the registered op."""

    @staticmethod
    def forward(ctx, stage, update, x, *tensors):
        n = len(stage.training)
        weights, gammas, betas, means, variances = _columns(tensors, n)
        used: list[Tensor] = []
        z, zs, masks, ys, stats = forward(
            x, weights, gammas, betas, means, variances, stage, True, None, used
        )
        update(stats)
        ctx.stage, ctx.blocks = stage, len(masks)
        # Weights cast for autocast are kept, as autocast itself keeps them: a second cast in the
        # backward is 3% of a bf16 step where weights are as large as activations
        ctx.weight_dtypes = [w.dtype for w in weights]
        ctx.save_for_backward(x, *zs, *masks, *used, *tensors[n : 3 * n], *ys, *stats)
        return z

    @staticmethod
    def backward(ctx, dz):
        stage = ctx.stage
        n = len(stage.training)
        saved = _saved(ctx.saved_tensors, n, ctx.blocks)
        gammas, betas = saved[4:6]
        need_x, need_w = ctx.needs_input_grad[2], list(ctx.needs_input_grad[3 : 3 + n])
        config = stage.main, stage.projection, stage.geometry, stage.training, stage.fusion
        if not plain_backward(dz):
            # create_graph: the registered op records a node that refuses to be differentiated
            op: Callable = torch.ops.fastres.residual_stage_bwd
            dx, dws, dgammas, dbetas = op(dz, *saved, *config, need_x, need_w)
        else:
            # What autograd would keep until this returns, unless retain_graph: now only `saved`
            # holds it, and lets go block by block.
            ctx.maybe_clear_saved_tensors()
            run: Callable = _residual_stage_bwd
            dx, dws, dgammas, dbetas = run(dz, *saved, *config, need_x, need_w, True)
        return (
            None, None,
            dx if need_x else None,
            *[
                in_dtype(dw, dtype) if need else None
                for dw, dtype, need in zip(dws, ctx.weight_dtypes, need_w, strict=True)
            ],
            *[in_dtype(d, g.dtype) for d, g in zip(dgammas, gammas, strict=True)],
            *[in_dtype(d, b.dtype) for d, b in zip(dbetas, betas, strict=True)],
            *[None] * (2 * n),
        )  # fmt: skip


def residual_block(
    x: Tensor, units: list[Unit], shortcut: Unit | None = None, fusion: str | None = None
) -> Tensor:
    """relu(bn_K(conv_K(... relu(bn_1(conv_1(x))))) + s), s = x or bn_s(conv_s(x)): one autograd
    node.

    x: (N, C, H, W), float32, bfloat16 or float16 (float64 by the reference), channels_last or
    contiguous. units: the K >= 1 convs (without bias) with their batch norms; weights of another
    dtype are used in x's. shortcut: the projection's conv and batch norm; None for the identity,
    which needs the output to have x's shape. fusion: the rung of the ladder, "b", "c1", "c2" or "d"
    (None: "b", under use_backend("triton") "c2"), above "b" with the passes of convs that the
    vendor's kernels run, as in "c2 vendor conv2.wgrad shortcut.fprop". Running statistics of
    training batch norms are updated in place. Returns z in the convs' output layout. Raises
    ValueError or TypeError that names the argument, before anything is computed; BackendError where
    `fusion` asks for convs that the backend does not have, or for them on an x that is not
    channels_last."""
    return _run("residual_block", x, [Block(units, shortcut)], fusion)


def residual_stage(x: Tensor, blocks: list[Block], fusion: str | None = None) -> Tensor:
    """Residual blocks one after another as one autograd node, so that rungs c1, c2 and d also fuse
    across the blocks' borders.

    Arguments and errors of each block as in `residual_block`; the outputs between the blocks are
    not returned. Returns the last block's z."""
    return _run("residual_stage", x, blocks, fusion)


def check_passes(op: str, fusion: str, blocks: list[Block]) -> None:
    """The convs that a fusion names exist in some block."""
    there = {f"conv{i + 1}" for units, _ in blocks for i in range(len(units))}
    there |= {"shortcut" for _, shortcut in blocks if shortcut is not None}
    there |= {"stem"}  # of the network that the fusion was asked for
    for name in sorted(parse(fusion).named()):
        if name.partition(".")[0] not in there:
            known = ", ".join(sorted(there - {"stem"}))
            raise ValueError(f"{op}: fusion={fusion!r} names {name}; the convs are {known}")


def _run(op: str, x: Tensor, blocks: list[Block], fusion: str | None) -> Tensor:
    check_activation(op, "x", x)
    if not blocks:
        raise ValueError(f"{op}: blocks is empty; at least one is needed")
    every: list[Unit] = []
    shapes: list[tuple[int, ...]] = []
    shape: tuple[int, ...] = tuple(x.shape)
    for b, (units, shortcut) in enumerate(blocks):
        where = op if op == "residual_block" else f"{op}: blocks[{b}]"
        shape = check_block(where, x, shape, units, shortcut, shapes)
        every += units
        if shortcut is not None:
            every.append(shortcut)
    fusion = check_fusion(op, fusion, x)
    check_passes(op, fusion, blocks)
    stage = _stage(blocks, every, fusion)
    if fusion == "b" and len(blocks) == 1 and trains_eagerly(x, every):
        return run_program(Program(x, stage, shapes), x, every)
    weights = [u.conv.weight for u in every]
    affines = [u.bn.affine(s[1], x) for u, s in zip(every, shapes, strict=True)]
    running = [u.bn.running(s[1], x) for u, s in zip(every, shapes, strict=True)]
    gammas, betas = [a[0] for a in affines], [a[1] for a in affines]
    means, variances = [r[0] for r in running], [r[1] for r in running]
    save = needs_grad(x, *weights, *gammas, *betas)
    bns = [u.bn for u in every]
    counts = [s[0] * s[2] * s[3] for s in shapes]

    def update(stats: list[Tensor]) -> None:
        update_running_stats(bns, stats, counts)

    columns = (weights, gammas, betas, means, variances)
    if not plain_eager(x, *(t for column in columns for t in column)):
        z, _, _, _, stats = torch.ops.fastres.residual_stage(x, *columns, *stage, save)
        update(stats)
    elif save:
        z = _EagerNode.apply(stage, update, x, *(t for column in columns for t in column))
    else:
        with torch.no_grad():
            fixed = [None if bn.training else fixed_norm(bn, x) for bn in bns]
            z, _, _, _, stats = forward(x, *columns, stage, False, fixed)
            update(stats)
    return z


def _stage(blocks: list[Block], every: list[Unit], fusion: str) -> Stage:
    """every: the blocks' units, a projection after its main branch."""
    return Stage(
        [len(units) for units, _ in blocks],
        [shortcut is not None for _, shortcut in blocks],
        [g for u in every for g in u.conv.geometry()],
        [u.bn.training for u in every],
        [u.bn.eps for u in every],
        fusion,
    )


# --- a block's training on rung b, prepared -------------------------------------------------------


def trains_eagerly(x: Tensor, every: list[Unit]) -> bool:
    """Whether this is training on the statistics of the batch, and nothing watches the dispatcher:
    what a Program runs."""
    return (
        all([u.bn.training for u in every])
        and plain_eager(x, *[t for u in every for t in (u.conv.weight, u.bn.weight, u.bn.bias)])
        and torch.is_grad_enabled()
        and (
            x.requires_grad
            or any([needs_grad(u.conv.weight, u.bn.weight, u.bn.bias) for u in every])
        )
    )


def prepare_block(x: Tensor, units: list[Unit], shortcut: Unit | None) -> Program:
    """The program of `residual_block(x, units, shortcut, "b")`, after the same checks."""
    check_activation("residual_block", "x", x)
    shapes: list[tuple[int, ...]] = []
    check_block("residual_block", x, tuple(x.shape), units, shortcut, shapes)
    every = units if shortcut is None else [*units, shortcut]
    stage = _stage([Block(units, shortcut)], every, "b")
    return Program(x, stage, shapes)


def run_program(program: Program, x: Tensor, every: list[Unit]) -> Tensor:
    """The block on x, which trains_eagerly; every: its units, the projection last."""
    affines = [
        u.bn.affine(u.conv.weight.shape[0], x)
        if u.bn.weight is None or u.bn.bias is None
        else (u.bn.weight, u.bn.bias)
        for u in every
    ]
    return BlockNode.apply(
        program,
        [u.bn for u in every],
        torch.ops.fastres.residual_stage_bwd,
        x,
        *[u.conv.weight for u in every],
        *[gamma for gamma, _ in affines],
        *[beta for _, beta in affines],
    )


def check_block(
    op: str,
    x: Tensor,
    in_shape: tuple[int, ...],
    units: list[Unit],
    shortcut: Unit | None,
    shapes: list[tuple[int, ...]],
) -> tuple[int, ...]:
    """The block's output shape; appends that of each conv."""
    if not units:
        raise ValueError(f"{op}: units is empty; at least one conv and batch norm is needed")
    shape = check_chain(op, x, units, shapes, in_shape)
    if shortcut is not None:
        short = _check_unit(f"{op}: shortcut", x, in_shape, shortcut)
        shapes.append(short)
        if short != shape:
            raise ValueError(f"{op}: the shortcut gives {short}, the main branch {shape}")
    elif shape != in_shape:
        raise ValueError(
            f"{op}: an identity shortcut needs the block to keep x's shape {in_shape}, but "
            f"it gives {shape}; "
            "pass shortcut=Unit(conv, bn)"
        )
    return shape


def check_chain(
    op: str,
    x: Tensor,
    units: list[Unit],
    shapes: list[tuple[int, ...]],
    in_shape: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """The output shape of a block's main branch; appends that of each conv. in_shape: x's."""
    shape = tuple(x.shape) if in_shape is None else in_shape
    for i, unit in enumerate(units):
        shape = _check_unit(f"{op}: units[{i}]", x, shape, unit)
        shapes.append(shape)
    return shape


def _check_unit(op: str, x: Tensor, in_shape: tuple[int, ...], unit: Unit) -> tuple[int, ...]:
    check_conv(op, x, unit.conv)
    if unit.conv.bias is not None:
        raise ValueError(f"{op}: a conv bias before a batch norm is not supported here")
    shape = conv_out_shape(op, in_shape, unit.conv)
    check_bn(op, shape, x, unit.bn)
    return shape
