"""The ISA variants of the CPU kernels: each passes the kernel tests; a missing one is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from common import backend

HERE = Path(__file__).parent
FILES = (
    "bn_stats", "bn_apply", "bn_bwd", "add_relu", "bn_relu_maxpool", "winograd", "network",
)  # fmt: skip


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        cwd=HERE.parent,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_cpu_isa_matches_reference(isa):
    """The best variant runs in every other test; here each one, forced, on a thin set of shapes."""
    native = backend("cpu")._C
    if isa not in native.isas():
        pytest.skip(f"this CPU or build has no {isa}: {native.isas()}")
    if isa == native.isa():
        pytest.skip(f"{isa} is what the other tests run on this CPU")
    files = [str(HERE / f"test_{name}.py") for name in FILES]
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-k", "cpu and (matches or keeps or rounds or torchs) or (winograd or network) and matches",
        *files,
        FASTRES_CPU_ISA=isa, FASTRES_TEST_THIN="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_cpu_isa_rejects_an_unknown_name():
    backend("cpu")
    code = "import fastres._native as n; print(n.why_missing())"
    done = python("-c", code, FASTRES_CPU_ISA="sse9")
    assert "FASTRES_CPU_ISA=sse9 is not available" in done.stdout
    assert "portable" in done.stdout, "the message names what is supported"


def test_cpu_isa_runs_on_torchs_threads_or_says_why():
    from fastres import _native

    backend("cpu")
    assert _native.module().has_parallel_for() == (_native.serial_reason() is None)
