"""Bytes that a forward pass saves for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor], batch: Tensor) -> int:
    """Bytes of the unique storages that `forward()` packs for backward.

    Storages of the model's parameters and buffers and of the input batch are not counted: they
    exist anyway. Nor are the low-precision copies of parameters that autocast makes: they are no
    activations, and counting them would flatter a variant that casts again in backward. Tensors
    are held until the end, so that no address is used twice.
    """
    import torch

    parameters = list(model.parameters())
    known = {t.untyped_storage().data_ptr() for t in (*parameters, *model.buffers(), batch)}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            held.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    activations = [t for t in held.values() if not _is_parameter_copy(t, parameters)]
    total = sum(tensor.untyped_storage().nbytes() for tensor in activations)
    del out
    return total


def _is_parameter_copy(tensor: Tensor, parameters: Sequence[Tensor]) -> bool:
    """True when the tensor, or its transpose, is a parameter cast to the tensor's dtype."""
    import torch

    views = [tensor, tensor.t()] if tensor.dim() == 2 else [tensor]
    return any(
        view.shape == p.shape and tensor.dtype != p.dtype and torch.equal(view, p.to(tensor.dtype))
        for view in views
        for p in parameters
    )
