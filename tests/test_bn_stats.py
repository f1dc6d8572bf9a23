"""bn_stats against float64; large means, NaN, Inf; the same bits for any number of threads."""

from __future__ import annotations

import pytest
import torch
from common import (
    BACKENDS,
    Case,
    activation,
    assert_close,
    assert_deterministic,
    backend,
    cases,
    poison_vector,
)

from fastres import reference as ref

EPS = 1e-5


def stats(case: Case, x, eps: float = EPS):
    out = [poison_vector(x.shape[1]) for _ in range(3)]
    case.run.bn_stats(*out, x, eps)
    return out


def check(case: Case, x) -> None:
    truth = ref.bn_stats(x.double(), EPS)
    eager_var, eager_mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    eager = eager_mean, eager_var, (eager_var + EPS).rsqrt()
    size = x.double().abs().amax(dim=(0, 2, 3))
    for name, got, want, yard in zip(
        ("mean", "var", "rstd"), stats(case, x), truth, eager, strict=True
    ):
        # torch sums fp32 in double on the CPU, the contract in fp32: hence the length
        scale = size if name == "mean" else None
        assert_close(name, got, want, yard, scale, length=case.count)


@cases()
def test_bn_stats_fwd_matches_reference(case):
    check(case, activation(case, 1))


@cases(dtypes=("fp32",))
def test_bn_stats_fwd_keeps_variance_under_a_large_mean(case):
    """mean 1e4, std 1 in every second channel: E[x^2] - E[x]^2 in fp32 would lose var."""
    x = activation(case, 2, scale=1.0, shift=0.0)
    x[:, ::2] += 1e4
    check(case, x)
    var = stats(case, x)[1].double()
    truth = ref.bn_stats(x.double(), EPS)[1]
    assert ((var - truth).abs() <= 1e-4 * truth + 1e-12).all()


@cases(dtypes=("fp32",))
def test_bn_stats_fwd_survives_an_outlying_first_value(case):
    """The first value of a tile is an obvious pivot; an outlier there must not spoil the tile."""
    x = activation(case, 3)
    x[0, :, 0, 0] = 300.0
    check(case, x)


@cases(dtypes=("fp32",))
def test_bn_stats_fwd_of_constant_channels_is_exact(case):
    x = torch.full(case.shape, 3.7).contiguous(memory_format=case.layout)
    mean, var, rstd = stats(case, x)
    assert (mean == x[0, 0, 0, 0]).all()
    assert (var == 0).all()
    assert torch.allclose(rstd, torch.tensor(EPS).rsqrt().expand_as(rstd))


@cases(dtypes=("fp32", "bf16"))
def test_bn_stats_fwd_is_deterministic(case):
    x = activation(case, 4)
    assert_deterministic(lambda: dict(zip(("mean", "var", "rstd"), stats(case, x), strict=True)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bn_stats_fwd_propagates_nan_and_inf(name, bad, layout):
    """A bad value makes its own channel's variance NaN, as in torch, and no other channel's."""
    case = Case(name, torch.float32, layout, (2, 20, 5, 3))
    for where in ((0, 3, 0, 0), (1, 3, 4, 2)):
        x = activation(case, 5)
        x[where] = bad
        mean, var, rstd = stats(case, x)
        assert not mean[3].isfinite()
        assert var[3].isnan() and rstd[3].isnan()
        others = torch.arange(20) != 3
        assert mean[others].isfinite().all() and var[others].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_bn_stats_fwd_uses_eps(name):
    case = Case(name, torch.float32, torch.channels_last, (2, 20, 5, 3))
    x = activation(case, 6)
    _, var, rstd = stats(case, x, eps=0.5)
    assert torch.allclose(rstd, (var + 0.5).rsqrt(), rtol=1e-6)
    assert name == backend(name).NAME
