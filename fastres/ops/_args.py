"""The arguments ops share (a convolution, a batch norm) and the checks made before anything is
computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres._layout import is_nhwc
from fastres._members import tensor_of


class Conv(NamedTuple):
    """A 2-d convolution: weight (K, C / groups, R, S), optional bias (K,), zero padding."""

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @staticmethod
    def of(m: nn.Conv2d) -> Conv:
        assert not isinstance(m.padding, str)
        geometry: tuple = (m.stride, m.padding, m.dilation, m.groups)
        return Conv(tensor_of(m, "weight"), tensor_of(m, "bias"), *geometry)

    def geometry(self) -> list[int]:
        """[stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups]"""
        return [*self.stride, *self.padding, *self.dilation, self.groups]


class BatchNorm(NamedTuple):
    """A 2-d batch norm of C channels, with the meaning of torch.nn.functional.batch_norm.

    training: normalise by batch statistics and update the running ones by
    `running = (1 - momentum) * running + momentum * batch` (unbiased variance); otherwise normalise
    by the running ones (eval mode, or a frozen BN in a training model). Running statistics may both
    be None when training. batches: torch's num_batches_tracked, counted up with each update;
    momentum None: 1 / batches, a cumulative average."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    batches: Tensor | None = None

    @staticmethod
    def of(m: nn.BatchNorm2d) -> BatchNorm:
        """The batch norm a module stands for at this moment."""
        mean, var = tensor_of(m, "running_mean"), tensor_of(m, "running_var")
        batch_stats = m.training or (mean is None and var is None)
        tracked = not m.training or m.track_running_stats
        return BatchNorm(
            tensor_of(m, "weight"),
            tensor_of(m, "bias"),
            mean if tracked else None,
            var if tracked else None,
            batch_stats,
            m.momentum,
            m.eps,
            tensor_of(m, "num_batches_tracked") if m.training and m.track_running_stats else None,
        )

    def affine(self, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, beta), constants where the batch norm has none."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        gamma = self.weight
        if gamma is None:
            gamma = torch.ones(channels, dtype=dtype, device=like.device)
        beta = self.bias
        if beta is None:
            beta = torch.zeros(channels, dtype=dtype, device=like.device)
        return gamma, beta

    def running(self, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, var) to normalise by when not training; empty tensors when there are none to
        read."""
        if self.training:
            empty = torch.empty(0, device=like.device)
            return empty, empty
        assert self.running_mean is not None and self.running_var is not None
        return self.running_mean, self.running_var


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(t: Tensor) -> str:
    return "(" + ", ".join(str(s) for s in t.shape) + ")"


def check_activation(op: str, name: str, x: Tensor) -> None:
    """x is a non-empty (N, C, H, W) tensor of a floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be 4-d (N, C, H, W), got {x.dim()}-d {_shape(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype}; accepted: float32, bfloat16, float16 (float64 by "
            f"the reference)"
        )
    if x.numel() == 0:
        raise ValueError(f"{op}: {name} is empty {_shape(x)}; at least one value is needed")


def check_like(op: str, name: str, t: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """t is an activation of `shape`, and of x's dtype and device."""
    check_activation(op, name, t)
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {_shape(t)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}, but x has {x.dtype}; they must agree")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, but x is on {x.device}; move one of them")


def conv_out_shape(op: str, x_shape: tuple[int, ...], conv: Conv) -> tuple[int, int, int, int]:
    """Shape of conv(x), after checking that the geometry is possible."""
    n, c, h, w = x_shape
    weight = conv.weight
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: the conv weight must be 4-d (K, C / groups, R, S), got {_shape(weight)}"
        )
    if weight.shape[1] * conv.groups != c:
        raise ValueError(
            f"{op}: x has {c} channels, but the conv weight {_shape(weight)} with "
            f"groups={conv.groups} "
            f"takes {weight.shape[1] * conv.groups}"
        )
    k, _, r, s = weight.shape
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    oh, ow = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
    if oh < 1 or ow < 1:
        raise ValueError(
            f"{op}: input {h}x{w} is too small for a {r}x{s} conv with "
            f"stride {conv.stride}, padding {conv.padding}, dilation {conv.dilation}"
        )
    return n, k, oh, ow


def check_conv(op: str, x: Tensor, conv: Conv) -> None:
    for name, t in (("conv weight", conv.weight), ("conv bias", conv.bias)):
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{op}: the {name} is on {t.device}, but x is on {x.device}; move one of them"
            )
    if conv.weight.dtype not in FLOATS:
        raise TypeError(
            f"{op}: the conv weight has dtype {conv.weight.dtype}; a floating dtype is needed"
        )


