"""Several fused blocks in a row: a network, or a Sequential of blocks.

In inference a tensor that only passes from block to block is added to in place, which spares one
pass over memory for every identity shortcut; on rungs c1 and up, the blocks of a layer run as one
stage, fused across their borders.

CPU inference of batches of a shape that came before runs by a `Route`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import inference, plan
from ._chosen import (
    asked_rung,
    autocast_dtype,
    block_of,
    checked_rung,
    choice_of,
    modules_of,
)
from ._route import Route, Stem, Step, Trace, situation
from ._spec import PLAIN, child, has_hooks, remember_methods, replaced, watcher
from ._watch import Watch
from .nn import (
    FusedMixin,
    ResidualBlockMixin,
    StemMixin,
    cast_input,
    marked,
    stem_forward,
    window_of,
)
from .ops import residual_stage
from .ops._choice import parse

remember_methods(nn.Linear, "forward")


# --- block by block -------------------------------------------------------------------------------


def run_blocks(
    layers: list[Any], x: Tensor, own_input: bool, largest: float | None = None,
    trace: Trace | None = None,
) -> Tensor:  # fmt: skip
    """layers[-1](... layers[0](x)), each a Sequential of blocks.

    largest: a bound of |x|, if known. A hook on a layer or a block sees tensors, so none there is
    written over. trace: takes note of what ran."""
    trace = Trace() if trace is None else trace
    for layer in layers:
        if type(layer) is nn.Sequential and _bypassable(layer):
            x, own_input, largest = _run_layer(layer, x, own_input, largest, trace)
        else:
            x, own_input, largest = layer(marked(x, largest)), False, None
            trace.whole = False
    return x


def _run_layer(
    layer: nn.Sequential, x: Tensor, own_input: bool, largest: float | None, trace: Trace
) -> tuple[Tensor, bool, float | None]:  # fmt: skip
    """(z, whether nobody else holds z, a bound of |z|), past any hooks on the layer."""
    rung = _stage_rung(layer, x)
    if rung is not None:
        trace.whole = False
        return _run_stage(list(layer), x, rung), False, None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        trace.whole = False
        return nn.Sequential.forward(layer, marked(x, largest)), False, None
    block: Any
    for block in layer:
        if not isinstance(x, Tensor):  # a child of one's own may give anything to the next
            x, own_input, largest = block(x), False, None
            trace.whole = False
            continue
        fused = (
            isinstance(block, ResidualBlockMixin)
            and _bypassable(block)
            and block._obstacle(x) is None
        )
        choice = choice_of(block, x)[0] if fused else plan.EAGER
        shape, given, dtype = x.shape, x.dtype, autocast_dtype(x) or x.dtype
        folded = None
        if choice != plan.EAGER:
            (x, largest), own_input = block._fused(x, own_input, largest, choice), True
            if largest is not None:
                folded = block._fastres.cache.held(dtype, shape)
            if folded is None:  # for its values, or for want of room
                trace.whole = False
        else:
            x, own_input, largest = block(marked(x, largest)), False, None
        trace.steps.append(Step(block, folded, shape, given, dtype))
    return x, own_input, largest


def _bypassable(module: Any) -> bool:
    """Whether calling module is calling its class's forward: no hook, no forward of its own."""
    return not has_hooks(module) and "forward" not in module.__dict__


def _stage_rung(layer: Any, x: Tensor) -> str | None:
    """The rung above b that was asked for on all blocks of a layer, if they are fused and
    unwatched; None when they do not run as one stage. (A plan chooses block by block.)"""
    if len(layer) == 0:
        return None
    first: Any = layer[0]
    rung = asked_rung(first._fastres) if isinstance(first, ResidualBlockMixin) else None
    if rung is None or not parse(rung).rung.conv:
        return None
    for block in layer:
        if not isinstance(block, ResidualBlockMixin) or asked_rung(block._fastres) != rung:
            return None
        if block._fastres.spec.branch is not None:
            return None
        if not _bypassable(block) or block._obstacle(x) is not None:
            return None
    return rung


def _run_stage(blocks: list[Any], x: Tensor, rung: str) -> Tensor:
    first = blocks[0]
    x = cast_input(first, first._fastres.spec, x)
    checked_rung(type(first).__name__, first._fastres.rung, x)
    return residual_stage(x, [block_of(b, b._fastres.spec) for b in blocks], rung)


# --- routes ---------------------------------------------------------------------------------------


