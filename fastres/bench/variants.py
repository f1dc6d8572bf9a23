"""What is timed: a variant is an engine (engines.py) and the malloc settings of its process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from fastres.bench.options import Case, Options

# glibc gives every large buffer fresh pages from mmap and returns them when freed, so each op pays
# for page faults. These settings keep freed memory in the heap instead. Read by glibc at process
# start only.
MALLOC_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@dataclass(frozen=True)
class Variant:
    """A row of the table. `malloc`: the process runs with MALLOC_SETTINGS."""

    name: str
    engine: str
    malloc: bool = False


EAGER = Variant("eager", "eager")
FASTRES = Variant("fastres", "fastres")
BASELINES = (
    EAGER,
    Variant("eager+malloc", "eager", malloc=True),
    Variant("compile", "compile"),
    Variant("compile+malloc", "compile", malloc=True),
)
PEERS = (Variant("onnxruntime", "onnxruntime"), Variant("openvino", "openvino"))


def variants_for(options: Options) -> list[Variant]:
    """The rows of a run in the order of the table. A GPU does not care about malloc."""
    rows = [*BASELINES, FASTRES, *(PEERS if options.peers else ())]
    return [v for v in rows if not (v.malloc and options.device != "cpu")]


def not_measured(variant: Variant, case: Case, options: Options) -> str | None:
    """Why a variant is not run in a case, or None when it is."""
    if variant.engine == "compile":
        if options.quick:
            return "not measured (--quick)"
        if not options.compile:
            return "not measured (--no-compile)"
    if variant in PEERS:
        if case.mode != "inference":
            return "inference only"
        if options.device != "cpu":
            return "timed on the CPU only"
        if case.dtype not in (("fp32", "bf16") if variant.engine == "openvino" else ("fp32",)):
            return f"has no {case.dtype} mode here"
        needed = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}[variant.engine]
        absent = [package for package in needed if find_spec(package) is None]
        if absent:
            return f"not installed (pip install {' '.join(absent)})"
    return None


def worker_environment(
    variant: Variant, threads: int | None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a variant's process: the user's, malloc settings as the variant says."""
    env = dict(os.environ if base is None else base)
    for key in MALLOC_SETTINGS:
        env.pop(key, None)
    if variant.malloc:
        env.update(MALLOC_SETTINGS)
    if threads is not None:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    return env
