"""The Winograd convolutions of the CPU against float64: every pass, odd sizes, epilogues, poisoned
outputs; where they are chosen, and that what is not finite shows as in torch."""

from __future__ import annotations

import os

import pytest
import torch
from common import assert_close, assert_deterministic, assert_same_bits, backend

import fastres
from fastres import _winograd as wino

CL = torch.channels_last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# N, C, K, H, W, padding: both orders of loops (by tiles and by panels of weights), wgrad by parts
# of the tiles (up to 4096 products of channels) and by chunks, several of each; tiles over the
# edge, one tile, more rows than a pass takes, channels that fill no vector, no panel, half of one
SHAPES = [
    (2, 72, 72, 56, 50, 1),
    (9, 33, 70, 18, 21, 1),
    (2, 35, 24, 13, 7, 1),
    (1, 3, 1, 5, 3, 1),
    (2, 130, 40, 7, 7, 1),
    (1, 300, 20, 9, 6, 0),
    (2, 20, 50, 6, 5, 2),
    (1, 16, 33, 4, 4, 1),
    (4, 16, 16, 32, 30, 1),
    (2, 64, 48, 29, 31, 1),
    (2, 16, 12, 14, 13, 1),
]
THIN = [*SHAPES[1:3], SHAPES[-1]]


def shapes():
    chosen = THIN if os.environ.get("FASTRES_TEST_THIN") else SHAPES
    labels = ["x".join(map(str, s[:5])) + f"-p{s[5]}" for s in chosen]
    return pytest.mark.parametrize("shape", chosen, ids=labels)


TAPS = 9  # the products that a transform mixes: its rounding is theirs all

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _built():
    backend("cpu")


def draw(shape, dtype, seed=0):
    """x, w (K, C, 3, 3) and dy; x as after a ReLU."""
    n, c, k, h, w, p = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=g).relu()
    dy = torch.randn(n, k, h + 2 * p - 2, w + 2 * p - 2, generator=g)
    weight = torch.randn(k, c, 3, 3, generator=g) * (2 / (9 * c)) ** 0.5
    x, dy, weight = (t.to(dtype).contiguous(memory_format=CL) for t in (x, dy, weight))
    return x, weight, dy


def poison(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=CL)


def grads(dy, x, w, p):
    geometry = [1, 1], [p, p], [1, 1], False, [0, 0], 1, [True, True, False]
    return torch.ops.aten.convolution_backward(dy, x, w, None, *geometry)[:2]


@dtypes
@shapes()
@pytest.mark.parametrize("epilogue", ["bias", "relu", "residual", "inplace"])
def test_winograd_conv_matches_reference(shape, dtype, epilogue):
    x, w, dy = draw(shape, dtype)
    _, _, k, _, _, p = shape
    bias = torch.randn(k, generator=torch.Generator().manual_seed(1))
    residual = torch.randn_like(dy) if epilogue in ("residual", "inplace") else None
    relu = epilogue != "bias"

    def run(x, w, bias, residual):
        y = torch.conv2d(x, w, None, padding=p)
        y = y + bias.to(y.dtype).view(-1, 1, 1)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    truth = run(
        x.double(), w.double(), bias.double(), None if residual is None else residual.double()
    )
    eager = run(x, w, bias, residual)
    out = residual.clone() if epilogue == "inplace" else poison(dy.shape, dtype)
    added = out if epilogue == "inplace" else residual
    y = wino.conv(x, wino.pack(w.float(), dtype), k, p, bias, added, relu, out)
    assert y is out
    assert_close("y", y, truth, eager, length=TAPS)


@dtypes
@shapes()
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_winograd_fprop_matches_reference(shape, dtype, layout):
    """On raw weights of either layout, fp32 ones rounded to the activation's dtype."""
    x, w, _ = draw(shape, dtype)
    p = shape[5]
    truth = torch.conv2d(x.double(), w.double(), padding=p)
    eager = torch.conv2d(x, w, padding=p)
    w = w.float() + 1e-5 * w.float().abs() if dtype == torch.bfloat16 else w  # rounds back
    w = w.contiguous(memory_format=CL if layout == "nhwc" else torch.contiguous_format)
    y = wino.fprop(x, w, p)
    assert y.is_contiguous(memory_format=CL) and y.dtype == dtype
    assert_close("y", y, truth, eager, length=TAPS)


