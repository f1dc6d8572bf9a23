"""CPU inference: convs with their batch norm folded in, prepacked for oneDNN, or for Winograd's
algorithm where that is faster; bias, ReLU and the residual add in the same pass.

    w' = w * gamma * rstd,   b' = beta - mean * gamma * rstd;   z = relu(conv(x, w') + b' + s)

Traffic: each activation is written once and read once by each conv that uses it; nothing else.
Folding is done in fp32 and rounded once to the activation's dtype. Source: Jacob et al. 2018,
section 3.2 (folding).

A module's folded weights are cached and dropped when any tensor they came from changes: another
object, version counter, storage, shape or strides, or another setting of the layer. The cache holds
those tensors, so that no freed one's identity or address can come back. A write through `.data`
bypasses torch's version counter; call `fastres.invalidate(model)` after one.

oneDNN's ReLU post-op turns NaN into 0, unlike torch's. A NaN arises only from values that are not
finite, so this path is taken where none can arise: `Bound` says how large an input a module takes
before anything inside may leave the floating-point range, and how large its output then is. The
bound is carried from module to module; where it is unknown, or has grown too large, the tensor
itself is measured."""

from __future__ import annotations

import functools
import math
import struct
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _native, _winograd, counters
from ._arguments import DTYPE
from ._layout import is_nhwc
from ._members import Uncopied, tensor_of

# (dtype, input shape) variants of one module that are packed. oneDNN chooses its weight layout by
# the input's shape, and running on another one's costs up to 100x; a server that batches 1 to 8
# needs 8. What comes beyond runs on folded weights in torch's layout, which oneDNN reorders in
# every call, as it does in eager mode; what keeps coming takes the least recently used one's place.
PACKS_KEPT = 8
CALLS_TO_REPLACE = 4
# Of 3.4e38, the largest fp32 and bf16: the rest is for Winograd's intermediate values and rounding.
LIMIT = 1e37 / _winograd.GROWTH
_MARK = "_fastres_bound"
NCHW = "the input is not channels_last"

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
Shape = tuple[int, ...]


class Packed(NamedTuple):
    """A folded conv ready to run: the weight in oneDNN's own layout, torch's or, where `channels`
    of the output are given, as `_winograd.pack` makes it; fp32 bias.

    add_bias: the bias in the activation's dtype, which oneDNN's form with a residual asks for."""

    weight: Tensor
    bias: Tensor
    add_bias: Tensor
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int
    channels: int | None = None


class Bound(NamedTuple):
    """|z| <= gain * |x| + shift, and nothing on the way beyond LIMIT, for |x| <= safe.

    safe is -1 where no input is safe, as with weights that are not finite."""

    gain: float
    shift: float
    safe: float


class Folded(NamedTuple):
    """A module's convs for one input dtype and shape, in the order of its pairs."""

    packs: list[Packed]
    bound: Bound


@functools.cache
def _watch_fused_optimisers() -> None:
    """torch's optimisers with fused=True write on the CPU without moving version counters."""

    def stepped(optimiser: Any, *_: Any) -> None:
        for group in optimiser.param_groups:
            if group.get("fused"):
                for p in group["params"]:
                    if p.is_cpu and p.grad is not None and not p.is_inference():
                        torch.autograd.graph.increment_version(p)

    register_optimizer_step_post_hook(stepped)


class _Source(NamedTuple):
    """A tensor as it was when it was folded. `alias` keeps its storage from being reused."""

    tensor: Tensor | None
    alias: Tensor | None
    version: int

    @staticmethod
    def of(t: Tensor | None) -> _Source:
        _watch_fused_optimisers()
        return _Source(t, None, 0) if t is None else _Source(t, t.detach(), t._version)

    def holds(self, t: Tensor | None) -> bool:
        if t is None or self.alias is None:
            return t is self.tensor
        same = t is self.tensor and not t.is_inference() and t._version == self.version
        return same and t.is_cpu and t.is_set_to(self.alias)  # storage, shape, strides


