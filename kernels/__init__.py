"""The Triton backend: the functions of docs/kernels.md on CUDA or HIP tensors.

With TRITON_INTERPRET=1 in the environment before the first call they run, slowly, on CPU tensors:
for tests only.
Triton is imported at the first call, not with this package.
"""

from __future__ import annotations

import importlib.util
import os

NAME = "triton"


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def why_missing() -> str | None:
    """None when these kernels can run in this process, otherwise the reason."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    import torch

    if not torch.cuda.is_available():
        return "no CUDA or HIP device, and TRITON_INTERPRET is not 1"
    return None


def bn_stats(mean, var, rstd, x, eps):
    """mean[c], biased var[c] of x over (N, H, W); rstd = 1 / sqrt(var + eps)."""
    from ._bn_stats import bn_stats as run

    run(mean, var, rstd, x, eps)


def bn_apply(
    z, mask, x, mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, relu
):
    """z = act(normalise(x) + r), and the bits of the ReLU's gate."""
    from ._bn_apply import bn_apply as run

    run(
        z, mask, x, mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, relu
    )


def bn_bwd_reduce(
    dgamma, dbeta, res_dgamma, dz, mask, x, mean, rstd, gamma, beta,
    residual, res_mean, res_rstd, gate,
):  # fmt: skip
    """dbeta = sum g, dgamma = sum g * xhat, res_dgamma = sum g * res_xhat."""
    from ._bn_bwd import bn_bwd_reduce as run

    run(
        dgamma, dbeta, res_dgamma, dz, mask, x, mean, rstd, gamma, beta,
        residual, res_mean, res_rstd, gate,
    )  # fmt: skip


def bn_bwd_apply(
    dx, dres, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta,
    residual, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
):  # fmt: skip
    """dx = gamma * rstd * (g - dbeta / M - xhat * dgamma / M), frozen gamma * rstd * g; dres."""
    from ._bn_bwd import bn_bwd_apply as run

    run(
        dx, dres, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta,
        residual, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
    )  # fmt: skip


def add_relu(z, mask, a, b):
    """z = relu(a + b), and the bits of the ReLU's gate."""
    from ._add_relu import add_relu as run

    run(z, mask, a, b)


def relu_bwd(dx, dy, dz, mask):
    """dx = gate(dz) + dy."""
    from ._add_relu import relu_bwd as run

    run(dx, dy, dz, mask)


def bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, kernel, stride, padding):
    """z = maxpool(relu(normalise(x))), and the window offset of each maximum."""
    from ._bn_relu_maxpool import bn_relu_maxpool as run

    run(z, index, x, mean, rstd, gamma, beta, kernel, stride, padding)


def bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, kernel, stride, padding):
    """bn_bwd_reduce with g gathered from the windows that chose each pixel."""
    from ._bn_relu_maxpool import bn_relu_maxpool_bwd_reduce as run

    run(dgamma, dbeta, dz, index, x, mean, rstd, kernel, stride, padding)


def bn_relu_maxpool_bwd_apply(
    dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, kernel, stride, padding, training
):
    """bn_bwd_apply with g gathered from the windows that chose each pixel."""
    from ._bn_relu_maxpool import bn_relu_maxpool_bwd_apply as run

    run(dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, kernel, stride, padding, training)


def conv_missing(device):
    """None when the conv kernels have tiles for this device, otherwise the reason."""
    from ._conv_config import NoTable, arch_of

    try:
        arch_of(device)
    except NoTable as e:
        return str(e)
    return None


def conv_why_not(x, weight, geometry):
    """None when the conv kernels take this conv, otherwise the reason."""
    from ._conv import why_not

    return why_not(x, weight, geometry)


def conv_fprop(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps):
    """y = conv(h) and its statistics, h = x or relu(normalise(x) + shortcut)."""
    from ._conv_fprop import conv_fprop as run

    run(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps)


def conv_fprop_act(z, x, weight, geometry, norm, residual, relu):
    """z = act(normalise(conv(x)) + residual)."""
    from ._conv_fprop import conv_fprop_act as run

    run(z, x, weight, geometry, norm, residual, relu)


def conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev):
    """dx = gate(dgrad(dy) + dres), and the sums of the batch norm before the conv."""
    from ._conv_dgrad import conv_dgrad as run

    run(dx, sums, g, weight, geometry, bn, dres, prev)


def conv_wgrad(dw, g, x, geometry, bn, norm):
    """dw = wgrad(dy, h), h = x or relu(normalise(x))."""
    from ._conv_wgrad import conv_wgrad as run

    run(dw, g, x, geometry, bn, norm)


def conv_bwd_pointwise_why_not(x, weight, geometry, frozen):
    """None when conv_bwd_pointwise takes this conv, otherwise the reason. frozen: with a batch norm
    on fixed statistics behind it."""
    from ._conv_bwd_pointwise import why_not

    return why_not(x, weight, geometry, frozen)


def conv_bwd_pointwise(dx, sums, dw, g, x, weight, geometry, bn, norm, dres, prev):
    """conv_dgrad and conv_wgrad of a 1x1, stride 1 conv in one kernel."""
    from ._conv_bwd_pointwise import conv_bwd_pointwise as run

    run(dx, sums, dw, g, x, weight, geometry, bn, norm, dres, prev)
