"""Bytes that a forward pass saves for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor], batch: Tensor) -> int:
    """Bytes of the unique storages that `forward()` packs for backward.

    Storages of the model's parameters and buffers and of the input batch are not counted: they
    exist anyway. The low-precision copies of weights that autocast makes are counted, in every
    variant alike. Tensors are held until the end, so that no address is used twice.
    """
    import torch

    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), batch)}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            held.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del out
    return total
