"""The bytes that the Triton kernels load and store are those of the model (fastres.roofline),
tensor by tensor: each kernel alone in every prologue and epilogue, and whole stages on every rung.

What the model leaves out is counted and bounded here: per-channel vectors, and the partial sums in
the workspaces."""

from __future__ import annotations

import importlib

import pytest
import torch
from common import DTYPES, backend, table
from test_conv import Layer, Random, gradient_case, previous_of, residual_of
from torch import Tensor, nn
from traffic import flat, in_formulas_words, metered

import fastres
from fastres import roofline
from fastres._contract import Shortcut, Sums
from fastres._layout import mask_shape
from fastres.ops import residual_stage
from fastres.roofline import ConvShape, Traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

# Several programs, tiles and steps of a sum in each; odd sizes, whose borders are masked.
TILES = {"block_m": 64, "block_n": 32, "row_bytes": 64, "stats_n": (32, 32)}
LAYERS = {
    "1x1": Layer(2, 24, 7, 6, 40, 1, 1, 1, 0, 1),
    "1x1 s2": Layer(2, 24, 7, 6, 40, 1, 1, 2, 0, 1),
    "3x3": Layer(2, 24, 6, 7, 16, 3, 3, 1, 1, 1),
    "3x3 s2": Layer(2, 16, 9, 7, 24, 3, 3, 2, 1, 1),
    "3x3 d2": Layer(1, 16, 9, 9, 16, 3, 3, 1, 2, 2),
}
IMAGES = {
    "7x7 s2": Layer(2, 3, 13, 12, 24, 7, 7, 2, 3, 1),
    "3x3 images": Layer(2, 3, 9, 8, 16, 3, 3, 1, 1, 1),
}


DTYPE = pytest.mark.parametrize("dtype", ["bf16", "fp32"])


def layers(*names: str):
    """All in fp32, which the interpreter is quickest at; a dense and a strided one in bf16."""
    cases = [(n, "fp32") for n in names] + [(n, "bf16") for n in names if n in ("1x1", "3x3 s2")]
    return pytest.mark.parametrize(
        "layer, dtype", [pytest.param((LAYERS | IMAGES)[n], d, id=f"{d}-{n}") for n, d in cases]
    )


@pytest.fixture
def triton():
    return backend("triton")


def shape_of(layer: Layer) -> ConvShape:
    pairs = ((v, v) for v in (layer.stride, layer.padding, layer.dilation))
    return ConvShape(layer.n, layer.c, layer.h, layer.w, layer.k, layer.r, layer.s, *pairs)


def counted(run, expected: Traffic) -> None:
    """One call of a backend function reads and writes what a formula says, and all of a workspace
    that it writes is read once."""
    with table(**TILES), metered() as calls:
        run()
    (call,) = calls
    _, reads, writes = in_formulas_words(call)
    assert reads == expected.reads
    assert writes == expected.writes
    partial = {
        kind: sum(n for name, n in call.small.items() if name.startswith(f"{kind} workspace"))
        for kind in ("load", "store")
    }
    vectors = sum(n for name, n in call.small.items() if "workspace" not in name)
    assert partial["load"] == partial["store"]
    tensors = [t for name, value in call.arguments.items() for _, t in flat(name, value)]
    channels = max(t.shape[1] for t in tensors if t.dim() == 4)
    assert vectors <= 16 * 4 * channels * call.launches


def empty(shape, dtype) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype]).contiguous(memory_format=torch.channels_last)


def inputs(layer: Layer, dtype: str):
    random = Random(DTYPES[dtype], "traffic", layer)
    x = random.activation(layer.n, layer.c, layer.h, layer.w)
    return random, x, random.weight(layer).contiguous(memory_format=torch.channels_last)


# --- each kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prologue", ["none", "norm_relu"])
@pytest.mark.parametrize("epilogue", ["none", "stats"])
@layers(*LAYERS, *IMAGES)
def test_fprop(triton, layer, dtype, prologue, epilogue):
    random, x, w = inputs(layer, dtype)
    y = empty(layer.out, dtype)
    stats = torch.empty(3, layer.k) if epilogue == "stats" else None
    norm = random.norm(layer.c) if prologue == "norm_relu" else None
    counted(
        lambda: triton.conv_fprop(y, stats, None, None, x, w, layer.geometry, norm, None, 1e-5),
        roofline.fprop(shape_of(layer), dtype, prologue, epilogue),
    )