class Cache(Uncopied):
    """Folded weights of one module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def __len__(self) -> int:
        """How many variants are held."""
        return len(self._variants)

    def clear(self) -> None:
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._sources: list[_Source] = []
        self._settings: list[Any] = []
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._winograd: dict[tuple[int, torch.dtype], Tensor] = {}  # serves every shape
        self._bound: Bound | None = None
        self._variants: OrderedDict[tuple, Folded] = OrderedDict()
        self._waiting: Counter[tuple] = Counter()

    def get(
        self, pairs: Sequence[Pair], x: Tensor, in_shapes: Callable[[], list[Shape]], add: str
    ) -> Folded | None:
        """The folded convs for inputs like x; None when they cannot be watched for changes.

        in_shapes() gives the input shape of each conv, or raises; it is asked once a variant. add:
        see `bound`."""
        with self._lock:
            tensors, settings = sources_of(pairs)
            if settings != self._settings or not all(
                s.holds(t) for s, t in zip(self._sources, tensors, strict=True)
            ):
                self._forget()
                if any(t is not None and t.is_inference() for t in tensors):
                    counters.count(
                        "inference: parameters made under inference_mode cannot be watched for "
                        "changes"
                    )
                    return None
                self._sources, self._settings = [_Source.of(t) for t in tensors], settings
            key = (x.dtype, x.shape)
            folded = self._variants.get(key)
            if folded is None:
                return self._add(key, pairs, in_shapes(), add)
            self._variants.move_to_end(key)
            return folded

    def held(self, dtype: torch.dtype, shape: Sequence[int]) -> Folded | None:
        """What the last call of inputs like these ran on, if it is packed."""
        with self._lock:
            return self._variants.get((dtype, shape))

    def _add(self, key: tuple, pairs: Sequence[Pair], shapes: list[Shape], add: str) -> Folded:
        """Fold for a variant that is not held; hold it if there is room, or if it keeps coming."""
        if len(self._variants) >= PACKS_KEPT:
            if len(self._waiting) > 8 * PACKS_KEPT:
                self._waiting.clear()
            self._waiting[key] += 1
            if self._waiting[key] < CALLS_TO_REPLACE:
                counters.count(
                    f"inference: more than {PACKS_KEPT} input shapes, the weights of another were "
                    "not packed"
                )
                return self._fold(pairs, key[0], None, add)
            del self._waiting[key]
            self._variants.popitem(last=False)
        folded = self._variants[key] = self._fold(pairs, key[0], shapes, add)
        return folded

    @torch.no_grad()
    def _fold(
        self, pairs: Sequence[Pair], dtype: torch.dtype, shapes: list[Shape] | None, add: str
    ) -> Folded:
        """shapes: what to pack for; None: not packed."""
        weights = self._weights or [fold(*pair) for pair in pairs]
        if self._bound is None:
            self._bound = bound(pairs, weights, add)
        else:  # a second variant: more may come, and fold no more
            self._weights = weights
        packs = []
        for i, ((c, _), (weight, shift)) in enumerate(zip(pairs, weights, strict=True)):
            geometry = ([*c.padding], [*c.stride], [*c.dilation], c.groups)
            if shapes is not None and _winograd_runs(c, shapes[i], dtype):
                u = self._winograd.get((i, dtype))
                if u is None:
                    u = self._winograd[i, dtype] = _winograd.pack(weight, dtype)
                packs.append(Packed(u, shift, shift, *geometry, len(weight)))
                continue
            weight = weight.to(dtype)
            if shapes is not None:
                weight = torch.ops.mkldnn._reorder_convolution_weight(
                    weight, *geometry, list(shapes[i])
                )
            packs.append(Packed(weight, shift, shift.to(dtype), *geometry))
        return Folded(packs, self._bound)


class Linear(NamedTuple):
    """A linear layer, its weight in oneDNN's own layout: autocast casts it in every call."""

    weight: Tensor
    bias: Tensor | None
    features: int

    def takes(self, x: Tensor) -> bool:
        return x.dim() == 2 and x.shape[1] == self.features and x.dtype == self.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        call = torch.ops.mkldnn._linear_pointwise.default
        return call(x.contiguous(), self.weight, self.bias, "none", [], "")


class LinearCache(Uncopied):
    """A packed linear layer by dtype, while its tensors are what they were."""

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        self._packed: dict[torch.dtype, Linear] = {}

    def clear(self) -> None:
        self._packed = {}

    def get(self, fc: nn.Linear, dtype: torch.dtype, autocast: bool) -> Linear | None:
        """fc on activations of a dtype, to which autocast casts fp32 ones; None where torch must
        run it."""
        tensors = fc.weight, fc.bias
        if fc.weight.dim() != 2 or fc.weight.numel() == 0:
            return None
        if fc.bias is not None and fc.bias.shape != fc.weight.shape[:1]:
            return None
        for t in tensors:
            if t is None:
                continue
            if not t.is_cpu or t.is_inference():
                return None
            if t.dtype != dtype and not (autocast and t.dtype == torch.float32):
                return None
        same = all(s.holds(t) for s, t in zip(self._sources, tensors, strict=False))
        if not self._sources or not same:
            self._sources, self._packed = [_Source.of(t) for t in tensors], {}
        packed = self._packed.get(dtype)
        if packed is None:
            with torch.no_grad():
                weight = torch.ops.mkldnn._reorder_linear_weight(fc.weight.to(dtype))
                bias = None if fc.bias is None else fc.bias.detach().to(dtype)
            packed = self._packed[dtype] = Linear(weight, bias, fc.weight.shape[1])
        return packed


