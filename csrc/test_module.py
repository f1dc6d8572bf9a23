"""ctest: the module loads, has what was built, and computes, on every ISA of this machine. Run with
its folder on PYTHONPATH; needs no torch: `array` holds the tensors."""

import os
import random
import subprocess
import sys
from array import array

import _C

ROWS, CHANNELS = 61, 35  # neither a multiple of a vector
MASK_ROW = (CHANNELS + 7) // 8


def floats(values=None):
    return array("f", values if values is not None else [float("nan")] * (ROWS * CHANNELS))


def at(values):
    return values.buffer_info()[0]


def close(got, want):
    assert all(abs(g - w) <= 1e-5 * (1 + abs(w)) for g, w in zip(got, want, strict=True)), got


def check_kernels():
    """add_relu and its bits, relu_bwd by them, bn_stats: fp32, NHWC, one image."""
    sizes = 0, True, 1, CHANNELS, ROWS
    draw = random.Random(0)
    a, b, dz, dy = (floats([draw.gauss(0.3, 1) for _ in range(ROWS * CHANNELS)]) for _ in range(4))
    sums = floats([x + y for x, y in zip(a, b, strict=True)])
    z, dx, mask = floats(), floats(), array("B", [0xAA] * (ROWS * MASK_ROW))
    _C.add_relu(at(z), at(mask), at(a), at(b), *sizes)
    assert z.tolist() == [max(v, 0.0) for v in sums]
    bits = [
        mask[row * MASK_ROW + c // 8] >> c % 8 & 1 for row in range(ROWS) for c in range(CHANNELS)
    ]
    assert bits == [v > 0 for v in sums]
    _C.relu_bwd(at(dx), at(dy), at(dz), at(mask), *sizes)
    close(dx, [g * bit + d for g, bit, d in zip(dz, bits, dy, strict=True)])
    mean, var, rstd = (array("f", [float("nan")] * CHANNELS) for _ in range(3))
    _C.bn_stats(at(mean), at(var), at(rstd), at(a), 1e-5, *sizes)
    columns = [a[c::CHANNELS] for c in range(CHANNELS)]
    means = [sum(v) / ROWS for v in columns]
    variances = [sum((x - m) ** 2 for x in v) / ROWS for v, m in zip(columns, means, strict=True)]
    close(mean, means)
    close(var, variances)
    close(rstd, [(v + 1e-5) ** -0.5 for v in variances])


forced = os.environ.get("FASTRES_CPU_ISA")  # empty: unset, as in runtime.cpp
asked = forced or _C.isa()
assert _C.isa() == asked and asked in _C.isas(), (_C.isa(), asked, _C.isas())
assert hasattr(_C, "cuda") == (sys.argv[1] == "cuda"), sys.argv
if sys.argv[1] == "cuda":
    assert "ptx80" in _C.cuda.archs().split()
    assert _C.cuda.workspace_floats(2, 1, True, 256, 64, 56 * 56) > 0
check_kernels()
if not forced:
    for isa in _C.isas():
        env = {**os.environ, "FASTRES_CPU_ISA": isa}
        subprocess.run([sys.executable, *sys.argv], env=env, check=True)
    print(_C.build_info)
