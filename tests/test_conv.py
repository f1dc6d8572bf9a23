"""The convolution kernels (docs/kernels.md): every kernel x prologue x epilogue x dtype.

Truth is the reference backend in float64 on the same rounded inputs. A kernel's error may be twice
that of the reference backend in the kernel's own dtype (fp32 sums, rounded where eager PyTorch
rounds), plus the floor of TOLERANCES. Outputs and workspaces are poisoned with NaN."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import pytest
import torch
from common import DTYPES, TOLERANCES, backend, table
from torch import Tensor

from fastres import _reference_backend as reference
from fastres._contract import Gradient, Normalise, NormGradient, Previous, Shortcut, Sums
from fastres._layout import mask_shape

EPS = 1e-5
SMALL = {
    "block_m": 64, "block_n": 32, "row_bytes": 128, "dw_elements": 1 << 14, "stats_n": (32, 32),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int
    padding: int
    dilation: int
    groups: int = 1

    @property
    def geometry(self) -> list[int]:
        return [*[self.stride] * 2, *[self.padding] * 2, *[self.dilation] * 2, self.groups]

    @property
    def out(self) -> tuple[int, int, int, int]:
        def size(v, taps):
            return (v + 2 * self.padding - self.dilation * (taps - 1) - 1) // self.stride + 1

        return self.n, self.k, size(self.h, self.r), size(self.w, self.s)

    @property
    def pointwise(self) -> bool:
        return (self.r, self.s, self.stride, self.padding, self.groups) == (1, 1, 1, 0, 1)


# The layer types of ResNet-18/50/152, ResNeXt and the CIFAR nets at reduced size, and the odd ones:
# 35 channels, 7x7 maps, one image, strides on odd sizes, 5x5, 7x7, dilation, 1x3; groups that begin
# inside a mask byte, of more columns than a tile, of one channel.
LAYERS = {
    "1x1": Layer(2, 64, 8, 8, 48, 1, 1, 1, 0, 1),
    "1x1 odd": Layer(1, 35, 7, 7, 24, 1, 1, 1, 0, 1),
    "1x1 wide": Layer(1, 24, 5, 5, 136, 1, 1, 1, 0, 1),
    "1x1 s2": Layer(2, 16, 9, 9, 40, 1, 1, 2, 0, 1),
    "3x3": Layer(3, 16, 8, 8, 16, 3, 3, 1, 1, 1),
    "3x3 odd": Layer(1, 35, 7, 7, 24, 3, 3, 1, 1, 1),
    "3x3 s2": Layer(2, 16, 9, 7, 40, 3, 3, 2, 1, 1),
    "5x5": Layer(1, 8, 7, 6, 16, 5, 5, 1, 2, 1),
    "7x7 s2": Layer(1, 3, 15, 14, 16, 7, 7, 2, 3, 1),
    "images": Layer(3, 3, 8, 7, 24, 3, 3, 1, 1, 1),
    "two d2": Layer(1, 2, 9, 8, 35, 3, 5, 2, 2, 2),
    "3x3 d2": Layer(1, 16, 9, 9, 16, 3, 3, 1, 2, 2),
    "3x3 s3 d2": Layer(1, 8, 11, 10, 16, 3, 3, 3, 2, 2),
    "1x3": Layer(1, 8, 6, 9, 16, 1, 3, 1, 0, 1),
    "3x3 g4": Layer(2, 16, 8, 7, 16, 3, 3, 1, 1, 1, 4),
    "3x3 s2 g2": Layer(1, 24, 9, 7, 40, 3, 3, 2, 1, 1, 2),
    "3x3 wide g2": Layer(1, 96, 4, 5, 80, 3, 3, 1, 1, 1, 2),
    "1x1 g3": Layer(2, 24, 5, 5, 36, 1, 1, 1, 0, 1, 3),
    "depthwise": Layer(1, 12, 6, 6, 12, 3, 3, 1, 1, 1, 12),
}
GROUPED = ("3x3 g4", "3x3 s2 g2", "3x3 wide g2", "1x1 g3", "depthwise")
FEW = ("1x1 odd", "3x3", "3x3 s2", "3x3 g4")


def layers(names=tuple(LAYERS), dtypes=tuple(DTYPES)):
    return pytest.mark.parametrize(
        "layer, dtype",
        [
            pytest.param(LAYERS[name], DTYPES[d], id=f"{d}-{name.replace(' ', '-')}")
            for d in dtypes
            for name in names
        ],
    )


@pytest.fixture
def triton(gpu):
    """The backend. In the interpreter on tiles so small that the small shapes here have several; on
    a GPU on its own table (test_cuts has other tiles)."""
    module = backend("triton")
    with table(**(SMALL if module.interpreting() else {})):
        yield module


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN: outputs and workspaces that are not written show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


class Random:
    """Random inputs of a test, the same for every backend: of the values of `dtype`."""

    def __init__(self, dtype: torch.dtype, *key) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def activation(self, *shape: int) -> Tensor:
        x = (self.normal(*shape) + 0.3).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weight(self, layer: Layer) -> Tensor:
        shape = layer.k, layer.c // layer.groups, layer.r, layer.s
        fan = shape[1] * layer.r * layer.s
        return (self.normal(*shape) * fan**-0.5).to(self.dtype)

    def norm(self, channels: int) -> Normalise:
        mean, gamma, beta = (self.normal(channels) for _ in range(3))
        return Normalise(mean, torch.rand(channels, generator=self.generator) + 0.5, gamma, beta)

    def mask(self, x: Tensor) -> Tensor:
        bits = torch.randint(0, 2, x.permute(0, 2, 3, 1).shape, generator=self.generator)
        from fastres.reference import pack_mask

        return pack_mask(bits.bool(), x.shape[1])


def widened(value):
    """The same arguments in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(widened(v) for v in value))
    return value


