"""The CUDA C++ kernels on the CPU, under AddressSanitizer and UBSan: the tests of every kernel with
the backend `cuda`, in processes of their own; and what the host shim must catch."""

from __future__ import annotations

import re
import subprocess
import sys

import cuda_host
import pytest

FILES = (
    "test_add_relu.py",
    "test_bn_stats.py",
    "test_bn_apply.py",
    "test_bn_bwd.py",
    "test_bn_relu_maxpool.py",
    "test_cuda_conv.py",
    "test_selfcheck.py",
    "test_ops.py",
    "test_cuda_pointwise.py",
    "test_cuda_ladder.py",
    "test_cuda_tiles.py",
)

if cuda_host.wanted():
    pytest.skip("this is one of the processes", allow_module_level=True)


@pytest.fixture(scope="module")
def built():
    reason = cuda_host.why_not()
    if reason is not None:
        pytest.skip(f"the host shim cannot be built: {reason}")
    return cuda_host.build()


def in_a_process(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], cwd=cuda_host.ROOT, env=cuda_host.environment(),
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels_pass_their_tests_under_the_sanitizers(built, file):
    """Failures are shown as that pytest reports them; a sanitizer's report ends the process."""
    done = in_a_process("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
                        "-k", "cuda", f"tests/{file}")  # fmt: skip
    text = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0, text
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 3 and "skipped" not in done.stdout.splitlines()[-1], text


def test_the_shim_runs_right_kernels(built):
    """Barriers, shuffles, ballots, shared memory, atomics; every order of the threads."""
    assert cuda_host.selftest("right") == (0, "")


@pytest.mark.parametrize("case", cuda_host.CAUGHT)
def test_the_shim_catches_broken_kernels(built, case):
    """add_relu past the end of its tensors; bn_stats and small kernels without their barriers."""
    code, said = cuda_host.selftest(case)
    assert code in (3, 77) and cuda_host.CAUGHT[case] in said


def test_a_tensor_too_short_is_caught_in_python_too(built):
    """The module that the tests of the kernels use, given an output that lacks its last row."""
    code = (
        "import sys, torch; sys.path.insert(0, 'tests')\n"
        "import cuda_host\n"
        "x, z = torch.ones(9 * 16), torch.empty(8 * 16)\n"
        "p = x.data_ptr()\n"
        "cuda_host.module().add_relu(z.data_ptr(), 0, p, p, 0, True, 1, 16, 9, 0, 0)\n"
    )
    done = in_a_process("-c", code)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "WRITE" in done.stderr