@dtypes
@shapes()
def test_winograd_dgrad_matches_reference(shape, dtype):
    x, w, dy = draw(shape, dtype)
    p = shape[5]
    truth = grads(dy.double(), x.double(), w.double(), p)[0]
    assert_close("dx", wino.dgrad(dy, w, p), truth, grads(dy, x, w, p)[0], length=TAPS)


@dtypes
@shapes()
def test_winograd_wgrad_matches_reference(shape, dtype):
    x, w, dy = draw(shape, dtype)
    n, _, _, h, wd, p = shape
    truth = grads(dy.double(), x.double(), w.double(), p)[1]
    dw = wino.wgrad(dy, x, p)
    assert dw.dtype == torch.float32 and dw.is_contiguous(memory_format=CL)
    eager = grads(dy.float(), x.float(), w.float(), p)[1]
    assert_close("dw", dw, truth, eager, length=n * h * wd)


def test_winograd_is_deterministic():
    def outputs():
        out = {}
        for i, shape in enumerate(SHAPES[:3]):
            x, w, dy = draw(shape, torch.float32)
            out[f"y{i}"] = wino.fprop(x, w, 1)
            out[f"dx{i}"] = wino.dgrad(dy, w, 1)
            out[f"dw{i}"] = wino.wgrad(dy, x, 1)
        return out

    assert_deterministic(outputs)


def test_winograd_raw_and_packed_weights_give_the_same_bits():
    for shape in SHAPES[:3]:
        x, w, _ = draw(shape, torch.float32)
        k = shape[2]
        y = wino.conv(x, wino.pack(w, x.dtype), k, 1, torch.zeros(k), relu=False)
        assert_same_bits("y", y, wino.fprop(x, w, 1))


GEOMETRY = [1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("what", "change", "reason"),
    [
        ("fprop", {}, None),
        ("inference", {}, None),
        ("wgrad", {}, None),
        ("fprop", {"geometry": [2, 2, 1, 1, 1, 1, 1]}, "stride 1"),
        ("fprop", {"geometry": [1, 1, 2, 2, 2, 2, 1]}, "dilation 1"),
        ("fprop", {"geometry": [1, 1, 1, 1, 1, 1, 2]}, "one group"),
        ("fprop", {"geometry": [1, 1, 3, 3, 1, 1, 1]}, "padding"),
        ("fprop", {"geometry": [1, 1, 1, 0, 1, 1, 1]}, "padding"),
        ("fprop", {"taps": (1, 1)}, "3x3"),
        ("fprop", {"dtype": torch.float16}, "float16"),
        ("fprop", {"k": 12}, "16 channels"),
        ("fprop", {"k": 16}, None),
        ("fprop", {"shape": (8, 64, 2, 2)}, "outside the image"),
        ("fprop", {"shape": (1, 512, 7, 7), "k": 512}, "too few pixels"),
        ("inference", {"shape": (1, 512, 7, 7), "k": 512}, None),
        ("fprop", {"shape": (8, 256, 14, 14), "k": 256, "dtype": torch.bfloat16}, "bf16"),
        ("wgrad", {"shape": (8, 256, 14, 14), "k": 256, "dtype": torch.bfloat16}, "bf16"),
        ("inference", {"shape": (8, 256, 14, 14), "k": 256, "dtype": torch.bfloat16}, None),
        ("fprop", {"shape": (1, 72, 16, 16), "k": 72, "dtype": torch.bfloat16}, "bf16"),
        ("fprop", {"shape": (1, 64, 16, 16), "dtype": torch.bfloat16}, None),
        ("wgrad", {"dtype": torch.bfloat16}, None),
    ],
)
def test_winograd_says_why_not(monkeypatch, what, change, reason):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    args = {"shape": (8, 64, 28, 28), "dtype": torch.float32, "k": 64, "geometry": GEOMETRY,
            "taps": (3, 3), **change}  # fmt: skip
    got = wino.why_not(what, **args)
    assert (got is None) if reason is None else (got is not None and reason in got), got


