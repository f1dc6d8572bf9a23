"""The CUDA C++ build: the machine code's budget, the errors, a module that loads without CUDA, and
what the build says where it cannot build the kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_sass
import pytest
import torch

from bench import pointwise_model
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
    convs = [r for r in found["rows"] if r["kernel"] in cuda_sass.CONVS]
    assert len(kernels) == 9 and (len(found["rows"]) - len(convs)) % len(cuda_sass.ARCHS) == 0
    # each pass in both types and both widths of tile, for Hopper alone
    assert {(r["kernel"], r["dtype"], r["lanes"]) for r in convs} == {
        (k, d, n) for k in cuda_sass.CONVS for d in ("bf16", "fp16") for n in (64, 128)
    }
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
                         ({"wide_stores": 0}, "0 wide_stores"),
                         ({"waits": 9}, "9 waits for 8 wgmma: serialised")]:  # fmt: skip
        fprop = next(r for r in here if r["kernel"] == "pointwise_fprop_kernel")
        assert said in cuda_sass.problems({**fprop, **change})[0]


def test_the_budget_is_broken_by_a_conv_off_the_tensor_cores():
    row = next(r for r in cuda_sass.committed()["rows"]
               if r["kernel"] == "conv_fprop stats" and r["lanes"] == 64)  # fmt: skip
    assert cuda_sass.problems(row) == []
    for change, said in [({"wgmma": 8}, "8 HGMMA, wanted 16"), ({"copies": 1}, "1 UTMALDG"),
                         ({"setmaxnreg": 0}, "ignored setmaxnreg"), ({"stack": 8}, "stack 8"),
                         ({"registers": 200}, "200 registers"), ({"wide_stores": 2}, "2 16-byte"),
                         ({"wide_stage": 0}, "from the stage"), ({"arch": "sm_80"}, "for sm_80"),
                         ({"half_stores": 1}, "1 2-byte stores"),
                         ({"waits": 16}, "16 waits for 16 wgmma: serialised")]:  # fmt: skip
        assert said in cuda_sass.problems({**row, **change})[0]


def test_every_ring_has_two_stages(built):
    """A ring of one waits for itself. All channels that the kernels take, every form; and the
    committed rings of ResNet-50."""
    rings = [dict(zip(cuda_sass.LAYER_COLUMNS, r, strict=True)) for r in cuda_sass.layers(built)]
    found = cuda_sass.committed()
    assert found["layer_columns"] == list(cuda_sass.LAYER_COLUMNS)
    assert found["layers"] == [list(r.values()) for r in rings]
    assert all(r["blocks"] <= 132 for r in rings)
    many = [*range(8, 4096, 504), 3520, 3528, 4096]
    for c in many:
        for k in (8, 128, 136, 4096):
            rings += [built.pointwise_fprop_shape(form, 1000, c, k) for form in range(3)]
            for shape_of in (built.pointwise_dgrad_shape, built.pointwise_wgrad_shape):
                rings += [shape_of(1000, c, k), shape_of(1000, k, c)]
    assert all(r["stages"] >= 2 and r["shared"] <= cuda_sass.MOST_SHARED for r in rings)
    narrow = [built.pointwise_fprop_shape(1, 1000, c, 136)["columns"] for c in (3520, 3528)]
    assert narrow == [256, 128]


def test_the_table_of_predicted_times_is_current():
    text = pointwise_model.PAGE.read_text()
    assert pointwise_model.page(text) == text, "run: python -m bench.pointwise_model --write"
    deep = pointwise_model.fprop(256, 1024, 14)
    assert max(deep.times.values()) == deep.times["wgmma"] < deep.vendor_time


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


CONV = (2, 8, 8, 16, 24, 3, 3, 8, 8, 1, 1, 1, 1, 1, 1)  # N H W C, K R S, P Q, stride, padding, ...


@pytest.fixture
def convs(built):
    if not hasattr(built, "conv_fprop"):
        pytest.skip((_native.build_info() or {})["not_built"]["CUDA convolutions"])
    return built


def test_convolutions_are_refused_before_the_launch(convs):
    """By CUTLASS's can_implement, on the host, and by what it does not look at."""
    assert convs.conv_why_not(1, CONV) == "" and convs.conv_why_not(2, CONV) == ""
    assert "bfloat16 and float16" in convs.conv_why_not(0, CONV)
    a = 1 << 20
    for change, said in [({3: 12}, "channels 12 and 24: .* multiples of 8"), ({0: 0}, "empty"),
                         ({0: 1 << 26}, "more than 2.31 pixels"), ({9: 9}, "strides up to 8"),
                         ({11: 300}, "im2col")]:  # fmt: skip
        sizes = tuple(change.get(i, v) for i, v in enumerate(CONV))
        with pytest.raises(ValueError, match=rf"conv_wgrad on x .* weight 24 .*{said}"):
            convs.conv_wgrad(a, a, a, a, 0, 1, sizes, 0, 0)
    with pytest.raises(ValueError, match="conv_fprop on x 2 x 16 x 8 x 8, weight 24 x 16 x 3 x 3.*"
                       "not aligned to 16 bytes"):  # fmt: skip
        convs.conv_fprop(a, 0, 0, 0, a + 2, a, 1e-5, 0, 0, 1, CONV, 0, 0)