def _winograd_runs(c: nn.Conv2d, shape: Shape, dtype: torch.dtype) -> bool:
    geometry = [*c.stride, *c.padding, *c.dilation, c.groups]
    k, _, *taps = c.weight.shape  # pruning tools leave out_channels as it was
    why = _winograd.why_not("inference", shape, dtype, k, geometry, taps)
    return why is None


def sources_of(pairs: Sequence[Pair]) -> tuple[list[Tensor | None], list[Any]]:
    """The tensors that folding reads, and the settings."""
    tensors: list[Tensor | None] = []
    settings: list[Any] = []
    for c, bn in pairs:
        tensors += (
            tensor_of(c, "weight"), tensor_of(bn, "weight"), tensor_of(bn, "bias"),
            tensor_of(bn, "running_mean"), tensor_of(bn, "running_var"),
        )  # fmt: skip
        settings += (c.stride, c.padding, c.dilation, c.groups, bn.eps)
    return tensors, settings


def fold(c: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(w', b') in fp32, w' in channels_last."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (bn.running_var.float() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.float()
    shift = -bn.running_mean.float() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.float()
    weight = c.weight.float() * scale.view(-1, 1, 1, 1)
    return weight.contiguous(memory_format=torch.channels_last), shift


def bound(pairs: Sequence[Pair], weights: list[tuple[Tensor, Tensor]], add: str) -> Bound:
    """The bound of a chain of convs, folded or as eager runs them (conv, then batch norm).

    |conv(h)| <= |h| * max over channels of sum |w|. add: what is added at the chain's end: "x", or
    "conv", the last pair, which is not of the chain, but of x; "" when nothing is."""

    def norm(w: Tensor) -> float:
        return w.float().abs().sum((1, 2, 3)).max().item()

    safe = math.inf
    ends: list[tuple[float, float]] = []
    gain, shift = 1.0, 0.0
    for i, ((c, _), (w, b)) in enumerate(zip(pairs, weights, strict=True)):
        if add == "conv" and i == len(pairs) - 1:
            ends.append((gain, shift))
            gain, shift = 1.0, 0.0
        raw = norm(c.weight)
        safe = min(safe, _largest(raw * gain, raw * shift))
        folded = norm(w)
        gain, shift = folded * gain, folded * shift + b.abs().max().item()
        safe = min(safe, _largest(gain, shift))
    for other in [*ends, *([(1.0, 0.0)] if add == "x" else [])]:
        gain, shift = gain + other[0], shift + other[1]
        safe = min(safe, _largest(gain, shift))
    return Bound(gain, shift, safe)


def _largest(gain: float, shift: float) -> float:
    """The largest |x| with gain * |x| + shift <= LIMIT; -1 when there is none."""
    if not (math.isfinite(gain) and shift <= LIMIT):
        return -1.0
    return (LIMIT - shift) / gain if gain > 0 else math.inf


def usable(x: Tensor) -> str | None:
    """None when the oneDNN path can run on x, otherwise the reason."""
    if not x.is_cpu:
        return "not a CPU tensor"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} has no oneDNN path here"
    if not (torch._C._get_mkldnn_enabled() and torch._C._has_mkldnn):
        return "torch.backends.mkldnn is off"
    if not is_nhwc(x):
        return NCHW
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 convolutions"
    return None


_epoch = 0


def epoch() -> int:
    """Moves when somebody says that folded weights are stale: what was derived of them is, too."""
    return _epoch


def forget() -> None:
    global _epoch
    _epoch += 1


def sharded() -> bool:
    """Whether FSDP2 is at work in this process: it writes gathered parameters into storage that it
    keeps, and puts their version counters back."""
    states = sys.modules.get("torch.distributed._composable_state")
    return states is not None and len(states._module_state_mapping) > 0