def empty(shape, dtype: torch.dtype) -> Tensor:
    if len(shape) == 4:
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def check(module, dtype, outputs: dict, call, *inputs) -> dict[str, Tensor]:
    """Run `call(module, outputs, *inputs)` on the kernels, on the reference in `dtype` and in
    float64, and compare; returns the kernels' outputs."""
    results = []
    for where, kind in ((module, dtype), (reference, dtype), (reference, torch.float64)):
        args = [widened(i) for i in inputs] if kind == torch.float64 else inputs
        made = {
            name: torch.full(shape, 0xAA, dtype=torch.uint8)
            if name == "mask"
            else empty(shape, kind)
            for name, shape in outputs.items()
        }
        call(where, made, *args)
        results.append(made)
    got, eager, truth = results
    for name in outputs:
        if name == "mask":
            assert torch.equal(got[name], eager[name]), name
            continue
        want = truth[name]
        assert torch.isfinite(got[name]).all(), name
        for error in (
            lambda v: (v.double() - want).abs().max() / want.abs().max(),  # noqa: B023
            lambda v: (v.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt(),  # noqa: B023
        ):
            ours, theirs = error(got[name]), error(eager[name])
            floor = TOLERANCES[torch.float32 if got[name].dim() == 1 else dtype]
            assert ours <= 2 * theirs + floor, f"{name}: {ours:.2e}, eager {theirs:.2e}"
    return got


# --- fprop ----------------------------------------------------------------------------------------


def _fprop(module, out, x, w, geometry, norm, shortcut=None):
    stats = None
    if "mean" in out:
        stats = torch.stack([out[v] for v in ("mean", "var", "rstd")])
    module.conv_fprop(
        out["y"], stats, out.get("z"), out.get("mask"), x, w, geometry, norm, shortcut, EPS
    )
    if stats is not None:
        for name, row in zip(("mean", "var", "rstd"), stats, strict=True):
            out[name].copy_(row)


def fprop_case(layer: Layer, dtype, norm: bool, stats: bool = True):
    random = Random(dtype, "fprop", layer)
    x, w = random.activation(layer.n, layer.c, layer.h, layer.w), random.weight(layer)
    vectors = {v: (layer.k,) for v in ("mean", "var", "rstd")} if stats else {}
    return {"y": layer.out, **vectors}, (
        x,
        w,
        layer.geometry,
        random.norm(layer.c) if norm else None,
    )


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@layers()
def test_fprop(triton, layer, dtype, norm):
    outputs, inputs = fprop_case(layer, dtype, norm)
    check(triton, dtype, outputs, _fprop, *inputs)


@layers(FEW, ("bf16",))
def test_fprop_without_statistics(triton, layer, dtype):
    outputs, inputs = fprop_case(layer, dtype, True, stats=False)
    check(triton, dtype, outputs, _fprop, *inputs)


@layers(("images", "7x7 s2"), ("fp16",))
def test_fprop_of_a_frozen_stem(triton, layer, dtype):
    outputs, inputs = fprop_case(layer, dtype, False, stats=False)
    check(triton, dtype, outputs, _fprop, *inputs)


@pytest.mark.parametrize("kind", ["identity", "dual", "identity no mask"])
@layers(("1x1", "1x1 odd", "1x1 wide"))
def test_fprop_writes_the_block_output(triton, layer, dtype, kind):
    outputs, (x, w, geometry, norm) = fprop_case(layer, dtype, True)
    random = Random(dtype, "block", layer)
    res = random.activation(*x.shape)
    shortcut = Shortcut(res, random.norm(layer.c) if kind == "dual" else None)
    outputs["z"] = tuple(x.shape)
    if kind != "identity no mask":
        outputs["mask"] = mask_shape(x)
    check(triton, dtype, outputs, _fprop, x, w, geometry, norm, shortcut)


def _act(module, out, x, w, geometry, norm, residual, relu):
    module.conv_fprop_act(out["z"], x, w, geometry, norm, residual, relu)


@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (False, False)])
@layers(("1x1 wide", "1x1 s2", "3x3 odd", "3x3 s2", "7x7 s2", "3x3 g4"))
def test_fprop_act(triton, layer, dtype, residual, relu):
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    random = Random(dtype, "act", layer)
    res = random.activation(*layer.out) if residual else None
    check(triton, dtype, {"z": layer.out}, _act, x, w, geometry, random.norm(layer.k), res, relu)


