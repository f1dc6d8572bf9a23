"""CPU inference: convs with their batch norm folded in, prepacked for oneDNN, ReLU and the residual
add as post-ops.

    w' = w * gamma * rstd,   b' = beta + (bias - mean) * gamma * rstd;   z = relu(conv(x, w') + b' +
    s)

Traffic: each activation is written once and read once by each conv that uses it; nothing else.
Folding is done in fp32 and rounded once to the activation's dtype. Source: Jacob et al. 2018,
section 3.2 (folding).

A folded weight is cached in its module and dropped when any tensor it came from changes: the cache
key holds identity, version counter, storage address, dtype of each, and the shape the weight was
packed for. A write through `.data` bypasses torch's version counter; call
`fastres.invalidate(model)` after one.

oneDNN's ReLU post-op turns NaN into 0, unlike torch's. So this path is taken only for finite inputs
and finite folded weights: the first fused module checks its input (one sum), and marks its output
so that the next one need not."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import counters
from ._layout import is_nhwc

PACKS_KEPT = 4  # (dtype, input shape) variants of one conv, least recently used dropped first
_MARK = "_fastres_finite"


class Packed(NamedTuple):
    """A folded conv ready to run: oneDNN's own weight layout, fp32 bias.

    add_bias: the bias in the activation's dtype, which oneDNN's form with a residual asks for."""

    weight: Tensor
    bias: Tensor
    add_bias: Tensor
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int


class Cache:
    """Folded weights of one conv + batch norm. Not copied, not pickled: a copy starts empty and
    refolds."""

    def __init__(self) -> None:
        self._stamp: tuple | None = None
        self._packs: OrderedDict[tuple, Packed | None] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple:
        return (Cache, ())

    def clear(self) -> None:
        self._stamp = None
        self._packs.clear()

    def get(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> Packed | None:
        """The folded conv for inputs like x; None when the folded weights are not finite or not
        cacheable."""
        tensors = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        if any(t is not None and t.is_inference() for t in tensors):
            counters.count(
                "inference: parameters made under inference_mode cannot be watched for changes"
            )
            return None
        stamp = (
            bn.eps, conv.stride, conv.padding, conv.dilation, conv.groups,
            *((id(t), t._version, t.data_ptr(), t.dtype) for t in tensors if t is not None),
        )  # fmt: skip
        if stamp != self._stamp:
            self._packs.clear()
            self._stamp = stamp
        key = (x.dtype, tuple(x.shape))
        if key in self._packs:
            self._packs.move_to_end(key)
            return self._packs[key]
        pack = fold(conv, bn, x)
        self._packs[key] = pack
        if len(self._packs) > PACKS_KEPT:
            self._packs.popitem(last=False)
        return pack


@torch.no_grad()
def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> Packed | None:
    """Fold bn into conv and prepack for inputs of x's shape and dtype; None when the result is not
    finite."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (bn.running_var.float() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.float()
    shift = -bn.running_mean.float() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.float()
    if conv.bias is not None:
        shift = shift + conv.bias.float() * scale
    weight = conv.weight.float() * scale.view(-1, 1, 1, 1)
    if not math.isfinite((weight.sum() + shift.sum()).item()):
        return None
    geometry = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight.to(x.dtype).contiguous(memory_format=torch.channels_last), *geometry, list(x.shape)
    )
    return Packed(packed, shift, shift.to(x.dtype), *geometry)


def usable(x: Tensor) -> str | None:
    """None when the oneDNN path can run on x, otherwise the reason."""
    if x.device.type != "cpu":
        return "not a CPU tensor"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} has no oneDNN path here"
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return "torch.backends.mkldnn is off"
    if not is_nhwc(x):
        return "NCHW input"
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 convolutions"
    return None


def finite(x: Tensor) -> bool:
    """Whether x holds no NaN or Inf; one pass, none when a fused module made x from finite
    input."""
    if getattr(x, _MARK, False):
        return True
    if math.isfinite(x.sum(dtype=torch.float32).item()):
        return True
    counters.count(
        "inference: a non-finite input took the unfolded path, to propagate as torch does"
    )
    return False


def mark_finite(z: Tensor) -> Tensor:
    setattr(z, _MARK, True)
    return z


def conv(x: Tensor, p: Packed, relu: bool) -> Tensor:
    """act(conv(x, w') + b')"""
    return torch.ops.mkldnn._convolution_pointwise.default(
        x, p.weight, p.bias, p.padding, p.stride, p.dilation, p.groups,
        "relu" if relu else "none", [], "",
    )  # fmt: skip


def conv_add_relu(x: Tensor, p: Packed, residual: Tensor, inplace: bool) -> Tensor:
    """relu(conv(x, w') + b' + residual); `inplace` lets it overwrite the residual."""
    if inplace:
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, p.weight, p.add_bias, p.padding, p.stride, p.dilation, p.groups,
            "add", 1.0, "relu", [], "",
        )  # fmt: skip
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, p.weight, p.add_bias, p.padding, p.stride, p.dilation, p.groups,
        "add", 1.0, "relu", [], "",
    )  # fmt: skip
