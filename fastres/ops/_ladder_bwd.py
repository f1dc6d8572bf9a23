"""The backward of a stage of residual blocks, on each rung of the fusion ladder (see _ladder)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres import backends
from fastres._contract import Gradient, NormGradient, Previous, Sums
from fastres._contract import Shortcut as ShortcutArgument
from fastres._layout import is_nhwc

from ._choice import parse
from ._ladder import (
    Pending,
    Stage,
    as_normalise,
    convs_of,
    fuses,
    kernel_weight,
    weight_like,
)
from ._units import (
    Norm,
    Shortcut,
    alloc_vectors,
    cast,
    conv_bwd,
    dense,
    in_format,
    normalise,
    vector,
)


class Incoming(NamedTuple):
    """The gradient of relu(normalise(y) + shortcut): gate(dz), gate as in docs/kernels.md, with the
    batch norm's sums where they are known."""

    dz: Tensor
    gate: str
    mask: Tensor | None = None
    sums: Sums | None = None


class Backward:
    """One backward pass; dws, dgammas and dbetas fill up as it goes."""

    def __init__(self, like, weights, gammas, betas, ys, stats, stage, need_dw, as_summed):
        self.backend = backends.select(like)
        self.rung = parse(stage.fusion).rung
        self.weights, self.ys, self.stage, self.need_dw = weights, ys, stage, need_dw
        self.as_summed = as_summed
        self.norms = [
            Norm(st, vector(g, like), vector(b, like))
            for st, g, b in zip(stats, gammas, betas, strict=True)
        ]
        empty = stats[0].new_empty(0)
        self.dws, self.dgammas, self.dbetas = ([empty] * len(weights) for _ in range(3))

    def fused(self, x: Tensor, i: int, which: str) -> bool:
        """Whether a pass of unit i, "dgrad" or "wgrad", runs on the backend's own kernel."""
        return fuses(self.backend, self.stage, x, self.weights[i], i, which)

    def sums(self, i: int, incoming: Incoming, shortcut: Shortcut | None) -> Sums:
        """The sums of unit i's batch norm (and the shortcut's), by their own pass if need be."""
        if incoming.sums is not None:
            return incoming.sums
        y, norm = self.ys[i], self.norms[i]
        dual = shortcut is not None and shortcut.norm is not None
        sums = Sums(*alloc_vectors(y, 3 if dual else 2))
        res = res_norm = None
        if dual:
            res, res_norm = shortcut  # type: ignore[misc]
        res_vectors = (None, None) if res_norm is None else (res_norm.mean, res_norm.rstd)
        self.backend.bn_bwd_reduce(
            sums.dgamma, sums.dbeta, sums.res_dgamma, incoming.dz, incoming.mask, y,
            norm.mean, norm.rstd, norm.gamma, norm.beta, res, *res_vectors, incoming.gate,
        )  # fmt: skip
        return sums

    def apply(
        self, i: int, incoming: Incoming, dgamma: Tensor, dbeta: Tensor, out: Tensor | None
    ) -> Tensor:
        """dy of unit i's conv output, by its own pass."""
        y, norm = self.ys[i], self.norms[i]
        dy = torch.empty_like(y) if out is None else out
        self.backend.bn_bwd_apply(
            dy, None, incoming.dz, incoming.mask, y, norm.mean, norm.rstd, norm.gamma, norm.beta,
            dgamma, dbeta, None, None, None, None, None, incoming.gate, self.stage.training[i],
            False,
        )  # fmt: skip
        return dy

    def apply_dual(self, i: int, j: int, incoming: Incoming, sums: Sums) -> tuple[Tensor, Tensor]:
        """dy of unit i and of the projection's unit j, in one pass."""
        y, norm, y_s, norm_s = self.ys[i], self.norms[i], self.ys[j], self.norms[j]
        y_s = in_format(y_s, is_nhwc(y), "residual_block backward shortcut")
        dy, dy_s = torch.empty_like(y), torch.empty_like(y)
        self.backend.bn_bwd_apply(
            dy, dy_s, incoming.dz, incoming.mask, y, norm.mean, norm.rstd, norm.gamma, norm.beta,
            sums.dgamma, sums.dbeta, y_s, norm_s.mean, norm_s.rstd, norm_s.gamma, sums.res_dgamma,
            incoming.gate, self.stage.training[i], self.stage.training[j],
        )  # fmt: skip
        return dy, dy_s

    def folds(self, i: int, incoming: Incoming, x: Tensor) -> bool:
        """Whether unit i's conv forms dy itself, in both passes."""
        if not self.rung.fold or incoming.gate == "recompute":
            return False
        return self.fused(x, i, "dgrad") and self.fused(x, i, "wgrad")

    def conv(
        self,
        i: int,
        g: Gradient,
        bn: NormGradient | None,
        source: Tensor | Pending,
        dres: Gradient | None = None,
        prev: Previous | None = None,
        need_dx: bool = True,
    ) -> Incoming | None:
        """Backward of conv i: dw, and the gradient of its input, + dres, gated by what produced the
        input (prev), with the sums of the batch norm there. bn: g is the gradient of the batch norm
        behind the conv, not dy. source: the conv's input."""
        geometry = self.stage.of_unit(i)
        need_dw = self.need_dw[i]
        raw = source.y if isinstance(source, Pending) else source
        our_dx, our_dw = self.fused(raw, i, "dgrad"), self.fused(raw, i, "wgrad")
        result: Incoming | None = None
        # 1. what the vendor's conv computes
        if (need_dx and not our_dx) or (need_dw and not our_dw):
            assert bn is None
            h = raw
            if isinstance(source, Pending) and need_dw and not our_dw:
                h, _ = normalise(source.y, source.norm, relu=True)
            asked = need_dx and not our_dx, need_dw and not our_dw
            batch = self.stage.training[i]
            dx, vendor_dw = conv_bwd(
                g.dz, h, self.weights[i], geometry, *asked, batch, self.as_summed
            )
            if vendor_dw is not None:
                self.dws[i] = vendor_dw
            if dx is not None:
                result = self.by_passes(dx, raw, dres, prev)
        # 2. what our kernels compute
        need_dx, need_dw = need_dx and our_dx, need_dw and our_dw
        if not (need_dx or need_dw):
            return result
        weight = kernel_weight(self.weights[i], raw)
        norm = as_normalise(source.norm) if isinstance(source, Pending) else None
        dw = weight_like(cast(self.weights[i], raw)) if need_dw else None
        sums = None
        if need_dx:
            dx = torch.empty_like(raw)
            if prev is not None:
                dual = prev.shortcut is not None and prev.shortcut.norm is not None
                sums = Sums(*alloc_vectors(raw, 3 if dual else 2))
            result = Incoming(dx, "none", None, sums)
        dgrad, wgrad = (convs_of(self.backend, self.stage, i, p) for p in ("dgrad", "wgrad"))
        if (
            self.rung.joint
            and need_dx
            and need_dw
            and dgrad is wgrad is self.backend
            and self.backend.conv_bwd_pointwise_why_not(
                raw, weight, geometry, bn is not None and not bn.training
            )
            is None
        ):
            self.backend.conv_bwd_pointwise(
                dx, sums, dw, g, raw, weight, geometry, bn, norm, dres, prev
            )
        else:
            if need_dx:
                dgrad.conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev)
            if need_dw:
                wgrad.conv_wgrad(dw, g, raw, geometry, bn, norm)
        if dw is not None:
            self.dws[i] = dw.to(self.weights[i].dtype)
        return result

    def by_passes(
        self, dx: Tensor, raw: Tensor, dres: Gradient | None, prev: Previous | None
    ) -> Incoming:
        """What the epilogue of a fused dgrad does, after a vendor's."""
        if self.rung.conv:
            dx = in_format(dx, is_nhwc(raw), "residual_block backward")
        if dres is not None:
            dx = in_format(dx, is_nhwc(dres.dz), "residual_block backward shortcut")
            if dres.mask is None:
                dx = dx.add_(dres.dz)
            else:
                self.backend.relu_bwd(dx, dx, dres.dz, dres.mask)
        if prev is None:
            return Incoming(dx, "none")
        dx = in_format(dx, is_nhwc(raw), "residual_block backward")
        return Incoming(dx, "recompute" if prev.mask is None else "mask", prev.mask)

    def gradient(
        self, i: int, incoming: Incoming, dgamma: Tensor, dbeta: Tensor, raw: Tensor, inplace: bool
    ) -> tuple[Gradient, NormGradient | None]:
        """dy of unit i as its conv takes it: to be formed there, or formed here."""
        if self.folds(i, incoming, raw):
            bn = NormGradient(
                self.ys[i], as_normalise(self.norms[i]), dgamma, dbeta, self.stage.training[i]
            )
            return Gradient(incoming.dz, incoming.mask), bn
        out = incoming.dz if inplace else None
        return Gradient(self.apply(i, incoming, dgamma, dbeta, out)), None

    def block(
        self,
        first: int,
        main: int,
        projection: bool,
        incoming: Incoming,
        x: Tensor,
        before: Previous | None,
        need_dx: bool,
    ) -> Incoming | None:
        """Backward of a block on its input x; before: what produced x, where the gate and the sums
        of that are wanted."""
        last, proj = first + main - 1, first + main
        y = self.ys[last]
        # 1. the last batch norm, and the shortcut's
        shortcut = None
        if projection:
            y_s = in_format(self.ys[proj], is_nhwc(y), "residual_block backward shortcut")
            shortcut = Shortcut(y_s, self.norms[proj])
        sums = self.sums(last, incoming, shortcut)
        self.dgammas[last], self.dbetas[last] = sums.dgamma, sums.dbeta
        raw = self.ys[last - 1] if main > 1 else x
        g_s: Gradient | None = None
        bn_s = None
        if projection:
            assert sums.res_dgamma is not None
            self.dgammas[proj], self.dbetas[proj] = sums.res_dgamma, sums.dbeta.clone()
            if self.folds(last, incoming, raw) or self.folds(proj, incoming, x):
                g, bn = self.gradient(last, incoming, sums.dgamma, sums.dbeta, raw, False)
                g_s, bn_s = self.gradient(proj, incoming, sums.res_dgamma, sums.dbeta, x, False)
            else:
                dy, dy_s = self.apply_dual(last, proj, incoming, sums)
                g, bn, g_s = Gradient(dy), None, Gradient(dy_s)
        else:
            g, bn = self.gradient(last, incoming, sums.dgamma, sums.dbeta, raw, False)
        # 2. the shortcut's gradient of x
        dres = None
        if g_s is None:
            dres = Gradient(incoming.dz, incoming.mask)
        else:
            dx_s = self.conv(proj, g_s, bn_s, x, need_dx=need_dx)
            dres = None if dx_s is None else Gradient(dx_s.dz)
        # 3. main branch, last conv to first
        gradient: Incoming | None = None
        for i in range(last, first - 1, -1):
            inner = i > first
            source: Tensor | Pending = x
            prev = before
            if inner:
                source = Pending(self.ys[i - 1], self.norms[i - 1])
                prev = Previous(self.ys[i - 1], as_normalise(self.norms[i - 1]))
            if i < last:
                assert gradient is not None
                s = self.sums(i, gradient, None)
                self.dgammas[i], self.dbetas[i] = s.dgamma, s.dbeta
                raw = source.y if isinstance(source, Pending) else source
                g, bn = self.gradient(i, gradient, s.dgamma, s.dbeta, raw, True)
            gradient = self.conv(i, g, bn, source, None if inner else dres, prev, inner or need_dx)
        return gradient