@layers(("1x1 odd", "5x5", "3x3 d2", "3x3 s3 d2", "1x3", "depthwise", "images"), ("bf16",))
def test_fprop_act_of_other_shapes(triton, layer, dtype):
    """With a residual and no ReLU, which no block has."""
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    random = Random(dtype, "act", layer)
    res, norm = random.activation(*layer.out), random.norm(layer.k)
    check(triton, dtype, {"z": layer.out}, _act, x, w, geometry, norm, res, False)


@layers(("3x3", "1x1 odd", "images"), ("fp32",))
def test_statistics_of_large_means(triton, layer, dtype):
    """Mean 1e4, standard deviation 1: Chan's merge, not E[x^2] - E[x]^2."""
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    w = torch.zeros_like(w)
    w[:, 0, layer.r // 2, layer.s // 2] = 1.0
    x[:, 0] += 1e4
    y = torch.empty(layer.out).contiguous(memory_format=torch.channels_last)
    stats = torch.empty(3, layer.k)
    triton.conv_fprop(y, stats, None, None, x, w, geometry, None, None, EPS)
    want = y.double().var(dim=(0, 2, 3), unbiased=False)
    assert 0.5 < want.min() <= want.max() < 2
    torch.testing.assert_close(stats[1].double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_fprop_propagates_nan_and_inf(triton, norm, value):
    layer, dtype = LAYERS["3x3"], torch.float32
    _, (x, w, geometry, _) = fprop_case(layer, dtype, False)
    affine = Normalise(*(torch.ones(layer.c) for _ in range(4))) if norm else None
    x[1, 3, 4, 4] = value
    y, stats = empty(layer.out, dtype), torch.empty(3, layer.k)
    triton.conv_fprop(y, stats, None, None, x, w, geometry, affine, None, EPS)
    # on the CPU: cuDNN may choose Winograd, which spreads a NaN over its tile
    want = empty(layer.out, dtype).cpu()
    norm_cpu = None if affine is None else Normalise(*(v.cpu() for v in affine))
    reference.conv_fprop(want, None, None, None, x.cpu(), w.cpu(), geometry, norm_cpu, None, EPS)
    y, stats = y.cpu(), stats.cpu()
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    assert not torch.isfinite(y[1, :, 3:6, 3:6]).any()
    assert stats[1].isnan().all()


def spread(module, outputs: dict, call, *inputs) -> None:
    """Call the kernels and the reference in fp32: NaN and Inf reach the same elements, some."""
    made = []
    for where in (module, reference):
        out = {k: empty(shape, torch.float32) for k, shape in outputs.items()}
        call(where, out, *inputs)
        made.append(out)
    for name in outputs:
        ours, theirs = (~torch.isfinite(out[name]) for out in made)
        assert torch.equal(ours, theirs), (name, ours.sum(), theirs.sum())
    assert any((~torch.isfinite(made[0][name])).any() for name in outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("into", ["x", "w", "residual", "shortcut"])
def test_the_fused_forwards_propagate_nan_and_inf(triton, into, value):
    """Of conv_fprop_act, and of an input formed from a shortcut."""
    layer, dtype = LAYERS["1x1 odd"], torch.float32
    _, (x, w, geometry, norm) = fprop_case(layer, dtype, True)
    norm = norm._replace(gamma=norm.gamma.abs())  # inf stays inf behind the ReLU
    random = Random(dtype, "spread", layer)
    res, shortcut = random.activation(*layer.out), random.activation(*x.shape)
    hit = {"x": x, "w": w, "residual": res, "shortcut": shortcut}[into]
    hit[(2, 3, 0, 0) if into == "w" else (0, 3, 2, 4)] = value
    if into != "shortcut":
        spread(triton, {"z": layer.out}, _act, x, w, geometry, random.norm(layer.k), res, True)
    if into != "residual":
        outputs = {"y": layer.out, "z": tuple(x.shape)}
        spread(triton, outputs, _fprop, x, w, geometry, norm, Shortcut(shortcut, None))


# --- backward -------------------------------------------------------------------------------------


def gradient_case(layer: Layer, dtype, mode: str, masked: bool):
    """(random, x, w, g, bn): the gradient that reaches a conv's output."""
    random = Random(dtype, "bwd", layer)
    x, w = random.activation(layer.n, layer.c, layer.h, layer.w), random.weight(layer)
    dz = random.activation(*layer.out)
    g = Gradient(dz, random.mask(dz) if masked else None)
    bn = None
    if mode != "none":
        vectors = random.norm(layer.k), *(random.normal(layer.k) for _ in range(2))
        bn = NormGradient(random.activation(*layer.out), *vectors, mode == "bn")
    return random, x, w, g, bn


def residual_of(random: Random, x: Tensor, kind: str) -> Gradient | None:
    if kind == "none":
        return None
    dz = random.activation(*x.shape)
    return Gradient(dz, random.mask(dz) if kind == "mask" else None)


def previous_of(random: Random, x: Tensor, kind: str) -> Previous | None:
    if kind == "none":
        return None
    y, norm = random.activation(*x.shape), random.norm(x.shape[1])
    if kind == "recompute":
        return Previous(y, norm)
    other = random.activation(*x.shape)
    shortcut = Shortcut(other, random.norm(x.shape[1]) if kind == "dual" else None)
    return Previous(y, norm, random.mask(x), shortcut)


def sums_of(out: dict[str, Tensor]) -> Sums | None:
    return Sums(out["dgamma"], out["dbeta"], out.get("res_dgamma")) if "dgamma" in out else None


def gradient_outputs(x: Tensor, previous: str) -> dict:
    outputs = {"dx": tuple(x.shape)}
    if previous != "none":
        outputs |= {"dgamma": (x.shape[1],), "dbeta": (x.shape[1],)}
    if previous == "dual":
        outputs["res_dgamma"] = (x.shape[1],)
    return outputs


def _dgrad(module, out, g, w, geometry, bn, dres, prev):
    module.conv_dgrad(out["dx"], sums_of(out), g, w, geometry, bn, dres, prev)


# (batch norm behind, its gate, residual gradient, what came before): every value of each, and the
# combinations the rungs use.
FORMS = [
    ("none", False, "none", "none"),
    ("none", False, "none", "recompute"),
    ("none", False, "mask", "none"),
    ("bn", False, "none", "recompute"),
    ("bn", True, "none", "recompute"),
    ("frozen", True, "plain", "mask"),
    ("bn", False, "mask", "dual"),
    ("bn", False, "plain", "mask"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f)))
@layers(("1x1", "1x1 odd", "1x1 s2", "3x3 odd", "3x3 s2"))
def test_dgrad(triton, layer, dtype, form):
    _dgrad_case(triton, layer, dtype, form)


def _dgrad_case(triton, layer, dtype, form):
    mode, masked, residual, previous = form
    random, x, w, g, bn = gradient_case(layer, dtype, mode, masked)
    dres, prev = residual_of(random, x, residual), previous_of(random, x, previous)
    outputs = gradient_outputs(x, previous)
    check(triton, dtype, outputs, _dgrad, g, w, layer.geometry, bn, dres, prev)


@layers(("5x5", "7x7 s2", "3x3 d2", "3x3 s3 d2", "1x3", "3x3", *GROUPED))
def test_dgrad_of_other_shapes(triton, layer, dtype):
    random, x, w, g, bn = gradient_case(layer, dtype, "bn", False)
    outputs = gradient_outputs(x, "recompute")
    prev = previous_of(random, x, "recompute")
    check(triton, dtype, outputs, _dgrad, g, w, layer.geometry, bn, None, prev)


def _wgrad(module, out, g, x, geometry, bn, norm):
    module.conv_wgrad(out["dw"], g, x, geometry, bn, norm)


@pytest.mark.parametrize("mode, masked, norm", [
    ("none", False, False), ("none", False, True), ("bn", False, True), ("bn", True, True),
    ("frozen", True, False),
], ids=str)  # fmt: skip
@layers(("1x1", "1x1 odd", "1x1 s2", "3x3 odd", "3x3 s2", "7x7 s2", "images", "two d2"))
def test_wgrad(triton, layer, dtype, mode, masked, norm):
    _wgrad_case(triton, layer, dtype, mode, masked, norm)


def _wgrad_case(triton, layer, dtype, mode, masked, norm):
    random, x, w, g, bn = gradient_case(layer, dtype, mode, masked)
    affine = random.norm(layer.c) if norm else None
    outputs = {"dw": tuple(w.shape)}
    check(triton, dtype, outputs, _wgrad, g, x, layer.geometry, bn, affine)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f)))
