"""Groups of arguments of the convolutions' out-variants (docs/kernels.md): what the ops hand to a
backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Normalise(NamedTuple):
    """The per-channel vectors of normalise(x) = (x - mean) * (gamma * rstd) + beta, fp32 (C,)."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor | None = None


class Shortcut(NamedTuple):
    """What a block adds before its last ReLU: x as it is, or normalise(x)."""

    x: Tensor
    norm: Normalise | None = None


class Gradient(NamedTuple):
    """gate(dz): dz where the bit of `mask` is 1, else 0; all of dz when mask is None."""

    dz: Tensor
    mask: Tensor | None = None


class NormGradient(NamedTuple):
    """The backward of normalise(y), which turns its gradient g into y's, dy:

    dy = gamma * rstd * (g - dbeta / M - xhat * dgamma / M), not training: gamma * rstd * g."""

    y: Tensor
    norm: Normalise
    dgamma: Tensor
    dbeta: Tensor
    training: bool


class Previous(NamedTuple):
    """What produced a conv's input: relu(normalise(y) [+ shortcut]).

    mask: bits of that ReLU; None: its gate is recomputed from normalise(y), no shortcut then."""

    y: Tensor
    norm: Normalise
    mask: Tensor | None = None
    shortcut: Shortcut | None = None


class Sums(NamedTuple):
    """Outputs, fp32 (C,): dbeta = sum g, dgamma = sum g * xhat, and the dual shortcut's dgamma."""

    dgamma: Tensor
    dbeta: Tensor
    res_dgamma: Tensor | None = None
