"""Every public op as a case: random leaves, the fused call, and the same maths in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import ops
from fastres.ops import BatchNorm, Conv, Unit

Leaves = dict[str, Tensor]
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
MODES = ("train", "frozen", "nograd")


@dataclass
class Case:
    """One op on one shape. leaves: differentiable inputs; buffers: running statistics by name."""

    name: str
    leaves: Leaves
    buffers: Leaves
    fused: Callable[[Leaves, Leaves, bool], Tensor]
    plain: Callable[[Leaves, Leaves, bool], Tensor]
    updated: tuple[str, ...] = field(default=())

    def copy(
        self, dtype: torch.dtype, layout: torch.memory_format, values_of: torch.dtype | None = None
    ) -> tuple[Leaves, Leaves]:
        """Fresh leaves in dtype and layout (per-channel vectors at least fp32), and fresh buffers.

        values_of: round the values to this dtype first, so that a float64 truth sees what the
        others see."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def fit(t: Tensor) -> Tensor:
            if t.dim() == 4:
                t = t if values_of is None else t.to(values_of)
                return (
                    t.to(dtype)
                    .contiguous(memory_format=layout)
                    .clone(memory_format=torch.preserve_format)
                )
            return (t if values_of is None else t.float()).to(wide).clone()

        leaves = {k: fit(t).requires_grad_() for k, t in self.leaves.items()}
        return leaves, {k: fit(t) for k, t in self.buffers.items()}


def _vectors(name: str, c: int, g: torch.Generator) -> tuple[Leaves, Leaves]:
    leaves = {
        f"{name}.weight": 1 + 0.3 * torch.randn(c, generator=g, dtype=torch.float64),
        f"{name}.bias": 0.5 * torch.randn(c, generator=g, dtype=torch.float64),
    }
    buffers = {
        f"{name}.mean": torch.randn(c, generator=g, dtype=torch.float64),
        f"{name}.var": 0.5 + torch.rand(c, generator=g, dtype=torch.float64),
    }
    return leaves, buffers


def _bn(name: str, p: Leaves, b: Leaves, training: bool) -> BatchNorm:
    return BatchNorm(
        p[f"{name}.weight"],
        p[f"{name}.bias"],
        b[f"{name}.mean"],
        b[f"{name}.var"],
        training,
        0.1,
        1e-5,
    )


def _plain_bn(x: Tensor, name: str, p: Leaves, b: Leaves, training: bool) -> Tensor:
    return F.batch_norm(
        x,
        b[f"{name}.mean"],
        b[f"{name}.var"],
        p[f"{name}.weight"],
        p[f"{name}.bias"],
        training,
        0.1,
        1e-5,
    )


def _rung(p: Leaves) -> str | None:
    """The default; rung b by name where x is NCHW, which the backends' own convs do not take."""
    return None if p["x"].is_contiguous(memory_format=torch.channels_last) else "b"


def make(name: str, shape: tuple[int, int, int, int], seed: int = 0) -> Case:
    """The case `name` for an input of `shape`, values drawn in float64."""
    g = torch.Generator().manual_seed(seed)
    n, c, h, w = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    leaves: Leaves = {"x": randn(*shape)}
    buffers: Leaves = {}

    def add_bn(bn: str, channels: int) -> None:
        p, b = _vectors(bn, channels, g)
        leaves.update(p)
        buffers.update(b)

    if name == "add_relu":
        leaves["r"] = randn(*shape)
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.add_relu(p["x"], p["r"]),
            lambda p, b, t: F.relu(p["x"] + p["r"]),
        )  # fmt: skip
    if name == "bn_relu":
        add_bn("bn", c)
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.bn_relu(p["x"], _bn("bn", p, b, t)),
            lambda p, b, t: F.relu(_plain_bn(p["x"], "bn", p, b, t)),
        )  # fmt: skip
    if name == "bn_add_relu":
        add_bn("bn", c)
        leaves["r"] = randn(*shape)
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.bn_add_relu(p["x"], _bn("bn", p, b, t), p["r"]),
            lambda p, b, t: F.relu(_plain_bn(p["x"], "bn", p, b, t) + p["r"]),
        )  # fmt: skip
    if name == "bn_add_relu_dual":
        add_bn("bn", c)
        add_bn("rbn", c)
        leaves["r"] = randn(*shape)
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.bn_add_relu(
                p["x"], _bn("bn", p, b, t), p["r"], _bn("rbn", p, b, t)
            ),
            lambda p, b, t: F.relu(
                _plain_bn(p["x"], "bn", p, b, t) + _plain_bn(p["r"], "rbn", p, b, t)
            ),
        )  # fmt: skip
    if name == "bn_relu_maxpool":
        add_bn("bn", c)
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.bn_relu_maxpool(p["x"], _bn("bn", p, b, t)),
            lambda p, b, t: F.max_pool2d(F.relu(_plain_bn(p["x"], "bn", p, b, t)), 3, 2, 1),
        )  # fmt: skip
    if name.startswith("conv_bn"):
        return _conv_case(name, leaves, buffers, c, add_bn, randn, shape)
    return _block_case(name, leaves, buffers, c, add_bn, randn)


