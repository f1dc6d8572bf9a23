"""Rungs b to d of DESIGN.md section 4 and folded inference: the kernels of a fused block or stem.

What fastres/ops/_ladder.py launches for a layer's blocks as one stage, kernel for kernel, and
conv_bn_relu_maxpool.py or conv_bn.py for a stem."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import traffic
from .eager import conv_backward
from .eager import forward as eager_forward
from .kernel import BACKWARD, BOTH, DGRAD, END, FORWARD, FPROP, WGRAD, Kernel, kernel
from .trace import Node, Op, Region
from .traffic import ConvShape, Traffic


@dataclass(frozen=True)
class Links:
    """How the nodes of a model hang together: who makes a value, and who reads it."""

    makers: dict[int, Node] = field(default_factory=dict)
    readers: dict[int, list[Node]] = field(default_factory=dict)

    @staticmethod
    def of(found: list[Node]) -> Links:
        links = Links()
        for node in found:
            for value in {ref.value for ref in node.inputs if not _parameter(ref)}:
                links.readers.setdefault(value, []).append(node)
            for ref in node.outputs:
                links.makers[ref.value] = node
        return links

    def before(self, region: Region) -> Region | None:
        """The block whose output only this block of the same layer reads, so that its end can move
        into it."""
        maker = self.makers.get(region.x.value)
        if not isinstance(maker, Region) or maker.kind != "block" or region.kind != "block":
            return None
        if maker.path.rpartition(".")[0] != region.path.rpartition(".")[0]:
            return None
        return maker if len(self.readers[region.x.value]) == 1 else None

    def after(self, region: Region) -> Region | None:
        """The block that is the only reader of this block's output."""
        readers = self.readers.get(region.z.value, [])
        only = readers[0] if len(readers) == 1 else None
        return only if isinstance(only, Region) and self.before(only) is region else None


def _parameter(ref: object) -> bool:
    return bool(getattr(ref, "parameter", False))


def _conv(op: Op) -> ConvShape:
    assert op.conv is not None
    return op.conv


