"""bn_relu_maxpool and its backward against float64; the index exactly, on ties and NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import (
    BACKENDS,
    POOLS,
    Case,
    activation,
    assert_close,
    assert_deterministic,
    cases,
    eager_norm,
    eager_norm_bwd,
    norm,
    poison,
    poison_vector,
    pool_shape,
)

from fastres import reference as ref

SHAPES = [(2, 35, 7, 7), (1, 1, 5, 3), (1, 20, 9, 6), (2, 5, 21, 18)]
# the CUDA C++ kernels of a ResNet's stem take 8 channels a thread
STEM = {"cpu": SHAPES, "triton": SHAPES, "cuda": [*SHAPES, (2, 72, 9, 7)]}
IDS = [f"k{k}s{s}p{p}" for k, s, p in POOLS]


def pool(case: Case, x, params, geometry, with_index=True):
    shape = pool_shape(x.shape, *geometry)
    z = poison(x, shape)
    index = poison(x, shape, torch.uint8) if with_index else None
    case.run.bn_relu_maxpool(z, index, x, *params, *geometry)
    return z, index


def backward(case: Case, dz, index, x, params, geometry, training):
    mean, rstd, gamma, _ = params
    dgamma, dbeta, dx = poison_vector(x.shape[1]), poison_vector(x.shape[1]), poison(x)
    case.run.bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, *geometry)
    case.run.bn_relu_maxpool_bwd_apply(
        dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, *geometry, training
    )
    return dx, dgamma, dbeta


@pytest.mark.parametrize("geometry", POOLS, ids=IDS)
@cases(shapes=STEM)
def test_bn_relu_maxpool_fwd_matches_reference(case, geometry):
    x = activation(case, 1)
    params = norm(case, x, 10)
    z, index = pool(case, x, params, geometry)
    pre = ref.bn_apply(x.double(), *(v.double() for v in params), relu_=True)
    truth = F.max_pool2d(pre, *geometry)
    eager = F.max_pool2d(eager_norm(x, *params).relu(), *geometry)
    assert_close("z", z, truth, eager)
    assert torch.equal(index == 255, z <= 0), "index is not 255 exactly where z <= 0"
    # the value at the index is the maximum (which of two near-equal ones is rounding's choice)
    chosen = ref.maxpool_scatter(torch.ones_like(truth), index, x.shape, *geometry) > 0
    kept = torch.where(chosen, pre, torch.zeros_like(pre))
    assert_close("value at index", F.max_pool2d(kept, *geometry).to(z.dtype), truth, eager)
    assert torch.equal(pool(case, x, params, geometry, with_index=False)[0], z)


@pytest.mark.parametrize("geometry", POOLS, ids=IDS)
@cases(shapes=SHAPES[:3])
def test_bn_relu_maxpool_fwd_index_is_torchs_on_ties_and_nan(case, geometry):
    """Small whole numbers are exact in every dtype: torch's index, on many ties and a few NaN."""
    x = activation(case, 2, scale=1.2, shift=0.5).float().round()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.05] = float("nan")
    x = x.to(case.dtype).contiguous(memory_format=case.layout)
    ones, zeros = torch.ones(case.channels), torch.zeros(case.channels)
    z, index = pool(case, x, (zeros, ones, ones, zeros), geometry)
    want_z, want_index = ref.maxpool_index(x.float().relu(), *geometry)
    assert torch.equal(z.float().nan_to_num(nan=99.0), want_z.nan_to_num(nan=99.0))
    assert torch.equal(index, want_index)


@pytest.mark.parametrize("geometry", POOLS, ids=IDS)
@cases(shapes=STEM)
def test_bn_relu_maxpool_bwd_matches_reference(case, geometry):
    x = activation(case, 1)
    params = mean, rstd, gamma, _ = norm(case, x, 10)
    _, index = pool(case, x, params, geometry)
    dz = activation(case, 3, shape=pool_shape(x.shape, *geometry))
    g = ref.maxpool_scatter(dz.double(), index, x.shape, *geometry)
    wide = [v.double() for v in (mean, rstd, gamma)]
    true_dgamma, true_dbeta = ref.bn_bwd_reduce(g, x.double(), *wide[:2])
    for training in (True, False):
        dx, dgamma, dbeta = backward(case, dz, index, x, params, geometry, training)
        truth = ref.bn_bwd_apply(g, x.double(), *wide, true_dgamma, true_dbeta, training)
        eager_g = ref.maxpool_scatter(dz, index, x.shape, *geometry)
        eager_g = eager_g.contiguous(memory_format=case.layout)
        eager = eager_norm_bwd(eager_g, x, mean, rstd, gamma, training)
        sums = eager_norm_bwd(g.float(), x.float(), mean, rstd, gamma)
        size = g.abs().sum((0, 2, 3))
        assert_close("dgamma", dgamma, true_dgamma, sums[1], scale=size)
        assert_close("dbeta", dbeta, true_dbeta, sums[2], scale=size)
        assert_close(f"dx training={training}", dx, truth, eager[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bn_relu_maxpool_bwd_gates_before_the_product(name, layout):
    """A NaN in dz where no gradient passes contributes nothing."""
    case = Case(name, torch.float32, layout, (1, 20, 8, 8))
    x = activation(case, 1)
    params = norm(case, x, 10)
    geometry = (3, 2, 1)
    _, index = pool(case, x, params, geometry)
    index[:, 4] = 255
    dz = activation(case, 3, shape=pool_shape(x.shape, *geometry))
    dz[:, 4] = float("nan")
    dx, dgamma, dbeta = backward(case, dz, index, x, params, geometry, True)
    assert dgamma[4] == 0 and dbeta[4] == 0 and (dx[:, 4] == 0).all()
    assert dx.isfinite().all()


@cases(dtypes=("fp32", "bf16"), shapes=STEM)
def test_bn_relu_maxpool_is_deterministic(case):
    x = activation(case, 1)
    params = norm(case, x, 10)
    dz = activation(case, 3, shape=pool_shape(x.shape, 3, 2, 1))

    def outputs():
        z, index = pool(case, x, params, (3, 2, 1))
        dx, dgamma, dbeta = backward(case, dz, index, x, params, (3, 2, 1), True)
        return {"z": z, "index": index, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    assert_deterministic(outputs)