@pytest.mark.parametrize("prologue", ["norm_add_relu", "dual_add_relu"])
@layers("1x1")
def test_fprop_of_a_blocks_end(triton, layer, dtype, prologue):
    random, x, w = inputs(layer, dtype)
    y, z = empty(layer.out, dtype), torch.empty_like(x)
    mask = torch.empty(mask_shape(x), dtype=torch.uint8)
    dual = random.norm(layer.c) if prologue.startswith("dual") else None
    shortcut = Shortcut(random.activation(*x.shape), dual)
    stats, norm, geometry = torch.empty(3, layer.k), random.norm(layer.c), layer.geometry
    counted(
        lambda: triton.conv_fprop(y, stats, z, mask, x, w, geometry, norm, shortcut, 1e-5),
        roofline.fprop(shape_of(layer), dtype, prologue, "stats"),
    )


@pytest.mark.parametrize("epilogue", ["affine", "affine_relu", "affine_add_relu"])
@layers("1x1", "1x1 s2", "3x3", "3x3 s2")
def test_fprop_act(triton, layer, dtype, epilogue):
    random, x, w = inputs(layer, dtype)
    z, norm = empty(layer.out, dtype), random.norm(layer.k)
    residual = random.activation(*layer.out) if "add" in epilogue else None
    relu = "relu" in epilogue
    counted(
        lambda: triton.conv_fprop_act(z, x, w, layer.geometry, norm, residual, relu),
        roofline.fprop(shape_of(layer), dtype, "none", epilogue),
    )


# (dy prologue, epilogue, dres has bits) -> gradient_case's, residual_of's and previous_of's words
BACKWARD = {
    ("none", "none", False): ("none", False, "none", "none"),
    ("none", "gate_sums", False): ("none", False, "none", "recompute"),
    ("dbn", "gate_sums", False): ("bn", False, "none", "recompute"),
    ("mask_dbn", "gate_sums", False): ("bn", True, "none", "recompute"),
    ("dbn", "add", True): ("bn", False, "mask", "none"),
    ("dbn", "add_gate_sums", False): ("bn", False, "plain", "mask"),
    ("dbn", "dual_add_gate_sums", True): ("bn", False, "mask", "dual"),
}
FORMS = pytest.mark.parametrize("form", BACKWARD, ids=lambda f: "-".join(map(str, f)))


def backward(layer: Layer, dtype: str, form):
    mode, masked, residual, previous = BACKWARD[form]
    random, x, w, g, bn = gradient_case(layer, DTYPES[dtype], mode, masked)
    w = w.contiguous(memory_format=torch.channels_last)
    dres, prev = residual_of(random, x, residual), previous_of(random, x, previous)
    sums = None if prev is None else Sums(*(torch.empty(layer.c) for _ in range(3)))
    return random, x, w, g, bn, dres, prev, sums


@FORMS
@layers(*LAYERS)
def test_dgrad(triton, layer, dtype, form):
    _, x, w, g, bn, dres, prev, sums = backward(layer, dtype, form)
    dx = torch.empty_like(x)
    counted(
        lambda: triton.conv_dgrad(dx, sums, g, w, layer.geometry, bn, dres, prev),
        roofline.dgrad(shape_of(layer), dtype, *form, ours=True),
    )


@pytest.mark.parametrize("x_prologue", ["none", "norm_relu"])
@pytest.mark.parametrize("dy_prologue", ["none", "dbn", "mask_dbn"])
@layers(*LAYERS, *IMAGES)
def test_wgrad(triton, layer, dtype, dy_prologue, x_prologue):
    if layer in IMAGES.values() and x_prologue != "none":
        pytest.skip("thinned: no batch norm stands before the conv on images")
    form = (dy_prologue, "gate_sums", False)
    random, x, w, g, bn, *_ = backward(layer, dtype, form)
    norm = None if x_prologue == "none" else random.norm(layer.c)
    dw = torch.empty_like(w)
    counted(
        lambda: triton.conv_wgrad(dw, g, x, layer.geometry, bn, norm),
        roofline.wgrad(shape_of(layer), dtype, dy_prologue, x_prologue),
    )


@FORMS
@layers("1x1")
def test_bwd_pointwise(triton, layer, dtype, form):
    _, x, w, g, bn, dres, prev, sums = backward(layer, dtype, form)
    norm = None
    if "add" not in form[1] and prev is not None:  # relu(norm(x)), and x the raw tensor of both
        prev = prev._replace(y=x)
        norm = prev.norm
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    prologue = "none" if norm is None else "norm_relu"
    counted(
        lambda: triton.conv_bwd_pointwise(
            dx, sums, dw, g, x, w, layer.geometry, bn, norm, dres, prev
        ),
        roofline.dgrad_wgrad(shape_of(layer), dtype, form[0], prologue, *form[1:]),
    )


