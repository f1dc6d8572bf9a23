"""keep_buffers: a large buffer is page-faulted once, not once an op."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastres import _native

CODE = """
import resource, sys, torch
from fastres import memory
kept = memory.keep_buffers() if sys.argv[1] == "keep" else False
def faults(n):
    for _ in range(n):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults(10)  # aligned blocks settle after a few rounds of split and merge
print(int(kept), faults(10) - first, memory.state())
"""


def run(mode: str, **env: str) -> list[str]:
    command = [sys.executable, "-c", CODE, mode]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **env}
    )
    return out.stdout.splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_large_buffers_are_faulted_once() -> None:
    assert _native.why_missing() is None
    (plain,) = run("leave")
    (kept,) = run("keep")
    # 10 buffers of 64 MiB are 163,840 pages of 4 KiB (320 of 2 MiB, should the system use those)
    assert plain.split()[0] == "0" and int(plain.split()[1]) >= 300
    assert kept.startswith("1 ") and int(kept.split()[1]) < int(plain.split()[1]) / 20
    assert "large buffers are kept" in kept


def test_the_environment_can_refuse() -> None:
    (line,) = run("keep", FASTRES_MALLOC="0")
    assert line.startswith("0 ") and line.endswith("off (FASTRES_MALLOC=0)")