def _conv_case(name, leaves, buffers, c, add_bn, randn, shape) -> Case:
    n, _, h, w = shape
    k = c + 3
    leaves["w"] = randn(k, c, 3, 3) / (3 * c**0.5)
    add_bn("bn", k)

    def conv(p: Leaves) -> Conv:
        return Conv(p["w"], None, (2, 2), (1, 1))

    def plain_conv(p: Leaves) -> Tensor:
        return F.conv2d(p["x"], p["w"], None, 2, 1)

    if name == "conv_bn":
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.conv_bn(p["x"], conv(p), _bn("bn", p, b, t), _rung(p)),
            lambda p, b, t: _plain_bn(plain_conv(p), "bn", p, b, t),
        )  # fmt: skip
    if name == "conv_bn_relu":
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.conv_bn_relu(p["x"], conv(p), _bn("bn", p, b, t), _rung(p)),
            lambda p, b, t: F.relu(_plain_bn(plain_conv(p), "bn", p, b, t)),
        )  # fmt: skip
    if name == "conv_bn_relu_maxpool":
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.conv_bn_relu_maxpool(
                p["x"], conv(p), _bn("bn", p, b, t), fusion=_rung(p)
            ),
            lambda p, b, t: F.max_pool2d(F.relu(_plain_bn(plain_conv(p), "bn", p, b, t)), 3, 2, 1),
        )  # fmt: skip
    leaves["r"] = randn(n, k, (h + 1) // 2, (w + 1) // 2)
    if name == "conv_bn_add_relu":
        return Case(
            name, leaves, buffers,
            lambda p, b, t: ops.conv_bn_add_relu(
                p["x"], conv(p), _bn("bn", p, b, t), p["r"], fusion=_rung(p)
            ),
            lambda p, b, t: F.relu(_plain_bn(plain_conv(p), "bn", p, b, t) + p["r"]),
        )  # fmt: skip
    assert name == "conv_bn_add_relu_dual", name
    add_bn("rbn", k)
    return Case(
        name, leaves, buffers,
        lambda p, b, t: ops.conv_bn_add_relu(
            p["x"], conv(p), _bn("bn", p, b, t), p["r"], _bn("rbn", p, b, t), _rung(p)
        ),
        lambda p, b, t: F.relu(
            _plain_bn(plain_conv(p), "bn", p, b, t) + _plain_bn(p["r"], "rbn", p, b, t)
        ),
    )  # fmt: skip


def _block_case(name, leaves, buffers, c, add_bn, randn) -> Case:
    projection = name == "block_projection"
    assert projection or name == "block_identity", name
    stride = 2 if projection else 1
    out = 2 * c if projection else c
    mid = max(c // 2, 1)
    leaves["w1"] = randn(mid, c, 1, 1) / c**0.5
    leaves["w2"] = randn(mid, mid, 3, 3) / (3 * mid**0.5)
    leaves["w3"] = randn(out, mid, 1, 1) / mid**0.5
    for bn, channels in (("bn1", mid), ("bn2", mid), ("bn3", out)):
        add_bn(bn, channels)
    if projection:
        leaves["ws"] = randn(out, c, 1, 1) / c**0.5
        add_bn("bns", out)

    def fused(p: Leaves, b: Leaves, t: bool) -> Tensor:
        units = [
            Unit(Conv(p["w1"]), _bn("bn1", p, b, t)),
            Unit(Conv(p["w2"], None, (stride, stride), (1, 1)), _bn("bn2", p, b, t)),
            Unit(Conv(p["w3"]), _bn("bn3", p, b, t)),
        ]
        shortcut = None
        if projection:
            shortcut = Unit(Conv(p["ws"], None, (stride, stride)), _bn("bns", p, b, t))
        return ops.residual_block(p["x"], units, shortcut, _rung(p))

    def plain(p: Leaves, b: Leaves, t: bool) -> Tensor:
        h = F.relu(_plain_bn(F.conv2d(p["x"], p["w1"]), "bn1", p, b, t))
        h = F.relu(_plain_bn(F.conv2d(h, p["w2"], None, stride, 1), "bn2", p, b, t))
        h = _plain_bn(F.conv2d(h, p["w3"]), "bn3", p, b, t)
        s = p["x"]
        if projection:
            s = _plain_bn(F.conv2d(p["x"], p["ws"], None, stride), "bns", p, b, t)
        return F.relu(h + s)

    return Case(name, leaves, buffers, fused, plain)


OPS = (
    "add_relu",
    "bn_relu",
    "bn_add_relu",
    "bn_add_relu_dual",
    "bn_relu_maxpool",
    "conv_bn",
    "conv_bn_relu",
    "conv_bn_relu_maxpool",
    "conv_bn_add_relu",
    "conv_bn_add_relu_dual",
    "block_identity",
    "block_projection",
)