def _producer(run: Backward, b: int, x: Tensor, zs, masks) -> Previous:
    """What produced the input of block b > 0: the block before."""
    first, main = run.stage.first_units()[b - 1], run.stage.main[b - 1]
    last, proj = first + main - 1, first + main
    y = run.ys[last]
    res = ShortcutArgument(zs[b - 2] if b > 1 else x)
    if run.stage.projection[b - 1]:
        y_s = in_format(run.ys[proj], is_nhwc(y), "residual_block backward shortcut")
        res = ShortcutArgument(y_s, as_normalise(run.norms[proj]))
    return Previous(y, as_normalise(run.norms[last]), masks[b - 1], res)


def backward(
    dz, x, zs, masks, weights, gammas, betas, ys, stats, stage: Stage, need_dx: bool, need_dw,
    consume: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """(dx, dweights, dgammas, dbetas); an empty tensor where a gradient is not needed. consume:
    drop zs, masks and ys from their lists block by block, as soon as they were used, and leave
    dweights as they were summed (`backward_of`)."""
    x = dense(x, "residual_block backward")
    run = Backward(x, weights, gammas, betas, ys, stats, stage, need_dw, consume)
    firsts = stage.first_units()
    last = firsts[-1] + stage.main[-1] - 1
    dz = in_format(dz, is_nhwc(ys[last]), "residual_block backward")
    incoming: Incoming | None = Incoming(dz, "mask", masks[-1])
    del dz
    for b in range(len(firsts) - 1, -1, -1):
        source, before = x, None
        if b > 0:
            source, before = zs[b - 1], _producer(run, b, x, zs, masks)
        assert incoming is not None
        incoming = run.block(
            firsts[b], stage.main[b], stage.projection[b], incoming, source, before,
            need_dx or b > 0,
        )  # fmt: skip
        if consume:
            source = before = None
            del ys[firsts[b] :], masks[b:], zs[max(b - 1, 0) :]
    dx = stats[0].new_empty(0) if incoming is None else incoming.dz
    return dx, run.dws, run.dgammas, run.dbetas
