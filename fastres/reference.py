"""The readable truth of every fused operation.

Plain torch math on (N, C, H, W) tensors. Evaluated in float64 it is what every backend's numbers
are judged against; evaluated in the tensor's own dtype it is the `reference` backend (see
`fastres/_reference_backend.py`). Functions return their results; `docs/kernels.md` has the
out-variant contract.

    mean = E[x]    var = E[(x - mean)^2]    rstd = 1 / sqrt(var + eps)          over (N, H, W), per
    channel normalise(x) = (x - mean) * rstd * gamma + beta
    z = relu(normalise(x) + shortcut)        shortcut: nothing, a tensor, or its own normalise(...)

Sources: Ioffe & Szegedy 2015 (batch normalization, Alg. 1 and section 3); He et al. 2015, section 3
(residual blocks).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def bn_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and 1 / sqrt(var + eps) of each channel over (N, H, W)."""
    mean = x.mean(dim=(0, 2, 3))
    var = (x - _per_channel(mean)).square().mean(dim=(0, 2, 3))
    return mean, var, (var + eps).rsqrt()


def normalise(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    """(x - mean) * (gamma * rstd) + beta; an argument that is None leaves its step out."""
    if mean is not None:
        x = x - _per_channel(mean)
    if gamma is not None and rstd is not None:
        x = x * _per_channel(gamma * rstd)
    elif gamma is not None or rstd is not None:
        scale = gamma if rstd is None else rstd
        assert scale is not None
        x = x * _per_channel(scale)
    return x if beta is None else x + _per_channel(beta)


def relu(v: Tensor) -> Tensor:
    """v where not (v <= 0), else 0: NaN propagates, as in torch."""
    return torch.where(v <= 0, torch.zeros_like(v), v)


def relu_gate(z: Tensor) -> Tensor:
    """Where the gradient passes the ReLU: not (z <= 0), so at exactly 0 it does not, at NaN it
    does."""
    return ~(z <= 0)


def bn_apply(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None = None,
    res_mean: Tensor | None = None,
    res_rstd: Tensor | None = None,
    res_gamma: Tensor | None = None,
    res_beta: Tensor | None = None,
    relu_: bool = True,
) -> Tensor:
    """z = act(normalise(x) + shortcut); see the module's formula."""
    z = normalise(x, mean, rstd, gamma, beta)
    if residual is not None:
        if res_mean is not None:
            residual = normalise(residual, res_mean, res_rstd, res_gamma, res_beta)
        z = z + residual
    return relu(z) if relu_ else z


def bn_bwd_reduce(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dgamma = sum g * xhat, dbeta = sum g for the gradient g of normalise(x)."""
    xhat = (x - _per_channel(mean)) * _per_channel(rstd)
    return (g * xhat).sum(dim=(0, 2, 3)), g.sum(dim=(0, 2, 3))


def bn_bwd_apply(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    dgamma: Tensor,
    dbeta: Tensor,
    training: bool,
) -> Tensor:
    """dx = gamma * rstd * (g - dbeta / M - xhat * dgamma / M); with fixed statistics gamma * rstd *
    g."""
    scale = _per_channel(rstd if gamma is None else gamma * rstd)
    if not training:
        return scale * g
    count = x.numel() // x.shape[1]
    xhat = (x - _per_channel(mean)) * _per_channel(rstd)
    return scale * (g - _per_channel(dbeta) / count - xhat * (_per_channel(dgamma) / count))


def maxpool_index(z: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """max_pool2d of z and, per output, the window offset kh * kernel + kw of its first maximum.

    The offset is 255 where no gradient passes the ReLU before the pool (pooled value <= 0)."""
    pooled, flat = F.max_pool2d(z, kernel, stride, padding, return_indices=True)
    out_h = torch.arange(pooled.shape[2], device=z.device).view(1, 1, -1, 1)
    out_w = torch.arange(pooled.shape[3], device=z.device).view(1, 1, 1, -1)
    kh = flat // z.shape[3] - (out_h * stride - padding)
    kw = flat % z.shape[3] - (out_w * stride - padding)
    offset = torch.where(pooled <= 0, 255, kh * kernel + kw)
    return pooled, offset.to(torch.uint8)


def maxpool_scatter(
    dz: Tensor, index: Tensor, shape: torch.Size, kernel: int, stride: int, padding: int
) -> Tensor:
    """Gradient of the pooled input: the sum of dz over the windows whose index points at the
    pixel."""
    n, c, h, w = shape
    g = dz.new_zeros((n, c, h + 2 * padding + kernel, w + 2 * padding + kernel))
    rows, cols = dz.shape[2], dz.shape[3]
    for kh in range(kernel):
        for kw in range(kernel):
            hit = torch.where(index == kh * kernel + kw, dz, torch.zeros_like(dz))
            g[:, :, kh : kh + rows * stride : stride, kw : kw + cols * stride : stride] += hit
    return g[:, :, padding : padding + h, padding : padding + w]


def pack_mask(gate: Tensor, inner: int) -> Tensor:
    """Bits of a boolean activation in memory order, least significant first, each row of `inner`
    padded to a byte: uint8 (outer, ceil(inner / 8))."""
    rows = F.pad(gate.reshape(-1, inner).to(torch.uint8), (0, -inner % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=gate.device)
    return (rows.view(rows.shape[0], -1, 8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_mask(mask: Tensor, inner: int) -> Tensor:
    """The inverse of `pack_mask`: bool (outer, inner)."""
    bits = (mask.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :inner].bool()