_VECTORS = ("weight", "bias", "running_mean", "running_var")


def check_bn(op: str, shape: tuple[int, ...], x: Tensor, bn: BatchNorm, name: str = "bn") -> None:
    """The vectors of bn have `shape[1]` elements on x's device, and there is something to normalise
    by."""
    channels, device = shape[1], x.device
    for field, t in zip(_VECTORS, (bn.weight, bn.bias, bn.running_mean, bn.running_var)):  # noqa: B905
        if t is None:
            continue
        if t.shape != (channels,):
            raise ValueError(
                f"{op}: {name}.{field} must have shape ({channels},), one value a channel, got "
                f"{_shape(t)}"
            )
        if t.device != device:
            raise ValueError(
                f"{op}: {name}.{field} is on {t.device}, but x is on {x.device}; move one of them"
            )
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(
            f"{op}: {name} has only one of running_mean and running_var; give both or none"
        )
    if bn.training:
        if shape[0] * shape[2] * shape[3] == 1:
            # torch's own words (torch.nn.functional.batch_norm)
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size "
                f"{torch.Size(shape)}"
            )
    elif bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            f"{op}: {name} is not training, so running_mean and running_var are needed"
        )


def check_conv_bn(op: str, x: Tensor, conv: Conv, bn: BatchNorm) -> tuple[int, int, int, int]:
    """The shape of conv(x), after checking everything that conv and batch norm need."""
    check_activation(op, "x", x)
    check_conv(op, x, conv)
    shape = conv_out_shape(op, tuple(x.shape), conv)
    check_bn(op, shape, x, bn)
    return shape


# --- torch.ops.fastres.*, called by hand ----------------------------------------------------------
# The kernels read as many elements as shapes promise; these are the promises.


def _require(op: str, name: str, t: Tensor, x: Tensor, shape: tuple[int, ...], dtype=None) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {_shape(t)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, but x is on {x.device}; move one of them")
    if t.dtype not in FLOATS if dtype is None else t.dtype != dtype:
        accepted = dtype or "a floating dtype"
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted: {accepted}")


def check_raw(
    op: str,
    x: Tensor,
    like: Mapping[str, Tensor | None] = {},  # noqa: B006
    vectors: Mapping[str, Tensor | None] = {},  # noqa: B006
    stats: Mapping[str, Tensor | None] = {},  # noqa: B006
    masks: Mapping[str, Tensor | None] = {},  # noqa: B006
    nhwc: bool | None = None,
) -> None:
    """x is an activation; what is not None among `like` has its shape, dtype and device; `vectors`
    have a value a channel, `stats` (mean, var, rstd) of each, `masks` a bit an element of x in its
    layout (or in NHWC, or not, as `nhwc` says)."""
    check_activation(op, "x", x)
    n, c, h, w = x.shape
    for name, t in like.items():
        if t is not None:
            check_like(op, name, t, x, (n, c, h, w))
    for name, t in vectors.items():
        if t is not None:
            _require(op, name, t, x, (c,))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in stats.items():
        if t is not None:
            _require(op, name, t, x, (3, c), wide)
            _check_dense(op, name, t)
    for name, t in masks.items():
        if t is not None:
            rows_nhwc = (is_nhwc(x) if nhwc is None else nhwc) or c == 1 or h == w == 1
            outer, inner = (n * h * w, c) if rows_nhwc else (n * c, h * w)
            _require(op, name, t, x, (outer, (inner + 7) // 8), torch.uint8)
            _check_dense(op, name, t)


def _check_dense(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tuple(t.stride())}")


def raw_bn(
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> BatchNorm:
    """The batch norm of an op's arguments; the running statistics are not read in training."""
    if training:
        return BatchNorm(gamma, beta, None, None, True)
    return BatchNorm(gamma, beta, running_mean, running_var)


def raw_conv(op: str, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Conv:
    """The conv of an op's [stride, padding, dilation (h, w each), groups]."""
    if len(geometry) != 7 or min(geometry[:2]) < 1 or min(geometry[4:]) < 1 or min(geometry) < 0:
        raise ValueError(
            f"{op}: geometry is {list(geometry)}; accepted: [stride, padding, dilation (h, w "
            "each), groups]"
        )
    sh, sw, ph, pw, dh, dw, groups = geometry
    return Conv(weight, bias, (sh, sw), (ph, pw), (dh, dw), groups)
