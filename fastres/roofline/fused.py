"""Rungs b to d of DESIGN.md section 4 and folded inference: the kernels of a fused block or stem.

What b does is read off fastres/ops/residual_block.py and fastres/nn.py; c1, c2 and d are the plan
for convolutions of our own, with the prologues and epilogues of traffic.py."""

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
        """The block whose output only this block reads, so that its end can move into it."""
        maker = self.makers.get(region.x.value)
        if not isinstance(maker, Region) or maker.kind != "block" or region.kind != "block":
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
        """The conv and its statistics: two kernels in b, one above."""
        if self.name != "b":
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
        conv, which writes z beside. That conv must read every pixel."""
        after = self.links.after(region)
        if self.name != "d" or after is None:
            return False
        first = _conv(after.convs[0])
        return first.x_read == first.x

    def _block_forward(self, region: Region) -> list[Kernel]:
        own = self.name != "b"
        before = self.links.before(region)
        prologue = "none"
        if before is not None and self.end_moves(before):
            prologue = "norm_add_relu" if before.shortcut is None else "dual_add_relu"
        found = self._conv_stats(region.convs[0], prologue)
        for last, op in zip(region.convs, region.convs[1:], strict=False):
            if not own:
                found.append(self._apply(last))
            found += self._conv_stats(op, "norm_relu" if own else "none")
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
        self, op: Op, x_prologue: str, epilogue: str = "none", ends: bool = False
    ) -> list[Kernel]:
        """dgrad and wgrad of our own; `ends`: what dgrad's epilogue reads and writes counts as
        block-end backward, as in ANCHORS.md."""
        shape, dtype = _conv(op), self.dtype
        dy = "none" if self.name == "c1" else "dbn"
        dx, dw = op.inputs[0].needs_grad, op.inputs[1].needs_grad
        names = ("dres", "y_end", "y_short", "bits", "g_in", "dx")
        rows = {name: END for name in names} if ends else {}
        note = ",".join(p for p in (dy, x_prologue) if p != "none") or "none"
        if self.name == "d" and shape.pointwise and dx and dw:
            moved = traffic.dgrad_wgrad(shape, dtype, dy, x_prologue, epilogue)
            name = "dgrad_wgrad"
            return [
                kernel(name, "backward", op.path, moved, BOTH, rows, note, epilogue, shape)
            ]  # fmt: skip
        found = []
        if dx:
            moved = traffic.dgrad(shape, dtype, dy, epilogue)
            found.append(
                kernel("dgrad", "backward", op.path, moved, DGRAD, rows, dy, epilogue, shape)
            )
        if dw:
            moved = traffic.wgrad(shape, dtype, dy, x_prologue)
            found.append(kernel("wgrad", "backward", op.path, moved, WGRAD, {}, note, shape=shape))
        return found

    def _block_backward(self, region: Region) -> list[Kernel]:
        dtype, last, first = self.dtype, region.convs[-1], region.convs[0]
        dual, z = region.shortcut is not None, _conv(region.convs[-1]).y
        c1 = self.name == "c1"
        found = []
        # 1. the gated gradient and the sums: from the next block's dgrad, or in a pass
        if self.links.after(region) is None:
            moved = traffic.bn_bwd_reduce(z, dtype, mask=True, dual=dual, write_g=True)
            found.append(self._bwd("bn_bwd_reduce", last, moved, END, "mask"))
        if c1:
            moved = traffic.bn_bwd_apply(z, dtype, dual=dual)
            found.append(self._bwd("bn_bwd_apply", last, moved, BACKWARD))
        # 2. main branch, last conv to second
        for op, producer in zip(region.convs[:0:-1], region.convs[-2::-1], strict=True):
            found += self._gradients(op, "norm_relu", "gate_sums")
            if c1:
                moved = traffic.bn_bwd_apply(_conv(producer).y, dtype)
                found.append(self._bwd("bn_bwd_apply", producer, moved, BACKWARD))
        # 3. shortcut, then the first conv, whose dgrad adds and gates for the block before
        if region.shortcut is not None:
            found += self._gradients(region.shortcut, "none", ends=True)
        before = self.links.before(region)
        epilogue = "add"
        if before is not None:
            epilogue = "add_gate_sums" if before.shortcut is None else "dual_add_gate_sums"
        return found + self._gradients(first, "none", epilogue, ends=True)

    def _stem_backward(self, region: Region) -> list[Kernel]:
        (conv,) = region.convs
        dtype, y = self.dtype, _conv(conv).y
        later = self.name in ("c2", "d")  # the apply runs in the convolution's prologues
        if region.pool is None:
            reduce = traffic.bn_bwd_reduce(y, dtype, mask=True, write_g=later)
            found = [self._bwd("bn_bwd_reduce", conv, reduce, BACKWARD, "mask")]
            apply = traffic.bn_bwd_apply(y, dtype, mask=True)
            if not later:
                found.append(self._bwd("bn_bwd_apply", conv, apply, BACKWARD, "mask"))
        else:
            z = region.pool.outputs[0].shape
            reduce = traffic.bn_relu_maxpool_bwd_reduce(y, z, dtype, write_g=later)
            found = [self._bwd("bn_relu_maxpool_bwd_reduce", region.pool, reduce, BACKWARD)]
            apply = traffic.bn_relu_maxpool_bwd_apply(y, z, dtype)
            if not later:
                found.append(self._bwd("bn_relu_maxpool_bwd_apply", region.pool, apply, BACKWARD))
        return found + (self._gradients(conv, "none") if later else conv_backward(conv, dtype))


_PREFIX = {"none": "", "identity": "add_", "dual": "dual_add_"}