@DTYPE
def test_streaming(triton, dtype):
    shape = (2, 35, 7, 6)
    random = Random(DTYPES[dtype], "streaming")
    x, r, dz, out, out2 = (random.activation(*shape) for _ in range(5))
    mean, rstd, gamma, beta, d1, d2, d3 = (torch.ones(35) for _ in range(7))
    v = mean, rstd, gamma, beta
    m, none = random.mask(x), (None,) * 4
    run = triton
    counted(lambda: run.bn_stats(mean, d1, rstd, x, 1e-5), roofline.bn_stats(shape, dtype))
    counted(
        lambda: run.bn_apply(out, None, x, *v, None, *none, True), roofline.bn_apply(shape, dtype)
    )
    counted(
        lambda: run.bn_apply(out, m, x, *v, r, *v, True),
        roofline.bn_apply(shape, dtype, True, True),
    )
    counted(
        lambda: run.bn_bwd_reduce(d1, d2, None, dz, None, x, *v, None, None, None, "recompute"),
        roofline.bn_bwd_reduce(shape, dtype),
    )
    counted(
        lambda: run.bn_bwd_reduce(d1, d2, d3, dz, m, x, *v, r, mean, rstd, "mask"),
        roofline.bn_bwd_reduce(shape, dtype, True, True),
    )
    apply = (out, None, dz, m, x, *v, d1, d2, None, *none, "mask", True, False)
    counted(lambda: run.bn_bwd_apply(*apply), roofline.bn_bwd_apply(shape, dtype, True))
    apply = (out, out2, dz, m, x, *v, d1, d2, r, mean, rstd, gamma, d3, "mask", True, True)
    counted(lambda: run.bn_bwd_apply(*apply), roofline.bn_bwd_apply(shape, dtype, True, True))
    counted(lambda: run.relu_bwd(out, out, dz, m), roofline.relu_bwd(shape, dtype))


@DTYPE
def test_pool(triton, dtype):
    random = Random(DTYPES[dtype], "pool")
    x, z = random.activation(2, 16, 13, 12), random.activation(2, 16, 7, 6)
    index = torch.empty_like(z, dtype=torch.uint8)
    mean, rstd, gamma, beta, d1, d2 = (torch.ones(16) for _ in range(6))
    shapes, pool = (tuple(x.shape), tuple(z.shape)), (3, 2, 1)
    counted(
        lambda: triton.bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, *pool),
        roofline.bn_relu_maxpool(*shapes, dtype),
    )
    counted(
        lambda: triton.bn_relu_maxpool_bwd_reduce(d1, d2, z, index, x, mean, rstd, *pool),
        roofline.bn_relu_maxpool_bwd_reduce(*shapes, dtype),
    )
    dx = torch.empty_like(x)
    counted(
        lambda: triton.bn_relu_maxpool_bwd_apply(
            dx, z, index, x, mean, rstd, gamma, d1, d2, *pool, True
        ),
        roofline.bn_relu_maxpool_bwd_apply(*shapes, dtype),
    )


# --- whole stages ---------------------------------------------------------------------------------


