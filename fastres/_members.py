"""A module's tensors and children, read directly: every call of a fused module asks for all of
them, and nn.Module.__getattr__ takes 0.5 us. And what a module's caches are."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


class Uncopied:
    """What a module keeps for itself alone: not copied, not pickled; a copy starts empty."""

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple:
        return (type(self), ())


def tensor_of(m: nn.Module, name: str) -> Any:
    """m's tensor `name`: a parameter, a buffer or a plain attribute."""
    own = m.__dict__
    if name in own:
        return own[name]
    if name in own["_parameters"]:
        return own["_parameters"][name]
    return own["_buffers"][name] if name in own["_buffers"] else getattr(m, name)


def child(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path."""
    direct = module._modules.get(path)  # nearly always, and every call asks
    if direct is not None:
        return direct
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None:
            raise AttributeError(f"{type(module).__name__} has no submodule {name!r}")
        module = found
    return module