@dataclass(frozen=True)
class Fused:
    """Makes the kernels of regions for one rung and dtype."""

    name: str
    dtype: str
    links: Links

    def ours(self, op: Op) -> bool:
        """Whether a block's or stem's conv runs on our kernels: above b."""
        return self.name != "b"

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, region: Region, training: bool) -> list[Kernel]:
        if not training:
            return self._folded(region) if self.name == "folded" else self._frozen(region)
        return self._stem_forward(region) if region.kind == "stem" else self._block_forward(region)

    def _fprop(self, op: Op, prologue: str = "none", epilogue: str = "none") -> Kernel:
        shape = _conv(op)
        moved = traffic.fprop(shape, self.dtype, prologue, epilogue)
        sides = {t: FORWARD for t in ("shortcut", "side z", "side bits", "residual")}
        return kernel(
            "fprop", "forward", op.path, moved, FPROP, sides, prologue, epilogue, shape
        )  # fmt: skip

    def _conv_stats(self, op: Op, prologue: str = "none") -> list[Kernel]:
        """The conv and its statistics: two kernels of a vendor's conv, one of ours."""
        if self.ours(op):
            return [self._fprop(op, prologue, "stats")]
        stats = traffic.bn_stats(_conv(op).y, self.dtype)
        return [self._fprop(op), kernel("bn_stats", "forward", op.path, stats, FORWARD)]

    def _apply(self, op: Op, residual: str = "none", mask: bool = False) -> Kernel:
        moved = traffic.bn_apply(_conv(op).y, self.dtype, residual != "none", mask)
        return kernel(
            "bn_apply", "forward", op.path, moved, FORWARD, epilogue=f"{_PREFIX[residual]}relu"
        )

    def _pool(self, region: Region) -> Kernel:
        assert region.pool is not None
        y, z = _conv(region.convs[0]).y, region.pool.outputs[0].shape
        moved = traffic.bn_relu_maxpool(y, z, self.dtype)
        return kernel("bn_relu_maxpool", "forward", region.pool.path, moved, FORWARD)

    def _stem_forward(self, region: Region) -> list[Kernel]:
        (conv,) = region.convs
        end = self._apply(conv, mask=True) if region.pool is None else self._pool(region)
        return [*self._conv_stats(conv), end]

    def end_moves(self, region: Region) -> bool:
        """Rung d: the block's normalise-add-ReLU runs in the prologue of the next block's first
        conv, which writes z beside: a 1x1 of stride 1, so not in basic blocks."""
        after = self.links.after(region)
        if self.name != "d" or after is None:
            return False
        return self.ours(after.convs[0]) and _conv(after.convs[0]).pointwise

    def _block_forward(self, region: Region) -> list[Kernel]:
        before = self.links.before(region)
        prologue = "none"
        if before is not None and self.end_moves(before):
            prologue = "norm_add_relu" if before.shortcut is None else "dual_add_relu"
        found = self._conv_stats(region.convs[0], prologue)
        for last, op in zip(region.convs, region.convs[1:], strict=False):
            if not self.ours(op):
                found.append(self._apply(last))
            found += self._conv_stats(op, "norm_relu" if self.ours(op) else "none")
        if region.shortcut is not None:
            found += self._conv_stats(region.shortcut)
        if not self.end_moves(region):
            residual = "identity" if region.shortcut is None else "dual"
            found.append(self._apply(region.convs[-1], residual, mask=True))
        return found

    def _folded(self, region: Region) -> list[Kernel]:
        """One kernel a conv: affine, residual and ReLU in its epilogue."""
        if region.kind == "stem":
            found = [self._fprop(region.convs[0], epilogue="affine_relu")]
            return found + ([] if region.pool is None else eager_forward(region.pool, self.dtype))
        found = [self._fprop(op, epilogue="affine_relu") for op in region.convs[:-1]]
        if region.shortcut is not None:
            found.append(self._fprop(region.shortcut, epilogue="affine"))
        return [*found, self._fprop(region.convs[-1], epilogue="affine_add_relu")]

    def _frozen(self, region: Region) -> list[Kernel]:
        """Inference without folding: each conv, then one pass."""
        convs = [self._fprop(op) for op in region.convs]
        if region.kind == "stem":
            (conv,) = region.convs
            end = self._apply(conv) if region.pool is None else self._pool(region)
            return [*convs, end]
        short = [] if region.shortcut is None else [self._fprop(region.shortcut)]
        passes = [self._apply(op) for op in region.convs[:-1]]
        residual = "identity" if region.shortcut is None else "dual"
        pairs = [k for pair in zip(convs, passes, strict=False) for k in pair]
        return [*pairs, convs[-1], *short, self._apply(region.convs[-1], residual)]

    # --- backward ---------------------------------------------------------------------------------

    def backward(self, region: Region) -> list[Kernel]:
        if not any(ref.needs_grad for op in region.ops for ref in op.inputs):
            return []
        if region.kind == "stem":
            return self._stem_backward(region)
        return self._block_backward_b(region) if self.name == "b" else self._block_backward(region)

    def _bwd(self, op: str, at: Op, moved: Traffic, row: str, note: str = "none") -> Kernel:
        return kernel(op, "backward", at.path, moved, row, prologue=note)

    def _block_backward_b(self, region: Region) -> list[Kernel]:
        dtype, last, first = self.dtype, region.convs[-1], region.convs[0]
        dual, z = region.shortcut is not None, _conv(region.convs[-1]).y
        reduce = traffic.bn_bwd_reduce(z, dtype, mask=True, dual=dual)
        apply = traffic.bn_bwd_apply(z, dtype, mask=True, dual=dual)
        found = [
            self._bwd("bn_bwd_reduce", last, reduce, END, "mask"),
            self._bwd("bn_bwd_apply", last, apply, END, "mask"),
        ]
        for op, producer in zip(region.convs[:0:-1], region.convs[-2::-1], strict=True):
            y = _conv(producer).y
            again = traffic.bn_apply(y, dtype)
            found.append(self._bwd("bn_apply", producer, again, BACKWARD, "recompute"))
            found += conv_backward(op, dtype)
            for name, formula in (
                ("bn_bwd_reduce", traffic.bn_bwd_reduce),
                ("bn_bwd_apply", traffic.bn_bwd_apply),
            ):
                found.append(self._bwd(name, producer, formula(y, dtype), BACKWARD, "recompute"))
        found += conv_backward(first, dtype)
        x = _conv(first).x
        if region.shortcut is not None:
            found += conv_backward(region.shortcut, dtype)
        if region.x.needs_grad and dual:
            found.append(self._bwd("grad_add", first, traffic.grad_add(x, dtype), END))
        elif region.x.needs_grad:
            found.append(self._bwd("relu_bwd", last, traffic.relu_bwd(x, dtype), END, "mask"))
        return found

    def _gradients(
        self,
        op: Op,
        dy: str,
        x_prologue: str,
        epilogue: str = "none",
        dres_mask: bool = False,
        ends: bool = False,
    ) -> list[Kernel]:
        """dgrad and wgrad of our own; `ends`: what dgrad's epilogue reads and writes counts as
        block-end backward, as in ANCHORS.md."""
        shape, dtype = _conv(op), self.dtype
        dx, dw = op.inputs[0].needs_grad, op.inputs[1].needs_grad
        names = ("dres", "dres bits", "y_end", "y_short", "bits", "g_in", "dx")
        rows = {name: END for name in names} if ends else {}
        note = ",".join(p for p in (dy, x_prologue) if p != "none") or "none"
        if self.name == "d" and shape.joint(dtype) and dx and dw:
            moved = traffic.dgrad_wgrad(shape, dtype, dy, x_prologue, epilogue, dres_mask)
            name = "dgrad_wgrad"
            return [
                kernel(name, "backward", op.path, moved, BOTH, rows, note, epilogue, shape)
            ]  # fmt: skip
        found = []
        if dx:
            moved = traffic.dgrad(shape, dtype, dy, epilogue, dres_mask, ours=True)
            found.append(
                kernel("dgrad", "backward", op.path, moved, DGRAD, rows, dy, epilogue, shape)
            )
        if dw:
            moved = traffic.wgrad(shape, dtype, dy, x_prologue)
            found.append(kernel("wgrad", "backward", op.path, moved, WGRAD, {}, note, shape=shape))
        return found

    def _block_backward(self, region: Region) -> list[Kernel]:
        convs, short, last = region.convs, region.shortcut, region.convs[-1]
        after, dtype, z = self.links.after(region), self.dtype, _conv(last).y
        dual = short is not None
        # 1. the gradient comes gated and with its sums from the next block's dgrad, or as it is,
        # with bits, and the sums are a pass
        masked = after is None or not self.ours(after.convs[0])
        found = []
        if masked:
            moved = traffic.bn_bwd_reduce(z, dtype, mask=True, dual=dual)
            found.append(self._bwd("bn_bwd_reduce", last, moved, END, "mask"))
        # 2. dy of the last batch norm and of the shortcut's: in a pass, or in the convs
        ends = [op for op in (last, short) if op is not None]
        fold = {id(op): self.name in ("c2", "d") and self.ours(op) for op in ends}
        if not any(fold.values()):
            moved = traffic.bn_bwd_apply(z, dtype, mask=masked, dual=dual)
            found.append(self._bwd("bn_bwd_apply", last, moved, BACKWARD))
        else:
            moved = traffic.bn_bwd_apply(z, dtype, mask=masked)
            found += [
                self._bwd("bn_bwd_apply", op, moved, BACKWARD) for op in ends if not fold[id(op)]
            ]
        folded = "mask_dbn" if masked else "dbn"
        # 3. the shortcut, then the main branch, last conv to first
        if short is not None:
            found += self._backward_of(
                short, None, folded if fold[id(short)] else "none", ends=True
            )
        dy = folded if fold[id(last)] else "none"
        for i in range(len(convs) - 1, 0, -1):
            found += self._backward_of(convs[i], convs[i - 1], dy, "gate_sums")
            dy = "dbn"
            y = _conv(convs[i - 1]).y
            if not self.ours(convs[i]):
                moved = traffic.bn_bwd_reduce(y, dtype)
                found.append(self._bwd("bn_bwd_reduce", convs[i - 1], moved, BACKWARD))
            if self.name == "c1" or not (self.ours(convs[i]) and self.ours(convs[i - 1])):
                moved = traffic.bn_bwd_apply(y, dtype)
                found.append(self._bwd("bn_bwd_apply", convs[i - 1], moved, BACKWARD))
                dy = "none"
        # 4. the first conv's dgrad adds, and gates for the block before
        before = self.links.before(region)
        epilogue = "add"
        if before is not None:
            epilogue = "add_gate_sums" if before.shortcut is None else "dual_add_gate_sums"
        gated = masked and not dual
        return found + self._backward_of(convs[0], None, dy, epilogue, gated, ends=True)

    def _backward_of(
        self, op: Op, producer: Op | None, dy: str, epilogue: str = "none",
        dres_mask: bool = False, ends: bool = False,
    ) -> list[Kernel]:  # fmt: skip
        """Of one conv of a block; of a vendor's with the passes that ours have no need of."""
        if self.ours(op):
            inner = "none" if producer is None else "norm_relu"
            return self._gradients(op, dy, inner, epilogue, dres_mask, ends)
        found = []
        if producer is not None:
            again = traffic.bn_apply(_conv(producer).y, self.dtype)
            found.append(self._bwd("bn_apply", producer, again, BACKWARD, "recompute"))
        found += conv_backward(op, self.dtype)
        if "add" in epilogue and op.inputs[0].needs_grad:
            x = _conv(op).x
            if dres_mask:
                found.append(self._bwd("relu_bwd", op, traffic.relu_bwd(x, self.dtype), END))
            else:
                found.append(self._bwd("grad_add", op, traffic.grad_add(x, self.dtype), END))
        return found

    def _stem_backward(self, region: Region) -> list[Kernel]:
        (conv,) = region.convs
        dtype, y = self.dtype, _conv(conv).y
        if region.pool is None:
            reduce = traffic.bn_bwd_reduce(y, dtype, mask=True)
            apply = traffic.bn_bwd_apply(y, dtype, mask=True)
            at, op, note = conv, "bn_bwd", "mask"
        else:
            z = region.pool.outputs[0].shape
            reduce = traffic.bn_relu_maxpool_bwd_reduce(y, z, dtype)
            apply = traffic.bn_relu_maxpool_bwd_apply(y, z, dtype)
            at, op, note = region.pool, "bn_relu_maxpool_bwd", "none"
        found = [self._bwd(f"{op}_reduce", at, reduce, BACKWARD, note)]
        if region.pool is None and self.name in ("c2", "d") and self.ours(conv):
            return found + self._gradients(conv, "mask_dbn", "none")
        found.append(self._bwd(f"{op}_apply", at, apply, BACKWARD, note))
        return found + (
            self._gradients(conv, "none", "none") if self.ours(conv) else conv_backward(conv, dtype)
        )


_PREFIX = {"none": "", "identity": "add_", "dual": "dual_add_"}
