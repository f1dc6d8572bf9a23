"""Whether modules and their tensors are as they were when something was decided on them.

What a fused module checks in every call (its children's types, hooks, settings, training flags,
tensors) is all read from the instance dictionaries of a few modules. A `Watch` notes their contents
once, and later compares pointers in C++ (csrc/watch.h): any attribute that was set, any hook,
child or tensor put in or taken out, any write to a tensor is seen, whatever it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from . import _native
from ._members import Uncopied

_DICTS = (
    "_parameters", "_buffers", "_modules",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


KEPT = 8  # routes of a module: each holds folded weights
# After so many routes in a row that were never run, a module is taken for one that changes all the
# time, and a route is made in one call of RETRY only.
WASTED = 16
RETRY = 64


class Watch:
    """Modules, other objects with attributes, tensors and methods of classes, as they are now.

    modules: first the one whose calls are decided on."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        others: Iterable[Any],
        tensors: Iterable[Tensor],
        methods: Iterable[tuple[type, str]],
    ) -> None:
        modules, tensors = list(modules), list(tensors)
        objects = [*modules, *others]
        self.owner = modules[0]
        dicts = [m.__dict__[name] for m in modules for name in _DICTS]
        aliases = [t.detach() for t in tensors]
        # what the C++ object borrows; values as they are now, in case their dict changes
        self._kept = objects, dicts, tensors, aliases
        self._values = [[*d.items()] for d in (*dicts, *(vars(o) for o in objects))]
        self._methods: list[tuple[type, str, Callable]] = [
            (kind, name, getattr(kind, name)) for kind, name in methods
        ]
        self._native = _native.module().Watch(objects, dicts, tensors, aliases)

    def holds(self) -> bool:
        for kind, name, method in self._methods:
            if getattr(kind, name) is not method:
                return False
        return self._native.holds()


class Routes(Uncopied):
    """How calls of one module ran, by what the call depends on beside the module and what it holds:
    good while nothing changes of what a Watch sees."""

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._routes: OrderedDict[tuple, Any] = OrderedDict()
        self._unused = 0  # calls since a route was run

    def __len__(self) -> int:
        return len(self._routes)

    def find(self, key: tuple | None, owner: Any) -> Any | None:
        """The route of a call of owner, if there is one and nothing changed."""
        route = None if key is None else self._routes.get(key)
        if route is None:
            return None
        watch = self._watch
        # a shallow copy of a module has the module's Routes, but may have other children
        if watch is None or watch.owner is not owner or not watch.holds():
            self.clear()
            return None
        self._unused = 0
        return route

    def clear(self) -> None:
        self._watch, self._routes = None, OrderedDict()

    def prepare(self, key: tuple | None, owner: Any, watch: Callable[[Any], Watch]) -> Watch | None:
        """Before a call of owner without a route: what `add` is to be given after it; None where no
        route should be made of it."""
        if key is None:
            return None
        self._unused += 1
        if self._unused > WASTED and self._unused % RETRY:
            return None
        found = self._watch
        if found is None or found.owner is not owner or not found.holds():
            found = watch(owner)
            self._watch, self._routes = found, OrderedDict()
        return found

    def add(self, key: tuple | None, route: Any, watch: Watch) -> None:
        """Keep the route of a call that was prepared, and ran so."""
        # what a call began with may have changed, and another thread's call be watching since
        if key is None or self._watch is not watch or not watch.holds():
            return
        while len(self._routes) >= KEPT:
            self._routes.popitem(last=False)
        self._routes[key] = route
