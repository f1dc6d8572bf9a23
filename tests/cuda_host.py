"""Builds the kernels of csrc/cuda for the CPU (tests/cuda_host) with AddressSanitizer and UBSan.

Python loads them in a process of its own, into which the sanitizer's runtime is preloaded:
`environment()`. There FASTRES_TEST_CUDA_HOST is 1, and `module()` is the backend's native part."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / f"cuda_host-{sys.implementation.cache_tag}"
SHIM = ROOT / "tests" / "cuda_host"
VARIABLE = "FASTRES_TEST_CUDA_HOST"

# What selftest's broken kernels must say.
CAUGHT = {
    "out of bounds": "AddressSanitizer: heap-buffer-overflow",
    "missing barrier": "is read before anything was written to it",
    "missing second barrier": "race: shared cell[255] is written by thread 255 and read with no",
    "shared bounds": "shared cell[256] is out of bounds",
    "divergent barrier": "deadlock: thread 32 has ended; thread 0 waits at a barrier",
    "kernel without barriers": "caught: bn_stats, block 0, thread 0: shared m2_cell[",
}

WARNINGS = "-Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
COMMON = "-std=c++17 -fPIC -fvisibility=hidden -DFASTRES_CUDA_HOST -DFASTRES_CUDA_CONV"
# as nvcc's -fmad=false: an fma only where the source says fmaf
KERNELS = f"{COMMON} {WARNINGS} -O1 -g1 -ffp-contract=off"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def wanted() -> bool:
    """Whether this is a process for the CUDA kernels on the CPU."""
    return os.environ.get(VARIABLE) == "1"


def compiler() -> str:
    return os.environ.get("CXX", "").split(" ")[0] or "g++"


@functools.cache
def _runtimes() -> tuple[str, ...]:
    """The sanitizer's shared library, and libstdc++ for its exceptions."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        path = subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(path):
            return ()
        found.append(os.path.realpath(path))
    return tuple(found)


def _ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def why_not() -> str | None:
    """None when the kernels can be built for the CPU here, otherwise the reason."""
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()})"
    if importlib.util.find_spec("pybind11") is None or _ninja() is None:
        return "pybind11 or ninja is not installed"
    if not _runtimes():
        return f"{compiler()} has no shared AddressSanitizer"
    return None


def environment() -> dict[str, str]:
    """Of a Python process that loads the sanitized module."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return env | {
        VARIABLE: "1",
        "LD_PRELOAD": " ".join(_runtimes()),
        # Python and torch keep what they allocated; two C++ libraries may share a symbol's name
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0:"
        "detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # no GPU has business here
    }


def sources() -> list[Path]:
    """Not the tensor cores' (sm_90a); tests/cuda_host/conv_gemm.cpp stands in for them."""
    found = (ROOT / "csrc" / "cuda").glob("*.cu")
    return sorted(s for s in found if not s.stem.endswith("_sm90"))


def _ninja_file() -> str:
    import pybind11

    include = f"-I{SHIM} -I{ROOT / 'csrc'}"
    python = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule module",
        f"  command = $cxx -shared {SANITIZE} $in -o $out",
        "rule program",
        f"  command = $cxx {SANITIZE} $in -o $out",
    ]

    def compile_(source: Path, out: str, flags: str) -> str:
        lines.extend([f"build {out}: compile {source}", f"  flags = {flags} {include}"])
        return out

    kernels = [*sources(), SHIM / "conv_gemm.cpp"]
    objects = [compile_(s, f"{s.stem}.o", f"{KERNELS} {SANITIZE}") for s in kernels]
    shim = compile_(SHIM / "shim.cpp", "shim.o", f"{KERNELS} {SANITIZE}")
    for name in ("hopper", "wgmma"):  # they check every access and multiply matrices: -O2
        shim += " " + compile_(SHIM / f"{name}.cpp", f"{name}.o", f"{KERNELS} -O2 {SANITIZE}")
    for source in (*sorted((ROOT / "csrc" / "cuda").glob("*bindings.cpp")), SHIM / "module.cpp"):
        objects.append(compile_(source, f"{source.stem}.o", f"{COMMON} -O0 {python}"))
    lines.append(f"build fastres_cuda_host.so: module {' '.join([*objects, shim])}")
    selftest = compile_(SHIM / "selftest.cpp", "selftest.o", f"{KERNELS} {SANITIZE}")
    lines.append(f"build selftest: program {selftest} {shim}")
    return "\n".join([*lines, ""])


def build(*targets: str) -> Path:
    """Builds what is stale; the folder it lies in."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = FOLDER / "build.ninja"
        text = _ninja_file()
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [str(_ninja()), "-C", str(FOLDER), *targets]
        env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return FOLDER


def selftest(case: str) -> tuple[int, str]:
    """Exit code and errors of the program that runs right and broken kernels on the shim."""
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:exitcode=77"}
    program = [str(FOLDER / "selftest"), case]
    done = subprocess.run(program, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


def main() -> int:
    """For ctest: the shim proven by right and broken kernels; no torch is needed. 77: skipped."""
    reason = why_not()
    if reason is not None:
        print(reason)
        return 77
    build("selftest")
    wrong = [] if selftest("right") == (0, "") else ["right"]
    for case, said in CAUGHT.items():
        code, errors = selftest(case)
        if code not in (3, 77) or said not in errors:
            wrong.append(case)
    print(f"{1 + len(CAUGHT)} kernels on the host shim; not as they should be: {wrong or 'none'}")
    return 1 if wrong else 0


@functools.cache
def module():
    """The sanitized module, in a process with `environment()`."""
    path = FOLDER / "fastres_cuda_host.so"
    spec = importlib.util.spec_from_file_location("fastres_cuda_host", path)
    assert spec is not None and spec.loader is not None, f"{path} was not built"
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def set_order(seed: int) -> None:
    """The order of blocks and threads on the host shim, where that runs."""
    with contextlib.suppress(AssertionError):
        if wanted():
            module().set_order(seed)


if __name__ == "__main__":
    sys.exit(main())
