"""The convolution kernels at their limits: cuts, rows past 2^31 elements, repeatability, refusals,
precision. Cases and criterion are those of test_conv.py."""

from __future__ import annotations

import itertools

import pytest
import test_conv
import torch
from common import table
from test_conv import (
    EPS,
    FEW,
    LAYERS,
    Layer,
    _both,
    _dgrad,
    _fprop,
    _wgrad,
    check,
    empty,
    fprop_case,
    gradient_case,
    gradient_outputs,
    layers,
    previous_of,
    residual_of,
)

from fastres._contract import Gradient, Sums

poison, triton = test_conv.poison, test_conv.triton  # fixtures

# One program that walks over many tiles, and many with one; the tiles of sm_90.
TABLES = {
    "one program": {"programs": 1, "block_m": 16},
    "many programs": {"programs": 4096, "block_m": 16, "block_n": 32},
    "sm_90 tiles": {"block_m": 128, "block_n": 128, "stats_n": (128, 128)},
}


@pytest.mark.parametrize("changes", TABLES)
@layers(("1x1 odd", "3x3", "3x3 s2"), ("bf16",))
def test_cuts(triton, layer, dtype, changes):
    with table(**TABLES[changes]):
        outputs, inputs = fprop_case(layer, dtype, True)
        check(triton, dtype, outputs, _fprop, *inputs)
        random, x, w, g, bn = gradient_case(layer, dtype, "bn", True)
        prev = previous_of(random, x, "dual")
        outputs = gradient_outputs(x, "dual")
        check(triton, dtype, outputs, _dgrad, g, w, layer.geometry, bn, None, prev)
        outputs = {"dw": tuple(w.shape)}
        check(triton, dtype, outputs, _wgrad, g, x, layer.geometry, bn, random.norm(layer.c))
        if layer.pointwise:
            outputs = {**gradient_outputs(x, "dual"), "dw": tuple(w.shape)}
            args = (g, x, w, layer.geometry, bn, None, None, prev)
            check(triton, dtype, outputs, _both, *args)


def test_unaligned_tensors_are_loaded_by_pointer(triton):
    """A view that does not start at 16 bytes has no tensor descriptor."""
    layer, dtype = LAYERS["1x1"], torch.bfloat16
    outputs, (x, w, geometry, norm) = fprop_case(layer, dtype, True)
    store = torch.empty(x.numel() + 1, dtype=dtype)
    view = store[1:].as_strided(x.shape, x.stride())
    view.copy_(x)
    assert view.data_ptr() % 16
    check(triton, dtype, outputs, _fprop, view, w, geometry, norm)


@layers(FEW, ("bf16",))
def test_64_bit_rows_give_the_same_bits(triton, layer, dtype, monkeypatch):
    """What tensors past 2^31 elements run."""
    from fastres.kernels import _conv_bwd_pointwise, _conv_dgrad, _conv_fprop, _conv_wgrad

    def run():
        outputs, inputs = fprop_case(layer, dtype, True)
        out = {k: empty(v, dtype) for k, v in outputs.items()}
        _fprop(triton, out, *inputs)
        random, x, w, g, bn = gradient_case(layer, dtype, "bn", True)
        dres, prev = residual_of(random, x, "mask"), previous_of(random, x, "dual")
        for call in (_dgrad, *([_both] if layer.pointwise else [])):
            made = {k: empty(v, dtype) for k, v in gradient_outputs(x, "dual").items()}
            made["dw"] = empty(tuple(w.shape), dtype)
            if call is _dgrad:
                _dgrad(triton, made, g, w, layer.geometry, bn, dres, prev)
                _wgrad(triton, made, g, x, layer.geometry, bn, None)
            else:
                _both(triton, made, g, x, w, layer.geometry, bn, None, dres, prev)
            out |= {f"{call.__name__} {k}": v for k, v in made.items()}
        return out

    narrow = run()
    asked = []
    for module in (_conv_fprop, _conv_dgrad, _conv_wgrad, _conv_bwd_pointwise):
        monkeypatch.setattr(module, "wide", lambda *tensors: asked.append(1) or True)
    wide = run()
    assert len(asked) >= 3
    assert all(torch.equal(narrow[k], wide[k]) for k in narrow)


