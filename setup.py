"""Builds fastres._C with CMake + Ninja. Never imports torch: a wheel fits every torch.

Everything declarative is in pyproject.toml. Here: the native build, its incremental folder
(build/native-*, so that a second `pip install -e .` takes seconds), and a loud summary.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_COMPILER = """
fastres needs a C++ compiler: its CPU kernels are part of every build, and none was found
(looked for $CXX, c++, g++, clang++). Install one and run the same command again:
  Debian, Ubuntu:  apt-get install g++
  Fedora, RHEL:    dnf install gcc-c++
  macOS:           xcode-select --install
  conda:           conda install -c conda-forge cxx-compiler
"""


def tool(name: str) -> str:
    """cmake or ninja: the build requirement's own binary first, then PATH."""
    try:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        folder = None
    found = shutil.which(name, path=folder) if folder else None
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(f"fastres: {name} was not found; pip install {name}")
    return found


def compiler() -> str:
    named = os.environ.get("CXX", "").split()
    for candidate in named[:1] or ["c++", "g++", "clang++"]:
        path = shutil.which(candidate)
        if path:
            return path
    raise SystemExit(NO_COMPILER)


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BuildNative(build_ext):
    def build_extension(self, ext):
        cxx = compiler()
        jobs = os.environ.get("MAX_JOBS") or str(cores())  # CMake: no more than the memory holds
        if not jobs.isdecimal() or int(jobs) < 1:
            raise SystemExit(f"fastres: MAX_JOBS={jobs} is not a number of compilers: 1 or more")
        if os.environ.get("MAX_JOBS"):
            os.environ["MAX_JOBS"] = jobs = str(int(jobs))  # 08: CMake takes no other form
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = self.build_folder()
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build), *self.cmake_options(cxx)]
        # A cache from another compiler or a vanished isolated environment cannot be reused.
        if subprocess.run(configure).returncode != 0:
            shutil.rmtree(build, ignore_errors=True)
            if subprocess.run(configure).returncode != 0:
                raise SystemExit("fastres: CMake could not configure the build, see above")
        if subprocess.run([tool("cmake"), "--build", str(build), "-j", jobs]).returncode != 0:
            raise SystemExit("fastres: the native build failed, see the compiler's message above")
        target.parent.mkdir(parents=True, exist_ok=True)
        module = next(build.glob("_C*.so"), None) or next(build.glob("_C*.pyd"))
        replace(module, target)
        replace(build / "build_info.json", target.parent / "_build_info.json")
        self.say(json.loads((build / "build_info.json").read_text()), target)

    def copy_extensions_to_source(self):  # editable installs and --inplace
        super().copy_extensions_to_source()
        info = ROOT / self.build_lib / "fastres" / "_build_info.json"
        replace(info, ROOT / "fastres" / "_build_info.json")

    def build_folder(self) -> Path:
        tag = f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / tag
        try:
            build.mkdir(parents=True, exist_ok=True)
        except OSError:  # a read-only source tree
            build = Path(self.build_temp).resolve() / tag
            build.mkdir(parents=True, exist_ok=True)
        return build

    def cmake_options(self, cxx: str) -> list[str]:
        return [
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_CXX_COMPILER={cxx}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
        ]

    def say(self, info: dict, target: Path) -> None:
        lines = [
            f"fastres: built {target.name} with {info['compiler']} for {info['system']}",
            f"  CPU kernels: built: {', '.join(info['cpu_variants'])} (chosen at run time)",
            *cuda_lines(info),
            *(f"  {what}: NOT BUILT: {why}" for what, why in info["not_built"].items()),
            "  Triton kernels: nothing to build, compiled on first use",
            "  check with: fastres doctor",
        ]
        bar = "=" * 78
        text = "\n".join([bar, *lines, bar])
        print(text, flush=True)
        # pip hides a build's output unless asked; a terminal still shows this
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write("\n" + text + "\n")
        except OSError:
            pass


def cuda_lines(info: dict) -> list[str]:
    cuda = info["cuda"]
    if cuda is None:
        return []
    lines = [f"  CUDA kernels: built: nvcc {cuda['nvcc']} for {cuda['code']}"]
    if cuda["convolutions"]:
        lines.append(f"  CUDA convolutions: built: {cuda['convolutions']} for 90a")
    return lines


def replace(source: Path, target: Path) -> None:
    """Copy by rename: a running process may have the old library mapped."""
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


README = ROOT / "README.md"

setup(
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["fastres", "fastres.*"]), "fastres.kernels"],
    package_dir={"fastres.kernels": "kernels"},
    package_data={"fastres": ["_build_info.json", "py.typed", "*.json", "**/*.json"]},
    ext_modules=[Extension("fastres._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
