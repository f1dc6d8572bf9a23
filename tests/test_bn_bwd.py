"""bn_bwd_reduce and bn_bwd_apply against float64: every gate and shortcut, frozen and training."""

from __future__ import annotations

import itertools

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
    eager_norm_bwd,
    gate_of,
    gated,
    norm,
    poison,
    poison_mask,
    poison_vector,
)

from fastres import reference as ref

# gate, shortcut: the combinations the contract allows
MODES = [
    ("none", "none"),
    ("mask", "none"),
    ("recompute", "none"),
    ("none", "normalised"),
    ("mask", "identity"),
    ("mask", "normalised"),
]


class Inputs:
    """dz, the gate and both normalisations of one case."""

    def __init__(self, case: Case, gate: str, shortcut: str):
        self.case, self.gate, self.shortcut = case, gate, shortcut
        self.x = activation(case, 1)
        self.dz = activation(case, 3, shift=0.05)
        self.params = norm(case, self.x, 10)
        dual = shortcut == "normalised"
        self.residual = activation(case, 2) if dual else None
        self.res_params = norm(case, self.residual, 20) if dual else (None,) * 4
        self.mask = bits(self.x, 5) if gate == "mask" else None
        self.g = self.dz
        if gate == "mask":
            self.g = gated(self.dz, gate_of(self.mask, self.dz))
        if gate == "recompute":  # compared under the kernel's own gate
            z, mask = poison(self.x), poison_mask(self.x)
            case.run.bn_apply(z, mask, self.x, *self.params, None, *(None,) * 4, True)
            self.g = gated(self.dz, gate_of(mask, self.dz))

    def reduce(self):
        dual = self.shortcut == "normalised"
        out = [poison_vector(self.case.channels) for _ in range(2)]
        out.append(poison_vector(self.case.channels) if dual else None)
        self.case.run.bn_bwd_reduce(
            *out, self.dz, self.mask, self.x, *self.params,
            self.residual, *self.res_params[:2], self.gate,
        )  # fmt: skip
        return out

    def truth(self, residual: bool = False):
        """dgamma, dbeta in float64 of x or of the shortcut."""
        x, params = (self.residual, self.res_params) if residual else (self.x, self.params)
        return ref.bn_bwd_reduce(
            self.g.double(), x.double(), params[0].double(), params[1].double()
        )

    def apply(self, training: bool, res_training: bool, dx=None):
        dgamma, dbeta = (v.float() for v in self.truth())
        res_dgamma = self.truth(residual=True)[0].float() if self.residual is not None else None
        dx = poison(self.x) if dx is None else dx
        dres = None if self.shortcut == "none" else poison(self.x)
        mean, rstd, gamma, beta = self.params
        self.case.run.bn_bwd_apply(
            dx, dres, self.dz, self.mask, self.x, mean, rstd, gamma, beta,
            dgamma, dbeta, self.residual, *self.res_params[:3], res_dgamma,
            self.gate, training, res_training,
        )  # fmt: skip
        return dx, dres


def true_dx(g, x, params, training):
    mean, rstd, gamma, _ = (v.double() for v in params)
    g, x = g.double(), x.double()
    dgamma, dbeta = ref.bn_bwd_reduce(g, x, mean, rstd)
    return ref.bn_bwd_apply(g, x, mean, rstd, gamma, dgamma, dbeta, training)


@pytest.mark.parametrize(("gate", "shortcut"), MODES)
@cases()
def test_bn_bwd_reduce_bwd_matches_reference(case, gate, shortcut):
    i = Inputs(case, gate, shortcut)
    dgamma, dbeta, res_dgamma = i.reduce()
    mean, rstd, gamma, _ = i.params
    _, eager_dgamma, eager_dbeta = eager_norm_bwd(i.g.float(), i.x.float(), mean, rstd, gamma)
    xhat = (i.x.double() - mean.double().view(1, -1, 1, 1)) * rstd.double().view(1, -1, 1, 1)
    size = (i.g.double() * xhat).abs().sum(dim=(0, 2, 3))
    want_dgamma, want_dbeta = i.truth()
    assert_close("dgamma", dgamma, want_dgamma, eager_dgamma, scale=size)
    assert_close("dbeta", dbeta, want_dbeta, eager_dbeta, scale=i.g.double().abs().sum((0, 2, 3)))
    if shortcut == "normalised":
        mean, rstd, gamma, _ = i.res_params
        eager = eager_norm_bwd(i.g.float(), i.residual.float(), mean, rstd, gamma)[1]
        assert_close("res_dgamma", res_dgamma, i.truth(residual=True)[0], eager, scale=size)