@layers(("3x3 g4", "3x3 s2 g2"), ("fp32",))
def test_dgrad_of_groups(triton, layer, dtype, form):
    """Every prologue and epilogue: bits of a group that begins inside a byte, borders of groups."""
    _dgrad_case(triton, layer, dtype, form)


@pytest.mark.parametrize("form", FORMS[4:7], ids=lambda f: "-".join(map(str, f)))
@layers(("3x3 s2 g2",), ("bf16", "fp16"))
def test_dgrad_of_groups_in_half_precision(triton, layer, dtype, form):
    _dgrad_case(triton, layer, dtype, form)


@pytest.mark.parametrize("form", FORMS[5:7], ids=lambda f: "-".join(map(str, f)))
@layers(("5x5", "7x7 s2", "3x3 d2"), ("bf16",))
def test_dgrad_epilogues_of_other_shapes(triton, layer, dtype, form):
    _dgrad_case(triton, layer, dtype, form)


@pytest.mark.parametrize("mode, masked, norm", [
    ("bn", False, False), ("bn", True, False), ("frozen", False, False), ("frozen", False, True),
    ("frozen", True, True), ("none", True, False), ("none", True, True),
], ids=str)  # fmt: skip
@layers(("1x1 odd", "3x3 s2", "images"), ("bf16",))
def test_wgrad_of_the_other_prologues(triton, layer, dtype, mode, masked, norm):
    """Of c2's first conv, of a stem, of frozen batch norms: in one dtype."""
    _wgrad_case(triton, layer, dtype, mode, masked, norm)


