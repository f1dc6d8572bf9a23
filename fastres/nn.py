"""FastRes modules: blocks that run as one fused autograd node, and the mixins by which `convert`
gives a user's own blocks the same forward.

A fused module *is a* module of the original class with another forward: same children, parameters,
hooks and paths. When something asks for an intermediate that fusion does not produce (a hook on an
inner layer, a replaced child, tracing), the call runs the original forward, and the reason is
counted for `fastres.report`. Under an explicit request (fusion=, use_backend) only what watches the
single operations of a call gets that (`watcher`); a changed module is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _winograd, backends, counters, inference, plan
from ._chosen import (
    CHOICES_KEPT,
    Fusion,
    asked_rung,
    autocast_dtype,
    block_of,
    checked_rung,
    choice_of,
    modules_of,
    refusal,
    unit_of,
    unproven,
)
from ._layout import is_nhwc
from ._members import tensor_of
from ._spec import (
    PLAIN,
    Spec,
    child,
    has_hooks,
    remember_methods,
    replaced,
    spec_obstacle,
    watcher,
)
from .ops import (
    BatchNorm,
    Conv,
    Unit,
    bn_relu_maxpool,
    conv_bn,
    conv_bn_add_relu,
    conv_bn_relu,
    conv_bn_relu_maxpool,
    residual_block,
)
from .ops._args import check_conv_bn, conv_out_shape
from .ops._choice import parse
from .ops._rung_b import Program
from .ops._units import in_format, needs_grad
from .ops.bn_relu_maxpool import check_window
from .ops.residual_stage import check_block, check_chain, prepare_block, run_program, trains_eagerly


class FusedMixin:
    """A module whose forward is fused; mixed in front of the original class by `fused_class`."""

    original_class: type[nn.Module]
    fused_mixin: type
    replaces: tuple[str, ...] = ("forward",)  # the original's methods that the mixin stands in for
    families: tuple[str, ...] = ("passes",)  # of kernels it uses: fastres.selfcheck
    fuses_block = False  # a residual block, not a stem
    _fastres: Fusion

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickle and deepcopy by original class, since the class itself is made at run time."""
        original = getattr(type(self), "original_class", None)
        if original is None:
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        return _rebuild, (type(self).fused_mixin, original), self.__dict__.copy()

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile the fused forward of {type(self).__name__}; script "
            "fastres.revert(model), which has the same parameters, or use torch.jit.trace"
        )

    def _obstacle(self, x: Tensor) -> str | None:
        """Why this call must run the original forward; None when it can run fused."""
        original = getattr(type(self), "original_class", None)
        if original is not None:
            for name in self.replaces:
                if replaced(original, name):
                    return f"{original.__name__}.{name} was replaced"
        reason = watcher(x) or spec_obstacle(self, self._fastres.spec)  # type: ignore[arg-type]
        if reason is None and not torch.compiler.is_compiling() and x.numel() == 0:
            return "the batch is empty"  # a detector without proposals
        return unproven(x, *self.families) if reason is None else reason

    def _leave(self, reason: str, x: Tensor) -> None:
        """The original forward is next: counted, but an error where something else was asked for
        and x has no watcher, which outranks that."""
        if watcher(x) is None:
            error = refusal(type(self).__name__, self._fastres, reason)
            if error is not None:
                raise backends.BackendError(error)
        counters.count(f"{type(self).__name__} ran unfused: {reason}")


_classes: dict[tuple[type, type], type] = {}


def fused_class(mixin: type, original: type[nn.Module]) -> type:
    """The subclass of `original` with `mixin`'s forward; one per pair."""
    key = (mixin, original)
    if key not in _classes:
        remember_methods(original, *mixin.replaces)  # type: ignore[attr-defined]
        _classes[key] = type(
            "Fast" + original.__name__,
            (mixin, original),
            {"original_class": original, "fused_mixin": mixin, "__module__": original.__module__},
        )
    return _classes[key]


def _rebuild(mixin: type, original: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, original)
    return object.__new__(cls)


def fuse(module: nn.Module, mixin: type, spec: Spec, path: str = "") -> None:
    """Give module the fused forward, in place. path: where it is in the model, for messages."""
    fusion = Fusion(spec, path=path)
    module.__class__ = fused_class(mixin, type(module))
    module.__dict__["_fastres"] = fusion


