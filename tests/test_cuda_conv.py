"""The convolutions of the `cuda` backend: on a Hopper GPU, and on the host shim, where plain loops
stand in for the tensor cores and all around them is the GPU's (tests/cuda_host/conv_gemm.cpp).

Inputs, references and tolerances are those of test_conv.py."""

from __future__ import annotations

from collections import Counter

import pytest
import test_conv as conv
import torch
from common import DTYPES, cuda_convs
from test_conv import Layer, check, empty

from fastres import _cuda, _cuda_cutlass, _cuda_pointwise, counters
from fastres._contract import Gradient, Normalise, Previous, Shortcut

# What each is there for: one tile; two columns of tiles; more tiles than workers, the last
# cluster's second past the end; workers of several tall tiles; the last split of wgrad shorter;
# phases without taps; odd sizes; taps far apart; a window that is not square.
LAYERS = {
    "1x1": Layer(2, 64, 8, 8, 48, 1, 1, 1, 0, 1),
    "1x1 wide": Layer(1, 24, 20, 20, 136, 1, 1, 1, 0, 1),
    "1x1 s2": Layer(2, 16, 9, 9, 40, 1, 1, 2, 0, 1),
    "3x3 many": Layer(2, 16, 24, 24, 72, 3, 3, 1, 1, 1),
    "3x3 tall": Layer(2, 8, 30, 30, 24, 3, 3, 1, 1, 1),
    "3x3 s2": Layer(2, 16, 19, 16, 40, 3, 3, 2, 1, 1),
    "7x7 s2": Layer(1, 8, 15, 14, 16, 7, 7, 2, 3, 1),
    "3x3 d2": Layer(1, 16, 9, 9, 16, 3, 3, 1, 2, 2),
    "3x3 s3 d2": Layer(1, 8, 11, 10, 16, 3, 3, 3, 2, 2),
    "1x3": Layer(1, 8, 6, 9, 16, 1, 3, 1, 0, 1),
}
FEW = ("1x1 wide", "3x3 many", "3x3 s2")


def layers(names=tuple(LAYERS), dtypes=("bf16",)):
    return pytest.mark.parametrize(
        "layer, dtype",
        [
            pytest.param(LAYERS[name], DTYPES[d], id=f"cuda-{d}-{name.replace(' ', '-')}")
            for d in dtypes
            for name in names
        ],
    )


@pytest.fixture
def module(gpu):
    """Without the pointwise kernels, which have tests of their own."""
    cuda_convs()
    return _cuda_cutlass


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN: outputs and workspaces that are not written show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@layers(dtypes=("bf16", "fp16"))
def test_fprop(module, layer, dtype, norm):
    outputs, inputs = conv.fprop_case(layer, dtype, norm)
    check(module, dtype, outputs, conv._fprop, *inputs)


@layers(FEW)
def test_fprop_without_statistics(module, layer, dtype):
    outputs, inputs = conv.fprop_case(layer, dtype, True, stats=False)
    check(module, dtype, outputs, conv._fprop, *inputs)


@pytest.mark.parametrize("kind", ["identity", "dual", "identity no mask"])
@layers(("1x1", "1x1 wide"))
def test_fprop_writes_the_block_output(module, layer, dtype, kind):
    outputs, (x, w, geometry, norm) = conv.fprop_case(layer, dtype, True)
    random = conv.Random(dtype, "block", layer)
    res = random.activation(*x.shape)
    shortcut = Shortcut(res, random.norm(layer.c) if kind == "dual" else None)
    outputs["z"] = tuple(x.shape)
    if kind != "identity no mask":
        outputs["mask"] = conv.mask_shape(x)
    check(module, dtype, outputs, conv._fprop, x, w, geometry, norm, shortcut)


@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (False, False)])
@layers(("1x1 wide", "3x3 tall", "3x3 s2"), dtypes=("bf16", "fp16"))
def test_fprop_act(module, layer, dtype, residual, relu):
    _, (x, w, geometry, _) = conv.fprop_case(layer, dtype, False)
    random = conv.Random(dtype, "act", layer)
    res = random.activation(*layer.out) if residual else None
    args = x, w, geometry, random.norm(layer.k), res, relu
    check(module, dtype, {"z": layer.out}, conv._act, *args)