def test_64_bit_rows_of_images_give_the_same_bits(triton, monkeypatch):
    from fastres.kernels import _conv_few

    layer, dtype = LAYERS["images"], torch.bfloat16
    outputs, inputs = fprop_case(layer, dtype, False)
    _, x, w, g, bn = gradient_case(layer, dtype, "bn", True)

    def run():
        out = {k: empty(v, dtype) for k, v in outputs.items()} | {"dw": torch.empty_like(w)}
        _fprop(triton, out, *inputs)
        _wgrad(triton, out, g, x, layer.geometry, bn, None)
        return out

    narrow, asked = run(), []
    monkeypatch.setattr(_conv_few, "wide", lambda *tensors: asked.append(1) or True)
    wide = run()
    assert len(asked) == 2 and all(torch.equal(narrow[k], wide[k]) for k in narrow)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_partials_of_all_phases_fit_one_tile(triton, monkeypatch, stride):
    """What the finalise kernel holds in registers: 1024 chunks, the phases of a strided dgrad
    together."""
    from fastres.kernels import _bn_bwd, _conv_dgrad

    layer = Layer(2, 16, 96, 96, 16, 3, 3, stride, 1, 1)
    random, x, w, g, _ = gradient_case(layer, torch.bfloat16, "none", False)
    found = []
    for module in (_bn_bwd, _conv_dgrad):
        monkeypatch.setattr(module, "launch", lambda *args, **options: found.append(options))
    with table(programs=1 << 20, block_m=16):
        sums, prev = Sums(*torch.empty(2, layer.c), None), previous_of(random, x, "recompute")
        triton.conv_dgrad(torch.empty_like(x), sums, g, w, layer.geometry, None, None, prev)
    assert found[-1]["BLOCK_K"] == {1: 512, 2: 1024, 3: 1024}[stride]


def test_tensors_past_2_31_elements_take_64_bit_rows():
    _conv = pytest.importorskip("fastres.kernels._conv")
    assert not _conv.wide(torch.empty(2**31 - 2**24 - 1, device="meta"), None)
    assert _conv.wide(torch.empty(2**31 - 2**24, device="meta"))


@layers(("1x1", "3x3 s2"), ("bf16",))
def test_two_runs_agree_bit_for_bit(triton, layer, dtype):
    def run():
        out = {}
        outputs, inputs = fprop_case(layer, dtype, True)
        out |= {k: empty(v, dtype) for k, v in outputs.items()}
        _fprop(triton, out, *inputs)
        random, x, w, g, bn = gradient_case(layer, dtype, "bn", True)
        prev = previous_of(random, x, "dual")
        out |= {k: empty(v, dtype) for k, v in gradient_outputs(x, "dual").items()}
        out["dw"] = empty(tuple(w.shape), dtype)
        _dgrad(triton, out, g, w, layer.geometry, bn, None, prev)
        _wgrad(triton, out, g, x, layer.geometry, bn, None)
        return out

    first, second = run(), run()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "shape, weight, geometry, fmt, dtype, reason",
    [
        ((1, 8, 4, 4), (8, 8, 3, 3), [1, 1, 1, 1, 1, 1, 1], torch.contiguous_format, None, "NCHW"),
        ((1, 8, 4, 4), (8, 8, 1, 1), [1, 1, 0, 0, 1, 1, 1], torch.channels_last, torch.float64,
         "float64"),
    ],
)  # fmt: skip
def test_refuses_with_a_reason(triton, shape, weight, geometry, fmt, dtype, reason):
    x = torch.zeros(shape, dtype=dtype or torch.float32).contiguous(memory_format=fmt)
    assert reason in triton.conv_why_not(x, torch.zeros(weight), geometry)


