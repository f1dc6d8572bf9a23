"""FastRes modules: blocks that run as one fused autograd node, and the mixins by which `convert`
gives a user's own blocks the same forward.

A fused module *is a* module of the original class with another forward: same children, parameters,
hooks and paths. When something asks for an intermediate that fusion does not produce (a hook on an
inner layer, a replaced child, tracing), the call runs the original forward, and the reason is
counted for `fastres.report`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from . import backends, counters, inference, plan
from .ops import (
    BatchNorm,
    Block,
    Conv,
    Unit,
    bn_relu_maxpool,
    conv_bn_relu,
    residual_block,
    residual_stage,
)
from .ops._ladder import RUNGS
from .ops._units import needs_grad
from .ops.residual_stage import check_fusion

CHOICES_KEPT = 64  # input shapes of a module whose plan entries are remembered
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Spec:
    """Where a fused module finds its layers: paths of conv and batch norm, in execution order.

    units: the main branch; shortcut: the projection's pair, if any; plain: other children the fused
    forward stands in for (ReLU, max-pool), which must keep their type and carry no hooks."""

    units: tuple[tuple[str, str], ...]
    shortcut: tuple[str, str] | None = None
    plain: tuple[tuple[str, type], ...] = ()

    def pairs(self) -> tuple[tuple[str, str], ...]:
        return self.units if self.shortcut is None else (*self.units, self.shortcut)

    def covered(self) -> tuple[tuple[str, type], ...]:
        """(path, exact type) of every child the fused forward stands in for."""
        found: list[tuple[str, type]] = list(self.plain)
        for conv, bn in self.pairs():
            found += [(conv, nn.Conv2d), (bn, nn.BatchNorm2d)]
        if self.shortcut is not None and "." in self.shortcut[0]:
            found.append((self.shortcut[0].rpartition(".")[0], nn.Sequential))
        return tuple(found)


@dataclass
class Fusion:
    """What `convert` attaches to a module: the spec, the folded weights of its convs, and the rung
    of the fusion ladder that was asked for (None: the default)."""

    spec: Spec
    rung: str | None = None
    choices: dict[tuple, tuple[int, str, str]] = field(default_factory=dict)
    caches: dict[str, inference.Cache] = field(default_factory=dict)

    def cache(self, conv: str) -> inference.Cache:
        return self.caches.setdefault(conv, inference.Cache())


def child(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path."""
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None:
            raise AttributeError(f"{type(module).__name__} has no submodule {name!r}")
        module = found
    return module


def conv_obstacle(conv: nn.Conv2d, name: str) -> str | None:
    """Why a fused op cannot stand in for this conv; None when it can."""
    if conv.padding_mode != "zeros":
        return f"{name} has padding_mode={conv.padding_mode!r}; only zero padding is fused"
    if isinstance(conv.padding, str):
        return f"{name} has padding={conv.padding!r}; only explicit padding is fused"
    if conv.bias is not None:
        return f"{name} has a bias; a conv bias before a batch norm is not fused"
    return None


def bn_obstacle(bn: nn.BatchNorm2d, name: str) -> str | None:
    """Why a fused op cannot stand in for this batch norm; None when it can."""
    if not bn.training and (bn.running_mean is None) != (bn.running_var is None):
        return f"{name} has only one of running_mean and running_var"
    return None


def pool_obstacle(pool: nn.MaxPool2d, name: str) -> str | None:
    """Why a fused op cannot stand in for this max-pool; None when it can."""
    for what in ("kernel_size", "stride", "padding"):
        value = getattr(pool, what)
        if isinstance(value, tuple) and len(set(value)) != 1:
            return f"{name} has a non-square {what} {value}"
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return f"{name} has dilation, ceil_mode or return_indices"
    return None