@layers(("3x3 many", "3x3 tall"))
def test_statistics_of_large_means(module, layer, dtype):
    """Mean 128, steps of 0.5 (bf16 has none smaller there): Chan's merge, not E[y^2] - E[y]^2."""
    _, (x, w, geometry, _) = conv.fprop_case(layer, dtype, False)
    w = torch.zeros_like(w)
    w[:, 0, 1, 1] = 1.0
    x[:, 0] = (x[:, 0] * 2).round() / 2 + 192
    y = empty(layer.out, dtype)
    stats = torch.empty(3, layer.k)
    module.conv_fprop(y, stats, None, None, x, w, geometry, None, None, conv.EPS)
    want = y.double().var(dim=(0, 2, 3), unbiased=False)
    assert 0.3 < want.min() <= want.max() < 2
    torch.testing.assert_close(stats[1].double(), want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("form", conv.FORMS, ids=lambda f: "-".join(map(str, f)))
@layers(("1x1 wide", "1x1 s2", "3x3 tall", "3x3 s2"))
def test_dgrad(module, layer, dtype, form):
    mode, masked, residual, previous = form
    random, x, w, g, bn = conv.gradient_case(layer, dtype, mode, masked)
    dres, prev = conv.residual_of(random, x, residual), conv.previous_of(random, x, previous)
    outputs = conv.gradient_outputs(x, previous)
    check(module, dtype, outputs, conv._dgrad, g, w, layer.geometry, bn, dres, prev)


@layers(dtypes=("bf16", "fp16"))
def test_dgrad_of_every_shape(module, layer, dtype):
    random, x, w, g, bn = conv.gradient_case(layer, dtype, "bn", False)
    prev = conv.previous_of(random, x, "dual")
    outputs = conv.gradient_outputs(x, "dual")
    check(module, dtype, outputs, conv._dgrad, g, w, layer.geometry, bn, None, prev)


@pytest.mark.parametrize("mode, masked, norm", [
    ("none", False, False), ("none", True, True), ("bn", True, True), ("frozen", True, False),
])  # fmt: skip
@layers(FEW)
def test_wgrad(module, layer, dtype, mode, masked, norm):
    random, x, w, g, bn = conv.gradient_case(layer, dtype, mode, masked)
    affine = random.norm(layer.c) if norm else None
    outputs = {"dw": tuple(w.shape)}
    check(module, dtype, outputs, conv._wgrad, g, x, layer.geometry, bn, affine)


@layers(dtypes=("bf16", "fp16"))
def test_wgrad_of_every_shape(module, layer, dtype):
    _, x, w, g, bn = conv.gradient_case(layer, dtype, "none", False)
    check(module, dtype, {"dw": tuple(w.shape)}, conv._wgrad, g, x, layer.geometry, bn, None)


@layers(("1x1", "1x1 wide"))
def test_pointwise_backward_forms_dy_once(module, layer, dtype):
    random, x, w, g, bn = conv.gradient_case(layer, dtype, "bn", True)
    dres, prev = conv.residual_of(random, x, "mask"), conv.previous_of(random, x, "dual")
    outputs = {**conv.gradient_outputs(x, "dual"), "dw": tuple(w.shape)}
    norm = random.norm(layer.c)
    check(module, dtype, outputs, conv._both, g, x, w, layer.geometry, bn, norm, dres, prev)


@layers(("3x3 s2",))
def test_any_weight_strides_and_unaligned_tensors(module, layer, dtype):
    """Copies that the copy engine needs, counted; the results have the caller's strides."""
    before = Counter(counters.events())
    outputs, (x, w, geometry, norm) = conv.fprop_case(layer, dtype, True)

    def shifted(t):
        store = torch.empty(t.numel() + 1, dtype=t.dtype)
        view = store[1:].as_strided(t.shape, t.stride())
        view.copy_(t)
        assert view.data_ptr() % 16
        return view

    check(module, dtype, outputs, conv._fprop, shifted(x), w.contiguous(), geometry, norm)
    random, x, w, g, bn = conv.gradient_case(layer, dtype, "none", False)
    prev = conv.previous_of(random, x, "mask")
    prev = Previous(shifted(prev.y), prev.norm, prev.mask, prev.shortcut)
    args = Gradient(shifted(g.dz)), w.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), geometry
    check(module, dtype, conv.gradient_outputs(x, "mask"), conv._dgrad, *args, bn, None, prev)
    dw, want = torch.empty_like(w).contiguous(), torch.empty_like(w)
    dw.fill_(float("nan"))
    module.conv_wgrad(dw, g, x, geometry, None, None)
    module.conv_wgrad(want, g, x, geometry, None, None)
    assert dw.is_contiguous() and torch.equal(dw, want) and torch.isfinite(dw).all()
    copies = Counter(counters.events()) - before
    aligned = "cuda convolution: copied a tensor that is not aligned to 16 bytes"
    strides = "cuda convolution: copied a result to a tensor of other strides or alignment"
    assert copies[aligned] == 2 and copies[strides] == 2, copies  # dw, and want, like w