def unfuse(module: nn.Module) -> None:
    """The inverse of `fuse`, exact."""
    fusion: Any = module._fastres
    fusion.routes.clear()  # which hold the module
    module.__class__ = type(module).original_class  # type: ignore[attr-defined]
    del module.__dict__["_fastres"]


def why_unfolded(module: nn.Module, spec: Spec, x: Tensor) -> str | None:
    """None when this call is CPU inference on folded, prepacked convs, otherwise the reason; ""
    when it is not inference on the CPU, or not on a batch that any forward takes."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.dim() != 4 or x.numel() == 0:
        return ""
    grad = torch.is_grad_enabled()
    if (grad and x.requires_grad) or backends.forced() not in (None, "cpu"):
        return ""
    for conv, bn in modules_of(module, spec):
        running = tensor_of(bn, "running_mean"), tensor_of(bn, "running_var")
        if bn.training or running[0] is None or running[1] is None:
            return ""
        weight = tensor_of(conv, "weight")
        if weight.dtype not in (x.dtype, torch.float32) or type(weight) not in PLAIN:
            return ""
        if grad and needs_grad(weight, tensor_of(bn, "weight"), tensor_of(bn, "bias")):
            return ""
    if inference.sharded():
        return "FSDP's parameters cannot be watched for changes"
    return inference.usable(x)


def count_unfolded(reason: str) -> None:
    if reason:
        counters.count(f"inference: convs and batch norms were not folded: {reason}")


class ResidualBlockMixin(FusedMixin):
    """relu(bn_K(conv_K(... relu(bn_1(conv_1(x))))) + shortcut(x)) as one node
    (fastres.ops.residual_block)."""

    fuses_block = True

    def forward(self, x: Tensor) -> Tensor:
        reason = self._obstacle(x)
        if reason is None:
            choice, _ = choice_of(self, x)
            if choice != plan.EAGER:
                return marked(*self._fused(x, False, None, choice))
        else:
            self._leave(reason, x)
        return super().forward(x)  # type: ignore[misc]

    def _obstacle(self, x: Tensor) -> str | None:
        reason = super()._obstacle(x)
        if reason is None and self._fastres.spec.shortcut is None:
            dtype = autocast_dtype(x)
            if dtype is not None and x.dtype != dtype:
                return (
                    f"autocast adds a {dtype} branch to the {x.dtype} input, which torch promotes "
                    f"(an input in {dtype} is fused)"
                )
        return reason

    def fused_forward(self, x: Tensor) -> Tensor:
        return marked(*self._fused(x, False, None, choice_of(self, x)[0]))

    def _fused(
        self, x: Tensor, own_input: bool, largest: float | None, choice: str
    ) -> tuple[Tensor, float | None]:
        """(z, a bound of |z| where it is known).

        own_input: nobody else holds x, so that inference may write z over it. largest: a bound of
        |x|, if known. choice: choice_of this call."""
        module: nn.Module = self  # type: ignore[assignment]
        spec = self._fastres.spec
        x = cast_input(module, spec, x)
        if (
            spec.branch is None
            and choice in ("b", plan.EAGER)
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            units = [unit_of(module, pair) for pair in spec.pairs()]
            if trains_eagerly(x, units):
                return run_program(self._program(x, units), x, units), None
        if asked_rung(self._fastres) is not None:
            checked_rung(type(self).__name__, self._fastres.rung, x)
        reason = why_unfolded(module, spec, x)
        if reason is None:
            folded = _folded_block(module, self._fastres, x, own_input, largest)
            if folded is not None:
                return folded
        else:
            count_unfolded(reason)
        rung = checked_rung(type(self).__name__, None if choice == plan.EAGER else choice, x)
        return self._by_ops(x, rung), None

    def _by_ops(self, x: Tensor, rung: str) -> Tensor:
        module: Any = self
        return residual_block(x, *block_of(module, self._fastres.spec), rung)

    def _program(self, x: Tensor, units: list[Unit]) -> Program:
        """This block's training on rung b; made anew, with all checks, for whatever of an input and
        the units it has not seen yet."""
        programs = self._fastres.programs
        key = (
            *_facts(x), x.stride(), backends.forced(), _winograd.switched_off(),
            torch._C._get_mkldnn_enabled(),
            *[_unit_facts(*u) for u in units],
        )  # fmt: skip
        program = programs.get(key)
        if program is None:
            if len(programs) >= CHOICES_KEPT:
                programs.clear()
            main = units if self._fastres.spec.shortcut is None else units[:-1]
            program = prepare_block(x, main, None if main is units else units[-1])
            programs[key] = program
        return program


def _facts(t: Tensor | None) -> tuple:
    """What checks and choices read of a tensor."""
    return () if t is None else (t.shape, t.dtype, t.device)


def _unit_facts(conv: Conv, bn: BatchNorm) -> tuple:
    return (*conv[2:], bn.eps, *map(_facts, (conv.weight, *bn[:4])))


def cast_input(module: nn.Module, spec: Spec, x: Tensor) -> Tensor:
    """x in the dtype the convs run in: autocast's, otherwise its own, which must be the
    weights'."""
    weight = tensor_of(child(module, spec.units[0][0]), "weight")
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