def admit(x: Tensor, largest: float | None, b: Bound) -> float | None:
    """A bound of the module's output, given one of |x| (None: unknown); None when the module must
    not run folded on x.

    Measures x (one pass) only when what is known of it does not do."""
    if largest is None:
        largest = known(x)
    if largest is None or largest > b.safe:
        largest = abs_max(x)
    if largest <= b.safe:
        return b.gain * largest + b.shift
    counters.count(
        "inference: values that may overflow took the unfolded path, to do so as in torch"
        if math.isfinite(largest) and b.safe >= 0
        else "inference: a non-finite input or weight took the unfolded path, to propagate as torch"
        " does"
    )
    return None


def known(x: Tensor) -> float | None:
    """The bound of |x| that `mark` left."""
    version, marked = getattr(x, _MARK, (0, None))
    return marked if marked is not None and version == x._version else None


def in_channels_last(x: Tensor) -> Tensor:
    """A network's input in the layout that it runs in."""
    if is_nhwc(x):
        return x
    counters.count("inference: a batch of images copied to channels_last")
    return x.contiguous(memory_format=torch.channels_last)


def abs_max(x: Tensor) -> float:
    """max |x|, NaN where x holds one; x dense."""
    bits = _native.module().abs_max(x.data_ptr(), DTYPE[x.dtype], x.numel())
    if x.dtype == torch.bfloat16:
        bits <<= 16
    return struct.unpack("f", struct.pack("I", bits))[0]


def admit_sum(bound: float, residual: Tensor) -> float | None:
    """A bound of |y + residual|, |y| <= bound; None where the sum might overflow, or is NaN."""
    total = bound + abs_max(residual)
    return total if total <= LIMIT else None


def mark(z: Tensor, largest: float | None) -> Tensor:
    """z, its bound remembered until somebody writes to it. (Inference tensors do not tell.)"""
    if largest is not None and not z.is_inference():
        setattr(z, _MARK, (z._version, largest))
    return z


def block(x: Tensor, packs: Sequence[Packed], projected: bool, own_input: bool) -> Tensor:
    """relu(conv_K(... relu(conv_1(x))) + s), s = x or, `projected`, the last pack's conv of x.
    own_input: z may be written over x."""
    residual = conv(x, packs[-1], relu=False) if projected else x
    *inner, last = packs[:-1] if projected else packs
    return conv_add_relu(chain(x, inner), last, residual, projected or own_input)


def chain(x: Tensor, packs: Sequence[Packed]) -> Tensor:
    """relu(conv_K(... relu(conv_1(x))))"""
    for packed in packs:
        x = conv(x, packed, relu=True)
    return x


def max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """maxpool(x) of x >= 0, channels_last."""
    n, c, *size = x.shape
    out = [(s + 2 * padding - kernel) // stride + 1 for s in size]
    z = torch.empty((n, c, *out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _native.module().max_pool(
        z.data_ptr(), x.data_ptr(), kernel, stride, padding, DTYPE[x.dtype], n, c, *size, *out
    )
    return z


def conv(x: Tensor, p: Packed, relu: bool) -> Tensor:
    """act(conv(x, w') + b')"""
    if p.channels is not None:
        return _winograd.conv(x, p.weight, p.channels, p.padding[0], p.bias, relu=relu)
    return _channels_last(torch.ops.mkldnn._convolution_pointwise.default(
        x, p.weight, p.bias, p.padding, p.stride, p.dilation, p.groups,
        "relu" if relu else "none", [], "",
    ))  # fmt: skip


def conv_add_relu(x: Tensor, p: Packed, residual: Tensor, inplace: bool) -> Tensor:
    """relu(conv(x, w') + b' + residual); `inplace` lets it overwrite the residual."""
    if p.channels is not None:
        out = residual if inplace else None
        return _winograd.conv(x, p.weight, p.channels, p.padding[0], p.bias, residual, out=out)
    if inplace:
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, p.weight, p.add_bias, p.padding, p.stride, p.dilation, p.groups,
            "add", 1.0, "relu", [], "",
        )  # fmt: skip
    return _channels_last(torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, p.weight, p.add_bias, p.padding, p.stride, p.dilation, p.groups,
        "add", 1.0, "relu", [], "",
    ))  # fmt: skip


def _channels_last(z: Tensor) -> Tensor:
    """Of one channel, torch takes an input and an unpacked weight for NCHW, and answers in it."""
    return z if is_nhwc(z) else z.contiguous(memory_format=torch.channels_last)
