"""z = relu(a + b): forward reads 2, writes 1 tensor and a bit mask; backward reads 1, writes 1. Sum
in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import backends
from fastres._layout import is_nhwc

from ._args import check_activation, check_like, check_raw
from ._library import define, refuse_double_backward
from ._units import alloc_mask, dense, in_format, needs_grad


def _add_relu(a: Tensor, b: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    a = dense(a, "add_relu")
    b = in_format(b, is_nhwc(a), "add_relu")
    z, mask = torch.empty_like(a), alloc_mask(a, save)
    backends.select(a).add_relu(z, mask if save else None, a, b)
    return z, mask


def _add_relu_fake(a: Tensor, b: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    a = dense(a, "add_relu")
    return torch.empty_like(a), alloc_mask(a, save)


def _relu_bwd(dz: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    dz = in_format(dz, channels_last, "add_relu backward")
    dx = torch.empty_like(dz)
    backends.select(dz).relu_bwd(dx, None, dz, mask)
    return dx


def _relu_bwd_fake(dz: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(in_format(dz, channels_last, "add_relu backward"))


def _check(a: Tensor, b: Tensor, save: bool) -> None:
    check_activation("add_relu", "a", a)
    check_like("add_relu", "b", b, a, tuple(a.shape))


def _check_bwd(dz: Tensor, mask: Tensor, channels_last: bool) -> None:
    check_raw("relu_bwd", dz, masks={"mask": mask}, nhwc=channels_last)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    z, mask = output
    ctx.channels_last = is_nhwc(z)
    ctx.save_for_backward(mask)


def _backward(ctx, dz, _):
    (mask,) = ctx.saved_tensors
    if mask.numel() == 0:
        raise RuntimeError("fastres::add_relu was called with save=False; it has no backward")
    dx = torch.ops.fastres.relu_bwd(dz, mask, ctx.channels_last)
    return dx, dx, None


define(
    "relu_bwd(Tensor dz, Tensor mask, bool channels_last) -> Tensor",
    _relu_bwd,
    _relu_bwd_fake,
    *refuse_double_backward("add_relu"),
    _check_bwd,
)
define(
    "add_relu(Tensor a, Tensor b, bool save) -> (Tensor z, Tensor mask)",
    _add_relu,
    _add_relu_fake,
    _setup,
    _backward,
    _check,
)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b) in one pass: the end of a residual block (He et al. 2015, eq. 1 and figure 2).

    a, b: (N, C, H, W), one dtype (float32, bfloat16, float16; float64 by the reference) and device,
    dense in channels_last or contiguous; a b in another layout than a is copied, and counted in
    `fastres.report`. Returns z in a's layout. Saves one bit an element for the backward. Raises
    TypeError or ValueError that names the argument."""
    _check(a, b, False)
    return torch.ops.fastres.add_relu(a, b, needs_grad(a, b))[0]