@pytest.mark.parametrize(
    "shape, k, threads, reason",
    [
        ((8, 64, 56, 56), 64, 16, None),  # 7 parts of 2 panels
        ((8, 64, 56, 56), 64, 32, "14 jobs for 32 threads"),
        ((1, 32, 36, 36), 32, 4, "1 jobs for 4 threads"),  # 81 tiles are one part
        ((8, 64, 56, 56), 128, 32, None),  # more channels are cut for the threads
    ],
)
def test_winograd_wgrad_with_too_few_jobs_is_left(monkeypatch, shape, k, threads, reason):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    args = shape, torch.float32, k, GEOMETRY, (3, 3)
    assert wino.why_not("wgrad", *args) == reason
    assert wino.runs("wgrad", *args[:2], k, tuple(GEOMETRY), (3, 3)) is (reason is None)


def test_winograd_without_images():
    """Nothing to divide by: y is empty, dw is zero."""
    assert wino.why_not("inference", (0, 16, 8, 8), torch.float32, 16, GEOMETRY, (3, 3))
    x = torch.empty(0, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 3, 3)
    assert wino.fprop(x, w, 1).shape == (0, 16, 8, 8)
    assert wino.wgrad(x, x, 1).eq(0).all()
    wide = torch.empty(0, 128, 8, 8).contiguous(memory_format=torch.channels_last)
    assert wino.wgrad(wide, wide, 1).eq(0).all()


def test_winograd_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FASTRES_WINOGRAD", "0")
    assert "FASTRES_WINOGRAD" in wino.why_not(
        "fprop", (8, 64, 28, 28), torch.float32, 64, GEOMETRY, (3, 3)
    )


def _calls(monkeypatch):
    """Counts the calls of each pass."""
    seen = []
    for name in ("conv", "fprop", "dgrad", "wgrad"):
        real = getattr(wino, name)

        def call(*args, real=real, name=name, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(wino, name, call)
    return seen


def _unit():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(48, 40, 3, padding=1, bias=False), torch.nn.BatchNorm2d(40)
    ).to(memory_format=CL)


def _conv_bn_relu(unit, x):
    ops = fastres.ops
    return ops.conv_bn_relu(x, ops.Conv.of(unit[0]), ops.BatchNorm.of(unit[1]))


def test_winograd_runs_in_training_and_not_on_running_statistics(monkeypatch):
    """With running statistics it would show where a value that is not finite spread to."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # with many wgrad has too few jobs
    seen = _calls(monkeypatch)
    unit = _unit()
    x = torch.randn(4, 48, 16, 16).contiguous(memory_format=CL).requires_grad_()
    _conv_bn_relu(unit, x).sum().backward()
    assert sorted(seen) == ["dgrad", "fprop", "wgrad"]
    del seen[:]
    _conv_bn_relu(unit.eval(), x).sum().backward()
    assert not seen


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_winograd_keeps_to_the_backend_asked_for(monkeypatch, name):
    seen = _calls(monkeypatch)
    x = torch.randn(4, 48, 16, 16).contiguous(memory_format=CL)
    with fastres.use_backend(name):
        _conv_bn_relu(_unit(), x)
    assert bool(seen) == (name == "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_winograd_shows_what_is_not_finite_as_torch_does(value):
    unit = _unit()
    x = torch.randn(4, 48, 16, 16).contiguous(memory_format=CL)
    x[1, 3, 5, 5] = value
    z = _conv_bn_relu(unit, x)
    want = unit(x).relu()
    assert torch.equal(z.isnan(), want.isnan()) and want.isnan().any()


def test_winograd_is_in_the_report():
    from torchvision.models import resnet18

    rows = {row.path: row.reason for row in fastres.report(fastres.convert(resnet18())).rows}
    assert "conv1, conv2 by Winograd" in rows["layer1.0"]
    assert "; conv2 by Winograd" in rows["layer2.0"]  # its conv1 has stride 2
    assert "Winograd" not in rows["(model)"]