@layers(("5x5", "3x3 d2", "3x3 s3 d2", "1x3", "3x3", "3x3 g4", "3x3 s2 g2", "1x1 g3"))
def test_wgrad_of_other_shapes(triton, layer, dtype):
    random, x, w, g, bn = gradient_case(layer, dtype, "bn", False)
    norm = random.norm(layer.c)
    check(triton, dtype, {"dw": tuple(w.shape)}, _wgrad, g, x, layer.geometry, bn, norm)


@layers(("3x3 wide g2", "depthwise"), ("bf16", "fp16"))  # the interpreter takes 8 s each in fp32
def test_wgrad_of_groups_in_half_precision(triton, layer, dtype):
    test_wgrad_of_other_shapes(triton, layer, dtype)


@pytest.mark.parametrize("contiguous", [False, True])
def test_wgrad_writes_the_weights_own_strides(triton, contiguous):
    layer, dtype = LAYERS["3x3"], torch.float32
    _, x, w, g, _ = gradient_case(layer, dtype, "none", False)
    dw = torch.empty_like(w) if contiguous else w.contiguous(memory_format=torch.channels_last)
    want = torch.empty_like(w)
    triton.conv_wgrad(dw, g, x, layer.geometry, None, None)
    reference.conv_wgrad(want, g, x, layer.geometry, None, None)
    torch.testing.assert_close(dw, want, rtol=1e-5, atol=1e-5)


