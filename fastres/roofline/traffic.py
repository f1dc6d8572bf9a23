"""Bytes and FLOPs of one kernel, by formula: the vocabulary of the ladder in DESIGN.md section 4.
tests/test_traffic.py holds the Triton kernels to them, tensor by tensor.

Each function answers with a `Traffic`: the bytes of every tensor that the kernel reads and writes,
each tensor crossing memory once. Per-channel vectors (mean, rstd, gamma, beta, sums) and the
partial sums of a reduction are left out: a vector of each of the 53 batch norms of a ResNet-50 is
0.1 MB a batch together. Names below: x, w, z as in docs/kernels.md; y a raw conv output; dy, dx
gradients of y and x; g a gradient gated by its ReLU; y_in the raw output of the producer of a
conv's input, where the input itself (relu of the normalised y_in) is never written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}

FPROP_PROLOGUES = ("none", "norm_relu", "norm_add_relu", "dual_add_relu")
FPROP_EPILOGUES = ("none", "stats", "affine", "affine_relu", "affine_add_relu")
DY_PROLOGUES = ("none", "dbn", "mask_dbn")
X_PROLOGUES = ("none", "norm_relu")
DGRAD_EPILOGUES = ("none", "add", "gate_sums", "add_gate_sums", "dual_add_gate_sums")

# Output channels whose dw a program of dgrad_wgrad holds, in a tile of 32 input channels: the table
# of sm_90 (kernels/_conv_config.py; fp32 as TF32). Wider 1x1 convs run dgrad and wgrad apart.
JOINT_CHANNELS = {"fp32": 128, "bf16": 256, "fp16": 256}
# The same where a pixel's channels, C or K, are no whole 16 bytes (joint_odd there).
JOINT_ODD = {"fp32": 0, "bf16": 128, "fp16": 128}

Shape = tuple[int, ...]


def itemsize(dtype: str) -> int:
    """Bytes of one element. Raises ValueError for an unknown dtype."""
    if dtype not in ITEMSIZE:
        raise ValueError(f"roofline: unknown dtype {dtype!r}; accepted: {', '.join(ITEMSIZE)}")
    return ITEMSIZE[dtype]


def size(shape: Shape, dtype: str) -> int:
    """Bytes of a dense activation."""
    return math.prod(shape) * itemsize(dtype)


def bits(shape: Shape) -> int:
    """Bytes of an NHWC activation's 1-bit mask: N * H * W rows of ceil(C / 8)."""
    n, c, h, w = shape
    return n * h * w * -(-c // 8)


@dataclass(frozen=True)
class Traffic:
    """What one kernel moves and computes: tensor -> bytes read, tensor -> bytes written, FLOPs.

    Only matrix arithmetic counts as FLOPs (a multiply-add is 2), as torch.utils.flop_counter."""

    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


# --- convolutions ---------------------------------------------------------------------------------


def _touched(length: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many of `length` positions a conv reads in one direction."""
    seen = {
        o * stride - padding + k * dilation
        for o in range(out)
        for k in range(kernel)
        if 0 <= o * stride - padding + k * dilation < length
    }
    return len(seen)


def _launched(length: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions of the output, over the residue classes of the input positions, that reach them."""
    return sum(
        len(
            {
                (i + padding - k * dilation) // stride
                for i in range(first, length, stride)
                for k in range(kernel)
                if (i + padding - k * dilation) % stride == 0
                and 0 <= (i + padding - k * dilation) // stride < out
            }
        )
        for first in range(min(stride, length))
    )


@dataclass(frozen=True)
class ConvShape:
    """A convolution: input (N, C, H, W), weight (K, C / groups, R, S); pairs are (h, w)."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def P(self) -> int:
        """Output rows."""
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[
            0
        ] + 1

    @property
    def Q(self) -> int:
        """Output columns."""
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[
            1
        ] + 1

    @property
    def x(self) -> Shape:
        return (self.N, self.C, self.H, self.W)

    @property
    def y(self) -> Shape:
        return (self.N, self.K, self.P, self.Q)

    @property
    def pointwise(self) -> bool:
        """1x1, stride 1, one group: a plain matrix product."""
        one = (self.R, self.S, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))
        return one and self.groups == 1

    def joint(self, dtype: str) -> bool:
        """Whether `dgrad_wgrad` takes it."""
        odd = (self.C * itemsize(dtype)) % 16 != 0 or (self.K * itemsize(dtype)) % 16 != 0
        most = (JOINT_ODD if odd else JOINT_CHANNELS)[dtype]
        return self.pointwise and most >= self.K

    @property
    def x_read(self) -> Shape:
        """The part of x that the conv reads: of a strided 1x1 a quarter, otherwise all."""
        rows = _touched(self.H, self.P, self.R, self.stride[0], self.padding[0], self.dilation[0])
        cols = _touched(self.W, self.Q, self.S, self.stride[1], self.padding[1], self.dilation[1])
        return (self.N, self.C, rows, cols)

    @property
    def dy_read(self) -> Shape:
        """What our dgrad reads of y's gradient. With a stride it runs one launch for each residue
        class of x's pixels, with the taps that reach it: a 3x3 of stride 2 reads y four times."""
        rows = _launched(self.H, self.P, self.R, self.stride[0], self.padding[0], self.dilation[0])
        cols = _launched(self.W, self.Q, self.S, self.stride[1], self.padding[1], self.dilation[1])
        return (self.N, self.K, rows, cols)

    @property
    def flops(self) -> int:
        """2 N P Q K (C / groups) R S: of fprop, of dgrad and of wgrad alike."""
        return 2 * math.prod(self.y) * (self.C // self.groups) * self.R * self.S

    @property
    def weights(self) -> int:
        return self.K * (self.C // self.groups) * self.R * self.S


def _one_of(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"roofline: unknown {what} {value!r}; accepted: {', '.join(accepted)}")


def fprop(shape: ConvShape, dtype: str, prologue: str = "none", epilogue: str = "none") -> Traffic:
    """y = conv(h, w).

    | prologue | h | reads besides w | also writes |
    |---|---|---|---|
    | none | x | x | |
    | norm_relu | relu(norm(y_in)) | y_in | |
    | norm_add_relu | z = relu(norm(y_in) + shortcut) | y_in, shortcut | z, bits |
    | dual_add_relu | the same, the shortcut by its own batch norm | y_in, shortcut | z, bits |

    epilogue: none; stats (sums of y a channel, no tensor more); for inference affine, affine_relu,
    affine_add_relu (reads the residual), all writing the result instead of y. A conv reads of its
    input what it touches (`ConvShape.x_read`)."""
    _one_of("fprop prologue", prologue, FPROP_PROLOGUES)
    _one_of("fprop epilogue", epilogue, FPROP_EPILOGUES)
    reads = {"w": shape.weights * itemsize(dtype)}
    writes = {"y" if epilogue in ("none", "stats") else "z": size(shape.y, dtype)}
    if prologue in ("none", "norm_relu"):
        reads["x" if prologue == "none" else "y_in"] = size(shape.x_read, dtype)
    else:
        if shape.x_read != shape.x:
            raise ValueError(
                f"roofline: fprop prologue {prologue!r} writes all of its input, of which a conv of"
                f" stride {shape.stride} and kernel {shape.R}x{shape.S} reads only a part"
            )
        reads |= {"y_in": size(shape.x, dtype), "shortcut": size(shape.x, dtype)}
        writes |= {"side z": size(shape.x, dtype), "side bits": bits(shape.x)}
    if epilogue == "affine_add_relu":
        reads["residual"] = size(shape.y, dtype)
    return Traffic(reads, writes, shape.flops)


def _dy(shape: ConvShape, dtype: str, prologue: str, read: Shape | None = None) -> dict[str, int]:
    """The gradient operand: dy; or (dbn) a * g + b * y + c from g and y; or (mask_dbn) that of a g
    which its bits still gate."""
    _one_of("gradient prologue", prologue, DY_PROLOGUES)
    read = read or shape.y
    one = size(read, dtype)
    if prologue == "none":
        return {"dy": one}
    return {"g": one, "y": one, **({"g bits": bits(read)} if prologue == "mask_dbn" else {})}


def dgrad(
    shape: ConvShape,
    dtype: str,
    dy_prologue: str = "none",
    epilogue: str = "none",
    dres_mask: bool = False,
    ours: bool = False,
) -> Traffic:
    """dx = conv_transpose(dy, w), dy as read (none) or formed from g and y (dbn, mask_dbn).

    | epilogue | what | reads besides | writes |
    |---|---|---|---|
    | none | dx | | dx |
    | add | dx + the shortcut's gradient | dres | dx |
    | gate_sums | dReLU and dBN sums of the producer | y_in | g_in |
    | add_gate_sums | the same at a block's end, after the add | dres, y_end, bits | g_in |
    | dual_add_gate_sums | the same, with the projection's BN | dres, y_end, y_short, bits | g_in |

    dres_mask: dres is gated where it is read, by bits of its own. dx has the whole shape of x,
    whatever the stride: a strided 1x1 writes zeros. ours: a strided dgrad of fastres.kernels, which
    reads the gradient once a launch (`ConvShape.dy_read`)."""
    _one_of("dgrad epilogue", epilogue, DGRAD_EPILOGUES)
    x = size(shape.x, dtype)
    read = shape.dy_read if ours else shape.y
    reads = {"w": shape.weights * itemsize(dtype), **_dy(shape, dtype, dy_prologue, read)}
    if epilogue == "gate_sums":
        reads["y_in"] = x
    elif epilogue != "none":
        reads["dres"] = x
        if dres_mask:
            reads["dres bits"] = bits(shape.x)
    if epilogue.endswith("add_gate_sums"):
        reads |= {"y_end": x, "bits": bits(shape.x)}
        if epilogue.startswith("dual"):
            reads["y_short"] = x
    return Traffic(reads, {"g_in" if "gate" in epilogue else "dx": x}, shape.flops)


def wgrad(
    shape: ConvShape, dtype: str, dy_prologue: str = "none", x_prologue: str = "none"
) -> Traffic:
    """dw = dy * h, dy as in `dgrad`, h = x (none) or relu(norm(y_in)) (norm_relu); dw in dtype."""
    _one_of("wgrad x prologue", x_prologue, X_PROLOGUES)
    operand = "x" if x_prologue == "none" else "y_in"
    reads = {operand: size(shape.x_read, dtype), **_dy(shape, dtype, dy_prologue)}
    return Traffic(reads, {"dw": shape.weights * itemsize(dtype)}, shape.flops)


def dgrad_wgrad(
    shape: ConvShape,
    dtype: str,
    dy_prologue: str = "none",
    x_prologue: str = "none",
    epilogue: str = "none",
    dres_mask: bool = False,
) -> Traffic:
    """`dgrad` and `wgrad` in one kernel, each operand read once; 1x1 stride 1 only, and as many
    output channels as `ConvShape.joint` says (not checked here)."""
    if not shape.pointwise:
        raise ValueError(
            f"roofline: dgrad_wgrad is for 1x1 convs of stride 1, got {shape.R}x{shape.S} stride "
            f"{shape.stride} groups {shape.groups}"
        )
    d = dgrad(shape, dtype, dy_prologue, epilogue, dres_mask)
    w = wgrad(shape, dtype, dy_prologue, x_prologue)
    return Traffic(d.reads | w.reads, d.writes | w.writes, d.flops + w.flops)


# --- batch norm, ReLU, add, pool: docs/triton.md, "What each kernel reads and writes" -------------


def bn_stats(x: Shape, dtype: str) -> Traffic:
    """mean and variance of x a channel. Reads T."""
    return Traffic({"y": size(x, dtype)})


def bn_apply(x: Shape, dtype: str, residual: bool = False, mask: bool = False) -> Traffic:
    """z = relu(norm(x) + residual). Reads T, 2 T with a residual (its own batch norm or not);
    writes T and the mask's bits."""
    t = size(x, dtype)
    reads = {"y": t, **({"residual": t} if residual else {})}
    return Traffic(reads, {"z": t, **({"bits": bits(x)} if mask else {})})


def bn_bwd_reduce(x: Shape, dtype: str, mask: bool = False, dual: bool = False) -> Traffic:
    """dgamma and dbeta. Reads 2 T, 3 T dual, the mask's bits."""
    t = size(x, dtype)
    reads = {"dz": t, "y": t, **({"y_short": t} if dual else {})}
    if mask:
        reads["bits"] = bits(x)
    return Traffic(reads)


def bn_bwd_apply(x: Shape, dtype: str, mask: bool = False, dual: bool = False) -> Traffic:
    """dy from dz (or g) and y. Reads 2 T, 3 T dual, the mask's bits; writes T, 2 T dual."""
    t = size(x, dtype)
    reads = {"dz": t, "y": t, **({"y_short": t} if dual else {})}
    if mask:
        reads["bits"] = bits(x)
    return Traffic(reads, {"dy": t, **({"dy_short": t} if dual else {})})


def relu_bwd(x: Shape, dtype: str) -> Traffic:
    """dx = gate(dz) + dy under the mask. Reads 2 T and bits, writes T."""
    t = size(x, dtype)
    return Traffic({"dz": t, "dx": t, "bits": bits(x)}, {"dx": t})


def grad_add(x: Shape, dtype: str) -> Traffic:
    """The sum of two gradients where a tensor forks. Reads 2 T, writes T."""
    t = size(x, dtype)
    return Traffic({"dx": t, "dx2": t}, {"dx": t})


def bn_relu_maxpool(x: Shape, z: Shape, dtype: str) -> Traffic:
    """z = maxpool(relu(norm(x))). Reads T, writes t and one byte of index an output."""
    return Traffic({"y": size(x, dtype)}, {"z": size(z, dtype), "index": math.prod(z)})


def bn_relu_maxpool_bwd_reduce(x: Shape, z: Shape, dtype: str) -> Traffic:
    """dgamma and dbeta of the stem. Reads T, t, the index."""
    return Traffic({"y": size(x, dtype), "dz": size(z, dtype), "index": math.prod(z)})


def bn_relu_maxpool_bwd_apply(x: Shape, z: Shape, dtype: str) -> Traffic:
    """dy of the stem's conv. Reads T, t, the index; writes T."""
    reads = {"y": size(x, dtype), "dz": size(z, dtype), "index": math.prod(z)}
    return Traffic(reads, {"dy": size(x, dtype)})
