"""Where a fused module finds its layers, and what keeps the fused forward from standing in for
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from ._members import child, tensor_of
from .ops.bn_relu_maxpool import MAX_KERNEL

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, "_global" + hooks) for hooks in _HOOKS]  # torch's own dicts
PLAIN = (Tensor, nn.Parameter)  # everything else has its own idea of what an operation does


@dataclass(frozen=True)
class Spec:
    """Paths of conv and batch norm, in execution order.

    units: the main branch; shortcut: the projection's pair, if any; plain: other children the fused
    forward stands in for (ReLU, max-pool), which must keep their type and carry no hooks; branch: a
    child that gives the shortcut in its own way, and is called."""

    units: tuple[tuple[str, str], ...]
    shortcut: tuple[str, str] | None = None
    plain: tuple[tuple[str, type], ...] = ()
    branch: str | None = None
    _pairs: tuple[tuple[str, str], ...] = field(init=False, repr=False)
    _covered: tuple[tuple[str, type], ...] = field(init=False, repr=False)
    _kinds: tuple[type, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = self.units if self.shortcut is None else (*self.units, self.shortcut)
        covered: list[tuple[str, type]] = list(self.plain)
        for conv, bn in pairs:
            covered += [(conv, nn.Conv2d), (bn, nn.BatchNorm2d)]
        if self.shortcut is not None and "." in self.shortcut[0]:
            covered.append((self.shortcut[0].rpartition(".")[0], nn.Sequential))
        object.__setattr__(self, "_pairs", pairs)
        object.__setattr__(self, "_covered", tuple(covered))
        object.__setattr__(self, "_kinds", tuple({kind for _, kind in covered}))

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The units, and the shortcut's."""
        return self._pairs

    def covered(self) -> tuple[tuple[str, type], ...]:
        """(path, exact type) of every child the fused forward stands in for."""
        return self._covered

    def kinds(self) -> tuple[type, ...]:
        """The types among them."""
        return self._kinds


# --- replaced forwards ----------------------------------------------------------------------------

_methods: dict[tuple[type, str], Callable | None] = {}


def remember_methods(kind: type, *names: str) -> None:
    """Note the methods that class `kind` came with, to know a replacement when one comes.

    One that is not from the file of the class is a replacement already."""
    for name in names:
        if (kind, name) not in _methods:
            method = getattr(kind, name)
            files = [
                getattr(getattr(f, "__code__", None), "co_filename", None)
                for f in (method, kind.__init__)  # type: ignore[misc]
            ]
            _methods[kind, name] = method if files[0] == files[1] else None


def replaced(kind: type, name: str) -> bool:
    """Whether somebody has put another method into class `kind`."""
    return getattr(kind, name) is not _methods.get((kind, name))


for _kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Sequential):
    remember_methods(_kind, "forward")


# --- obstacles ------------------------------------------------------------------------------------


def has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def global_hooks() -> bool:
    return any(_GLOBAL_HOOKS)


def conv_obstacle(conv: nn.Conv2d, name: str) -> str | None:
    """Why a fused op cannot stand in for this conv; None when it can."""
    if conv.padding_mode != "zeros":
        return f"{name} has padding_mode={conv.padding_mode!r}; only zero padding is fused"
    if isinstance(conv.padding, str):
        return f"{name} has padding={conv.padding!r}; only explicit padding is fused"
    if tensor_of(conv, "bias") is not None:
        return f"{name} has a bias; a conv bias before a batch norm is not fused"
    return None


def bn_obstacle(bn: nn.BatchNorm2d, name: str) -> str | None:
    """Why a fused op cannot stand in for this batch norm; None when it can."""
    if (tensor_of(bn, "running_mean") is None) != (tensor_of(bn, "running_var") is None):
        return f"{name} has only one of running_mean and running_var"
    return None


def pool_obstacle(pool: nn.MaxPool2d, name: str) -> str | None:
    """Why a fused op cannot stand in for this max-pool; None when it can."""
    for what in ("kernel_size", "stride", "padding"):
        value = getattr(pool, what)
        if isinstance(value, tuple) and len(set(value)) != 1:
            return f"{name} has a non-square {what} {value}"
    size = pool.kernel_size
    if (size[0] if isinstance(size, tuple) else size) > MAX_KERNEL:
        return f"{name} has kernel_size={size}; at most {MAX_KERNEL} is fused"
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return f"{name} has dilation, ceil_mode or return_indices"
    return None


_KINDS: dict[type, Callable[[Any, str], str | None]] = {
    nn.Conv2d: conv_obstacle,
    nn.BatchNorm2d: bn_obstacle,
    nn.MaxPool2d: pool_obstacle,
}


def spec_obstacle(module: nn.Module, spec: Spec) -> str | None:
    """Why module cannot run fused as it stands: a child of another type, a hook on one, another
    forward, an unfusable setting."""
    for path, kind in spec.covered():
        m = module._modules.get(path)
        if m is None:
            try:
                m = child(module, path)
            except AttributeError:
                return f"{path} is missing"
        own = m.__dict__
        if type(m) is not kind:
            return f"{path} is {type(m).__name__}, not {kind.__name__}"
        if (
            own["_forward_hooks"] or own["_forward_pre_hooks"]
            or own["_backward_hooks"] or own["_backward_pre_hooks"]
        ):  # fmt: skip
            return f"{path} has a hook, which needs the unfused tensors"
        if "forward" in own:
            return f"{path} has another forward of its own"
        obstacle = _KINDS.get(kind)
        reason = None if obstacle is None else obstacle(m, path)
        if reason is not None:
            return reason
    for kind in spec.kinds():
        if replaced(kind, "forward"):
            return f"{kind.__name__}.forward was replaced"
    if global_hooks():
        return "a global module hook is registered"
    return None


def forward_obstacle(module: nn.Module, kind: type, names: tuple[str, ...]) -> str | None:
    """Why the fused forward would not be what a call of module runs, or not what its class `kind`
    computes: one of the methods it stands in for was replaced."""
    for name in names:
        if name in module.__dict__:
            return f"it has another {name} of its own"
        if replaced(kind, name):
            return f"{kind.__name__}.{name} was replaced"
    return None


def watcher(x: Any) -> str | None:
    """Who watches or rewrites the single operations of this call, so that it must run them as they
    are; None in plain eager mode, and under torch.compile and torch.export, which take fused
    ops."""
    if not isinstance(x, Tensor):
        traced = isinstance(x, torch.fx.Proxy)
        return "traced by fx" if traced else f"the input is {type(x).__name__}, not a Tensor"
    if torch.compiler.is_compiling():
        return "exported to ONNX" if torch.onnx.is_in_onnx_export() else None
    if torch._C._is_tracing():
        return "traced by torch.jit"
    if torch._C._len_torch_dispatch_stack():
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        return f"under {type(mode).__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "under a torch.func transform"
    if forward_ad._current_level >= 0:
        return "under forward-mode AD"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    return None