def _both(module, out, g, x, w, geometry, bn, norm, dres, prev):
    module.conv_bwd_pointwise(
        out["dx"], sums_of(out), out["dw"], g, x, w, geometry, bn, norm, dres, prev
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f)))
@layers(("1x1", "1x1 odd", "1x1 wide"))
def test_bwd_pointwise(triton, layer, dtype, form):
    mode, masked, residual, previous = form
    random, x, w, g, bn = gradient_case(layer, dtype, mode, masked)
    dres, prev = residual_of(random, x, residual), previous_of(random, x, previous)
    norm = None
    if previous == "recompute":  # the input is relu(normalise(x)), and x the raw tensor of both
        prev = replace_y(prev, x)
        norm = prev.norm
    outputs = {**gradient_outputs(x, previous), "dw": tuple(w.shape)}
    check(triton, dtype, outputs, _both, g, x, w, layer.geometry, bn, norm, dres, prev)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("into", ["dz", "x", "y", "w", "dres", "prev"])
@pytest.mark.parametrize("name", ["1x1 odd", "3x3 odd"])
def test_the_backward_propagates_nan_and_inf(triton, name, into, value):
    """dgrad, wgrad and, of a 1x1, both in one kernel."""
    layer, dtype = LAYERS[name], torch.float32
    random, x, w, g, bn = gradient_case(layer, dtype, "bn", False)
    dres = residual_of(random, x, "plain")
    ones = torch.ones(layer.c)
    prev = Previous(random.activation(*x.shape), Normalise(0 * ones, ones, ones, 9 * ones))  # open
    hit = {"dz": g.dz, "x": x, "y": bn.y, "w": w, "dres": dres.dz, "prev": prev.y}[into]
    # of a weight the tap that every pixel has: a product with padding is NaN or nothing
    hit[(2, 3, layer.r // 2, layer.s // 2) if into == "w" else (0, 3, 2, 4)] = value
    outputs, dw = gradient_outputs(x, "recompute"), {"dw": tuple(w.shape)}
    if into != "x":
        spread(triton, outputs, _dgrad, g, w, layer.geometry, bn, dres, prev)
    if into in ("dz", "x", "y"):
        spread(triton, dw, _wgrad, g, x, layer.geometry, bn, None)
    if layer.pointwise:
        args = g, x, w, layer.geometry, bn, None, dres, prev
        spread(triton, {**outputs, **dw}, _both, *args)


def replace_y(prev: Previous, y: Tensor) -> Previous:
    return prev._replace(y=y)