def _folded_block(
    module: nn.Module, fusion: Fusion, x: Tensor, own_input: bool, largest: float | None
) -> tuple[Tensor, float | None] | None:
    """(z, a bound of |z|) on folded convs; None when they cannot be had, or x is too large."""
    spec = fusion.spec

    def in_shapes() -> list[inference.Shape]:
        outs: list[inference.Shape] = []
        if spec.branch is not None:
            check_chain("residual_block", x, block_of(module, spec).units, outs)
            return [tuple(x.shape), *outs[:-1]]
        check_block("residual_block", x, tuple(x.shape), *block_of(module, spec), outs)
        main = [tuple(x.shape), *outs[: len(spec.units) - 1]]
        return main if spec.shortcut is None else [*main, tuple(x.shape)]

    add = "conv" if spec.shortcut is not None else "x" if spec.branch is None else ""
    folded = fusion.cache.get(modules_of(module, spec), x, in_shapes, add)
    if folded is None:
        return None
    return run_folded(module, folded, x, own_input, largest)


def run_folded(
    module: Any, folded: inference.Folded, x: Tensor, own_input: bool, largest: float | None
) -> tuple[Tensor, float | None] | None:
    """(z, a bound of |z|) of a block on its folded convs; None, and nothing run, where x is too
    large."""
    spec = module._fastres.spec
    bound = inference.admit(x, largest, folded.bound)
    if bound is None:
        return None
    if spec.branch is None:
        return inference.block(x, folded.packs, spec.shortcut is not None, own_input), bound
    h = inference.chain(x, folded.packs[:-1])  # before the branch, which may write to x
    residual = child(module, spec.branch)(x)
    conv = Conv.of(child(module, spec.units[-1][0]))
    shape = conv_out_shape("residual_block", tuple(h.shape), conv)
    bound = inference.admit_sum(bound, residual) if _fits(residual, shape, h) else None
    if bound is None:
        return module.last_unit(h, residual, "b"), None
    return inference.conv_add_relu(h, folded.packs[-1], residual, inplace=False), bound