def network(kind: str) -> nn.Module:
    """A conv, so that x needs a gradient, and a layer of three blocks: stride 2 and a projection,
    then identities."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    out = 32 if kind == "basic" else 64
    down = nn.Sequential(nn.Conv2d(16, out, 1, 2, bias=False), nn.BatchNorm2d(out))
    if kind == "basic":
        blocks = [BasicBlock(16, 32, 2, down), BasicBlock(32, 32), BasicBlock(32, 32)]
    else:
        # two groups of 8 or one of 16 channels
        extra = {"groups": 2, "base_width": 32} if kind == "grouped" else {}
        sizes = [(16, 16, 2, down), (64, 16), (64, 16)]
        blocks = [Bottleneck(*size, **extra) for size in sizes]
    net = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Sequential(*blocks))
    return net.to(memory_format=torch.channels_last)


def step(net: nn.Module, x: Tensor, rung: str) -> list:
    """The calls of a training step of the layer, as one stage."""
    from fastres._chosen import block_of

    fused = fastres.convert(net, fusion="b")
    x = x.clone().requires_grad_()
    with fastres.use_backend("triton"), metered() as calls:
        if rung == "b":
            z = fused[1](x)
        else:
            z = residual_stage(x, [block_of(b, b._fastres.spec) for b in fused[1]], rung)
        z.backward(torch.ones_like(z))
    return calls


@pytest.mark.parametrize("rung", ["b", "c1", "c2", "d"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_a_stage_moves_what_the_model_says(triton, kind, rung):
    """Kernel by kernel and tensor by tensor; a vendor's convs and torch's additions are not
    counted."""
    net = network(kind)
    x = torch.randn(2, 16, 10, 9).contiguous(memory_format=torch.channels_last)
    model = roofline.model(net, x, "fp32", rung)
    expected = [
        (k.op, {a.tensor: a.bytes for a in k.reads}, {a.tensor: a.bytes for a in k.writes})
        for k in model.kernels
        if k.path.startswith("1.")
        and k.op != "grad_add"
        and not (k.shape is not None and rung == "b")
    ]
    calls = step(net, x, rung)
    found = [in_formulas_words(call) for call in calls]
    assert sorted(map(repr, map(_sorted, found))) == sorted(map(repr, map(_sorted, expected)))
    total = sum(sum(r.values()) + sum(w.values()) for _, r, w in found)
    assert total == sum(sum(r.values()) + sum(w.values()) for _, r, w in expected) > 0


def _sorted(kernel):
    op, reads, writes = kernel
    return op, sorted(reads.items()), sorted(writes.items())


@pytest.mark.parametrize("rung", ["b", "c1", "c2"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_a_stem_moves_what_the_model_says(triton, pool, rung):
    from test_stem import Cifar, network

    net = network() if pool else Cifar()
    x = torch.randn(2, 3, 14, 13).contiguous(memory_format=torch.channels_last)
    expected = [
        (k.op, {a.tensor: a.bytes for a in k.reads}, {a.tensor: a.bytes for a in k.writes})
        for k in roofline.model(net, x, "fp32", rung).kernels
        if k.path.startswith(("conv1", "maxpool", "stem")) and not (k.shape and rung == "b")
    ]
    fused = fastres.convert(net, fusion=rung)
    if not pool:
        fused.stem._fastres.rung = rung
    with fastres.use_backend("triton"), metered() as calls:
        z = fused.fused_forward(x) if pool else fused.stem(x)
        z.backward(torch.ones_like(z))
    found = [in_formulas_words(call) for call in calls]
    assert sorted(map(repr, map(_sorted, found))) == sorted(map(repr, map(_sorted, expected)))


# --- what a GPU's tables change -------------------------------------------------------------------


def stages(target: str, dtype: str, network: str, rung: str):
    """The launches of a training step's residual stages at batch 256, by a target's table."""
    import aot_cases

    x = aot_cases.activation(256, 64, 56, aot_cases.DTYPES[dtype])
    for _, blocks in aot_cases._stages(network):
        with aot_cases.capture(target) as found:
            x = aot_cases._stage(x, blocks, rung, True, True, x.dtype)
        yield from found


@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_the_joint_backward_is_as_wide_as_the_model_says(triton, dtype, monkeypatch):
    """Which 1x1 convs run dgrad and wgrad in one kernel on sm_90: a limit of its registers."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    joint = [
        launch.named() | launch.constants
        for launch in stages("sm_90", dtype, "resnet50", "d")
        if launch.kernel.__name__ == "_conv_bwd_pointwise_kernel"
    ]
    name = "fp32" if dtype == "tf32" else dtype
    model = roofline.model(resnet50(), (256, 3, 224, 224), name, "d")
    expected = [k.shape.K for k in model.kernels if k.op == "dgrad_wgrad"]
    assert sorted(c["k_units"] * c["K_ALIGN"] for c in joint) == sorted(expected)
    assert max(expected) == roofline.traffic.JOINT_CHANNELS[name]


def resnet50():
    return importlib.import_module("torchvision").models.resnet50()


@pytest.mark.parametrize("network, rung, most", [
    ("resnet50", "c2", 7.5), ("resnet50", "d", 9.0), ("resnet18", "c2", 2.0),
])  # fmt: skip
def test_workspaces_are_bounded(triton, network, rung, most):
    """MB an image, written and read, of a step's partial sums on sm_90 at batch 256: what the model
    leaves out (docs/roofline.md)."""
    total, seen = 0, set()
    for launch in stages("sm_90", "bf16", network, rung):
        for name, t in launch.named().items():
            dw = name == "dw_ptr" and "pointwise" in launch.kernel.__name__
            if (name == "part_ptr" or dw) and t is not None:
                # the phases of a strided dgrad fill one workspace
                if "dgrad" in launch.kernel.__name__ and id(t) in seen:
                    continue
                seen.add(id(t))
                total += t.numel() * t.element_size()
    assert total / 256e6 <= most


# --- the counting itself --------------------------------------------------------------------------


def test_a_kernel_that_reads_more_is_caught(triton, monkeypatch):
    """A strided 1x1 that also reads the pixel beside."""
    module = importlib.import_module("fastres.kernels._conv")
    real = module.load_tile

    def twice(ptr, rows, cols, stride, ok):
        real(ptr, rows + 1, cols, stride, ok)
        return real(ptr, rows, cols, stride, ok)

    layer = LAYERS["1x1 s2"]
    _, x, w = inputs(layer, "fp32")
    y, geometry = empty(layer.out, "fp32"), layer.geometry
    args = (y, None, None, None, x, w, geometry, None, None, 1e-5)
    formula = roofline.fprop(shape_of(layer), "fp32")
    counted(lambda: triton.conv_fprop(*args), formula)
    monkeypatch.setattr(module, "load_tile", twice)
    with pytest.raises(AssertionError, match="'x'"):
        counted(lambda: triton.conv_fprop(*args), formula)
