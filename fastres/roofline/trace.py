"""What a model runs: its forward on the meta device, operator by operator, and the blocks of it
that `fastres.convert` would fuse, as convert's own matchers find them. Nothing is computed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastres import counters
from fastres.convert import revert
from fastres.convert._match import Match, find, original_type
from fastres.nn import Spec, spec_obstacle

from .traffic import ConvShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ref:
    """A tensor as an operator sees it. `value` names what it holds: views of one value share it,
    an in-place write makes another."""

    value: int
    shape: tuple[int, ...]
    bytes: int
    parameter: bool
    needs_grad: bool


@dataclass(frozen=True)
class Op:
    """One aten operator of the forward that computes something."""

    name: str
    path: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    flops: int
    conv: ConvShape | None
    training: bool

    @property
    def activations(self) -> tuple[Ref, ...]:
        return tuple(ref for ref in self.inputs if not ref.parameter)


@dataclass(frozen=True)
class Region:
    """A stretch of the forward that convert fuses: the convs of a `Spec`, in its order.

    kind: "block", or "stem" (one conv, batch norm, ReLU and perhaps `pool`). x, z: its input and
    output."""

    kind: str
    path: str
    convs: tuple[Op, ...]
    shortcut: Op | None
    pool: Op | None
    ops: tuple[Op, ...]

    @property
    def x(self) -> Ref:
        return self.convs[0].activations[0]

    @property
    def z(self) -> Ref:
        return self.ops[-1].outputs[0]

    @property
    def inputs(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def outputs(self) -> tuple[Ref, ...]:
        return (self.z,)


Node = Op | Region


class _Recorder(TorchDispatchMode):
    """Collects an Op for every operator call that is more than a view."""

    def __init__(self, parameters: set[int], skip: set[int], path: list[str]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.parameters, self.skip, self.path = parameters, skip, path
        self.alive: list[Any] = []  # no storage is freed, so that none is taken for another
        self.values: dict[int, int] = {}
        self.grads: dict[int, bool] = {}

    def ref(self, t: Tensor) -> Ref:
        storage = t.untyped_storage()._cdata
        value = self.values.setdefault(storage, len(self.alive))
        self.alive.append(t)
        parameter = storage in self.parameters
        needs = self.grads.setdefault(value, t.requires_grad if parameter else False)
        return Ref(value, tuple(t.shape), t.numel() * t.element_size(), parameter, needs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.alive += results
        data = [t for t in tensors if t.untyped_storage()._cdata not in self.skip]
        written = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        inside = {t.untyped_storage()._cdata for t in tensors}
        view = not written and all(t.untyped_storage()._cdata in inside for t in results)
        if not data or not results or view:
            return out
        inputs = tuple(self.ref(t) for t in data)
        needs = any(ref.needs_grad for ref in inputs)
        outputs = []
        for t in results:
            self.values[t.untyped_storage()._cdata] = value = len(self.alive)
            self.grads[value] = needs
            outputs.append(self.ref(t))
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        packet = func._overloadpacket
        count = flop_registry.get(packet)
        self.ops.append(
            Op(
                name=packet.__name__.removesuffix("_"),
                path=self.path[-1] if self.path else "",
                inputs=inputs,
                outputs=tuple(outputs),
                flops=0 if count is None else int(count(*args, **kwargs, out_val=out)),
                conv=_conv_shape(packet.__name__, named),
                training=bool(named.get("training", True)),
            )
        )
        return out


def _conv_shape(name: str, named: dict[str, Any]) -> ConvShape | None:
    if name != "convolution" or named["transposed"] or len(named["stride"]) != 2:
        return None
    x, w = named["input"], named["weight"]
    n, c, h, w_in = x.shape
    k, _, r, s = w.shape
    stride, padding, dilation = (tuple(named[key]) for key in ("stride", "padding", "dilation"))
    return ConvShape(n, c, h, w_in, k, r, s, stride, padding, dilation, named["groups"])


def meta_copy(model: nn.Module, dtype: str) -> nn.Module:
    """The model as it was before convert, without its data and hooks, in dtype."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    twin = revert(copy.deepcopy(model, memo))
    for m in twin.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks):
            hooks.clear()
    return twin.to(DTYPES[dtype])


def trace(model: nn.Module, shape: tuple[int, ...], dtype: str, training: bool) -> list[Op]:
    """The operators of one forward, in order. Raises ValueError when the model does not run."""
    twin = meta_copy(model, dtype).train(training)
    path: list[str] = []

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        path.pop()

    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: path.append(name))
        module.register_forward_hook(leave)
    parameters = {p.untyped_storage()._cdata for p in twin.parameters()}
    buffers = {b.untyped_storage()._cdata for b in twin.buffers()}
    recorder = _Recorder(parameters, buffers, path)
    sample = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    events = Counter(counters.events())
    try:
        with torch.no_grad(), recorder:
            twin(sample)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"roofline: {type(model).__name__} does not run on an input of shape {shape}: "
            f"{first[0]}"
        ) from error
    finally:
        counters._events.clear()
        counters._events.update(events)  # FastRes modules count the hooks above
    return recorder.ops


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _fusions(model: nn.Module) -> Iterator[tuple[str, str, Spec, bool]]:
    """(path, "block" or "stem", spec, whole) of what convert fuses, and of FastRes modules.

    whole: all of the module is fused, its functional add and ReLU too."""
    for path, m, match in find(model):
        if isinstance(match, Match) and "_fastres_rejected" not in m.__dict__:
            if match.spec.branch is not None:
                continue  # conv by conv; counted as unfused
            yield path, match.kind, match.spec, match.kind == "block"
    for path, m in model.named_modules():  # FastBasicBlock, FastBottleneck, ConvBNReLU
        own = getattr(m, "_fastres", None) if original_type(m).__module__ == "fastres.nn" else None
        if own is not None and spec_obstacle(m, own.spec) is None:
            yield path, "block" if hasattr(m, "downsample") else "stem", own.spec, True


def nodes(model: nn.Module, ops: list[Op]) -> list[Node]:
    """The trace with the operators of each fusable block or stem replaced by a Region."""
    region_of: dict[int, Region] = {}
    for path, kind, spec, whole in _fusions(model):
        inner = {_join(path, p) for pair in spec.pairs() for p in pair}
        inner |= {_join(path, p) for p, _ in spec.plain}
        if whole:
            inner.add(path)
        mine = [op for op in ops if op.path in inner]
        convs = {op.path: op for op in mine if op.conv is not None}
        wanted = [_join(path, conv) for conv, _ in spec.pairs()]
        if sorted(op.path for op in mine if op.conv is not None) != sorted(wanted):
            continue  # called twice, or never
        units = tuple(convs[_join(path, conv)] for conv, _ in spec.units)
        short = None if spec.shortcut is None else convs[_join(path, spec.shortcut[0])]
        pool = next((op for op in mine if "max_pool" in op.name), None)
        region = Region(kind, path, units, short, pool, tuple(mine))
        region_of |= {id(op): region for op in mine}
    found: list[Node] = []
    for op in ops:
        owner = region_of.get(id(op))
        if owner is None:
            found.append(op)
        elif owner.ops[0] is op:
            found.append(owner)
    return found
