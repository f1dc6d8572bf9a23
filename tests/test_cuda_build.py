"""The CUDA C++ build: the machine code's budget, the errors, a module that loads without CUDA, and
what the build says where it cannot build the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_sass
import pytest
import torch

from fastres import _cuda, _native, backends

ROOT = Path(__file__).resolve().parent.parent
BUILD = (_native.build_info() or {}).get("cuda")


@pytest.fixture
def built():
    reason = _cuda.built()
    if reason is not None:
        pytest.skip(reason)
    return _native.module().cuda


# --- machine code ---------------------------------------------------------------------------------


def test_the_committed_table_is_current_and_keeps_the_budget():
    found = cuda_sass.committed()
    assert found["digest"] == cuda_sass.digest(), "run: python tests/cuda_sass.py --write"
    assert {r["arch"] for r in found["rows"]} == set(cuda_sass.ARCHS)
    kernels = {r["kernel"] for r in found["rows"] if r["lanes"] == 8}
    assert {k + "_kernel" for k in ("add_relu", "relu_bwd", "bn_apply", "bn_stats")} <= kernels
    assert len(kernels) == 9 and len(found["rows"]) % len(cuda_sass.ARCHS) == 0
    broken = {(r["arch"], r["kernel"], r["dtype"]): p for r in found["rows"]
              if (p := cuda_sass.problems(r))}  # fmt: skip
    assert not broken


def test_the_installed_module_keeps_the_budget(built):
    if cuda_sass.cuobjdump() is None:
        pytest.skip("Triton's cuobjdump is not installed")
    rows = cuda_sass.read(cuda_sass.installed())
    assert rows and BUILD is not None
    assert not [(r, p) for r in rows if (p := cuda_sass.problems(r))]
    found = cuda_sass.committed()
    if found["nvcc"] == BUILD["nvcc"]:  # the same compiler gives the same code
        want = {json.dumps(r) for r in found["rows"]}
        assert [r for r in rows if r["arch"] in cuda_sass.ARCHS and json.dumps(r) not in want] == []


def test_the_budget_is_broken_by_spills_and_narrow_accesses():
    want = {"kernel": "add_relu_kernel", "lanes": 8, "dtype": "bf16"}
    row = next(r for r in cuda_sass.committed()["rows"] if want.items() <= r.items())
    assert cuda_sass.problems(row) == []
    for change, said in [({"stack": 8}, "stack 8"), ({"local_accesses": 2}, "2 accesses"),
                         ({"registers": 140}, "140 registers"), ({"wide_stores": 0}, "0 16-byte"),
                         ({"half_loads": 8}, "8 2-byte loads")]:  # fmt: skip
        assert said in cuda_sass.problems({**row, **change})[0]


def test_the_budget_of_the_pointwise_convolutions():
    rows = [r for r in cuda_sass.committed()["rows"] if r["kernel"] in cuda_sass.WGMMA]
    here = [r for r in rows if r["arch"] == "sm_90a"]
    assert {r["kernel"] for r in here} == set(cuda_sass.WGMMA)
    assert {(r["dtype"], r["lanes"]) for r in here} == {
        (d, n) for d in ("bf16", "fp16") for n in (64, 128, 256)
    }
    assert not any(r["wgmma"] for r in rows if r not in here)
    for change, said in [({"wgmma": 0}, "0 wgmma"), ({"copies": 0}, "0 copies"),
                         ({"registers": 176}, "176 registers"), ({"stack": 32}, "stack 32"),
                         ({"wide_stores": 0}, "0 wide_stores")]:  # fmt: skip
        fprop = next(r for r in here if r["kernel"] == "pointwise_fprop_kernel")
        assert said in cuda_sass.problems({**fprop, **change})[0]


# --- errors, before and at the launch -------------------------------------------------------------

SIZES = (1, True, 2, 8, 4)  # bf16, NHWC, N, C, H * W


def test_cuda_rejects_bad_arguments_before_the_launch(built):
    a = 1 << 20
    with pytest.raises(ValueError, match=r"add_relu on .* = 2 x 8 x 4 bfloat16 NHWC.*2 bytes"):
        built.add_relu(a + 1, 0, a, a, *SIZES, 0, 0)
    with pytest.raises(ValueError, match=r"bn_apply on .*per-channel vector.*4 bytes"):
        built.bn_apply(a, 0, a, a + 2, a, a, a, *(0,) * 5, False, True, *SIZES, 0, 0)
    with pytest.raises(ValueError, match="empty"):
        built.relu_bwd(a, 0, a, a, 1, True, 0, 8, 4, 0, 0)
    with pytest.raises(ValueError, match="too large"):
        built.add_relu(a, 0, a, a, 1, True, 1 << 40, 1 << 20, 1 << 20, 0, 0)
    with pytest.raises(ValueError, match="unknown dtype code 7"):
        built.add_relu(a, 0, a, a, 7, *SIZES[1:], 0, 0)
    with pytest.raises(ValueError, match=r"bn_relu_maxpool on .*too large"):
        built.bn_relu_maxpool(a, a, a, *(0,) * 4, 3, 2, 1, 1, True, 1 << 20, 8, 1 << 7, 1 << 7,
                              1 << 6, 1 << 6, 0, 0)  # fmt: skip


def test_cuda_names_kernel_and_shape_in_cudas_errors(built):
    """Here: no driver, or a device that does not exist. Twice: an error is reported once."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"add_relu on .* 2 x 8 x 4 bf.*device 99.*cuda"):
            built.add_relu(1 << 20, 0, 1 << 20, 1 << 20, *SIZES, 99, 0)
    if torch.cuda.is_available():
        assert torch.ones(8, device="cuda").sum().item() == 8  # the next, innocent call


