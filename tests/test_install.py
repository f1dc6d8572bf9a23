"""fastres as people install it: a wheel built from this tree, used from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def run(command, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch fails."""
    stub = folder / "no" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('not for setup.py')")
    return os.environ | {"PYTHONPATH": str(stub.parent)}


@pytest.mark.slow
def test_install_wheel_works_from_another_folder(tmp_path):
    """Built in the tree, so that the native build is incremental; build isolation and the CUDA
    kernels are CI's own install's job."""
    for needed in ("cmake", "ninja", "pybind11", "setuptools"):
        pytest.importorskip(needed)
    run(
        [*PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)],
        cwd=ROOT,
        env=without_torch(tmp_path) | {"FASTRES_SKIP_CUDA": "1"},
    )
    wheel = next(tmp_path.glob("fastres-*.whl"))
    target = tmp_path / "site"
    run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)])
    code = """
import json, fastres, fastres._C, fastres.kernels, fastres._native as n, fastres._cpu as k, torch
x = torch.randn(2, 35, 7, 7)
out = [torch.empty(35) for _ in range(3)]
k.bn_stats(*out, x, 1e-5)
assert torch.allclose(out[0], x.mean((0, 2, 3)), atol=1e-6)
assert n.why_missing() is None
print(json.dumps([fastres.__file__, fastres.kernels.__file__, n.build_info()["cpu_variants"]]))
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(target)}
    package, kernels, variants = json.loads(
        run([sys.executable, "-c", code], cwd=tmp_path, env=env)
    )
    assert Path(package).parent == target / "fastres"
    assert Path(kernels).parent == target / "fastres" / "kernels"
    assert "portable" in variants
    assert not (target / "kernels").exists(), "kernels/ must not be a top-level package"


# g++ and nvcc: of our sources they make empty objects that depend on all headers of their folders.
COMPILER = """#!/bin/sh
case "$*" in
  *-dryrun*) echo -L{folder} >&2; exit;;
  *sources/csrc/*|*-shared*|*probe_c*) ;;
  *--version*) {version}; exit;;
  *) exec c++ "$@";;
esac
for word; do
  case $before in -o) out=$word;; -MF) list=$word;; -isystem) folders="$folders $word";; esac
  before=$word
done
: > $out
[ -z "$list" ] || echo $out: $(find /dev/null $folders -name '*.h*') > $list
"""


def unpack(folder: Path, change: str = "") -> None:
    """What build isolation brings, new files every time; CUTLASS's headers, some of."""
    import cmake
    import ninja
    import pybind11

    (folder / "bin").mkdir(parents=True)
    shutil.copy(Path(cmake.CMAKE_BIN_DIR) / "cmake", folder / "bin")  # CMake follows links
    (folder / "share").symlink_to(Path(cmake.CMAKE_DATA) / "share")
    shutil.copytree(Path(pybind11.__file__).parent, folder / "pybind11", copy_function=shutil.copy)
    source = folder / "cutlass_library" / "source"
    for name, text in {
        "include/cutlass/version.h": "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n",
        "include/cutlass/conv/conv.hpp": change,
        "tools/util/include/cutlass/util/stride.hpp": "",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (folder / "cutlass_library" / "__init__.py").touch()
    with (folder / "pybind11" / "include" / "pybind11" / "pybind11.h").open("a") as header:
        header.write(change)
    (folder / "ninja").symlink_to(Path(ninja.BIN_DIR) / "ninja")


def compilers(folder: Path) -> dict[str, str]:
    """The environment of a build with those."""
    for needed in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(needed)
    (folder / "libcudart_static.a").touch()
    for name, version in (("g++", "exec c++ --version"), ("nvcc", "echo release 13.0, V0")):
        (folder / name).write_text(COMPILER.format(folder=folder, version=version))
        (folder / name).chmod(0o755)
    env = os.environ | {"CUDACXX": str(folder / "nvcc"), "FASTRES_CUDA_ARCHS": "90a"}
    for unwanted in ("FASTRES_SKIP_CUDA", "FASTRES_CUTLASS_DIR", "MAX_JOBS"):
        env.pop(unwanted, None)
    return env


def configure(folder: Path, brought: Path, env: dict[str, str], *options: str) -> Path:
    """The build tree of folder/sources, with what unpack() brought."""
    build = folder / "build"
    command = [brought / "bin" / "cmake", "-S", folder / "sources", "-B", build, "-G", "Ninja",
               f"-DCMAKE_MAKE_PROGRAM={brought / 'ninja'}",
               f"-DCMAKE_CXX_COMPILER={folder / 'g++'}", "-DCMAKE_BUILD_TYPE=Debug",
               f"-DPython_EXECUTABLE={sys.executable}", *options]  # fmt: skip
    run(command, env=env | {"PYTHONPATH": str(brought)})
    return build


def pybind11_dir(build: Path) -> Path:
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return Path(next(v.split("=")[1] for v in lines if v.startswith("pybind11_DIR:")))


def test_install_compiles_nothing_where_only_the_headers_folder_is_new(tmp_path):
    """pip's build isolation unpacks CUTLASS and pybind11 elsewhere at every install; older builds
    left the folder in the cache."""
    (tmp_path / "sources").symlink_to(ROOT)
    env = compilers(tmp_path) | {"MAX_JOBS": "3"}
    build = tmp_path / "build"

    def install(name: str, change: str) -> str:
        folder = tmp_path / name
        unpack(folder, change)
        share = folder / "pybind11" / "share" / "cmake" / "pybind11"
        cached = {"first": [f"-Dpybind11_DIR={share}"], "second": ["-Dpybind11_DIR=/vanished"]}
        configure(tmp_path, folder, env, *cached.get(name, []))
        assert pybind11_dir(build).is_relative_to(build / "headers")
        output = run([folder / "ninja", "-C", build, "-v"])
        shutil.rmtree(folder)
        return output

    first = install("first", "")
    compiled = [f"sources/csrc/{name}" for name in ("cuda/conv_wgrad_sm90.cu", "bindings.cpp")]
    assert all(source in first for source in (*compiled, "sources/csrc/cpu/bn_stats.cpp"))
    assert "ninja: no work to do." in install("second", "")
    changed = install("third", "// changed\n")
    assert all(source in changed for source in compiled)
    assert "sources/csrc/cpu/bn_stats.cpp" not in changed
    # every compiler in the pool of MAX_JOBS
    assert "pool compilers\n  depth = 3\n" in (build / "CMakeFiles" / "rules.ninja").read_text()
    edges = [
        e
        for e in (build / "build.ninja").read_text().split("\n\n")
        if "CXX_COMPILER__" in e or "/nvcc -std" in e
    ]
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    missing = [p for p in sources if not any(f"sources/{p.relative_to(ROOT)} " in e for e in edges)]
    assert sources and not missing
    assert [e for e in edges if "\n  pool = compilers" not in e] == []


def test_install_from_a_tree_without_the_tests(tmp_path):
    """And with a pybind11 that is given: as it is, unless it is too old."""
    (tmp_path / "sources").mkdir()
    for name in ("CMakeLists.txt", "csrc"):
        (tmp_path / "sources" / name).symlink_to(ROOT / name)
    env = compilers(tmp_path)
    brought = tmp_path / "brought"
    unpack(brought)
    given = tmp_path / "given"
    shutil.copytree(brought / "pybind11", given)
    share = given / "share" / "cmake" / "pybind11"
    build = configure(tmp_path, brought, env, f"-Dpybind11_DIR={share}")
    text = (build / "build.ninja").read_text()
    assert "csrc/cuda/conv_wgrad_sm90.cu" in text and "tma_maps" not in text
    assert pybind11_dir(build) == share and f"-isystem {given / 'include'}" in text
    version = share / "pybind11ConfigVersion.cmake"
    version.write_text(version.read_text().replace('PACKAGE_VERSION "', 'PACKAGE_VERSION "0.'))
    configure(tmp_path, brought, env)
    assert pybind11_dir(build) != share


def test_install_probes_the_compilers_again_where_something_changed_behind_its_path(tmp_path):
    (tmp_path / "sources").mkdir()
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path / "sources")
    shutil.copytree(ROOT / "csrc", tmp_path / "sources" / "csrc")
    brought = tmp_path / "brought"
    unpack(brought)
    cutlass = brought / "cutlass_library" / "source"
    env = compilers(tmp_path) | {"FASTRES_CUTLASS_DIR": str(cutlass)}

    def probed() -> set[str]:
        build = configure(tmp_path, brought, env)
        files = list(build.glob("probe_*.o"))
        for file in files:
            file.unlink()
        return {file.stem for file in files}

    def change(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    device, conv = "probe_cuda", "probe_conv"
    assert probed() == {device, conv}
    assert probed() == set()
    change(tmp_path / "g++", "exec c++ --version", "echo g++ 99.1.0")
    assert probed() == {device, conv}
    change(tmp_path / "nvcc", "13.0", "13.1")
    assert probed() == {device, conv}
    csrc = tmp_path / "sources" / "csrc"
    for header in (csrc / "cuda" / "device.cuh", csrc / "cpu" / "blocks.h"):
        change(header, "#include", "// changed\n#include")
        assert probed() == {device}
    change(cutlass / "include" / "cutlass" / "version.h", "MINOR 2", "MINOR 3")
    assert probed() == {conv}
    assert probed() == set()


GIB = 1 << 30
AVAILABLE = {"proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {10 * GIB // 1024} kB\n"}
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory/jobs"
MEMORY = {  # files of /proc and /sys, MAX_JOBS, compilers at once: 2.9 GB each
    "of the machine": (AVAILABLE, "", "3"),
    "not told": ({}, "", ""),
    "too little": ({"proc/meminfo": "MemAvailable: 1000 kB\n"}, "", "1"),
    "of a container": (
        AVAILABLE | {"proc/self/cgroup": "0::/docker/1f\n", f"{V2}/memory.max": f"{4 * GIB}\n"},
        "", "1"),
    "of a parent's high mark, but for its cache": (
        AVAILABLE | {"proc/self/cgroup": "0::/jobs/mine\n", f"{V2}/jobs/mine/memory.max": "max\n",
                     f"{V2}/jobs/memory.max": f"{20 * GIB}\n",
                     f"{V2}/jobs/memory.high": f"{8 * GIB}\n",
                     f"{V2}/jobs/memory.current": f"{7 * GIB}\n",
                     f"{V2}/jobs/memory.stat": f"anon 5\ninactive_file {4 * GIB}\n"
                                               f"active_file {GIB}\n"},
        "", "2"),
    "of version 1": (
        AVAILABLE | {"proc/self/cgroup": "5:cpu,memory:/jobs\n3:cpuset:/\n0::/\n",
                     f"{V1}/memory.limit_in_bytes": f"{6 * GIB}\n",
                     f"{V1}/memory.usage_in_bytes": f"{2 * GIB}\n"},
        "", "1"),
    "as asked": (AVAILABLE, "5", "5"),
    "as asked, in vain": (AVAILABLE, "many", "MAX_JOBS=many is not a number of compilers"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORY)
def test_install_runs_as_many_compilers_as_the_memory_holds(case, tmp_path):
    pytest.importorskip("cmake")
    import cmake

    files, asked, said = MEMORY[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = tmp_path / "jobs.cmake"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.21)\ninclude({ROOT / 'csrc' / 'jobs.cmake'})\n"
        f'fastres_jobs("{tmp_path}" jobs)\nmessage("jobs=${{jobs}}.")\n'
    )
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-P", script]
    env = os.environ | {"MAX_JOBS": asked}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if asked == "many":
        assert done.returncode != 0 and said in done.stderr
    else:
        assert done.stderr.strip() == f"jobs={said}."


@pytest.mark.slow
def test_install_sdist_has_the_native_sources_and_the_tests(tmp_path):
    pytest.importorskip("setuptools")
    run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("*.py")}
    assert {"tests/common.py", "tests/cases.py", "tests/conftest.py"} <= sources <= names, (
        f"missing from the sdist: {sorted(sources - names)}"
    )
    assert {"CMakeLists.txt", "kernels/__init__.py", "pyproject.toml"} <= names


def test_install_setup_never_imports_torch(tmp_path):
    """torch cannot be imported here; the wheel's test builds the extension in the same way."""
    env = without_torch(tmp_path)
    probe = [sys.executable, "-c", "import torch"]
    assert (
        "not for setup.py" in subprocess.run(probe, env=env, capture_output=True, text=True).stderr
    )
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    run(command, cwd=ROOT, env=env)
    assert (tmp_path / "fastres.egg-info" / "PKG-INFO").is_file()


def tree(folder: Path) -> Path:
    """What setup.py looks at before it compiles."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("fastres", "kernels"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


@pytest.mark.slow
def test_install_without_a_compiler_says_what_to_install(tmp_path):
    """An empty PATH stands for a machine without g++."""
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tree(tmp_path / "src"), env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "needs a C++ compiler" in done.stderr and "apt-get install g++" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("asked, passed", [("08", "8"), ("2", "2"), ("0", None), ("-1", None)])
def test_install_passes_max_jobs_on_as_cmake_takes_it(asked, passed, tmp_path):
    """CMake is a script here, which writes down what it was asked for."""
    (tmp_path / "cmake.py").write_text(f"CMAKE_BIN_DIR = {str(tmp_path)!r}\n")
    (tmp_path / "cmake").write_text(
        f'#!/bin/sh\necho "$MAX_JOBS $*" >> {tmp_path}/asked\ntest $1 = -S\n'
    )
    (tmp_path / "cmake").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=tree(tmp_path / "src"),
        env=os.environ | {"PYTHONPATH": str(tmp_path), "MAX_JOBS": asked},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    if passed is None:
        assert f"MAX_JOBS={asked} is not a number of compilers" in done.stderr
        assert not (tmp_path / "asked").exists()
        return
    assert "the native build failed" in done.stderr
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert first.startswith(f"{passed} -S ") and second.startswith(f"{passed} --build ")
    assert second.endswith(f"-j {passed}")