def _fits(residual: Any, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether a fused op adds it to what a conv gives of x, of that shape."""
    return (
        type(residual) is Tensor
        and tuple(residual.shape) == shape
        and (residual.dtype, residual.device) == (x.dtype, x.device)
        and is_nhwc(residual) == is_nhwc(x)
    )


class OpenBlockMixin(ResidualBlockMixin):
    """A residual block whose shortcut a module of its own gives: option A of the paper, a pool in
    front of the projection. That module is called; conv, batch norm and ReLU of the main branch,
    and the addition, are fused, each conv by itself."""

    fuses_block = False

    def _by_ops(self, x: Tensor, rung: str) -> Tensor:
        module: Any = self
        branch: Any = self._fastres.spec.branch
        h = x
        for unit in block_of(module, self._fastres.spec).units[:-1]:
            h = conv_bn_relu(h, *unit, rung)
        return self.last_unit(h, child(module, branch)(x), rung)

    def last_unit(self, h: Tensor, residual: Tensor, rung: str) -> Tensor:
        """relu(bn_K(conv_K(h)) + residual)"""
        module: Any = self
        last = unit_of(module, self._fastres.spec.units[-1])
        if _fits(residual, conv_out_shape("residual_block", tuple(h.shape), last.conv), h):
            return conv_bn_add_relu(h, *last, residual, fusion=rung)
        y = conv_bn(h, *last, rung).clone()
        y += residual  # as the block does it: any shape and dtype that y takes
        return nn.functional.relu(y)


def marked(x: Tensor, largest: float | None) -> Tensor:
    return x if largest is None else inference.mark(x, largest)


def stem_forward(
    module: nn.Module, fusion: Fusion, pool: str | None, x: Tensor, whole: bool = False
) -> tuple[Tensor, float | None]:
    """(z, a bound of |z| where it is known) of z = maxpool(relu(bn(conv(x)))): the stem of a
    ResNet, `pool` the path of its max-pool, or None.

    whole: only hooks see the tensors that follow; without any, inference chooses their layout."""
    spec = fusion.spec
    x = cast_input(module, spec, x)
    ((conv, bn),) = modules_of(module, spec)
    window = None if pool is None else child(module, pool)
    op = "conv_bn_relu" if pool is None else "conv_bn_relu_maxpool"
    asked = asked_rung(fusion)
    if asked is not None:
        if parse(asked).rung.conv and is_nhwc(conv.weight):  # as a vendor's conv of such a weight
            x = in_format(x, True, f"{op}: a batch of images")
        checked_rung(type(module).__name__, fusion.rung, x)
    reason = why_unfolded(module, spec, x)
    if whole and reason == inference.NCHW and not _hooked_inside(module):
        x, reason = inference.in_channels_last(x), None

    def in_shapes() -> list[inference.Shape]:
        shape = check_conv_bn(op, x, Conv.of(conv), BatchNorm.of(bn))
        if window is not None:
            check_window(op, shape, *window_of(window))
        return [tuple(x.shape)]

    if reason is None:
        folded = fusion.cache.get([(conv, bn)], x, in_shapes, "")
        bound = None if folded is None else inference.admit(x, None, folded.bound)
        if folded is not None and bound is not None:
            z = inference.conv(x, folded.packs[0], relu=True)
            return z if window is None else inference.max_pool(z, *window_of(window)), bound
    else:
        count_unfolded(reason)
    choice, _ = choice_of(module, x)
    rung = checked_rung(type(module).__name__, "b" if choice == plan.EAGER else choice, x)
    if window is None:
        return conv_bn_relu(x, Conv.of(conv), BatchNorm.of(bn), rung), None
    if parse(rung).rung.conv:
        pooled = *window_of(window), rung
        return conv_bn_relu_maxpool(x, Conv.of(conv), BatchNorm.of(bn), *pooled), None
    in_shapes()
    y = nn.functional.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return bn_relu_maxpool(y, BatchNorm.of(bn), *window_of(window)), None


def _hooked_inside(module: nn.Module) -> bool:
    return any(has_hooks(m) for m in module.modules() if m is not module)


def window_of(pool: nn.MaxPool2d) -> tuple[int, int, int]:
    kernel, stride, padding = (
        v[0] if isinstance(v, tuple) else v for v in (pool.kernel_size, pool.stride, pool.padding)
    )
    return kernel, stride, padding


class StemMixin(FusedMixin):
    """A network whose stem (conv, BN, ReLU, max-pool) is fused; a model family's subclass says
    where it stands."""

    pool: str | None = "maxpool"
    families = ("passes", "pool")

    def fused_forward(self, x: Tensor) -> Tensor:
        return marked(*stem_forward(self, self._fastres, self.pool, x))  # type: ignore[arg-type]


class ConvBNReLU(FusedMixin, nn.Module):
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
        reason = self._obstacle(x)
        if reason is None:
            return marked(*stem_forward(self, self._fastres, None, x))
        self._leave(reason, x)
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
        if fusion is not None:
            try:
                parse(fusion)
            except ValueError as e:
                raise ValueError(f"{type(self).__name__}: {e}") from None
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