@layers(FEW)
def test_two_runs_agree_bit_for_bit(module, layer, dtype):
    import cuda_host

    def run(order):
        cuda_host.set_order(order)
        outputs, inputs = conv.fprop_case(layer, dtype, False)
        out = {k: empty(v, dtype) for k, v in outputs.items()}
        conv._fprop(module, out, *inputs)
        random, x, w, g, bn = conv.gradient_case(layer, dtype, "bn", True)
        prev = conv.previous_of(random, x, "dual")
        out |= {k: empty(v, dtype) for k, v in conv.gradient_outputs(x, "dual").items()}
        out["dw"] = empty(tuple(w.shape), dtype)
        conv._dgrad(module, out, g, w, layer.geometry, bn, None, prev)
        conv._wgrad(module, out, g, x, layer.geometry, bn, None)
        cuda_host.set_order(0)
        return out

    first = run(0)
    for order in (1, 7):
        again = run(order)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_nan_and_inf_propagate(module):
    layer, dtype = LAYERS["3x3 many"], torch.bfloat16
    _, (x, w, geometry, _) = conv.fprop_case(layer, dtype, False)
    x[1, 3, 4, 4] = float("nan")
    y, stats = empty(layer.out, dtype), torch.empty(3, layer.k)
    module.conv_fprop(y, stats, None, None, x, w, geometry, None, None, conv.EPS)
    assert y[1, :, 3:6, 3:6].isnan().all() and stats[1].isnan().all()
    assert y.isnan().sum() == 9 * layer.k
    unit = Normalise(*(torch.ones(layer.k) for _ in range(4)))
    z = empty(layer.out, dtype)
    module.conv_fprop_act(z, x, w, geometry, unit, None, True)
    assert z[1, :, 3:6, 3:6].isnan().all()


@pytest.mark.parametrize("name", ["1x1 wide", "1x1 s2", "3x3 many"], ids=lambda n: f"cuda-{n}")
def test_the_backend_gives_each_conv_to_its_kernels(module, name, monkeypatch):
    """1x1 of stride 1 to the pointwise kernels, where every tensor lies at 16 bytes."""
    layer, dtype, asked = LAYERS[name], torch.bfloat16, []
    for module in (_cuda_pointwise, _cuda_cutlass):
        for f in ("conv_fprop", "conv_fprop_act", "conv_dgrad", "conv_wgrad"):
            monkeypatch.setattr(module, f, lambda *_, m=module: asked.append(m))
    x, w = conv.fprop_case(layer, dtype, False)[1][:2]
    y, norm = empty(layer.out, dtype), conv.Random(dtype).norm(layer.c)
    _cuda.conv_fprop(y, None, None, None, x, w, layer.geometry, norm, None, conv.EPS)
    _cuda.conv_fprop_act(y, x, w, layer.geometry, norm, None, True)
    z = empty(tuple(x.shape), dtype)
    _cuda.conv_fprop(y, None, z, None, x, w, layer.geometry, norm, Shortcut(x), conv.EPS)
    random, x, w, g, bn = conv.gradient_case(layer, dtype, "bn", True)
    dres, prev = conv.residual_of(random, x, "mask"), conv.previous_of(random, x, "dual")
    _cuda.conv_dgrad(x, None, g, w, layer.geometry, bn, dres, prev)
    _cuda.conv_wgrad(w, g, x, layer.geometry, bn, None)
    first = _cuda_pointwise if layer.pointwise else _cuda_cutlass
    assert asked == [first] * 5
    odd = torch.empty(y.numel() + 1, dtype=dtype)[1:].as_strided(y.shape, y.stride())
    _cuda.conv_wgrad(w, Gradient(odd), x, layer.geometry, None, None)  # copies what it must
    assert asked[-1] is _cuda_cutlass


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "channels 12 and 16": (Layer(1, 12, 6, 6, 16, 3, 3, 1, 1, 1), torch.bfloat16),
    "channels 8 and 20": (Layer(1, 8, 6, 6, 20, 3, 3, 1, 1, 1), torch.bfloat16),
    "float32": (Layer(1, 8, 6, 6, 16, 3, 3, 1, 1, 1), torch.float32),
    "groups=2": (Layer(1, 16, 6, 6, 16, 3, 3, 1, 1, 1, 2), torch.bfloat16),
    "strides up to 8": (Layer(1, 8, 40, 40, 16, 1, 1, 9, 0, 1), torch.bfloat16),
    "im2col": (Layer(1, 8, 300, 300, 16, 3, 3, 1, 128, 128), torch.bfloat16),
}


