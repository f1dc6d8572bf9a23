"""What tests/aot.py compiles: launches of the Triton kernels, captured on meta tensors.

Streaming kernels: every form the ops use, on a few shapes. Convolutions: whatever the fusion ladder
launches for the residual stages of ResNet-18 and ResNet-50 at batch 256, so that a form or a tile
that it begins to use is compiled without being listed here. Not to be imported under
TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# (dtype, layout, C, H) of the streaming kernels: one aligned NHWC shape for each dtype, NCHW
# aligned, and ragged both ways. CI compiles the first.
STREAMS = [
    ("bf16", "nhwc", 256, 14),
    ("fp32", "nhwc", 64, 56),
    ("fp16", "nhwc", 2048, 7),
    ("bf16", "nchw", 64, 56),
    ("fp32", "nchw", 35, 7),
]
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,  # torch.backends.cudnn.allow_tf32, torch's default
    "fp32": torch.float32,
}
# (rung, batch norms on batch statistics, a backward follows) of the stages
STEPS = [
    ("c1", True, True),
    ("c2", True, True),
    ("d", True, True),
    ("c1", False, True),
    ("d", False, True),
    ("d", False, False),
]
FEW_STEPS = [("c2", True, True), ("d", True, True), ("d", False, False)]

MODULES = (
    "_bn_stats", "_bn_apply", "_bn_bwd", "_add_relu", "_bn_relu_maxpool",
    "_conv_fprop", "_conv_dgrad", "_conv_wgrad", "_conv_bwd_pointwise", "_conv_few",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One call of `fastres.kernels._launch.launch`. wide: loads and stores of 16 bytes that the
    streaming kernels should have at least; None: not asked."""

    case: str
    dtype: str
    layout: str
    kernel: Any
    args: tuple
    warps: int  # of 32 lanes
    stages: int | None  # None: Triton's default
    maxnreg: int | None
    constants: dict[str, Any]
    wide: tuple[int, int] | None = None

    def named(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.args, strict=False))

    @property
    def conv(self) -> bool:
        return "_conv_" in self.kernel.__name__

    def form(self) -> tuple:
        """Kernel, prologue, epilogue, dtype, without the tile: which arguments there are, and the
        constants but for BLOCK_* and alignments (all aligned, in a ResNet)."""
        there = tuple(
            a.dtype if isinstance(a, Tensor) else None if a is None else type(a).__name__
            for a in self.args
        )
        chosen = {
            k: v for k, v in self.constants.items() if not k.startswith(("BLOCK", "C_", "K_"))
        }
        return self.kernel.__name__, self.dtype, there, tuple(sorted(chosen.items()))

    def tile(self) -> tuple:
        c = self.constants
        return c.get("BLOCK_M"), c.get("BLOCK_N"), c.get("BLOCK_K"), self.warps, self.stages


# --- capture --------------------------------------------------------------------------------------


@contextlib.contextmanager
def capture(target: str) -> Iterator[list[Launch]]:
    """Inside, the backend's functions on meta tensors launch nothing and fill the list."""
    from fastres.kernels import _conv_config

    from fastres import backends, kernels

    found: list[Launch] = []

    def launch(kernel, programs, args, num_warps, num_stages=None, maxnreg=None, **constants):
        options = num_warps, num_stages, maxnreg
        found.append(Launch("", "", "", kernel, args, *options, constants))

    patched = [(backends, "select", lambda x: kernels)]
    modules = [importlib.import_module(f"fastres.kernels.{name}") for name in MODULES]
    patched += [(module, "launch", launch) for module in modules]
    for module in (_conv_config, *modules):
        if hasattr(module, "arch_of"):
            patched.append((module, "arch_of", lambda device: _conv_config.ARCHS[target]))
    before = [(module, name, getattr(module, name)) for module, name, _ in patched]
    try:
        for module, name, value in patched:
            setattr(module, name, value)
        yield found
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def activation(n: int, c: int, h: int, dtype: torch.dtype, layout: str = "nhwc") -> Tensor:
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return torch.empty((n, c, h, h), dtype=dtype, device="meta").contiguous(memory_format=fmt)


