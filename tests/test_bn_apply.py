"""bn_apply against float64: every shortcut, the mask bit for bit, aliasing, NaN."""

from __future__ import annotations

import pytest
import torch
from common import (
    BACKENDS,
    Case,
    activation,
    assert_close,
    assert_deterministic,
    assert_same_bits,
    cases,
    eager_norm,
    mask_from,
    norm,
    poison,
    poison_mask,
)

from fastres import reference as ref

SHORTCUTS = ("none", "identity", "normalised")


def arguments(case: Case, shortcut: str):
    """x, (mean, rstd, gamma, beta), residual, (res_...)."""
    x = activation(case, 1)
    params = norm(case, x, 10)
    residual = None if shortcut == "none" else activation(case, 2)
    res_params = norm(case, residual, 20) if shortcut == "normalised" else (None,) * 4
    return x, params, residual, res_params


def apply(case: Case, args, relu=True, with_mask=True):
    x, params, residual, res_params = args
    z = poison(x)
    mask = poison_mask(x) if with_mask else None
    case.run.bn_apply(z, mask, x, *params, residual, *res_params, relu)
    return z, mask


def double(values):
    return tuple(None if v is None else v.double() for v in values)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@cases()
def test_bn_apply_fwd_matches_reference(case, shortcut):
    args = x, params, residual, res_params = arguments(case, shortcut)
    z, mask = apply(case, args)
    truth = ref.bn_apply(
        x.double(), *double(params), *double((residual,)), *double(res_params), True
    )
    eager = eager_norm(x, *params)
    if shortcut == "identity":
        eager = eager + residual
    if shortcut == "normalised":
        eager = eager + eager_norm(residual, *res_params)
    assert_close("z", z, truth, eager.relu())
    assert torch.equal(mask, mask_from(ref.relu_gate(z))), "mask is not where the stored z passes"
    # the mask is an extra output, not another computation
    assert_same_bits("z without mask", apply(case, args, with_mask=False)[0], z)
    linear = apply(case, args, relu=False, with_mask=False)[0]
    assert_same_bits("relu(z without relu)", ref.relu(linear), z)
    assert (linear < 0).any(), "the case never reaches the ReLU's flat side"


@cases(shapes=[(2, 35, 7, 7)])
def test_bn_apply_fwd_leaves_out_what_is_none(case):
    """No statistics: a plain affine. No gamma: 1. No beta: 0."""
    x, (mean, rstd, gamma, beta), residual, res = arguments(case, "normalised")
    for params in ((None, None, gamma, beta), (mean, rstd, None, None), (None, None, None, beta)):
        z = apply(case, (x, params, None, (None,) * 4), relu=False, with_mask=False)[0]
        ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
        filled = [
            v if v is not None else d
            for v, d in zip(params, (zeros, ones, ones, zeros), strict=True)
        ]
        truth = ref.bn_apply(x.double(), *double(params), relu_=False)
        assert_close(f"z {[v is None for v in params]}", z, truth, eager_norm(x, *filled))
    res = (res[0], res[1], None, None)
    z = apply(case, (x, (mean, rstd, gamma, beta), residual, res))[0]
    truth = ref.bn_apply(
        x.double(), *double((mean, rstd, gamma, beta)), residual.double(), *double(res)
    )
    eager = eager_norm(x, mean, rstd, gamma, beta) + eager_norm(residual, *res)
    assert_close("z, shortcut without affine", z, truth, eager.relu())


@pytest.mark.parametrize("target", ("x", "residual"))
@cases(dtypes=("fp32", "bf16"))
def test_bn_apply_fwd_may_alias(case, target):
    x, params, residual, res_params = arguments(case, "identity")
    z, mask = apply(case, (x, params, residual, res_params))
    out = x if target == "x" else residual
    mask_again = poison_mask(x)
    case.run.bn_apply(out, mask_again, x, *params, residual, *res_params, True)
    assert_same_bits("z", out, z)
    assert_same_bits("mask", mask_again, mask)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bn_apply_fwd_keeps_large_mean_nan_inf_and_zero(name, layout, dtype):
    """mean 1e4, std 1 comes out right. NaN passes the ReLU, -inf and exact 0 do not."""
    case = Case(name, dtype, layout, (1, 20, 3, 3))
    x = torch.zeros(case.shape, dtype=dtype).contiguous(memory_format=layout)
    x[:, 1] = float("nan")
    x[:, 2] = float("inf")
    x[:, 3] = float("-inf")
    x[:, 4] = 1e4
    mean = torch.zeros(20)
    mean[4] = x[0, 4, 0, 0].item() - 1.0
    params = (mean, torch.ones(20), torch.ones(20), torch.zeros(20))
    z, mask = apply(case, (x, params, None, (None,) * 4))
    want = torch.zeros(20)
    want[1], want[2], want[4] = float("nan"), float("inf"), 1.0
    assert torch.equal(z[0, :, 1, 1].float().nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    assert torch.equal(
        mask,
        mask_from(
            (~(want <= 0)).view(1, 20, 1, 1).expand(case.shape).contiguous(memory_format=layout)
        ),
    )
    assert not torch.signbit(z[:, 0].float()).any(), "relu(0) is +0"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bn_apply_fwd_rounds_to_nearest_even(name, dtype):
    """Every kind of value through the store: ties, subnormals, overflow, the smallest normal."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    step = bits[~bits.isnan()].float()
    near = torch.nextafter(step, torch.full_like(step, float("inf")))
    values = torch.cat([step, near, (step + near.roll(-1)) / 2, torch.randn(1000) * 1e-7])
    values = values[: values.numel() // 8 * 8].view(1, 8, -1, 1)
    # a tiny fp32 value comes in through beta: z = 0 * 1 + beta is stored in 16 bits
    case = Case(name, dtype, torch.channels_last, (1, values.numel(), 1, 1))
    x = torch.zeros(case.shape, dtype=dtype)
    z = apply(case, (x, (None, None, None, values.reshape(-1)), None, (None,) * 4), False, False)[0]
    want = (values.reshape(-1) + 0.0).to(dtype)
    assert torch.equal(z.reshape(-1).nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@cases(dtypes=("bf16",))
def test_bn_apply_fwd_is_deterministic(case, shortcut):
    args = arguments(case, shortcut)
    assert_deterministic(lambda: dict(zip(("z", "mask"), apply(case, args), strict=True)))
