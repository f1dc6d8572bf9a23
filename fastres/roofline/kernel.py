"""One kernel of a model: what traffic.py's formulas say, where it belongs, and in which row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .traffic import ConvShape, Traffic

# The rows of the breakdown in ANCHORS.md, in its order.
FPROP = "conv fprop"
FORWARD = "BN, ReLU, add, pool forward"
END = "block-end and shortcut backward"
BACKWARD = "other BN, ReLU, pool backward"
DGRAD = "dgrad"
WGRAD = "wgrad"
BOTH = "dgrad + wgrad, 1x1 stride 1"
HEAD = "optimiser, head, weight casts"
ROWS = (FPROP, FORWARD, END, BACKWARD, DGRAD, WGRAD, BOTH, HEAD)


@dataclass(frozen=True)
class Access:
    """One tensor crossing memory in one kernel; `row` is where the breakdown counts it."""

    tensor: str
    bytes: int
    row: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of one step of a whole batch: bytes in and out by tensor, FLOPs.

    op: the formula of fastres.roofline it comes from (fprop, dgrad, wgrad, dgrad_wgrad, bn_stats,
    ...), or the aten operator of what runs unfused; phase: "forward", "backward" or "optimiser";
    path: of the module in the model; shape: of convolutions."""

    op: str
    phase: str
    path: str
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: int = 0
    prologue: str = "none"
    epilogue: str = "none"
    shape: ConvShape | None = None

    @property
    def read_bytes(self) -> int:
        return sum(a.bytes for a in self.reads)

    @property
    def write_bytes(self) -> int:
        return sum(a.bytes for a in self.writes)

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes

    def seconds(self, bandwidth: float, rate: float) -> float:
        """max(bytes / bandwidth, flops / rate); in bytes/s and FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / rate)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON; a convolution's N, C, H, W, K, R, S, stride, ... beside the rest."""
        shape = self.shape
        conv = {} if shape is None else {f: getattr(shape, f) for f in shape.__dataclass_fields__}
        return {
            "op": self.op,
            "phase": self.phase,
            "path": self.path,
            "prologue": self.prologue,
            "epilogue": self.epilogue,
            "reads": {a.tensor: a.bytes for a in self.reads},
            "writes": {a.tensor: a.bytes for a in self.writes},
            "bytes": self.bytes,
            "flops": self.flops,
            **conv,
        }


def kernel(
    op: str,
    phase: str,
    path: str,
    traffic: Traffic,
    row: str,
    rows: dict[str, str] | None = None,
    prologue: str = "none",
    epilogue: str = "none",
    shape: ConvShape | None = None,
) -> Kernel:
    """A Kernel from its formula; `rows` names the tensors that another row than `row` counts."""
    rows = rows or {}

    def accesses(tensors: dict[str, int]) -> tuple[Access, ...]:
        return tuple(Access(name, n, rows.get(name, row)) for name, n in tensors.items())

    return Kernel(
        op, phase, path, accesses(traffic.reads), accesses(traffic.writes), traffic.flops,
        prologue, epilogue, shape,
    )  # fmt: skip
