"""The machine and the versions, for the record. Also used by `fastres doctor`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def cpu_model() -> str:
    """The CPU's marketing name, or the architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fastres_version() -> str:
    """fastres.__version__, or that of the installed distribution, or 'unknown'."""
    import fastres

    return getattr(fastres, "__version__", None) or version_of("fastres") or "unknown"


def package_folder() -> Path:
    """The folder that fastres is imported from."""
    return Path(__file__).resolve().parents[1]


def command_output(argv: list[str], timeout: float = 20.0) -> str | None:
    """stdout of a command, stripped; None when it cannot run or fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """Short hash of the checkout that fastres is imported from, with '+dirty', or None."""
    root = package_folder().parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    head = command_output([*git, "rev-parse", "--short=10", "HEAD"])
    if head is None:
        return None
    dirty = command_output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+dirty" if dirty else head


def gather(device: str, threads: int) -> dict[str, Any]:
    """What a benchmark result must carry to be compared with another."""
    import torch

    versions = {
        p: version_of(p) for p in ("torch", "torchvision", "triton", "onnxruntime", "openvino")
    }
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastres": fastres_version(),
        "commit": commit(),
        "device": device,
        **{k: v for k, v in versions.items() if v is not None},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
        found["cuda"] = torch.version.cuda
    return found


def one_line(env: dict[str, Any]) -> str:
    """The line under the table."""
    where = f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads, {env['isa']}"
    if "gpu" in env:
        where = f"{env['gpu']}, CUDA {env['cuda']}; {where}"
    names = ("torch", "torchvision", "triton", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {env[name]}" for name in names if name in env)
    at = f" ({env['commit']})" if env["commit"] else ""
    return f"{where}; fastres {env['fastres']}{at}, {versions}, python {env['python']}"
