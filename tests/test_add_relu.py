"""add_relu and relu_bwd against float64; the mask bit for bit; aliasing; NaN."""

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
    bits,
    cases,
    gate_of,
    gated,
    mask_from,
    poison,
    poison_mask,
)

from fastres import reference as ref


def add_relu(case: Case, a, b, with_mask=True):
    z, mask = poison(a), poison_mask(a) if with_mask else None
    case.run.add_relu(z, mask, a, b)
    return z, mask


def relu_bwd(case: Case, dy, dz, mask):
    dx = poison(dz)
    case.run.relu_bwd(dx, dy, dz, mask)
    return dx


@cases()
def test_add_relu_fwd_matches_reference(case):
    a, b = activation(case, 1, shift=0.0), activation(case, 2, shift=0.0)
    z, mask = add_relu(case, a, b)
    assert_close("z", z, ref.relu(a.double() + b.double()), (a + b).relu())
    assert torch.equal(mask, mask_from(ref.relu_gate(z))), "mask is not where the stored z passes"
    assert_same_bits("z without mask", add_relu(case, a, b, with_mask=False)[0], z)
    assert (z == 0).any() and (z > 0).any()


@pytest.mark.parametrize("with_dy", (False, True))
@cases()
def test_add_relu_bwd_matches_reference(case, with_dy):
    dz, mask = activation(case, 1), bits(activation(case, 1), 2)
    dy = activation(case, 3) if with_dy else None
    dx = relu_bwd(case, dy, dz, mask)
    g = gated(dz, gate_of(mask, dz))
    if dy is None:
        assert_same_bits("dx", dx, g)
    else:
        assert_close("dx", dx, g.double() + dy.double(), g + dy)


@pytest.mark.parametrize("target", ("a", "b"))
@cases(dtypes=("fp32", "bf16"))
def test_add_relu_fwd_may_alias(case, target):
    a, b = activation(case, 1), activation(case, 2)
    want, want_mask = add_relu(case, a, b)
    out, mask = (a if target == "a" else b), poison_mask(a)
    case.run.add_relu(out, mask, a, b)
    assert_same_bits("z", out, want)
    assert_same_bits("mask", mask, want_mask)


@pytest.mark.parametrize("target", ("dy", "dz"))
@cases(dtypes=("fp32", "bf16"))
def test_add_relu_bwd_may_alias(case, target):
    dz, dy = activation(case, 1), activation(case, 3)
    mask = bits(dz, 2)
    want = relu_bwd(case, dy, dz, mask)
    out = dy if target == "dy" else dz
    case.run.relu_bwd(out, dy, dz, mask)
    assert_same_bits("dx", out, want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_add_relu_follows_torch_at_zero_nan_and_inf(name, dtype, layout):
    case = Case(name, dtype, layout, (1, 20, 3, 3))
    a = torch.zeros(case.shape, dtype=dtype).contiguous(memory_format=layout)
    b = torch.zeros_like(a)
    a[:, 1], a[:, 2], a[:, 3] = float("nan"), float("inf"), float("-inf")
    a[:, 4], b[:, 4] = float("inf"), float("-inf")
    a[:, 5], a[:, 6], b[:, 6] = -0.0, 1.0, -1.0
    z, mask = add_relu(case, a, b)
    want = (a + b).relu()
    assert torch.equal(z.float().nan_to_num(nan=7.0), want.float().nan_to_num(nan=7.0))
    assert torch.equal(mask, mask_from(~(want <= 0)))
    dz = torch.full_like(a, float("nan"))
    dx = relu_bwd(case, None, dz, mask)
    assert torch.equal(dx.isnan(), ~(want <= 0)) and (dx[want <= 0] == 0).all()


@cases(dtypes=("bf16",))
def test_add_relu_is_deterministic(case):
    a, b = activation(case, 1), activation(case, 2)

    def outputs():
        z, mask = add_relu(case, a, b)
        return {"z": z, "mask": mask, "dx": relu_bwd(case, a, b, mask)}

    assert_deterministic(outputs)