def test_cuda_backend_says_why_it_is_off(monkeypatch):
    monkeypatch.setattr(_cuda, "_host", None)
    if not torch.cuda.is_available():
        why = backends.unavailable("cuda")
        assert why is not None and ("no CUDA device" in why or "built without them" in why)
        off = pytest.raises(backends.BackendError, match="'cuda' is not available")
        with off, backends.use_backend("cuda"):
            pass
    reason = backends.supports("cuda", torch.device("cpu"), torch.float32)
    assert reason == "the CUDA C++ kernels take CUDA tensors, not cpu"
    x = torch.ones(1, 8, 2, 2)
    with pytest.raises((RuntimeError, ImportError, AttributeError)):
        _cuda.add_relu(x, None, x, x)
    assert (x == 1).all()


def test_module_loads_without_cuda():
    """No torch, which loads CUDA by itself: the module's own needs only."""
    library = cuda_sass.installed()
    if library is None:
        pytest.skip("fastres._C is not built")
    code = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('_C', {str(library)!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.isa())\n"
        "print([l.split()[-1] for l in open('/proc/self/maps') if 'libcud' in l])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# --- builds that go on without it -----------------------------------------------------------------

FAKE = "#!/bin/sh\ncase \"$*\" in *--version*) echo 'release {version}, V0';; *) {rest};; esac\n"
REASONS = {
    "skipped": ({"FASTRES_SKIP_CUDA": "1"}, None, "FASTRES_SKIP_CUDA is set"),
    "missing": ({"CUDA_HOME": "/nowhere"}, None, "/nowhere/bin/nvcc does not exist"),
    "old": ({}, ("11.4", "exit 1"), "is CUDA 11.4, too old: 12.0 or newer is needed"),
    "no runtime": ({}, ("13.0", "exit 0"), "has no libcudart_static.a"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REASONS)
def test_the_build_goes_on_and_names_the_reason(case, tmp_path):
    pytest.importorskip("cmake")
    pytest.importorskip("ninja")
    variables, fake, said = REASONS[case]
    env = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    if fake is not None:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(FAKE.format(version=fake[0], rest=fake[1]))
        nvcc.chmod(0o755)
        env["CUDACXX"] = str(nvcc)
    import cmake
    import ninja

    command = [str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), "-S", str(ROOT), "-B",
               str(tmp_path / "build"), "-G", "Ninja",
               f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
               f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    info = json.loads((tmp_path / "build" / "build_info.json").read_text())
    assert info["cuda"] is None and said in info["not_built"]["CUDA kernels"]
    assert said in done.stdout