def test_convolutions_name_kernel_and_shape_in_cudas_errors(convs):
    """Here: no driver, or a device that does not exist."""
    a = 1 << 20
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"conv_fprop_act on .* 2 x 24 x 64 bf.*device 99.*cuda"
        ):
            convs.conv_fprop_act(a, a, a, 0, 0, 0, 0, 0, True, 0, 1, CONV, 99, 0)


def schedule(convs, which, rows, channels, taps, depth):
    s = convs.conv_schedule(which, rows, channels, taps, depth, 0)
    return s | {"blocks": s["workers"] * s["columns"] * s["splits"]}


def test_resnet_50s_convolutions_fill_one_wave(convs):
    """Batch 256, 132 SMs: the tiles of conv_plan.cu's comments."""
    for size, c, k, r in [(56, 64, 64, 1), (56, 64, 64, 3), (56, 64, 256, 1), (56, 256, 64, 1),
                          (28, 128, 128, 3), (28, 512, 128, 1), (28, 128, 512, 1),
                          (14, 256, 256, 3), (14, 1024, 256, 1), (14, 256, 1024, 1),
                          (7, 512, 512, 3), (7, 2048, 512, 1), (7, 512, 2048, 1)]:  # fmt: skip
        rows = 256 * size * size
        s = schedule(convs, 0, rows, k, r * r, c)
        m, n, cluster = s["tile"]
        assert (m, n, cluster) == ((256, 64, 1) if k == 64 else (128, 128, 2))
        assert (
            s["workers"] % cluster == 0 and s["blocks"] <= 132 and s["k_tiles"] == r * r * c // 64
        )
        # the longest worker against the mean over 132 SMs
        mean = -(-rows // m) * s["columns"] / 132
        most = 1.35 if (size, k) == (7, 512) else 1.1
        assert mean <= s["per"] <= most * mean, (size, c, k, r, s, mean)
        g = schedule(convs, 2, k, c, r * r, rows)
        assert g["k_per"] * (g["splits"] - 1) < g["k_tiles"] <= g["k_per"] * g["splits"]
        waves = g["blocks"] / 132
        assert waves <= -(-g["blocks"] // 132) <= 1.4 * waves, (size, c, k, r, g)
        partials = g["splits"] * k * c * r * r * 4
        assert partials <= 64 << 20  # about the L2's 50 MB


def test_a_tile_that_is_asked_for_is_the_schedules(convs):
    """Tiles by their place in the lists; a workspace has a row for each of its workers."""
    for which in range(3):
        for place, (_, *want, why) in enumerate(convs.conv_tiles(which), 1):
            assert list(convs.conv_schedule(which, 4096, 512, 9, 512, place)["tile"]) == want
            assert len(why) > 10
        with pytest.raises(ValueError, match="tile 3 of a list of 2"):
            convs.conv_schedule(which, 4096, 512, 9, 512, 3)
    wide = (256, 14, 14, 512, 512, 1, 1, 14, 14, *(1, 1, 0, 0, 1, 1))
    for which in (0, 1):
        floats = [convs.conv_workspace_floats(which, 1, wide, tile) for tile in range(3)]
        assert floats[0] == floats[1] != floats[2], floats  # 4 columns of 33 workers, or 8 of 16
    rows, channels = 256 * 14 * 14, 512
    floats = {
        "fprop": lambda tile: convs.pointwise_fprop_floats(rows, 64, channels, tile),
        "dgrad": lambda tile: convs.pointwise_dgrad_floats(rows, channels, 64, 2, tile),
        "wgrad": lambda tile: convs.pointwise_wgrad_floats(rows, channels, 64, tile),
    }
    for op, (_, floats_of) in zip((0, 2, 3), floats.items(), strict=True):
        places = range(1, len(convs.pointwise_tiles(op)) + 1)
        found = [floats_of(tile) for tile in places]
        assert sorted(set(found)) == found and floats_of(0) == found[-1], (op, found)


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


@pytest.mark.parametrize("driver, capability, said", [
    (13000, (9, 0), None), (13010, (12, 0), None),  # of the build's age, and newer
    (12080, (9, 0), r"driver is for CUDA 12\.8.*built with CUDA 13\.0.* a CUDA 12 toolkit"),
], ids=str)  # fmt: skip
def test_a_driver_older_than_the_toolkit_is_named(driver, capability, said):
    reason = _cuda.driver_obstacle(driver, 13000, capability, "80 90a ptx80")
    assert reason is None if said is None else re.search(said, reason)


def test_ptx_is_not_left_to_an_older_driver():
    """Within a major version machine code runs; PTX of a newer toolkit is not compiled."""
    archs = "80 90a 100a ptx80"
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        assert _cuda.driver_obstacle(12080, 12090, capability, archs) is None
    for capability, arch in (((10, 3), 103), ((12, 0), 120)):
        reason = _cuda.driver_obstacle(12080, 12090, capability, archs)
        assert f"PTX only for sm_{arch}, of CUDA 12.9" in reason
        assert f"FASTRES_CUDA_ARCHS={arch}" in reason


def test_the_module_tells_its_versions(built, monkeypatch):
    driver, toolkit = built.versions()
    assert BUILD is not None and toolkit == int(10 * float(BUILD["nvcc"])) * 100
    assert driver > 0 if torch.cuda.is_available() else driver >= 0
    # as `fastres doctor` and use_backend ask
    monkeypatch.setattr(_cuda, "_host", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_cuda, "_driver_too_old", lambda device: "the driver is for CUDA 11.8")
    assert backends.unavailable("cuda") == "the driver is for CUDA 11.8"


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


def test_module_computes_without_torch(tmp_path):
    """What ctest runs: every ISA of this machine."""
    library = cuda_sass.installed()
    if library is None:
        pytest.skip("fastres._C is not built")
    (tmp_path / library.name).symlink_to(library)
    right, wrong = ("cpu", "cuda") if BUILD is None else ("cuda", "cpu")
    program = [sys.executable, "-S", str(ROOT / "csrc" / "test_module.py")]
    for expected, code, isa in (
        (right, 0, {}),
        (right, 0, {"FASTRES_CPU_ISA": ""}),
        (wrong, 1, {}),
    ):
        env = {"PYTHONPATH": str(tmp_path)} | isa
        done = subprocess.run([*program, expected], env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert ('"compiler"' in done.stdout) == (code == 0)  # the last line, after every ISA


# --- builds that go on without it -----------------------------------------------------------------


def configure(env, folder: Path) -> tuple[dict, str]:
    """build_info.json and the output of CMake."""
    import cmake
    import ninja

    command = [str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), "-S", str(ROOT), "-B",
               str(folder / "build"), "-G", "Ninja",
               f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
               f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "build" / "build_info.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case, said", [
    ("missing", "no CUTLASS: /nowhere/include/cutlass/version.h does not exist"),
    ("old", "is CUTLASS 3.9, too old: 4.2 or newer is needed"),
    ("other arch", "they are for sm_90a, this build is for 80"),
    ("broken", r"does not compile CUTLASS 4\.2 with .*cute/tensor\.hpp.*No such file"),
])  # fmt: skip
def test_the_build_goes_on_without_the_convolutions(built, case, said, tmp_path):
    """CMake's configuration alone; the compiler is probed as always."""
    folder = tmp_path / "cutlass"
    (folder / "include" / "cutlass").mkdir(parents=True)
    major, minor = (4, 2) if case == "broken" else (3, 9)
    (folder / "include" / "cutlass" / "version.h").write_text(
        f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n"
    )
    variables = {
        "missing": {"FASTRES_CUTLASS_DIR": "/nowhere", "FASTRES_CUDA_ARCHS": "90a"},
        "old": {"FASTRES_CUTLASS_DIR": str(folder), "FASTRES_CUDA_ARCHS": "90a"},
        "other arch": {"FASTRES_CUDA_ARCHS": "80"},
        "broken": {"FASTRES_CUTLASS_DIR": str(folder), "FASTRES_CUDA_ARCHS": "90a"},
    }[case]
    info, output = configure(os.environ | variables, tmp_path)
    assert info["cuda"] is not None and info["cuda"]["convolutions"] is None
    assert re.search(said, info["not_built"]["CUDA convolutions"]) and re.search(said, output)
    assert ctest_names(tmp_path) == HERE


@pytest.mark.slow
@pytest.mark.parametrize("here", ["7.5", "7.5\n9.0"], ids=["alone", "beside a newer one"])
def test_a_gpu_older_than_the_kernels_is_named_or_left_out(built, here, tmp_path):
    """And everything else is built."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<E\n{here}\nE\n")
    smi.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FASTRES_CUTLASS_DIR": "/nowhere"}
    env = {k: v for k, v in os.environ.items() if k != "FASTRES_CUDA_ARCHS"}
    info, output = configure(env | variables, tmp_path)
    if here == "7.5":
        said = "no kernels for sm_75: they need sm_80 or newer"
        assert info["cuda"] is None and said in info["not_built"]["CUDA kernels"] and said in output
    else:
        assert info["cuda"]["code"] == "90a ptx80"


# An nvcc that makes sm_75 of sm_80: no conversion to bf16.
SM_75 = """#!/bin/sh
for word; do
  set -- "$@" "$(echo "$word" | sed s/=compute_80,code=sm_80/=compute_75,code=sm_75/)"
  shift
done
exec {nvcc} "$@"
"""


@pytest.mark.slow
def test_the_build_goes_on_where_nvcc_has_not_the_kernels_instructions(built, tmp_path):
    real = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if real is None:
        pytest.skip("nvcc is not on PATH")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(SM_75.format(nvcc=real))
    nvcc.chmod(0o755)
    env = os.environ | {"CUDACXX": str(nvcc), "FASTRES_CUDA_ARCHS": "80"}
    info, output = configure(env, tmp_path)
    said = r"does not compile for 80 with .*requires \.target sm_80 or higher"
    assert info["cuda"] is None
    assert re.search(said, info["not_built"]["CUDA kernels"]) and re.search(said, output)


HERE = ["module_loads", "cpu_kernels", "cuda_host_shim", "cuda_kernels_on_the_host"]


def ctest(folder: Path, *options: str) -> str:
    import cmake

    program = str(Path(cmake.CMAKE_BIN_DIR) / "ctest")
    command = [program, "--test-dir", str(folder / "build"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ctest_names(folder: Path) -> list[str]:
    """What ctest would run."""
    return re.findall(r"Test +#\d+: (\w+)", ctest(folder, "-N"))


@pytest.mark.slow
def test_ctest_replays_the_convolutions_copies(convs, tmp_path):
    """In a build of their own: the installation's may be configured anew meanwhile. Of the others'
    programs and tests pytest runs each by itself."""
    variables = {"FASTRES_CUDA_ARCHS": "90a"}
    package = importlib.util.find_spec("cutlass_library")
    if "FASTRES_CUTLASS_DIR" not in os.environ and package is None:
        version = BUILD["convolutions"].split()[-1]  # the installed module's
        copy = next(ROOT.glob(f"build/native-*/headers/cutlass-{version}"), None)
        if copy is None:
            pytest.skip("CUTLASS's headers are neither a package here nor in build/")
        variables["FASTRES_CUTLASS_DIR"] = str(copy)
    info, _ = configure(os.environ | variables, tmp_path)
    if "no CUDA toolkit" in (why := info["not_built"].get("CUDA kernels", "")):
        pytest.skip(why)
    assert info["not_built"] == {}
    assert ctest_names(tmp_path) == [*HERE, "build_tma_maps", "tma_maps"]
    output = ctest(tmp_path, "-V", "-R", "tma_maps")
    passes = re.search(r"(\d+) passes, 0 wrong, 0 bad maps", output)
    assert passes and int(passes[1]) == 87


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
    info, output = configure(env | variables, tmp_path)
    assert info["cuda"] is None and said in info["not_built"]["CUDA kernels"]
    assert said in output
    assert ctest_names(tmp_path) == HERE