# --- streaming kernels ----------------------------------------------------------------------------


def _streaming(dtype_name: str, layout: str, channels: int, side: int):
    """(case, (wide loads, wide stores) of its first launch, thunk): every kernel, in the forms the
    ops use."""
    from fastres import kernels as k

    dtype = DTYPES[dtype_name]

    def act(c, h, dt=dtype):
        return activation(256, c, h, dt, layout)

    x, v = act(channels, side), torch.empty(channels, device="meta")
    outer, inner = (256 * side**2, channels) if layout == "nhwc" else (256 * channels, side**2)
    m = torch.empty((outer, (inner + 7) // 8), dtype=torch.uint8, device="meta")
    stem_c = 64 if channels % 8 == 0 else channels
    s, p, i = act(stem_c, 112), act(stem_c, 56), act(stem_c, 56, torch.uint8)
    w = torch.empty(stem_c, device="meta")
    n4, v4, w4 = (None,) * 4, (v,) * 4, (w,) * 4
    # 64 bytes per thread and tensor are four 16-byte accesses, in reductions of two or three
    # tensors, too; a reduction of one tensor has eight, a 3 x 3 window nine loads of one.
    yield "bn_stats", (8, 0), lambda: k.bn_stats(v, v, v, x, 1e-5)
    yield "bn_apply dual relu", (8, 4), lambda: k.bn_apply(x, m, x, *v4, x, *v4, True)
    yield "bn_apply relu", (4, 4), lambda: k.bn_apply(x, None, x, *v4, None, *n4, True)
    yield (
        "bn_bwd_reduce dual mask",
        (12, 0),
        lambda: k.bn_bwd_reduce(v, v, v, x, m, x, *v4, x, v, v, "mask"),
    )
    yield (
        "bn_bwd_reduce recompute",
        (8, 0),
        lambda: k.bn_bwd_reduce(v, v, None, x, None, x, *v4, None, None, None, "recompute"),
    )
    yield (
        "bn_bwd_apply dual mask",
        (12, 8),
        lambda: k.bn_bwd_apply(x, x, x, m, x, *v4, v, v, x, *v4, "mask", True, True),
    )
    yield (
        "bn_bwd_apply recompute",
        (8, 4),
        lambda: k.bn_bwd_apply(x, None, x, None, x, *v4, v, v, None, *n4, "recompute", True, False),
    )
    yield (
        "bn_bwd_apply identity mask",
        (8, 8),
        lambda: k.bn_bwd_apply(x, x, x, m, x, *v4, v, v, None, *n4, "mask", True, False),
    )
    yield "add_relu", (8, 4), lambda: k.add_relu(x, m, x, x)
    yield "relu_bwd", (8, 4), lambda: k.relu_bwd(x, x, x, m)
    yield "bn_relu_maxpool", (9, 1), lambda: k.bn_relu_maxpool(p, i, s, *w4, 3, 2, 1)
    yield (
        "bn_relu_maxpool_bwd_reduce",
        (4, 0),
        lambda: k.bn_relu_maxpool_bwd_reduce(w, w, p, i, s, w, w, 3, 2, 1),
    )
    yield (
        "bn_relu_maxpool_bwd_apply",
        (8, 2),
        lambda: k.bn_relu_maxpool_bwd_apply(s, p, i, s, w, w, w, w, w, 3, 2, 1, True),
    )


def streaming(target: str, chosen=None) -> list[Launch]:
    """The streaming kernels' launches; chosen: some of STREAMS."""
    out = []
    for dtype, layout, channels, side in STREAMS if chosen is None else chosen:
        for case, wide, thunk in _streaming(dtype, layout, channels, side):
            with capture(target) as found:
                thunk()
            for i, launch in enumerate(found):
                asked = wide if i == 0 and layout == "nhwc" else None
                out.append(replace(launch, case=case, dtype=dtype, layout=layout, wide=asked))
    return out


# --- convolutions ---------------------------------------------------------------------------------

# Argument -> what it says of a conv kernel's form, in the order of the words.
_WORDS = {
    "_conv_fprop_kernel": {
        "mean_ptr": "norm", "res_ptr": "shortcut", "res_mean_ptr": "norm", "z_ptr": "z",
        "zmask_ptr": "bits", "part_ptr": "stats", "out_mean_ptr": "affine", "add_ptr": "add",
    },
    "_conv_dgrad_kernel": {
        "gmask_ptr": "bits", "y_ptr": "dbn", "res_ptr": "res", "res_mask_ptr": "bits",
        "prev_ptr": "gate", "prev_mask_ptr": "bits", "dual_ptr": "dual",
    },
    "_conv_wgrad_kernel": {"gmask_ptr": "bits", "y_ptr": "dbn", "in_mean_ptr": "norm"},
    "_conv_few_fprop_kernel": {"part_ptr": "stats"},
    "_conv_few_wgrad_kernel": {"gmask_ptr": "bits", "y_ptr": "dbn"},
    "_conv_bwd_pointwise_kernel": {
        "gmask_ptr": "bits", "y_ptr": "dbn", "in_mean_ptr": "norm", "res_ptr": "res",
        "res_mask_ptr": "bits", "prev_ptr": "gate", "prev_mask_ptr": "bits", "dual_ptr": "dual",
    },
}  # fmt: skip


def _describe(launch: Launch, where: str) -> str:
    """Form and one place of use, such as "1x1 norm shortcut z bits stats (resnet50 layer1)"."""
    named, constants = launch.named(), launch.constants
    words = [w for a, w in _WORDS.get(launch.kernel.__name__, {}).items() if named[a] is not None]
    if constants.get("MODE") == "frozen":
        words.append("frozen")
    if constants.get("RELU"):
        words.append("relu")
    if ragged(launch):
        words.append("odd channels")
    if not words and "finalise" in launch.kernel.__name__:
        return f"({where})"
    kind = "images" if "_few_" in launch.kernel.__name__ else "1x1"
    if not constants.get("POINTWISE", True):
        kind = f"{named['taps_h']}x{named['taps_w']}"
        stride = named.get("stride_h", 1)
        kind += f" s{stride}" if stride > 1 else ""
    if constants.get("GROUP_C"):
        kind += f" groups of {constants['GROUP_C']}"
    return " ".join([kind, *words]) + f" ({where})"


def ragged(launch: Launch) -> bool:
    """Whether a pixel's channels are no whole 16 bytes, so that no access can be."""
    size = DTYPES.get(launch.dtype, torch.bfloat16).itemsize
    aligns = [launch.constants.get(a) for a in ("C_ALIGN", "K_ALIGN")]
    return any(a is not None and a * size % 16 for a in aligns)


# Stages that torchvision's networks do not have: CIFAR's widths on 32 x 32 maps; a bottleneck of 35
# channels (140 behind it).
OWN = {"cifar": ("BasicBlock", (16, 32, 64)), "odd": ("Bottleneck", (35,))}


def _own_stages(network: str) -> Iterator[tuple[str, list]]:
    import torchvision

    name, widths = OWN[network]
    block = getattr(torchvision.models.resnet, name)
    c = widths[0]
    for i, width in enumerate(widths):
        stride, out = 2 if i else 1, width * block.expansion
        project = torch.nn.Conv2d(c, out, 1, stride, bias=False) if stride > 1 or c != out else None
        first = block(c, width, stride, None if project is None else torch.nn.Sequential(project))
        stage = []
        for b, projection in ((first, project), (block(out, width), None)):
            convs = [getattr(b, n) for n in ("conv1", "conv2", "conv3") if hasattr(b, n)]
            stage.append((convs, projection))
        c = out
        yield f"stage {i + 1}", stage


@functools.cache
def _stages(network: str) -> list[tuple[str, list]]:
    """(name, blocks) of the residual stages; a block is (convs, projection or None)."""
    import torchvision

    if network in OWN:
        with torch.device("meta"):
            return list(_own_stages(network))
    with torch.device("meta"):
        net = getattr(torchvision.models, network)()
    stages = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        blocks = []
        for block in getattr(net, name):
            convs = [getattr(block, c) for c in ("conv1", "conv2", "conv3") if hasattr(block, c)]
            blocks.append((convs, None if block.downsample is None else block.downsample[0]))
        stages.append((name, blocks))
    return stages


NETWORKS = ("resnet18", "resnet50")


def ladder(
    target: str,
    dtype_name: str,
    steps=STEPS,
    networks=NETWORKS,
    batch: int = 256,
    same: Callable[[Launch], Any] = lambda launch: (launch.form(), launch.tile()),
) -> list[Launch]:
    """The launches of the conv kernels and of those that add their partials, in the residual
    stages; one of those that are the `same`: form and tile."""
    dtype = DTYPES[dtype_name]
    out: dict[tuple, Launch] = {}
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype_name == "tf32"
    try:
        for network in networks:
            width, side = (OWN[network][1][0], 32) if network in OWN else (64, 56)
            x = activation(batch, width, side, dtype)
            for name, blocks in _stages(network):
                for rung, training, backward in steps:
                    with capture(target) as found:
                        z = _stage(x, blocks, rung, training, backward, dtype)
                    for launch in found:
                        # sums of partials are fp32 whatever the dtype
                        if launch.conv or (
                            dtype_name == "bf16" and "finalise" in launch.kernel.__name__
                        ):
                            launch = replace(launch, dtype=dtype_name)
                            case = _describe(launch, f"{network} {name}")
                            launch = replace(launch, case=case, dtype=dtype_name, layout="nhwc")
                            out.setdefault(same(launch), launch)
                x = z
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return list(out.values())


def _stage(x, blocks, rung: str, training: bool, save: bool, dtype) -> Tensor:
    """Forward (and backward) of one stage; its output."""
    from fastres.ops import _ladder, _ladder_bwd

    convs = [c for main, proj in blocks for c in [*main, *([] if proj is None else [proj])]]
    geometry = [g for c in convs for g in (*c.stride, *c.padding, *c.dilation, c.groups)]
    main, projection = [len(b[0]) for b in blocks], [b[1] is not None for b in blocks]
    n = len(convs)
    eps = [1e-5] * n
    stage = _ladder.Stage(main, projection, geometry, [training] * n, eps, rung)
    weights = [
        c.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last) for c in convs
    ]

    def vectors():
        return [torch.empty(c.out_channels, device="meta") for c in convs]

    affine = vectors(), vectors()
    z, zs, masks, ys, stats = _ladder.forward(
        x, weights, *affine, vectors(), vectors(), stage, save
    )
    if save:
        _ladder_bwd.backward(
            torch.empty_like(z), x, zs, masks, weights, *affine, ys, stats, stage, True, [True] * n
        )
    return z


def wide(target: str) -> list[Launch]:
    """The convolutions of tensors past 2^31 elements, in bf16 and every form of training."""
    launches = one_tile(ladder(target, "bf16", FEW_STEPS[:2], ("resnet50",), batch=2**17))
    launches = [x for x in launches if "WIDE" in x.constants]
    for launch in launches:
        assert launch.constants["WIDE"], launch.case
    for launch in stem(target, "bf16"):
        if "7x7" in launch.case:
            launches.append(replace(launch, constants={**launch.constants, "WIDE": True}))
    return [replace(x, case=x.case + " 64-bit rows") for x in launches]


def own(target: str, dtype_name: str = "bf16", networks=tuple(OWN)) -> list[Launch]:
    """The convolutions of CIFAR's widths, and of channels that are no whole 16 bytes."""
    steps = [ladder(target, dtype_name, FEW_STEPS, (name,)) for name in networks]
    return [launch for launches in steps for launch in one_tile(launches)]


def grouped(target: str, dtype_name: str) -> list[Launch]:
    """The launches of ResNeXt-50's grouped convolutions: groups of 4, 8, 16 and 32 channels."""
    launches = ladder(target, dtype_name, FEW_STEPS[::2], ("resnext50_32x4d",))
    return [x for x in launches if x.constants.get("GROUP_C")]


def stem(target: str, dtype_name: str) -> list[Launch]:
    """The launches of a stem's conv on images of 3 channels: ImageNet's, with a pool behind it, and
    CIFAR's, whose wgrad folds the batch norm's backward on c2."""
    from fastres import kernels as k
    from fastres._contract import Gradient, Normalise, NormGradient

    dtype = DTYPES[dtype_name]
    out: list[Launch] = []
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype_name == "tf32"
    try:
        for name, size, r, stride, channels in (("7x7 s2", 224, 7, 2, 64), ("3x3", 32, 3, 1, 16)):
            geometry = [stride, stride, r // 2, r // 2, 1, 1, 1]
            x, y = activation(256, 3, size, dtype), activation(256, channels, size // stride, dtype)
            w = torch.empty((channels, 3, r, r), dtype=dtype, device="meta")
            w = w.contiguous(memory_format=torch.channels_last)
            v, stats = torch.empty(channels, device="meta"), torch.empty(3, channels, device="meta")
            bits = torch.empty((y.numel() // channels, channels // 8), device="meta").byte()
            bn = NormGradient(y, Normalise(v, v, v, v), v, v, True)
            with capture(target) as found:
                k.conv_fprop(y, stats, None, None, x, w, geometry, None, None, 1e-5)
                k.conv_fprop(y, None, None, None, x, w, geometry, None, None, 1e-5)
                k.conv_wgrad(w, Gradient(y), x, geometry, None, None)
                if r == 3:
                    k.conv_wgrad(w, Gradient(y, bits), x, geometry, bn, None)
            for launch in found:
                if "_few_" in launch.kernel.__name__:
                    case = _describe(launch, f"{name} stem")
                    out.append(replace(launch, case=case, dtype=dtype_name, layout="nhwc"))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return out


def one_tile(launches: list[Launch]) -> list[Launch]:
    """One launch of each form, whatever its tile."""
    return list({launch.form(): launch for launch in reversed(launches)}.values())[::-1]


def extremes(launches: list[Launch]) -> list[Launch]:
    """Of each kernel the form with the fewest tensors and that with the most."""
    out = []
    for name in dict.fromkeys(launch.kernel.__name__ for launch in launches):
        of = [launch for launch in launches if launch.kernel.__name__ == name]
        of.sort(key=lambda launch: sum(a is not None for a in launch.args))
        out += [of[0], of[-1]] if len(of) > 1 else of
    return out


def everything(target: str, digest: Callable[[Launch], str]) -> list[Launch]:
    """The committed table: every kernel of bf16 (other channels make more of a form and tile), the
    other dtypes in one tile of the forms that ResNet training and inference use most; grouped convs
    in bf16."""
    out = streaming(target) + grouped(target, "bf16") + ladder(target, "bf16", same=digest)
    out += own(target) + wide(target)
    for dtype in DTYPES:
        out += stem(target, dtype)
    for dtype in ("fp16", "tf32", "fp32"):
        out += one_tile(ladder(target, dtype, FEW_STEPS)) + own(target, dtype, ("odd",))
    return out


def some(target: str) -> list[Launch]:
    """A few minutes of CI: sm_90 in bf16 by form, the extremes of the rest."""
    out = streaming(target, STREAMS[:1])
    bf16 = one_tile(ladder(target, "bf16", FEW_STEPS))
    out += bf16 if target == "sm_90" else extremes(bf16)
    if target == "sm_90":
        out += extremes(one_tile(ladder(target, "tf32", FEW_STEPS)))
        out += [x for x in extremes(own(target)) if "_fprop_" in x.kernel.__name__ and ragged(x)]
    out += [x for x in stem(target, "bf16") if "7x7" in x.case]
    out += extremes([x for x in grouped(target, "bf16") if x.constants["GROUP_C"] == 32])
    return out
