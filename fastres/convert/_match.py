"""What a matcher answers, and the walk that asks every module of a model.

A model family is one file with MODULE (the Python module its classes come from) and
matchers(module), a map from exact class to a function that answers with a Match, or with the reason
for a miss. Adding a family is adding such a file to FAMILIES."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastres._spec import Spec, forward_obstacle, remember_methods, spec_obstacle
from fastres.nn import FusedMixin

FAMILIES = ("fastres.convert.torchvision",)


@dataclass(frozen=True)
class Match:
    """How to fuse one module: `original(module, x)` is what `mixin.fused_forward` replaces."""

    kind: str  # "block" or "stem"
    mixin: type
    spec: Spec
    original: Callable[[nn.Module, Tensor], Tensor]


Matcher = Callable[[nn.Module], "Match | str"]


def known_types() -> dict[type, Matcher]:
    """Exact class -> matcher of every family whose Python module is loaded."""
    found: dict[type, Matcher] = {}
    for name in FAMILIES:
        family = importlib.import_module(name)
        source = sys.modules.get(family.MODULE)
        if source is not None:
            found.update(family.matchers(source))
    return found


def original_type(m: nn.Module) -> type:
    """The class m had before `convert`."""
    return getattr(type(m), "original_class", type(m)) if isinstance(m, FusedMixin) else type(m)


def find(model: nn.Module) -> Iterator[tuple[str, nn.Module, Match | str]]:
    """(path, module, match or reason) for every module that a family knows, converted or not."""
    known = known_types()
    for path, m in model.named_modules():
        matcher = known.get(original_type(m))
        if matcher is not None:
            match = matcher(m)
            if isinstance(match, Match):
                kind, names = original_type(m), match.mixin.replaces  # type: ignore[attr-defined]
                remember_methods(kind, *names)
                reason = forward_obstacle(m, kind, names) or spec_obstacle(m, match.spec)
                yield path, m, match if reason is None else reason
            else:
                yield path, m, match
            continue
        base = next((t for t in type(m).__mro__ if t in known), None)
        if base is not None and not isinstance(m, FusedMixin):
            yield (
                path,
                m,
                (
                    f"{type(m).__name__} is a subclass of {base.__name__} that may change its "
                    f"forward; "
                    "exact types are matched"
                ),
            )
