"""Every Triton kernel, compiled ahead of time for GPUs that are not here, and held to a budget
(`aot.Record.problems`): no spills, registers and shared memory within the architecture, tensor-core
instructions for every dot, 16-byte accesses to activations and weights.

Here a part of tests/aot_cases.py; all of it, and the committed table, with

    python tests/aot.py --write

Compiling happens in a subprocess: under TRITON_INTERPRET=1 triton.jit makes interpreted functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest


def subprocess_of(code_or_script: list[str]) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code_or_script],
        env=env,
        cwd=Path(__file__).parent,  # not the repository root, where `fastres` is a folder
        capture_output=True,
        text=True,
        timeout=900,
    )


def _broken(records: list[aot.Record]) -> list[str]:
    return [f"{r.kernel} [{r.case}, {r.dtype}]: {p}" for r in records for p in r.problems()]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_kernels_compile_within_budget(target):
    pytest.importorskip("triton")
    from triton.backends import backends

    if {"cuda": "nvidia", "hip": "amd"}[aot.TARGETS[target][0]] not in backends:
        pytest.skip(f"this Triton build has no backend for {target}: {sorted(backends)}")
    done = subprocess_of(["aot.py", "--some", target])
    assert done.returncode == 0, done.stderr[-4000:]
    records = [aot.from_dict(json.loads(line)) for line in done.stdout.splitlines()]
    kernels = {r.kernel for r in records}
    assert len(kernels) >= 15, sorted(kernels)
    dots = {r.kernel for r in records if sum(r.dots)}
    assert dots == {
        f"_conv_{k}_kernel"
        for k in ("fprop", "dgrad", "wgrad", "bwd_pointwise", "few_fprop", "few_wgrad")
    }, "a kernel without a dot, or a new one"  # fmt: skip
    assert not _broken(records), "\n".join(_broken(records))


@pytest.mark.parametrize("path", sorted(aot.TABLE.glob("*.json")), ids=lambda p: p.stem)
def test_the_committed_table_is_within_budget(path):
    records = aot.read_table(path)
    assert len(records) > 100 and {r.target for r in records} == {
        json.loads(path.read_text())["target"]
    }
    assert not _broken(records), "\n".join(_broken(records))


def test_the_committed_tables_are_of_these_kernels():
    """Row by row: no kernel, form or tile has changed, come or gone since they were written."""
    pytest.importorskip("triton")
    if not list(aot.TABLE.glob(f"triton-{aot.triton_version()}-*.json")):
        pytest.skip(f"no table of Triton {aot.triton_version()} is committed")
    done = subprocess_of(["aot.py", "--check"])
    assert done.returncode == 0, f"{done.stderr[-2000:]}python tests/aot.py --write TARGET"


@pytest.mark.parametrize("path", sorted(aot.TABLE.glob("triton-*.json")), ids=lambda p: p.stem)
def test_the_page_says_what_the_tables_say(path):
    """docs/triton.md: kernels, spills, registers, shared memory, programs an SM."""
    _, version, target = path.stem.split("-", 2)
    *facts, programs, _ = aot.summary(aot.read_table(path)).split(" | ")
    many = {int(k): int(n) for n, k in (x.split(" x ") for x in programs.split(", "))}
    more = sum(n for k, n in many.items() if k > 3)
    counts = ", ".join(map(str, [*(many.get(k, 0) for k in (1, 2, 3)), more]))
    page = (Path(__file__).parents[1] / "docs" / "triton.md").read_text()
    assert " | ".join([f"| {version} {target}", *facts, counts]) in page


RECORD = aot.Record(
    target="sm_90", kernel="_conv_fprop_kernel", case="1x1", dtype="bf16", layout="nhwc",
    tile="64x64x64", warps=4, stages=3, registers=128, shared=49152, programs=4, local=0,
    local_accesses=0, local_in_loop=0, wide=(24, 4), narrow=(12, 3), narrow_tile=(0, 0),
    matrix={"HGMMA": 4},
    dots=(1, 0), wide_wanted=None, digest="",
)  # fmt: skip


@pytest.mark.parametrize(
    "change, said",
    [
        ({"local": 8}, "spills: 8 bytes"),
        ({"local_accesses": 1}, "spills: 0 bytes of stack, 1 accesses"),
        ({"local": 8, "local_accesses": 4, "local_in_loop": 2}, "2 in the loop"),
        ({"shared": 240 << 10}, "shared memory"),
        ({"programs": 0}, "do not fit"),
        ({"matrix": {"HMMA": 16}}, "HMMA where HGMMA"),
        ({"dots": (0, 1), "matrix": {}}, "0 dots on the matrix unit, 1 on plain FMAs"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"kernel": "_conv_bwd_pointwise_kernel"}, "1 dots on the matrix unit"),
        ({"kernel": "_conv_few_fprop_kernel", "narrow_tile": (16, 1)}, "1 stores of activations"),
        ({"narrow_tile": (16, 0)}, "16 loads of activations or weights under 16 bytes"),
        ({"wide_wanted": (32, 4)}, "24 16-byte loads, wanted 32"),
        ({"wide_wanted": (8, 4), "narrow": (12, 0)}, "12 narrow loads"),
    ],
)
def test_a_broken_budget_is_named(change, said):
    assert not RECORD.problems()
    assert said in "; ".join(aot.from_dict({**aot.asdict(RECORD), **change}).problems())


@pytest.mark.parametrize(
    "change",
    [
        {"case": "1x1 odd channels (odd stage 1)", "narrow_tile": (16, 8)},
        {"case": "3x3 (cifar stage 1)", "tile": "128x16x16", "warps": 8, "narrow_tile": (1, 0)},
        {"kernel": "_conv_wgrad_kernel", "tile": "64x16x16", "matrix": {"HMMA": 4}},
    ],
)
def test_few_and_odd_channels_are_excused_but_not_from_spills(change):
    record = aot.from_dict({**aot.asdict(RECORD), **change})
    assert not record.problems()
    spilling = aot.from_dict({**aot.asdict(record), "local": 8})
    assert "spills: 8 bytes" in "; ".join(spilling.problems())


def test_another_batch_or_resolution_compiles_nothing():
    """A last batch of 250 of 256 images, images of 192 pixels: the kernels of a ResNet-50 step are
    those of the first, but for a few that hold as many partials as there are chunks."""
    pytest.importorskip("triton")
    code = (
        "import aot, aot_cases, torch\n"
        "def kernels(batch, side):\n"
        "    x = aot_cases.activation(batch, 64, side, torch.bfloat16)\n"
        "    found = []\n"
        "    for _, blocks in aot_cases._stages('resnet50'):\n"
        "        with aot_cases.capture('sm_90') as launches:\n"
        "            x = aot_cases._stage(x, blocks, 'd', True, True, torch.bfloat16)\n"
        "        found += launches\n"
        "    return {(x.kernel.__name__, aot.digest(x)) for x in found}\n"
        "first = kernels(256, 56)\n"
        "assert len(first) < 105, len(first)\n"
        "for size in (250, 56), (256, 48):\n"
        "    new = sorted(kernels(*size) - first)\n"
        "    assert len(new) <= 4 and all('finalise' in k for k, _ in new), (size, new)"
    )
    done = subprocess_of(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_tile_that_spills_is_found():
    """The reading of the machine code, on a table rule that asks too much of the registers."""
    pytest.importorskip("triton")
    code = (
        "import dataclasses, aot, aot_cases\n"
        "launch = next(x for x in aot_cases.ladder('sm_90', 'bf16', [('c2', True, True)])\n"
        "              if 'dgrad' in x.kernel.__name__)\n"
        "tile = {'BLOCK_M': 128, 'BLOCK_N': 256}\n"
        "launch = dataclasses.replace(launch, warps=4, constants={**launch.constants, **tile})\n"
        "print('\\n'.join(aot.compile_launch('sm_90', launch).problems()))"
    )
    done = subprocess_of(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "spills" in done.stdout


def test_triton_is_not_imported_with_the_package():
    done = subprocess_of(["-c", "import fastres.kernels, sys; print('triton' in sys.modules)"])
    # torch itself may import triton: what counts is what fastres adds to it
    alone = subprocess_of(["-c", "import torch, sys; print('triton' in sys.modules)"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == alone.stdout


def test_triton_rejects_cpu_tensors_without_the_interpreter():
    pytest.importorskip("triton")
    code = (
        "import torch; from fastres import kernels\n"
        "a = torch.ones(1, 8, 2, 2)\n"
        "try:\n    kernels.add_relu(a, None, a, a)\n"
        "except RuntimeError as e:\n    print(e)\n"
        "print(a.sum().item())"
    )
    done = subprocess_of(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    message, total = done.stdout.splitlines()
    assert "CUDA or HIP tensors" in message and "TRITON_INTERPRET=1" in message and "cpu" in message
    assert float(total) == 32.0
