"""Host side of every Triton kernel: layout -> matrix, tiles, reduction cuts, the one launch point.

Nothing here depends on the device in front of it: a tile or a cut is a function of shape, layout
and dtype alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

_INT32_MAX = 2**31 - 1


@triton.jit
def _probe():
    pass


# What triton.jit makes of a function in this process: TRITON_INTERPRET was set, or not, when this
# module was imported.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


# Arguments that follow from the batch and the size of the images: `triton.jit(do_not_specialize=
# SIZES)`. Triton compiles a kernel anew where an integer becomes 1, or divisible by 16, or no
# longer is: a last batch of 250 images, or another resolution, would cost some 2 s for each of 90
# kernels in the middle of training. None of these aligns an access. What the network alone decides
# (channels, taps, strides) stays special: the compiler folds it.
SIZES = (
    "rows", "outer", "N", "H", "W", "OH", "OW",
    "grid_h", "grid_w", "in_h", "in_w", "out_h", "out_w",
    "first_h", "first_w", "off_h", "off_w", "step_h", "step_w", "tap0", "tap_h", "tap_w",
    "tiles", "chunk", "chunk0", "chunks", "units", "unit",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """An activation as a dense row-major (outer, inner) matrix; see docs/kernels.md."""

    outer: int
    inner: int
    nhwc: bool
    batch: int
    channels: int
    pixels: int

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.batch * self.pixels

    @property
    def align(self) -> int:
        """Largest power of two that divides inner, at most 128.

        The kernels get `inner / align` and multiply it back, so that Triton's axis analysis knows
        the alignment of a row: 8 gives 16-byte accesses in bf16, and 128 gives 16-byte accesses to
        the bit masks. Triton's own specialisation knows only "divisible by 16", which 14 x 14 = 196
        pixels are not.
        """
        return min(self.inner & -self.inner, 128)


def layout(x: torch.Tensor, nhwc: bool | None = None) -> Layout:
    """The (outer, inner) view of a dense activation; dense in both layouts counts as NHWC, or as
    the caller says.
    """
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) if nhwc is None else nhwc:
        return Layout(n * h * w, c, True, n, c, h * w)
    return Layout(n * c, h * w, False, n, c, h * w)


def flat(lay: Layout, has_mask: bool) -> Layout:
    """The same activation as one long row, where an op has no channels: no ragged tile at the end
    of a row.

    With a bit mask only if a row is whole bytes. Column indices are 32 bit, so huge tensors stay a
    matrix.
    """
    numel = lay.outer * lay.inner
    if (has_mask and lay.inner % 8) or numel > _INT32_MAX - 2**16:
        return lay
    return Layout(1, numel, lay.nhwc, lay.batch, lay.channels, lay.pixels)


@dataclass(frozen=True)
class Tile:
    """One program's tile of an elementwise kernel."""

    block_m: int
    block_n: int
    num_warps: int


def elementwise_tile(lay: Layout, itemsize: int, thread_bytes: int = 64) -> Tile:
    """Tile of the elementwise kernels.

    64 bytes per thread and tensor: four independent 16-byte loads in flight, 16 KB per block and
    tensor, so that two resident blocks cover the bandwidth-latency product of an SM (about 25 KB on
    H100).
    """
    num_warps = 8
    elements = num_warps * 32 * thread_bytes // itemsize
    # NHWC: a row segment of at most 256 bytes, since the taller the tile, the less often the
    # per-channel vectors are read again. NCHW: long segments, since a vector element serves a whole
    # row.
    widest = (256 // itemsize) if lay.nhwc and lay.outer > 1 else elements
    block_n = min(max(8, triton.next_power_of_2(lay.inner)), widest)
    # Small tensors: no taller than they are.
    block_m = min(elements // block_n, triton.next_power_of_2(lay.outer))
    return Tile(block_m, block_n, num_warps)


@dataclass(frozen=True)
class Reduction:
    """How a per-channel sum over (N, H, W) is cut.

    NHWC: a program owns `chunk` rows and `block_c` channels and walks the rows in tiles (unroll,
    rows, block_c).
    NCHW: a program owns one channel of `chunk` images and walks tiles (rows = images, block_c =
    pixels); unroll = 1.
    `chunks` partials per channel go to the workspace.
    """

    unroll: int
    rows: int
    block_c: int
    chunk: int
    chunks: int
    num_warps: int

    @property
    def step(self) -> int:
        return self.unroll * self.rows


# Programs of a reduction: about two waves of 4-warp blocks on 132 SMs at four blocks each.
_PROGRAMS = 1024
# Partials per channel, so that the finalise kernel reads all of them in one tile: it runs on few
# SMs and a loop there would cost a memory latency per turn, as long as the whole reduction at C =
# 64.
_MAX_CHUNKS = 512


def reduction(lay: Layout, itemsize: int, tensors: int) -> Reduction:
    """Cut of a reduction that reads `tensors` activations: by shape, layout and dtype alone."""
    num_warps = 4
    vector = 16 // itemsize
    # 128 bytes in flight per thread: eight 16-byte loads of one tensor, or four of each of two or
    # three.
    unroll = 8 if tensors == 1 else 4
    if lay.nhwc:
        # 256-byte row segments, one 16-byte vector per thread and row: the sum over `unroll` stays
        # in the thread.
        block_c = min(max(8, triton.next_power_of_2(lay.inner)), 256 // itemsize)
        rows = num_warps * 32 * vector // block_c
        units, step = lay.outer, unroll * rows
        programs = triton.cdiv(lay.inner, block_c)
    else:
        # Half of that again: rows of H * W rarely fill a tile, and the sums are per element of it.
        elements = num_warps * 32 * vector * unroll // 2
        block_c = min(max(8, triton.next_power_of_2(lay.inner)), elements)
        rows = min(elements // block_c, triton.next_power_of_2(lay.batch))
        unroll = 1
        units, step = lay.batch, rows
        programs = lay.channels
    chunks = max(1, min(_MAX_CHUNKS, _PROGRAMS // programs))
    chunk = triton.cdiv(triton.cdiv(units, chunks), step) * step
    return Reduction(unroll, rows, block_c, chunk, triton.cdiv(units, chunk), num_warps)


# Channels per finalise program: 32-byte segments, and C / 8 programs.
FINALISE_CHANNELS = 8


def workspace(parts: int, cut: Reduction, x: torch.Tensor) -> torch.Tensor:
    """fp32 (parts, chunks, C): every element is written before it is read."""
    return torch.empty((parts, cut.chunks, x.shape[1]), dtype=torch.float32, device=x.device)


def launch(
    kernel,
    programs: int,
    args: tuple,
    num_warps: int,
    num_stages: int = 3,
    maxnreg: int | None = None,
    **constants,
) -> None:
    """Run `kernel` on a one-dimensional grid. The only launch in this package: the AOT test
    replaces it.
    """
    x = next(a for a in args if isinstance(a, torch.Tensor))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if INTERPRETED:  # any device
        kernel[(programs,)](*args, **options, **constants)
        return
    if not x.is_cuda:  # True on HIP, too
        raise RuntimeError(
            "fastres.kernels: Triton kernels need CUDA or HIP tensors, or TRITON_INTERPRET=1 in "
            f"the environment before the first use; got a tensor on {x.device}"
        )
    # num_warps counts warps of 32 lanes; AMD's CDNA has 64.
    if torch.version.hip:
        options["num_warps"] = num_warps // 2
    elif maxnreg is not None:
        options["maxnreg"] = maxnreg
    with torch.cuda.device(x.device):
        kernel[(programs,)](*args, **options, **constants)
