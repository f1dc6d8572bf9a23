"""The `cpu` backend: the functions of docs/kernels.md on the C++ kernels of fastres._C.

Addresses and sizes only. Nothing is checked here (fastres/ops does) and nothing is allocated.
The C++ functions release the GIL, run on torch's thread pool and give the same bits for any number
of threads."""

from __future__ import annotations

from . import _native
from ._arguments import GATE, pool_sizes, ptr, sizes

NAME = "cpu"

_C = _native.module()


def bn_stats(mean, var, rstd, x, eps):
    """mean[c], biased var[c] of x over (N, H, W); rstd = 1 / sqrt(var + eps)."""
    _C.bn_stats(
        mean.data_ptr(), var.data_ptr(), rstd.data_ptr(), x.data_ptr(), float(eps), *sizes(x)
    )


def bn_apply(
    z, mask, x, mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, relu
):
    """z = act(normalise(x) + r), and the bits of the ReLU's gate."""
    _C.bn_apply(
        z.data_ptr(), ptr(mask), x.data_ptr(), ptr(mean), ptr(rstd), ptr(gamma), ptr(beta),
        ptr(residual), ptr(res_mean), ptr(res_rstd), ptr(res_gamma), ptr(res_beta),
        res_mean is not None, bool(relu), *sizes(x),
    )  # fmt: skip


def bn_bwd_reduce(
    dgamma, dbeta, res_dgamma, dz, mask, x, mean, rstd, gamma, beta,
    residual, res_mean, res_rstd, gate,
):  # fmt: skip
    """dbeta = sum g, dgamma = sum g * xhat, res_dgamma = sum g * res_xhat."""
    _C.bn_bwd_reduce(
        dgamma.data_ptr(), dbeta.data_ptr(), ptr(res_dgamma), dz.data_ptr(), ptr(mask),
        x.data_ptr(), ptr(mean), ptr(rstd), ptr(gamma), ptr(beta),
        ptr(residual), ptr(res_mean), ptr(res_rstd), GATE[gate], *sizes(x),
    )  # fmt: skip


def bn_bwd_apply(
    dx, dres, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta,
    residual, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
):  # fmt: skip
    """dx = gamma * rstd * (g - dbeta / M - xhat * dgamma / M), or gamma * rstd * g; dres alike."""
    _C.bn_bwd_apply(
        dx.data_ptr(), ptr(dres), dz.data_ptr(), ptr(mask), x.data_ptr(), ptr(mean), ptr(rstd),
        ptr(gamma), ptr(beta), ptr(dgamma), ptr(dbeta), ptr(residual), ptr(res_mean),
        ptr(res_rstd), ptr(res_gamma), ptr(res_dgamma), GATE[gate], bool(training),
        res_mean is not None, bool(res_training), *sizes(x),
    )  # fmt: skip


def add_relu(z, mask, a, b):
    """z = relu(a + b), and the bits of the ReLU's gate."""
    _C.add_relu(z.data_ptr(), ptr(mask), a.data_ptr(), b.data_ptr(), *sizes(a))


def relu_bwd(dx, dy, dz, mask):
    """dx = gate(dz) + dy."""
    _C.relu_bwd(dx.data_ptr(), ptr(dy), dz.data_ptr(), mask.data_ptr(), *sizes(dz))


def bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, kernel, stride, padding):
    """z = maxpool(relu(normalise(x))), and the window offset of each maximum."""
    _C.bn_relu_maxpool(
        z.data_ptr(), ptr(index), x.data_ptr(), ptr(mean), ptr(rstd), ptr(gamma), ptr(beta),
        kernel, stride, padding, *pool_sizes(x, z),
    )  # fmt: skip


def bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, kernel, stride, padding):
    """bn_bwd_reduce with g gathered from the windows that chose each pixel."""
    _C.bn_relu_maxpool_bwd_reduce(
        dgamma.data_ptr(), dbeta.data_ptr(), dz.data_ptr(), index.data_ptr(), x.data_ptr(),
        ptr(mean), ptr(rstd), kernel, stride, padding, *pool_sizes(x, dz),
    )  # fmt: skip


def bn_relu_maxpool_bwd_apply(
    dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, kernel, stride, padding, training
):
    """bn_bwd_apply with g gathered from the windows that chose each pixel."""
    _C.bn_relu_maxpool_bwd_apply(
        dx.data_ptr(), dz.data_ptr(), index.data_ptr(), x.data_ptr(), ptr(mean), ptr(rstd),
        ptr(gamma), ptr(dgamma), ptr(dbeta), kernel, stride, padding, bool(training),
        *pool_sizes(x, dz),
    )  # fmt: skip
