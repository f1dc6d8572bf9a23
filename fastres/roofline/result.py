"""`model`: the kernels of a whole step, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import eager, traffic
from .kernel import END, HEAD, ROWS, Kernel, kernel
from .traffic import Traffic

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from .trace import Node

TRAINING_RUNGS = ("a", "b", "c1", "c2", "d")
INFERENCE_RUNGS = ("a", "b", "folded")
BANDWIDTH = 4.3e12  # bytes/s that one H200 reaches (DESIGN.md section 4)
RATE = 790e12  # bf16 FLOP/s that one H200 reaches


@dataclass(frozen=True)
class Roofline:
    """The kernels of one training step, or one inference, of a whole batch.

    bytes, flops: of the batch. Bandwidths are bytes/s, rates FLOP/s."""

    name: str
    rung: str
    dtype: str
    shape: tuple[int, ...]
    training: bool
    kernels: tuple[Kernel, ...]

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def bytes(self) -> int:
        return sum(k.bytes for k in self.kernels)

    @property
    def flops(self) -> int:
        return sum(k.flops for k in self.kernels)

    def seconds(self, bandwidth: float = BANDWIDTH, rate: float = RATE) -> float:
        """The least time of the batch: sum over kernels of max(bytes / bandwidth, flops / rate)."""
        for name, value in (("bandwidth", bandwidth), ("rate", rate)):
            if not 0 < value < float("inf"):
                raise ValueError(f"roofline: {name} must be positive and finite, got {value}")
        return sum(k.seconds(bandwidth, rate) for k in self.kernels)

    def ceiling(self, bandwidth: float = BANDWIDTH, rate: float = RATE) -> float:
        """Images a second: batch / seconds."""
        return self.batch / self.seconds(bandwidth, rate)

    def rows(self) -> dict[str, int]:
        """Bytes by row of the breakdown in ANCHORS.md; rows in which nothing moves are 0."""
        found = dict.fromkeys(ROWS, 0)
        for k in self.kernels:
            for access in (*k.reads, *k.writes):
                found[access.row] += access.bytes
        return found

    def table(self) -> Table:
        """Every kernel: what it reads and writes, in MB an image, and its FLOPs."""
        from rich.table import Table

        drawn = Table(title=f"{self.title()}, rung {self.rung}", title_justify="left")
        for head in ("kernel", "module", "prologue", "epilogue", "reads", "writes"):
            drawn.add_column(head, no_wrap=head in ("kernel", "module"))
        for head in ("MB/img", "GFLOP/img"):
            drawn.add_column(head, justify="right", no_wrap=True)
        for k in self.kernels:
            drawn.add_row(
                k.op, k.path or "(model)", _dash(k.prologue), _dash(k.epilogue),
                ", ".join(a.tensor for a in k.reads), ", ".join(a.tensor for a in k.writes),
                f"{k.bytes / self.batch / 1e6:.3f}",
                f"{k.flops / self.batch / 1e9:.3f}" if k.flops else "-",
            )  # fmt: skip
        return drawn

    def title(self) -> str:
        """The line over a table."""
        _, _, h, w = self.shape
        what = "training step" if self.training else "inference"
        return f"{self.name}, {what}, batch {self.batch}, {h} x {w} px, {self.dtype}"

    def to_dict(self, layers: bool = True) -> dict[str, Any]:
        """As JSON; bytes and FLOPs are of the whole batch."""
        found = {
            "model": self.name,
            "rung": self.rung,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "training": self.training,
            "bytes": self.bytes,
            "flops": self.flops,
            "rows": self.rows(),
        }
        return {**found, "kernels": [k.to_dict() for k in self.kernels]} if layers else found


def _dash(text: str) -> str:
    return "-" if text == "none" else text


def check_rung(rung: str, training: bool) -> str:
    """`rung` when the mode has it. Raises ValueError that lists the accepted ones."""
    accepted = TRAINING_RUNGS if training else INFERENCE_RUNGS
    if rung not in accepted:
        mode = "training" if training else "inference"
        raise ValueError(
            f"roofline: unknown rung {rung!r} for {mode}; accepted: {', '.join(accepted)}"
        )
    return rung


def _shape_of(sample: Tensor | Sequence[int]) -> tuple[int, ...]:
    shape = tuple(getattr(sample, "shape", sample))
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if len(shape) != 4 or not whole or min(shape) < 1:
        raise ValueError(
            "roofline: sample must be a tensor or a shape (N, C, H, W) of whole numbers of at "
            f"least 1, got {shape}"
        )
    return shape


def model(
    net: nn.Module,
    sample: Tensor | Sequence[int],
    dtype: str = "bf16",
    rung: str | None = None,
    training: bool = True,
    name: str | None = None,
) -> Roofline:
    """The bytes and FLOPs of every kernel of one training step (or inference) of `net`.

        ceiling = batch / sum over kernels of max(bytes / bandwidth, flops / rate)

    Each tensor crosses memory once in each kernel that uses it: no reuse in a cache between
    kernels. Nothing is computed: the forward runs on the meta device, and what
    `fastres.convert` would fuse, by its own matchers, is replaced by the rung's kernels; all else
    counts as eager PyTorch.

    sample: a tensor or its shape (N, C, H, W). dtype: of the activations, "bf16" (default), "fp16"
    or "fp32"; below fp32 the parameters stay fp32 and are cast, as under autocast. rung: training
    "a" eager, "b" (default; what convert does), "c1", "c2", "d"; inference "a", "b" one pass after
    each conv, "folded" (default). name: in titles (default: the class). Batch norms are taken as
    net.train(training) sets them, whatever they are now; the loss is not counted.

    Raises TypeError or ValueError that names the argument; ValueError when net does not run on
    such an input. Source: DESIGN.md section 4; Williams et al. 2009 (the roofline)."""
    rungs = None if rung is None else [rung]
    default = "b" if training else "folded"
    (found,) = ladder(net, sample, dtype, training, rungs or [default], name)
    return found


def ladder(
    net: nn.Module,
    sample: Tensor | Sequence[int],
    dtype: str = "bf16",
    training: bool = True,
    rungs: Sequence[str] | None = None,
    name: str | None = None,
) -> list[Roofline]:
    """`model` for each rung (default: all of the mode), in order."""
    from torch import nn

    from .trace import nodes, trace

    if not isinstance(net, nn.Module):
        raise TypeError(f"roofline: net must be a torch.nn.Module, got {type(net).__name__}")
    traffic.itemsize(dtype)
    accepted = TRAINING_RUNGS if training else INFERENCE_RUNGS
    wanted = [check_rung(rung, training) for rung in rungs or accepted]
    shape = _shape_of(sample)
    ops = trace(net, shape, dtype, training)
    title = name or getattr(type(net), "original_class", type(net)).__name__
    plain: list[Node] = list(ops)
    fused = nodes(net, ops)
    found = []
    for rung in wanted:
        kernels = _kernels(plain if rung == "a" else fused, rung, dtype, training)
        if training:
            casts = (_casts(net, dtype, phase) for phase in ("forward", "backward"))
            kernels = [*next(casts), *kernels, *next(casts), *_optimiser(net)]
        found.append(Roofline(title, rung, dtype, shape, training, tuple(kernels)))
    return found


def _kernels(found: list[Node], rung: str, dtype: str, training: bool) -> list[Kernel]:
    """The kernels of a traced model's forward, and backward."""
    from .fused import Fused, Links
    from .trace import Region

    links = Links.of(found)
    fused = Fused(rung, dtype, links)
    kernels: list[Kernel] = []
    for node in found:
        if isinstance(node, Region):
            kernels += fused.forward(node, training)
        else:
            kernels += eager.forward(node, dtype)
    for node in reversed(found) if training else ():
        for ref in node.outputs:
            forks = len(links.readers.get(ref.value, [])) - 1
            if ref.needs_grad and forks > 0:
                t = ref.bytes
                add = Traffic({"dx": t, "dx2": t}, {"dx": t})
                kernels += [kernel("grad_add", "backward", node.path, add, END)] * forks
        kernels += fused.backward(node) if isinstance(node, Region) else eager.backward(node, dtype)
    return kernels