def test_a_nan_stays_in_its_group(triton):
    layer, dtype = LAYERS["3x3 g4"], torch.float32
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    x[1, 5, 4, 4] = float("nan")  # the second of four groups of four channels
    y, stats = empty(layer.out, dtype), torch.empty(3, layer.k)
    triton.conv_fprop(y, stats, None, None, x, w, geometry, None, None, EPS)
    bad = y.isnan().any(dim=(0, 2, 3)).nonzero().flatten().tolist()
    assert bad == [4, 5, 6, 7] == stats[1].isnan().nonzero().flatten().tolist()
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    g = Gradient(y)
    triton.conv_dgrad(dx, None, g, w, geometry, None, None, None)
    assert dx.isnan().any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [4, 5, 6, 7]
    triton.conv_wgrad(dw, g, x, geometry, None, None)
    assert dw.isnan().any(dim=(1, 2, 3)).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_the_joint_kernel_refuses_groups(triton):
    x = torch.zeros(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, geometry = torch.zeros(8, 4, 1, 1), [1, 1, 0, 0, 1, 1, 2]
    reason = triton.conv_bwd_pointwise_why_not(x, weight, geometry, False)
    assert "groups=2" in reason


@pytest.mark.parametrize(
    "arch, dtype, c, k, taken",
    [
        ("sm_90", torch.bfloat16, 36, 35, True),
        ("sm_90", torch.bfloat16, 36, 140, False),
        ("sm_90", torch.float32, 35, 64, False),  # 36 channels are whole 16 bytes
        ("sm_80", torch.bfloat16, 36, 35, False),
        ("sm_100", torch.bfloat16, 36, 35, False),
        ("sm_100", torch.float32, 35, 64, False),
        ("gfx942", torch.bfloat16, 36, 128, True),
        ("gfx942", torch.float32, 35, 64, False),
    ],
)
def test_the_joint_kernel_refuses_odd_channels(triton, monkeypatch, arch, dtype, c, k, taken):
    """Where it would spill."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # no kernel at all else
    from fastres.kernels import _conv_bwd_pointwise, _conv_config

    for module in (_conv_config, _conv_bwd_pointwise):
        monkeypatch.setattr(module, "arch_of", lambda device: _conv_config.ARCHS[arch])
    x = torch.zeros(1, c, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    one = [1, 1, 0, 0, 1, 1, 1]
    reason = triton.conv_bwd_pointwise_why_not(x, torch.zeros(k, c, 1, 1), one, False)
    assert reason is None if taken else "no whole 16 bytes" in reason
    aligned = torch.zeros(1, 32, 4, 4, dtype=dtype)
    weight = torch.zeros(64, 32, 1, 1)
    assert triton.conv_bwd_pointwise_why_not(aligned, weight, one, False) is None


@pytest.mark.parametrize("arch, most", [("sm_80", 128), ("sm_90", 256), ("sm_100", 128)])
def test_the_joint_kernel_refuses_a_frozen_batch_norm_where_it_would_spill(
    triton, monkeypatch, arch, most
):
    """As said beforehand: no other kernels run in its place."""
    from fastres.kernels import _conv_bwd_pointwise, _conv_config

    for module in (_conv_config, _conv_bwd_pointwise):
        monkeypatch.setattr(module, "arch_of", lambda device: _conv_config.ARCHS[arch])
    for k in (64, 128, 256, 512):
        layer = Layer(1, 64, 2, 2, k, 1, 1, 1, 0, 1)
        _, x, w, g, bn = gradient_case(layer, torch.bfloat16, "frozen", True)
        reasons = [
            triton.conv_bwd_pointwise_why_not(x, w, layer.geometry, frozen)
            for frozen in (False, True)
        ]
        if k == 512:
            assert all("cannot hold dw of all" in reason for reason in reasons)
        else:
            assert reasons[0] is None and (reasons[1] is None) == (k <= most)
        if reasons[1] is not None:
            out = {"dx": torch.empty_like(x), "dw": torch.empty_like(w)}
            with pytest.raises(AssertionError, match=f"{k} output channels: "):
                _both(triton, out, g, x, w, layer.geometry, bn, None, None, None)


def test_an_architecture_without_a_table_is_named(triton, monkeypatch):
    from fastres.kernels import _conv_config as config

    monkeypatch.setattr(config, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(config.NoTable, match=r"sm_70; known: sm_80, sm_90, sm_100, gfx942"):
        config.arch_of(torch.device("cuda"))
    assert "sm_70" in triton.conv_missing(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    assert config.arch_of(torch.device("cuda")).name == "sm_80"


@pytest.fixture
def precisions():
    """torch.backends without a setting of the convs' own; put back afterwards."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.backends
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = before  # the legacy flag can be read again


@pytest.mark.parametrize(
    "setting, value, tf32",
    [
        ("cudnn.allow_tf32", True, True),
        ("cudnn.allow_tf32", False, False),
        ("cudnn.conv.fp32_precision", "ieee", False),
        ("cudnn.conv.fp32_precision", "tf32", True),
        ("fp32_precision", "ieee", False),  # of the parents
        ("fp32_precision", "tf32", True),
    ],
)
def test_fp32_multiplies_as_either_api_of_torch_says(triton, precisions, setting, value, tf32):
    from fastres.kernels._conv import precision

    *parents, last = setting.split(".")
    owner = precisions
    for name in parents:
        owner = getattr(owner, name)
    setattr(owner, last, value)
    assert precision(torch.float32) == ("tf32" if tf32 else "ieee")
    assert precision(torch.bfloat16) == "ieee"
    outputs, inputs = fprop_case(LAYERS["1x1"], torch.float32, False)
    if not torch.cuda.is_available():  # a GPU would round to TF32
        check(triton, torch.float32, outputs, _fprop, *inputs)


def test_phases_cover_each_tap_once():
    """Strided dgrad multiplies exactly the taps that reach a pixel."""
    _conv = pytest.importorskip("fastres.kernels._conv")
    for size, taps, stride, padding, dilation in itertools.product(
        (1, 5, 8), (1, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2)
    ):
        outputs = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        if outputs < 1:
            continue
        want = {
            (q * stride - padding + r * dilation, r, q)
            for q in range(outputs)
            for r in range(taps)
            if 0 <= q * stride - padding + r * dilation < size
        }
        found = set()
        for phase in _conv.phases(size, taps, stride, padding, dilation):
            for i, t in itertools.product(range(phase.size), range(phase.taps)):
                q = i + phase.off + t * phase.step
                if 0 <= q < outputs:
                    found.add((i * stride + phase.first, phase.tap0 + t * phase.tap_step, q))
        assert found == want, (size, taps, stride, padding, dilation)