def spec_obstacle(module: nn.Module, spec: Spec) -> str | None:
    """Why module cannot run fused as it stands: a child of another type, a hook on one, an
    unfusable setting."""
    for path, kind in spec.covered():
        try:
            m = child(module, path)
        except AttributeError:
            return f"{path} is missing"
        if type(m) is not kind:
            return f"{path} is {type(m).__name__}, not {kind.__name__}"
        if has_hooks(m):
            return f"{path} has a hook, which needs the unfused tensors"
        reason = None
        if isinstance(m, nn.Conv2d):
            reason = conv_obstacle(m, path)
        elif isinstance(m, nn.BatchNorm2d):
            reason = bn_obstacle(m, path)
        elif isinstance(m, nn.MaxPool2d):
            reason = pool_obstacle(m, path)
        if reason is not None:
            return reason
    if any(getattr(torch_module, "_global" + hooks) for hooks in _HOOKS):
        return "a global module hook is registered"
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast runs convolutions on x in; None when autocast is off or leaves x alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in ("cpu", "cuda"):
        return None  # (torch 2.11's compiler does not trace torch.amp.is_autocast_available)
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def signature(module: nn.Module, spec: Spec) -> str:
    """The layers of a block as a plan knows them: '1x1 64>64 b, 3x3 64>64 s2 b + 1x1 64>256 s2 b',
    b: batch statistics, f: frozen ones."""

    def layer(pair: tuple[str, str]) -> str:
        conv, bn = child(module, pair[0]), child(module, pair[1])
        r, s = conv.kernel_size
        parts = [f"{r}x{s} {conv.in_channels}>{conv.out_channels}"]
        for letter, value, usual in (
            ("s", conv.stride, (1, 1)),
            ("d", conv.dilation, (1, 1)),
            ("p", conv.padding, ((r - 1) // 2, (s - 1) // 2)),
        ):
            if tuple(value) != usual:
                parts.append(letter + "x".join(str(v) for v in dict.fromkeys(value)))
        if conv.groups != 1:
            parts.append(f"g{conv.groups}")
        return " ".join([*parts, "b" if bn.training or bn.running_mean is None else "f"])

    text = ", ".join(layer(pair) for pair in spec.units)
    return text if spec.shortcut is None else f"{text} + {layer(spec.shortcut)}"


def plan_key(module: Any, x: Tensor, training: bool) -> plan.Key:
    """What a choice for this call of a fused module is filed under."""
    spec = module._fastres.spec
    text = signature(module, spec)
    if not isinstance(module, ResidualBlockMixin):
        text = f"stem {text}"
    return plan.Key.of(text, x, autocast_dtype(x) or x.dtype, training)


def choice_of(module: Any, x: Tensor) -> tuple[str, str]:
    """(rung or plan.EAGER, why) for this call; explicit > table > cache > heuristic."""
    fusion: Fusion = module._fastres
    if fusion.rung is not None:
        return fusion.rung, "explicit"
    if torch.compiler.is_compiling() or x.dtype == torch.float64 or backends.forced():
        return plan.HEURISTIC  # nothing is measured there
    current = plan.current(x.device)
    if current.empty:
        return plan.HEURISTIC
    training = torch.is_grad_enabled()
    last = child(module, fusion.spec.units[-1][1])
    fast = (x.shape, x.stride(), x.dtype, x.device, autocast_dtype(x), training, last.training)
    known = fusion.choices.get(fast)
    if known is None or known[0] != current.version:
        if len(fusion.choices) >= CHOICES_KEPT:
            fusion.choices.clear()
        choice, why = current.lookup(plan_key(module, x, training))
        known = fusion.choices[fast] = (current.version, choice, why)
    return known[1], known[2]


class FusedMixin:
    """A module whose forward is fused; mixed in front of the original class by `fused_class`."""

    original_class: type[nn.Module]
    fused_mixin: type
    _fastres: Fusion

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickle and deepcopy by original class, since the class itself is made at run time."""
        original = getattr(type(self), "original_class", None)
        if original is None:
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        return _rebuild, (type(self).fused_mixin, original), self.__dict__.copy()

    def _obstacle(self, x: Tensor) -> str | None:
        """Why this call must run the original forward; None when it can run fused."""
        if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
            return "traced by fx or jit"
        reason = spec_obstacle(self, self._fastres.spec)  # type: ignore[arg-type]
        if reason is not None:
            return reason
        if not isinstance(x, Tensor):
            return f"the input is {type(x).__name__}, not a Tensor"
        return None

    def _leave(self, reason: str) -> None:
        counters.count(f"{type(self).__name__} ran unfused: {reason}")


_classes: dict[tuple[type, type], type] = {}


def fused_class(mixin: type, original: type[nn.Module]) -> type:
    """The subclass of `original` with `mixin`'s forward; one per pair."""
    key = (mixin, original)
    if key not in _classes:
        _classes[key] = type(
            "Fast" + original.__name__,
            (mixin, original),
            {"original_class": original, "fused_mixin": mixin, "__module__": original.__module__},
        )
    return _classes[key]


def _rebuild(mixin: type, original: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, original)
    return object.__new__(cls)


def fuse(module: nn.Module, mixin: type, spec: Spec) -> None:
    """Give module the fused forward, in place."""
    fusion = Fusion(spec)
    module.__class__ = fused_class(mixin, type(module))
    module.__dict__["_fastres"] = fusion


def unfuse(module: nn.Module) -> None:
    """The inverse of `fuse`, exact."""
    module.__class__ = type(module).original_class  # type: ignore[attr-defined]
    del module.__dict__["_fastres"]


def folds(module: nn.Module, spec: Spec, x: Tensor) -> bool:
    """Whether this call is plain CPU inference, which runs on folded, prepacked convs."""
    if torch.compiler.is_compiling() or inference.usable(x) is not None:
        return False
    tensors: list[Tensor | None] = [x]
    for conv_path, bn_path in spec.pairs():
        conv, bn = child(module, conv_path), child(module, bn_path)
        if bn.training or bn.running_mean is None or bn.running_var is None:
            return False
        if conv.weight.dtype not in (x.dtype, torch.float32):
            return False
        tensors += [conv.weight, bn.weight, bn.bias]
    return not needs_grad(*tensors) and inference.finite(x)


def unit_of(module: nn.Module, pair: tuple[str, str]) -> Unit:
    return Unit(Conv.of(child(module, pair[0])), BatchNorm.of(child(module, pair[1])))


def block_of(module: nn.Module, spec: Spec) -> Block:
    """The units a module stands for at this moment; counts the batch as torch's forward does."""
    units = [unit_of(module, pair) for pair in spec.units]
    return Block(units, None if spec.shortcut is None else unit_of(module, spec.shortcut))


class ResidualBlockMixin(FusedMixin):
    """relu(bn_K(conv_K(... relu(bn_1(conv_1(x))))) + shortcut(x)) as one node
    (fastres.ops.residual_block)."""

    def forward(self, x: Tensor) -> Tensor:
        reason = self._obstacle(x)
        if reason is None:
            if choice_of(self, x)[0] != plan.EAGER:
                return self.fused_forward(x)
        else:
            self._leave(reason)
        return super().forward(x)  # type: ignore[misc]

    def _obstacle(self, x: Tensor) -> str | None:
        reason = super()._obstacle(x)
        if reason is None and self._fastres.spec.shortcut is None:
            dtype = autocast_dtype(x)
            if dtype is not None and x.dtype != dtype:
                return f"autocast adds a {dtype} branch to a {x.dtype} input, which torch promotes"
        return reason

    def fused_forward(self, x: Tensor, own_input: bool = False) -> Tensor:
        """`own_input`: nobody else holds x, so that inference may write the block's output over
        it."""
        module: nn.Module = self  # type: ignore[assignment]
        spec = self._fastres.spec
        x = _cast_input(module, spec, x)
        if folds(module, spec, x):
            z = _folded_block(module, self._fastres, x, own_input)
            if z is not None:
                return z
        choice, _ = choice_of(self, x)
        rung = check_fusion(type(self).__name__, None if choice == plan.EAGER else choice, x)
        return residual_block(x, *block_of(module, spec), rung)


def _cast_input(module: nn.Module, spec: Spec, x: Tensor) -> Tensor:
    """x in the dtype the convs run in: autocast's, otherwise its own, which must be the
    weights'."""
    weight = child(module, spec.units[0][0]).weight
    if weight.device != x.device:
        raise ValueError(
            f"{type(module).__name__}: the input is on {x.device}, but the weights are on "
            f"{weight.device}; "
            "move one of them"
        )
    dtype = autocast_dtype(x)
    if dtype is not None:
        return x.to(dtype)
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{type(module).__name__}: the input has dtype {x.dtype}, but the weights have "
            f"{weight.dtype}; "
            "convert one of them, or run under torch.autocast"
        )
    return x


def _folded_block(module: nn.Module, fusion: Fusion, x: Tensor, own_input: bool) -> Tensor | None:
    """The block on folded convs; None when a folded weight is not finite or not cacheable."""
    spec = fusion.spec

    def pack(pair: tuple[str, str], h: Tensor) -> inference.Packed | None:
        return fusion.cache(pair[0]).get(child(module, pair[0]), child(module, pair[1]), h)

    h = x
    for pair in spec.units[:-1]:
        packed = pack(pair, h)
        if packed is None:
            return None
        h = inference.conv(h, packed, relu=True)
    last = pack(spec.units[-1], h)
    if last is None:
        return None
    residual = x
    if spec.shortcut is not None:
        packed = pack(spec.shortcut, x)
        if packed is None:
            return None
        residual = inference.conv(x, packed, relu=False)
    inplace = spec.shortcut is not None or own_input
    return inference.mark_finite(inference.conv_add_relu(h, last, residual, inplace))


def has_hooks(module: Any) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def run_blocks(layers: list[Any], x: Tensor, own_input: bool) -> Tensor:
    """layers[-1](... layers[0](x)), each a Sequential of blocks.

    In inference a tensor that only passes from block to block is added to in place, which spares
    one pass over memory for every identity shortcut. A hook on a layer or a block sees tensors, so
    none there is written over. On rungs c1 and up the blocks of a layer run as one stage, fused
    across their borders."""
    for layer in layers:
        rung = _stage_rung(layer, x)
        if rung is not None:
            x, own_input = _run_stage(list(layer), x, rung), False
            continue
        watched = (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(layer) is not nn.Sequential
            or has_hooks(layer)
        )
        if watched:
            x, own_input = layer(x), False
            continue
        for block in layer:
            fused = (
                isinstance(block, ResidualBlockMixin)
                and not has_hooks(block)
                and block._obstacle(x) is None
                and choice_of(block, x)[0] != plan.EAGER
            )
            if fused:
                x, own_input = block.fused_forward(x, own_input), True
            else:
                x, own_input = block(x), False
    return x


def _stage_rung(layer: Any, x: Tensor) -> str | None:
    """The rung above b that was asked for on all blocks of a layer, if they are fused and
    unwatched; None when they do not run as one stage. (A plan chooses block by block.)"""
    if type(layer) is not nn.Sequential or has_hooks(layer) or len(layer) == 0:
        return None
    first: Any = layer[0]
    rung = first._fastres.rung if isinstance(first, ResidualBlockMixin) else None
    if rung is None or not RUNGS[rung].conv:
        return None
    for block in layer:
        if not isinstance(block, ResidualBlockMixin) or block._fastres.rung != rung:
            return None
        if has_hooks(block) or block._obstacle(x) is not None:
            return None
    return rung


def _run_stage(blocks: list[Any], x: Tensor, rung: str) -> Tensor:
    first = blocks[0]
    x = _cast_input(first, first._fastres.spec, x)
    check_fusion(type(first).__name__, rung, x)
    return residual_stage(x, [block_of(b, b._fastres.spec) for b in blocks], rung)


def stem_forward(module: nn.Module, fusion: Fusion, pool: str | None, x: Tensor) -> Tensor:
    """maxpool(relu(bn(conv(x)))): the stem of a ResNet, `pool` the path of its max-pool, or
    None."""
    spec = fusion.spec
    x = _cast_input(module, spec, x)
    (pair,) = spec.units
    conv, bn = child(module, pair[0]), child(module, pair[1])
    window = None if pool is None else child(module, pool)
    if folds(module, spec, x):
        packed = fusion.cache(pair[0]).get(conv, bn, x)
        if packed is not None:
            z = inference.conv(x, packed, relu=True)
            return inference.mark_finite(z if window is None else window(z))
    if window is None:
        return conv_bn_relu(x, Conv.of(conv), BatchNorm.of(bn))
    y = nn.functional.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    kernel, stride, padding = (
        v[0] if isinstance(v, tuple) else v
        for v in (window.kernel_size, window.stride, window.padding)
    )
    return bn_relu_maxpool(y, BatchNorm.of(bn), kernel, stride, padding)


class StemMixin(FusedMixin):
    """A network whose stem (conv, BN, ReLU, max-pool) is fused; a model family's subclass says
    where it stands."""

    pool: str | None = "maxpool"

    def fused_forward(self, x: Tensor) -> Tensor:
        return stem_forward(self, self._fastres, self.pool, x)  # type: ignore[arg-type]


class ConvBNReLU(nn.Module):
    """relu(batch_norm(conv2d(x))), trained as one fused node, folded and prepacked for CPU
    inference.

    Children `conv` (no bias) and `bn`; arguments as torch.nn.Conv2d's. x: (N, in_channels, H, W) ->
    (N, out_channels, H', W'). Source: He et al. 2015, section 3.4."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        )
        self.bn = norm_layer(out_channels)
        self._fastres = Fusion(Spec((("conv", "bn"),)))

    def forward(self, x: Tensor) -> Tensor:
        reason = spec_obstacle(self, self._fastres.spec)
        if reason is None:
            return stem_forward(self, self._fastres, None, x)
        counters.count(f"ConvBNReLU ran unfused: {reason}")
        return nn.functional.relu(self.bn(self.conv(x)))


class _PlainBlock(nn.Module):
    """The layers and the plain forward of a residual block; arguments as torchvision's blocks."""

    expansion = 1

    def __init__(
        self,
        widths: list[tuple[int, int, int]],
        in_channels: int,
        downsample: nn.Module | None,
        groups: int,
        dilation: int,
        norm_layer: Callable[[int], nn.Module] | None,
        fusion: str | None,
    ) -> None:
        super().__init__()
        if fusion is not None and fusion not in RUNGS:
            raise ValueError(
                f"{type(self).__name__}: unknown fusion {fusion!r}; known: {', '.join(RUNGS)}"
            )
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        for i, (width, kernel, stride) in enumerate(widths, start=1):
            spatial = kernel > 1
            conv = nn.Conv2d(
                in_channels,
                width,
                kernel,
                stride,
                padding=dilation * (kernel // 2),
                dilation=dilation if spatial else 1,
                groups=groups if spatial else 1,
                bias=False,
            )
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", norm_layer(width))
            in_channels = width
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = max(stride for _, _, stride in widths)
        projection = None if downsample is None else ("downsample.0", "downsample.1")
        units = tuple((f"conv{i}", f"bn{i}") for i in range(1, len(widths) + 1))
        self._fastres = Fusion(Spec(units, projection, (("relu", nn.ReLU),)), fusion)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        units = self._fastres.spec.units
        for i, (conv, bn) in enumerate(units):
            h = child(self, bn)(child(self, conv)(h))
            if i < len(units) - 1:
                h = self.relu(h)
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class FastBasicBlock(ResidualBlockMixin, _PlainBlock):
    """Two 3x3 convs and a shortcut (He et al. 2015, figure 5 left), fused.

    Arguments, children and state_dict keys are those of torchvision.models.resnet.BasicBlock;
    fusion: the rung of the ladder, as in fastres.convert.
    x: (N, inplanes, H, W) -> (N, planes, H / stride, W / stride)."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        fusion: str | None = None,
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError("FastBasicBlock: only groups=1 and base_width=64 exist")
        super().__init__(
            [(planes, 3, stride), (planes, 3, 1)],
            inplanes,
            downsample,
            1,
            dilation,
            norm_layer,
            fusion,
        )


class FastBottleneck(ResidualBlockMixin, _PlainBlock):
    """1x1, 3x3, 1x1 convs and a shortcut (He et al. 2015, figure 5 right; stride on the 3x3),
    fused.

    Arguments, children and state_dict keys are those of torchvision.models.resnet.Bottleneck;
    fusion: the rung of the ladder, as in fastres.convert.
    x: (N, inplanes, H, W) -> (N, 4 * planes, H / stride, W / stride)."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        fusion: str | None = None,
    ) -> None:
        width = int(planes * (base_width / 64.0)) * groups
        super().__init__(
            [(width, 1, 1), (width, 3, stride), (planes * self.expansion, 1, 1)],
            inplanes,
            downsample,
            groups,
            dilation,
            norm_layer,
            fusion,
        )