def _casts(net: nn.Module, dtype: str, phase: str) -> list[Kernel]:
    """fp32 weights of convs and linear layers to dtype, and their gradients back, each once."""
    from torch import nn

    layers = [m for m in net.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    own = {id(p): p.numel() for m in layers for p in m.parameters(recurse=False)}
    count, low = sum(own.values()), traffic.itemsize(dtype)
    if low == 4 or not count:
        return []
    wide, narrow = {"fp32": 4 * count}, {dtype: low * count}
    moved = Traffic(wide, narrow) if phase == "forward" else Traffic(narrow, wide)
    return [kernel("cast_weights", phase, "", moved, HEAD)]


def _optimiser(net: nn.Module) -> list[Kernel]:
    """SGD with momentum in one pass: reads weight, gradient, momentum; writes weight, momentum."""
    t = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    if not t:
        return []
    moved = Traffic({"w": t, "dw": t, "momentum": t}, {"w": t, "momentum": t})
    return [kernel("sgd", "optimiser", "", moved, HEAD)]


def comparison(
    found: Sequence[Roofline], bandwidth: float = BANDWIDTH, rate: float = RATE
) -> Table:
    """Rungs side by side: MB an image by row of ANCHORS.md, FLOPs, and the ceiling."""
    from rich.table import Table

    drawn = Table(title=found[0].title(), title_justify="left")
    drawn.add_column("MB/img", no_wrap=True)
    rows = [f.rows() for f in found]
    for f in found:
        drawn.add_column(f.rung, justify="right", no_wrap=True)
    for row in ROWS:
        values = [r[row] / f.batch / 1e6 for r, f in zip(rows, found, strict=True)]
        if any(values):
            drawn.add_row(row, *(f"{v:.1f}" if v else "-" for v in values))
    drawn.add_section()
    drawn.add_row("all", *(f"{f.bytes / f.batch / 1e6:.1f}" for f in found), style="bold")
    drawn.add_row("kernels", *(f"{len(f.kernels)}" for f in found))
    drawn.add_row("GFLOP/img", *(f"{f.flops / f.batch / 1e9:.2f}" for f in found))
    ceilings = (f"{f.ceiling(bandwidth, rate):,.0f}" for f in found)
    drawn.add_row("ceiling img/s", *ceilings, style="bold")
    return drawn


def ladder_dict(
    found: Sequence[Roofline], bandwidth: float, rate: float, layers: bool = False
) -> dict[str, Any]:
    """`comparison` as JSON."""
    return {
        "bandwidth": bandwidth,
        "rate": rate,
        "rungs": [
            {**f.to_dict(layers), "ceiling_img_per_s": f.ceiling(bandwidth, rate)} for f in found
        ],
    }
