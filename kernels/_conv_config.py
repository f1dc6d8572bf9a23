"""Tiles of the convolution kernels: one table for each architecture, a reason beside each rule.

Nothing is measured at run time: a configuration is a function of architecture, shape and dtype. The
reasons are arithmetic, since no GPU has run these kernels; `fastres.tune` is to replace them by
measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from fastres._tf32 import conv_tf32

from ._conv import units, wide
from ._launch import INTERPRETED


@dataclass(frozen=True)
class ConvConfig:
    """block_m: pixels, block_n: the columns a program owns, block_k: the step of the dot's sum
    (wgrad sums over pixels: there block_m is the step and block_k the rows of the tile)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int  # to aim at
    maxnreg: int | None = None


@dataclass(frozen=True)
class Arch:
    """What the rules of one architecture need to know.

    block_m, block_n: the tile of a dot, at most; num_warps of such a tile; row_bytes: bytes of the
    sum's step in one row; stages: buffers of the software pipeline; programs: two an SM, four waves
    of them, so that the last wave costs little; dw_elements: elements of dw one program of
    conv_bwd_pointwise may hold: 8,192 are 64 registers a thread of 4 warps, a quarter of them, with
    dx, g and y beside; stats_n: columns of a tile whose epilogue takes statistics, of a 1x1 conv (4
    warps: 64 columns leave room for a second copy of the tile, the squares) and of others;
    split_steps: steps of the sum a split of dw has at least: 8 of 64 pixels read 8 (BM + BN) 128
    bytes for the 8 BM BN that storing and adding the split moves, twice as many at 128 x 128;
    descriptors: 1x1 convs load their tiles by tensor descriptor (TMA), which spares the registers
    and instructions of the addresses; maxnreg: registers of a thread, at most: where it is given,
    ptxas does not spill in the loop to get one more program on an SM.
    """

    name: str
    block_m: int
    block_n: int
    num_warps: int
    row_bytes: int
    stages: int
    programs: int
    dw_elements: int
    stats_n: tuple[int, int]
    split_steps: int
    descriptors: bool
    maxnreg: int | None = None


ARCHS = {
    # 108 SMs, mma.sync: 64 x 64 a warp pair keeps the operand traffic from shared memory below its
    # bandwidth; 163 KB of shared memory hold two programs of 3 stages of 24 KB. Its tiles have 64
    # columns anyway, statistics or not.
    "sm_80": Arch("sm_80", 128, 64, 8, 128, 3, 8 * 108, 8192, (64, 64), 8, False),
    # 132 SMs, wgmma 64 x N x 16: 128 x 128 on two warpgroups is 64 accumulator registers a thread,
    # which leaves room for an epilogue with statistics; 4 stages of 32 KB are under half of 227 KB
    # only at 3. 128-byte rows are the swizzle that wgmma and TMA read without bank conflicts. A
    # 3x3 with statistics is on 8 warps, whose 128 columns are what 64 are on 4.
    "sm_90": Arch("sm_90", 128, 128, 8, 128, 3, 8 * 132, 8192, (64, 128), 8, True),
    # 148 SMs, tcgen05: accumulators live in tensor memory (512 columns: two programs of 128 x 128
    # with room to spare), so the tile of sm_90 again. Statistics bring a tile back to registers,
    # all of it at once: 64 columns.
    "sm_100": Arch("sm_100", 128, 128, 8, 128, 3, 8 * 148, 8192, (64, 64), 8, True, 255),
    # 304 CUs, mfma 32x32x8: 64 KB of LDS hold 2 stages of 128 x 32 twice. 8,192 elements of dw
    # spill up to 380 bytes, 4,096 do not; accumulators share the registers with all else: 64
    # columns with statistics.
    "gfx942": Arch("gfx942", 128, 128, 8, 64, 2, 8 * 304, 4096, (64, 64), 8, False),
    # The interpreter pays per operation, not per element: large tiles. (The tests take small ones,
    # so that small shapes have several.)
    "interpreter": Arch("interpreter", 256, 256, 4, 1024, 1, 6, 1 << 18, (256, 256), 1, True),
}


class NoTable(RuntimeError):
    """The device's architecture has no table of tiles."""