@pytest.mark.parametrize("reason", REFUSED, ids=lambda r: f"cuda-{r.replace(' ', '-')}")
def test_refuses_with_a_reason(module, reason):
    layer, dtype = REFUSED[reason]
    x = empty((layer.n, layer.c, layer.h, layer.w), dtype)
    w = torch.empty(layer.k, layer.c // layer.groups, layer.r, layer.s, dtype=dtype)
    assert reason in module.conv_why_not(x, w, layer.geometry)
    if "channels" in reason or "im2col" in reason:  # asked for all the same
        y = empty(layer.out, dtype)
        with pytest.raises(ValueError, match=f"conv_fprop on .*{reason}"):
            module.conv_fprop(y, None, None, None, x, w, layer.geometry, None, None, conv.EPS)


GROUPED = {"3x3": (3, 1, 2, 8), "1x1": (1, 0, 2, 8), "1x1, a weight too short": (1, 0, 1, 8)}


@pytest.mark.parametrize("form", GROUPED, ids=lambda f: f"cuda-{f.replace(' ', '-')}")
def test_groups_are_not_read_past_the_weights_end(module, form):
    """Asked for all the same, as the ops do not."""
    r, padding, groups, of_group = GROUPED[form]
    geometry = [1, 1, padding, padding, 1, 1, groups]
    x, w = empty((1, 16, 4, 4), torch.bfloat16), empty((16, of_group, r, r), torch.bfloat16)
    said = rf"{groups} groups, 16 channels and a weight of \(16, {of_group}, {r}, {r}\)"
    calls = [
        lambda m: m.conv_fprop(x, None, None, None, x, w, geometry, None, None, conv.EPS),
        lambda m: m.conv_fprop_act(x, x, w, geometry, None, None, False),
        lambda m: m.conv_dgrad(x, None, Gradient(x), w, geometry, None, None, None),
        lambda m: m.conv_wgrad(w, Gradient(x), x, geometry, None, None),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=said):
            call(_cuda)


def test_nchw_is_refused(module):
    x, w = torch.empty(1, 8, 4, 4, dtype=torch.bfloat16), torch.empty(8, 8, 1, 1)
    assert "NCHW" in module.conv_why_not(x, w, [1, 1, 0, 0, 1, 1, 1])
    reason = module.conv_bwd_pointwise_why_not(x, w, [1, 1, 0, 0, 1, 1, 1], False)
    assert "one after the other" in reason


def test_why_the_convolutions_are_missing(monkeypatch):
    """No device is needed for the reasons."""
    monkeypatch.setattr(_cuda, "_host", None)
    monkeypatch.setattr(_cuda_cutlass, "built", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    assert "an A100 is sm_80" in _cuda_cutlass.conv_missing(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _cuda_cutlass.conv_missing(torch.device("cuda")) is None