def _watch(owner: nn.Module) -> Watch:
    """Of all that the fused modules in owner, itself included, read when they run."""
    modules: dict[nn.Module, None] = {owner: None}
    fusions: list[Any] = []
    tensors: list[Tensor] = []
    for m in owner.modules():
        if type(m) is nn.Sequential:
            modules[m] = None
        if not isinstance(m, FusedMixin):
            continue
        spec = m._fastres.spec
        fusions.append(m._fastres)
        children = [_child_or_none(m, path) for path, _ in spec.covered()]
        modules |= dict.fromkeys([m, *(c for c in children if c is not None)])
        if [type(c) for c in children] == [kind for _, kind in spec.covered()]:
            tensors += [t for t in inference.sources_of(modules_of(m, spec))[0] if t is not None]
    head = owner._modules.get("fc")
    if type(head) is nn.Linear:
        modules[head] = None
        tensors += [t for t in (head.weight, head.bias) if t is not None]
    return Watch(modules, fusions, [t for t in tensors if not t.is_inference()], _methods(modules))


def _child_or_none(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return child(module, path)
    except AttributeError:  # taken out since `convert`: module runs unfused
        return None


def _methods(modules: Iterable[nn.Module]) -> set[tuple[type, str]]:
    """What was replaced if it is not as it was."""
    found = set()
    for m in modules:
        original = getattr(type(m), "original_class", type(m))
        names = m.replaces if isinstance(m, FusedMixin) else ("forward",)
        found |= {(original, name) for name in names} | {(type(m), "forward")}
    return found


def _last_layer(fusion: Any, x: Tensor, fc: Any) -> inference.Linear | None:
    """fc, packed, for a network whose images are x; None where it is to be called."""
    if type(fc) is not nn.Linear or not _bypassable(fc) or replaced(nn.Linear, "forward"):
        return None
    if any(type(t) not in PLAIN for t in (fc.weight, fc.bias) if t is not None):
        return None
    dtype = autocast_dtype(x)
    return fusion.linear.get(fc, x.dtype if dtype is None else dtype, dtype is not None)


class SequenceMixin(FusedMixin):
    """A Sequential of blocks, some of them fused, in a network that no family knows."""

    def __getitem__(self, index: Any) -> nn.Module:
        """A slice is a Sequential of its own, not of this class."""
        layer: Any = self
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(layer._modules.items())[index]))
        return nn.Sequential.__getitem__(layer, index)

    def forward(self, x: Tensor) -> Tensor:
        fusion = self._fastres
        if replaced(nn.Sequential, "forward") or watcher(x) is not None:
            return super().forward(x)  # type: ignore[misc]
        key = situation(x)
        route = fusion.routes.find(key, self)
        if route is not None:
            z = route.run(x)
            assert z is not None  # only a stem refuses
            return z
        layer: Any = self
        watch, trace = fusion.routes.prepare(key, layer, _watch), Trace()
        z, _, largest = _run_layer(layer, x, False, None, trace)
        folded = any(step.folded is not None for step in trace.steps)
        if watch is not None and trace.whole and folded:
            fusion.routes.add(key, Route(trace.steps), watch)
        return marked(z, largest)


class NetworkMixin(StemMixin):
    """A network of a stem, layers of blocks, and `fc` on the average of what they give."""

    def fused_network(self, x: Tensor, layers: list[Any]) -> Tensor:
        """The whole network. Nothing of it depends on the strides of what the stem gives."""
        module: Any = self
        fusion = self._fastres
        key = situation(x)
        watch, trace = fusion.routes.prepare(key, module, _watch), Trace()
        z, largest = stem_forward(module, fusion, self.pool, x, whole=True)
        folded = key is not None and largest is not None
        stem = self._stem(x) if folded else None
        head = _last_layer(fusion, x, module._modules.get("fc")) if folded else None
        z = run_blocks(layers, z, own_input=True, largest=largest, trace=trace)
        if watch is not None and trace.whole and stem is not None:
            fusion.routes.add(key, Route(trace.steps, stem, head), watch)
        return self.last(z, head)

    def _stem(self, x: Tensor) -> Stem | None:
        """As it has just run on x."""
        module: Any = self
        dtype = autocast_dtype(x) or x.dtype
        folded = self._fastres.cache.held(dtype, x.shape)
        if folded is None:
            return None
        return Stem(
            dtype, folded, None if self.pool is None else window_of(child(module, self.pool))
        )

    def routed(self, x: Tensor) -> Tensor | None:
        """The network's output, where this call has a route."""
        route = self._fastres.routes.find(situation(x), self)
        z = None if route is None else route.run(x)
        return None if route is None or z is None else self.last(z, route.head)

    def last(self, z: Tensor, head: inference.Linear | None = None) -> Tensor:
        m: Any = self
        h = torch.flatten(m.avgpool(z), 1)
        return m.fc(h) if head is None or not head.takes(h) else head(h)