@pytest.mark.parametrize(("gate", "shortcut"), MODES)
@cases()
def test_bn_bwd_apply_bwd_matches_reference(case, gate, shortcut):
    i = Inputs(case, gate, shortcut)
    flags = (True, False)
    for training, res_training in itertools.product(
        flags, flags if i.residual is not None else (True,)
    ):
        dx, dres = i.apply(training, res_training)
        label = f"training={training}, res_training={res_training}"
        eager = eager_norm_bwd(i.g, i.x, *i.params[:3], training)[0]
        assert_close(f"dx {label}", dx, true_dx(i.g, i.x, i.params, training), eager)
        if shortcut == "identity":
            assert_same_bits(f"dres {label}", dres, i.g)
        if shortcut == "normalised":
            eager = eager_norm_bwd(i.g, i.residual, *i.res_params[:3], res_training)[0]
            truth = true_dx(i.g, i.residual, i.res_params, res_training)
            assert_close(f"dres {label}", dres, truth, eager)


@pytest.mark.parametrize(("gate", "shortcut"), MODES)
@cases(dtypes=("fp32", "bf16"))
def test_bn_bwd_apply_bwd_may_alias_dz(case, gate, shortcut):
    i = Inputs(case, gate, shortcut)
    want_dx, want_dres = i.apply(True, True)
    dx, dres = i.apply(True, True, dx=i.dz)
    assert dx is i.dz
    assert_same_bits("dx", dx, want_dx)
    if dres is not None:
        assert_same_bits("dres", dres, want_dres)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bn_bwd_apply_bwd_without_gamma(name, layout):
    """gamma None means 1, as does the affine-free shortcut's."""
    case = Case(name, torch.float32, layout, (2, 20, 5, 3))
    i = Inputs(case, "mask", "normalised")
    ones, zeros = torch.ones(20), torch.zeros(20)
    i.params, i.res_params = (*i.params[:2], ones, zeros), (*i.res_params[:2], ones, zeros)
    want_dx, want_dres = i.apply(True, True)
    i.params, i.res_params = (*i.params[:2], None, None), (*i.res_params[:2], None, None)
    dx, dres = i.apply(True, True)
    assert_same_bits("dx", dx, want_dx)
    assert_same_bits("dres", dres, want_dres)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bn_bwd_gates_before_the_product(name, layout):
    """A gated-out NaN or Inf of dz contributes exactly 0; a passing NaN stays in its channel."""
    case = Case(name, torch.float32, layout, (2, 20, 5, 3))
    i = Inputs(case, "mask", "identity")
    gate = torch.ones(case.shape, dtype=torch.bool).contiguous(memory_format=layout)
    gate[:, 4] = False
    i.mask = ref.pack_mask(
        gate.permute(0, 2, 3, 1) if layout == torch.channels_last else gate,
        20 if layout == torch.channels_last else 15,
    )
    i.dz[:, 4] = float("nan")
    i.dz[0, 4, 0, 0] = float("inf")
    i.dz[1, 7, 2, 2] = float("nan")
    i.g = gated(i.dz, gate)
    dgamma, dbeta, _ = i.reduce()
    assert dgamma[4] == 0 and dbeta[4] == 0
    bad = torch.arange(20) == 7
    assert torch.equal(dgamma.isnan(), bad) and torch.equal(dbeta.isnan(), bad)
    dx, dres = i.apply(True, True)
    assert dx[:, ~bad].isfinite().all() and dx[:, bad].isnan().all()
    assert (dres[:, 4] == 0).all() and int(dres.isnan().sum()) == 1


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bn_bwd_reduce_bwd_keeps_a_large_mean(name, layout):
    case = Case(name, torch.float32, layout, (2, 20, 9, 7))
    i = Inputs(case, "mask", "none")
    i.x = activation(case, 8, scale=1.0, shift=1e4)
    i.params = norm(case, i.x, 10)
    got = i.reduce()[0]
    want = i.truth()[0]
    assert ((got.double() - want).abs() <= 1e-5 * i.g.double().abs().sum((0, 2, 3))).all()


@pytest.mark.parametrize(("gate", "shortcut"), MODES)
@cases(dtypes=("fp32", "bf16"))
def test_bn_bwd_is_deterministic(case, gate, shortcut):
    i = Inputs(case, gate, shortcut)

    def outputs():
        reduced = dict(zip(("dgamma", "dbeta", "res_dgamma"), i.reduce(), strict=True))
        applied = dict(zip(("dx", "dres"), i.apply(True, True), strict=True))
        return {k: v for k, v in (reduced | applied).items() if v is not None}

    assert_deterministic(outputs)
