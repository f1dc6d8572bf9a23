"""`fastres doctor`: what is installed, what works, and why the rest does not.

`examine()` gathers facts as a JSON-ready dict and never raises for what is missing: the reason
takes its place. `text()` prints them.
"""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

from fastres.bench.environment import (
    command_output,
    commit,
    cpu_model,
    fastres_version,
    package_folder,
    usable_cores,
    version_of,
)

MALLOC_VARIABLES = (
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "FASTRES_MALLOC",
)
BACKENDS = ("cpu", "triton", "cuda", "reference")


def examine() -> dict[str, Any]:
    """All facts. `usable` is True when the native module runs."""
    native = _native()
    return {
        "usable": native["missing"] is None,
        "fastres": {
            "version": fastres_version(),
            "folder": str(package_folder()),
            "commit": commit(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("torch", "torchvision", "triton")},
        },
        "system": platform.platform(),
        "gpu": _gpu(),
        "cpu": {
            "model": cpu_model(),
            "cores": usable_cores(),
            "torch_isa": _torch_isa(),
            "isa": native["isa"],
        },
        "native": native,
        "compilers": {name: _compiler(name) for name in ("c++", "g++", "clang++", "nvcc")},
        "backends": {name: _why_off(name) for name in BACKENDS},
        "malloc": _malloc(),
        "threads": _threads(native),
    }


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _native() -> dict[str, Any]:
    """The C++ module: why it is missing (None when it runs), the ISA in use, how it was built."""
    found: dict[str, Any] = {
        "missing": None,
        "isa": None,
        "serial": None,
        "routes": None,
        "build": None,
    }
    try:
        from fastres import _native, _route

        found["build"] = _native.build_info()
        found["missing"] = _native.why_missing()
        if found["missing"] is None:
            found["serial"] = _native.serial_reason()
            found["isa"] = _native.module().isa()
            found["routes"] = _route.why_interpreted()
    except Exception as error:
        found["missing"] = _reason(error)
    return found


def _gpu() -> dict[str, Any]:
    """GPUs that torch sees, and the reason when it sees none."""
    try:
        import torch
    except ImportError as error:
        return {"devices": [], "why_none": _reason(error), "driver": None, "cuda": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = (command_output(query) or "").splitlines()
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            devices.append({"name": name, "capability": f"{major}.{minor}"})
    why = None
    if not devices:
        if torch.version.cuda is None and torch.version.hip is None:
            why = f"torch {torch.__version__} was built without GPU support"
        elif not driver:
            why = "no NVIDIA driver answers (nvidia-smi)"
        else:
            why = "torch.cuda.is_available() is False although a driver answers"
    return {
        "devices": devices,
        "why_none": why,
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _torch_isa() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.backends.cpu.get_cpu_capability()


def _compiler(name: str) -> str | None:
    """The version line of a compiler on PATH, or None."""
    if shutil.which(name) is None:
        return None
    lines = (command_output([name, "--version"]) or "").splitlines()
    wanted = [line for line in lines if "release" in line] if name == "nvcc" else lines
    return wanted[0].strip() if wanted else "found, but --version fails"


def _why_off(name: str) -> str | None:
    """None when backend `name` can be used in this process, otherwise the reason."""
    try:
        from fastres import backends
    except ImportError as error:
        return _reason(error)
    try:
        return backends.unavailable(name)
    except ImportError as error:
        return f"{_reason(error)}; `pip install -e .` in the repository installs it"
    except Exception as error:
        return _reason(error)


def _malloc() -> dict[str, Any]:
    """What keeps large buffers in the process: fastres's own setting, and the environment's."""
    try:
        from fastres import memory

        state = memory.state()
    except Exception as error:
        state = f"unknown ({_reason(error)})"
    variables = {k: os.environ[k] for k in MALLOC_VARIABLES if k in os.environ}
    return {"state": state, "environment": variables}


def _threads(native: dict[str, Any]) -> dict[str, Any]:
    """The thread pool that the CPU kernels run in."""
    try:
        import torch
    except ImportError as error:
        return {"count": None, "pool": _reason(error)}
    if native["missing"] is not None:
        pool = "none: the native module is missing"
    else:
        pool = native["serial"] or "shared with torch"
    return {"count": torch.get_num_threads(), "pool": pool}


def text(found: dict[str, Any]) -> str:
    """The facts as aligned lines, a verdict last."""
    lines: list[tuple[str, str]] = []
    own = found["fastres"]
    at = f", commit {own['commit']}" if own["commit"] else ""
    lines.append(("fastres", f"{own['version']} in {own['folder']}{at}"))
    lines += [(name, value or "not installed") for name, value in found["versions"].items()]
    lines.append(("system", found["system"]))
    cpu, gpu, native = found["cpu"], found["gpu"], found["native"]
    isa = cpu["isa"] or "none"
    lines.append(("CPU", f"{cpu['model']}, {cpu['cores']} cores"))
    lines.append(("CPU kernels use", f"{isa} (torch: {cpu['torch_isa']})"))
    if not native["missing"]:
        why = native["routes"]
        lines.append(("CPU inference", "in C++" if why is None else f"from Python: {why}"))
    if gpu["devices"]:
        for device in gpu["devices"]:
            lines.append(("GPU", f"{device['name']}, compute capability {device['capability']}"))
    else:
        lines.append(("GPU", f"none: {gpu['why_none']}"))
    lines.append(("GPU driver, CUDA", f"{gpu['driver'] or 'none'}, {gpu['cuda'] or 'none'}"))
    lines.append(("native module", f"MISSING: {native['missing']}" if native["missing"] else "ok"))
    for key, value in (native["build"] or {}).items():
        shown = (
            ", ".join(f"{k}: {v}" if v else k for k, v in value.items())
            if isinstance(value, dict)
            else value
        )
        lines.append((f"  {key.replace('_', ' ')}", str(shown or "none")))
    for name, version in found["compilers"].items():
        lines.append((name, version or "not on PATH"))
    for name, why in found["backends"].items():
        lines.append((f"backend {name}", "on" if why is None else f"off: {why}"))
    malloc = found["malloc"]
    variables = " ".join(f"{k}={v}" for k, v in malloc["environment"].items())
    lines.append(("malloc", malloc["state"] + (f"; {variables}" if variables else "")))
    lines.append(("threads", f"{found['threads']['count']}, pool: {found['threads']['pool']}"))
    width = max(len(name) for name, _ in lines) + 2
    verdict = (
        "usable" if found["usable"] else "NOT usable: the native module is missing (see above)"
    )
    return "\n".join([*(f"{name:<{width}}{value}" for name, value in lines), "", verdict])