def arch_of(device: torch.device) -> Arch:
    """The table for a device; raises NoTable, which names the architecture and those known."""
    if INTERPRETED:
        return ARCHS["interpreter"]
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
    # Same instruction set and shared memory, another number of SMs: the tiles are the same. (sm_86
    # and sm_89 have 100 KB of shared memory, which sm_80's tiles pass.)
    name = {"sm_87": "sm_80", "sm_103": "sm_100"}.get(name, name)
    if name not in ARCHS:
        known = ", ".join(a for a in ARCHS if a != "interpreter")
        raise NoTable(f"fastres has no convolution tiles for {name}; known: {known}")
    return ARCHS[name]


def _fit(size: int, most: int, least: int = 16) -> int:
    """The power of two that covers `size`, between tl.dot's least and the most."""
    return min(max(triton.next_power_of_2(size), least), most)


def _plain_fma(arch: Arch, itemsize: int) -> bool:
    """fp32 without TF32: NVIDIA's tensor cores do not take it, so that a dot is plain FMAs, its
    operands in registers."""
    return itemsize == 4 and arch.name.startswith("sm_") and not conv_tf32()


def _gemm(
    arch: Arch, geo, rows, columns, summed, itemsize, prologue: int, epilogue: int, stats: bool
):
    """The tile of a GEMM (rows, columns), whose prologue reads `prologue` tensors for its first
    operand and whose epilogue reads `epilogue` tensors of the output's shape."""
    half = itemsize == 4  # fp32: half the elements in the same registers and bytes
    # 1x1 convs wait for memory: 64 rows on 4 warps are half the program at the same registers a
    # thread, so that two on an SM overlap one's epilogue with the other's loads. A 3x3 reads each
    # operand 9 times from L2 and shared memory: the larger tile.
    most_m = arch.block_m // 2 if geo.pointwise or half else arch.block_m
    most_n = arch.block_n // 2 if epilogue > 1 or half else arch.block_n  # registers: spills else
    if geo.groups > 1:  # few columns: with 64 rows on 4 warps a thread still loads 16 bytes of each
        most_m = min(most_m, 64)
    if _plain_fma(arch, itemsize):
        most_m, most_n = most_m // 2, min(arch.block_n, 64)
    block_m = _fit(rows, most_m)
    if stats:  # their reductions need registers beside the accumulators
        most_n = min(most_n, arch.stats_n[geo.r * geo.s > 1])
    block_n = _fit(columns, most_n)
    row_bytes = arch.row_bytes
    if prologue > 1 and epilogue != 1:  # not below 64: narrower tiles have accesses under 16 bytes
        row_bytes = max(row_bytes // 2, 64)
    warps = arch.num_warps if block_m >= 128 else 4
    # 16 bytes a thread of the second operand's tile
    block_k = _fit(summed, max(row_bytes, 512 * warps // block_n) // itemsize)
    # A second operand in the prologue is pipelined, too: one buffer less keeps two programs an SM.
    stages = max(arch.stages - (prologue > 1), 2) if arch.stages > 1 else 1
    return ConvConfig(block_m, block_n, block_k, warps, stages, arch.programs, arch.maxnreg)


def _lean(arch: Arch) -> Arch:
    """The same bytes in flight in fewer registers: spills in the loop else."""
    return replace(arch, row_bytes=64, stages=4)


def _more_warps(config: ConvConfig) -> ConvConfig:
    """64 rows on 8 warps for 128 on 8 or 64 on 4, where a tile has 128 columns: with a prologue
    that forms its operand, or an epilogue with sums, a thread would need more than 255 registers.
    As many warps an SM as before, and the columns, which the prologue is repeated for, stay."""
    return replace(config, block_m=64, num_warps=8) if config.block_n >= 128 else config


def _odd(arch: Arch, geo, itemsize: int) -> bool:
    """Whether a pixel's channels do not start at whole 16 bytes, in x or y: each element is a load,
    an address and a mask of its own then, whose registers the tiles of whole vectors do not leave
    free. (A group's, or an image's, are few. The interpreter has no registers.)"""
    aligned = geo.c * itemsize % 16 == 0 and geo.k * itemsize % 16 == 0
    return not aligned and geo.groups == 1 and arch.name != "interpreter"


def _narrow(config: ConvConfig, arch: Arch, itemsize: int) -> ConvConfig:
    """For odd channels: up to 1.4 KB of stack, in the loop, too, else. Plain FMAs have operands in
    registers beside the addresses: half a step, and one program an SM (as with TF32 on sm_80), for
    two have 128 registers a thread. Else the architecture's cap: others are for 4 warps."""
    plain = _plain_fma(arch, itemsize)
    one = plain or (arch.name == "sm_80" and itemsize == 4)
    return replace(
        config,
        block_m=min(config.block_m, 64),
        block_n=min(config.block_n, 32),
        block_k=min(config.block_k, 16 if plain else config.block_k),
        num_warps=8,
        maxnreg=255 if one else ARCHS[arch.name].maxnreg,
    )


def fprop_config(geo, x, y, shortcut: bool, stats: bool) -> ConvConfig:
    arch = arch_of(x.device)
    size = x.element_size()
    odd = _odd(arch, geo, size)
    plain = _plain_fma(arch, size)
    if arch.name in ("sm_80", "sm_100") and not stats:
        arch = replace(_lean(arch), block_n=min(arch.block_n, 64))
        if arch.name == "sm_80":
            arch = replace(arch, stages=3)
    spilling = {"sm_80": size == 4 and not plain, "sm_90": plain and not geo.pointwise}
    if stats and not shortcut and spilling.get(arch.name):
        arch = replace(arch, maxnreg=168)  # three programs of 4 warps: ptxas spills for a fourth
    elif stats and arch.name == "sm_80" and geo.pointwise:
        if shortcut and size == 4 and not plain:
            arch = replace(arch, maxnreg=192)  # two, not three
        elif not shortcut and size < 4 and geo.k <= 128 < geo.c:
            arch = replace(arch, maxnreg=168)  # a narrowing conv: it takes z, and has no prologue
        elif not shortcut and x.dtype == torch.float16 and geo.c <= 64:
            arch = replace(arch, maxnreg=144)  # three, not four; bf16 has room for four
    elif (
        arch.name == "sm_80" and size < 4 and geo.k > 32 and geo.groups == 1 and not geo.pointwise
    ) and ((geo.r * geo.s == 1 and geo.k <= 128) if stats else not wide(x, y)):
        # two programs of 8 warps: ptxas spills when it chooses that limit itself (with 64-bit
        # offsets at 128, too)
        arch = replace(arch, maxnreg=128)
    columns, summed = geo.group_k, geo.group_c
    found = _gemm(arch, geo, geo.rows, columns, summed, size, 1 + shortcut, 0, stats)
    if arch.name == "sm_100" and shortcut and not plain:
        found = replace(found, num_warps=8)  # one program of 8 warps for two of 4, which spill
    if (arch.name == "sm_90" and stats != geo.pointwise) or (  # 8 bytes of stack with `add`, too
        arch.name == "gfx942" and not stats and geo.pointwise  # 8-byte loads of Triton 3.6 else
    ):
        found = _more_warps(found)
    return _narrow(found, arch, size) if odd else found


def dgrad_config(geo, x, dz, mode: str, epilogue: int) -> ConvConfig:
    """x: dx; epilogue: tensors read there (dres, the previous raw y, the shortcut's)."""
    arch = arch_of(x.device)
    prologue = 2 if mode == "bn" else 1
    if arch.name == "sm_100" and prologue == 1 and not geo.pointwise:
        arch = _lean(arch)
    size = x.element_size()
    found = _gemm(arch, geo, geo.rows, geo.group_c, geo.group_k, size, prologue, epilogue, False)
    if _odd(arch, geo, size):
        return _narrow(found, arch, size)
    spatial = not geo.pointwise and prologue > 1
    if arch.name == "sm_100" and spatial and epilogue > 1 and _plain_fma(arch, size):
        found = replace(found, num_stages=3)  # 16 bytes of stack at 2 or 4, of ptxas's making
    if arch.name == "sm_80" and spatial and epilogue and wide(x, dz):
        found = replace(found, block_m=min(found.block_m, 64))  # 64-bit offsets take two registers
    return _more_warps(found) if arch.name in ("sm_90", "sm_100") else found


def wgrad_config(geo, x, mode: str, norm: bool) -> ConvConfig:
    arch = arch_of(x.device)
    size = x.element_size()
    most = arch.block_n if size < 4 else arch.block_n // 2
    block_k = _fit(geo.group_k, most)
    block_n = _fit(geo.group_c, most)
    if arch.name == "sm_100" and _plain_fma(arch, size):
        block_k = min(block_k, 32)  # from 64 rows up Triton 3.6 takes tcgen05, which rounds to TF32
    # The dot sums over pixels; the rows of both operands are contiguous in channels, so the step
    # only sets how much is in flight.
    both = arch.name == "sm_80" and mode == "bn" and norm  # two prologues spill there
    block_m = _fit(geo.rows, 64 if size < 4 and not both else 32)
    warps = arch.num_warps if block_k * block_n >= 8192 else 4
    stages = max(arch.stages - (mode == "bn"), 2) if arch.stages > 1 else 1
    if _odd(arch, geo, size) and _plain_fma(arch, size):  # as in _narrow
        block_k, block_n, warps = min(block_k, 32), min(block_n, 32), 8
        return ConvConfig(block_m, block_n, block_k, warps, stages, arch.programs, 255)
    maxnreg = arch.maxnreg
    if both and _odd(arch, geo, size):
        maxnreg = 255  # two programs of 4 warps: ptxas spills for a third
    elif arch.name == "sm_80" and norm and size < 4 and geo.groups == 1 and units(geo.c)[0] > 1:
        # over 128 channels are an argument, which the compiler cannot fold: a few registers more
        if both and geo.pointwise:
            maxnreg = 168  # three programs: as in fprop_config
        elif mode == "none" or (mode == "frozen" and not geo.pointwise):
            maxnreg = 255  # two, not three
    return ConvConfig(block_m, block_n, block_k, warps, stages, arch.programs, maxnreg)


def few_fprop_config(geo, x) -> ConvConfig:
    """_conv_few: each element of x is a load, an address and a mask of its own: 64 rows of 32 terms
    on 8 warps are 8 of each a thread, which leaves two programs an SM (4 warps where y has so few
    columns that a thread would store less than 16 bytes). No stages: loads of 2 bytes are not
    copied to shared memory asynchronously, the other program hides their latency."""
    arch = arch_of(x.device)
    plain = _plain_fma(arch, x.element_size())
    block_m = _fit(geo.rows, 32 if plain else 64)
    block_n = _fit(geo.k, min(arch.block_n, 64))
    block_k = _fit(geo.r * geo.s * geo.c, 32)
    warps = arch.num_warps if block_n >= 32 else 4
    two = warps == 8 and x.element_size() < 4  # programs an SM
    maxnreg = 128 if two else arch.maxnreg
    if arch.name == "sm_80" and x.element_size() == 4 and not plain:
        maxnreg = 192  # ptxas takes 168 either way, but spills when it chooses that limit itself
    return ConvConfig(block_m, block_n, block_k, warps, 1, arch.programs, maxnreg)


def few_wgrad_config(geo, x, mode: str) -> ConvConfig:
    """_conv_few: 64 terms a program, so that a 7x7's 147 are three, with a quarter to spare; 32
    pixels a step, for the registers of the loads."""
    arch = arch_of(x.device)
    block_k = _fit(geo.k, min(arch.block_n, 64))
    if arch.name == "sm_100" and _plain_fma(arch, x.element_size()):
        block_k = min(block_k, 32)  # as in wgrad_config
    block_n = _fit(geo.r * geo.s * geo.c, 64)
    return ConvConfig(_fit(geo.rows, 32), block_n, block_k, 4, 1, arch.programs, arch.maxnreg)


def joint_odd(geo, x) -> bool:
    """Whether odd channels keep a conv from bwd_pointwise: spills, and no narrower tile helps,
    since dw's rows are all of K. (16-bit K up to 128 does without on sm_90, and on gfx942 with its
    512 registers.)"""
    arch, size = arch_of(x.device), x.element_size()
    few = arch.name in ("sm_90", "gfx942") and geo.k <= 128 and size < 4
    return _odd(arch, geo, size) and not few


def bwd_pointwise_config(geo, x, mode: str = "none", epilogue: int = 0) -> ConvConfig | None:
    """None when a program cannot hold dw of all K output channels and a useful width.

    epilogue: tensors that it reads, as in dgrad_config."""
    arch = arch_of(x.device)
    if _plain_fma(arch, x.element_size()):
        return None
    if arch.name in ("sm_80", "sm_100") and mode == "frozen" and geo.k > 128:
        return None  # spills: the registers of the operands' copy to shared memory
    elements = arch.dw_elements if x.element_size() < 4 else arch.dw_elements // 2
    if joint_odd(geo, x):
        return None
    block_k = _fit(geo.k, 1 << 20)
    block_n = _fit(geo.c, min(arch.block_n, elements // block_k) if block_k <= elements else 0, 0)
    if block_n < min(32, _fit(geo.c, 32)):
        return None
    # registers: a residual gradient, y (and the shortcut's y) beside dw and dx; 32 columns are two
    # 16-byte accesses a row
    if epilogue > 2 or (epilogue > 1 and (arch.name == "sm_80" or x.element_size() == 4)):
        block_n = max(block_n // 2, min(block_n, 32))
    # 64 pixels: the accumulators of dx then take at most half of what dw takes
    block_m = _fit(geo.rows, 64)
    # the elementwise work on g, y (64 x K) and the sums need registers, whatever dw takes
    warps = arch.num_warps if block_k * block_n >= arch.dw_elements or epilogue > 1 else 4
    stages = 2 if arch.stages > 1 else 1
    if arch.name == "sm_80" and epilogue > 2 and geo.k > 128:
        stages = 1  # 16 bytes of stack else; a step is 64 KB, whose transfer outlasts its latency
    return ConvConfig(block_m, block_n, block_k, warps, stages, arch.programs)


# Partials for each channel that the finalise kernels read in one tile: of one launch, and of all
# phases of a strided dgrad, where more would not fit in registers (8 channels by three sums by 1024
# are 192 a thread). A fourth of that is still one wave of two programs an SM.
_MAX_CHUNKS = 512
_MAX_PHASED = 1024


@dataclass(frozen=True)
class Cut:
    """A GEMM of `rows` cut into chunks of `tiles` tiles of block_m rows."""

    block_m: int
    tiles: int
    chunks: int
    programs: int


def cut(rows: int, columns: int, config: ConvConfig, groups: int = 1, phases: int = 1) -> Cut:
    """Of `rows` and, in each group, `columns`: by shape and table alone, so that sums repeat bit
    for bit on any device of one architecture. phases: launches that share the partials.

    At most 512 chunks: the partials are then under 1/50 of the tensor they are sums of.
    """
    tiles_m = triton.cdiv(rows, config.block_m)
    tiles_n = groups * triton.cdiv(columns, config.block_n)
    most = max(1, min(_MAX_CHUNKS, _MAX_PHASED // phases))
    chunks = max(1, min(most, triton.cdiv(config.programs, tiles_n)))
    tiles = triton.cdiv(tiles_m, chunks)
    chunks = triton.cdiv(tiles_m, tiles)
    return Cut(config.block_m, tiles, chunks, chunks * tiles_n)


def wgrad_cut(geo, config: ConvConfig, split_steps: int) -> tuple[int, int, int]:
    """(tiles of dw, splits, rows of a split): one wave of two programs an SM, which are equal and
    so have no tail, since a split costs a partial of the whole dw: 6 MB an image of a ResNet-50
    at batch 256."""
    tiles_k = geo.groups * triton.cdiv(geo.group_k, config.block_k)
    tiles = tiles_k * triton.cdiv(geo.group_c, config.block_n) * geo.r * geo.s
    splits = max(1, config.programs // (4 * tiles))
    steps = triton.cdiv(geo.rows, config.block_m)
    each = max(triton.cdiv(steps, splits), min(split_steps, steps))
    return tiles, triton.cdiv(steps, each), each * config.block_m
