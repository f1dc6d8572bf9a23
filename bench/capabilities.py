"""docs/capabilities.md: op x backend x arch x dtype x constraint, and what has run on hardware.

    python -m bench.capabilities            # writes it
    python -m bench.capabilities --check    # 1 when it is stale

Hardware counts only by a file: the outcomes of the run-book's `tests` stage in
bench/results/gpu*/checks.json, committed with device and commit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "capabilities.md"
RESULTS = ROOT / "bench" / "results"

# op -> the file of its tests
OPS = {
    "bn_stats": "test_bn_stats.py",
    "bn_apply (+ shortcut, dual, per-channel affine)": "test_bn_apply.py",
    "bn_bwd_reduce, bn_bwd_apply": "test_bn_bwd.py",
    "add_relu, relu_bwd": "test_add_relu.py",
    "bn_relu_maxpool, backward": "test_bn_relu_maxpool.py",
    "conv_fprop, conv_fprop_act, conv_dgrad, conv_wgrad, conv_bwd_pointwise": "test_conv.py",
}
DTYPES = "fp32, bf16, fp16"
TRITON = "sm_80, sm_90, sm_100, gfx942"
ANY = "NHWC or NCHW, any C"
CONV = "test_conv.py"
CUDA_CONV = "test_cuda_conv.py"
CUDA_POINTWISE = "test_cuda_pointwise.py"
HALVES = "conv_fprop, conv_fprop_act, conv_dgrad, conv_wgrad"


HEAD = """\
# Capabilities

Written by `python -m bench.capabilities`; a test keeps it current. *Hardware* is where the tests
of an op ran on a real processor, and at which commit: on a GPU by the run-book ([gpu.md](gpu.md)),
whose committed files are read here, and nothing else. Without hardware, Triton's kernels are proven
in its interpreter and compiled ahead of time ([triton.md](triton.md)), the CUDA C++ kernels on the
CPU under sanitizers and by their machine code ([cuda.md](cuda.md)). `reference` takes everything.

| op | backend | code for | dtypes | constraint | hardware |
|---|---|---|---|---|---|"""


def cuda_archs() -> str:
    """Of the committed machine code."""
    found = json.loads(sorted((RESULTS / "cuda").glob("nvcc-*.json"))[-1].read_text())
    archs = {row[0] for row in found["rows"]}
    return ", ".join(sorted(archs, key=lambda a: int(a[3:].rstrip("a")))) + ", PTX sm_80"


def _rows() -> list[tuple[str, str, str, str, str, str]]:
    """op, backend, arch, dtype, constraint, file of its tests."""
    rows = []
    for op, file in OPS.items():
        if file == CONV:
            rows.append(
                (op, "cpu", "-", "-", "oneDNN, Winograd for 3x3, own wgrad in bf16: rung b", file)
            )
            rows.append((op, "triton", TRITON, "fp32 (TF32), bf16, fp16",
                         "NHWC; `conv_why_not` tells the rest", file))  # fmt: skip
            rows.append((HALVES + " (1x1, stride 1)", "cuda", "sm_90a, by hand", "bf16, fp16",
                         "NHWC, C % 8 == 0 and at most 4096, one group; normalised inputs and dy "
                         "are formed in registers", CUDA_POINTWISE))  # fmt: skip
            rows.append((op, "cuda", "sm_90a, on CUTLASS", "bf16, fp16",
                         "NHWC, C % 8 == 0, one group; normalised inputs and dy are formed by "
                         "passes before the conv; dgrad, then wgrad", CUDA_CONV))  # fmt: skip
            rows.append(("convolutions on sm_80, sm_100", "cuda", "-", "-",
                         "none: Triton's (`use_backend(\"triton\")`), or the vendor's on rung b, "
                         "which `use_backend(\"cuda\")` takes there", CUDA_CONV))  # fmt: skip
            continue
        stem = file == "test_bn_relu_maxpool.py"
        window = "; square window up to 15, padding at most half of it" if stem else ""
        rows.append((op, "cpu", "AVX-512, AVX2, portable", DTYPES, ANY + window, file))
        rows.append((op, "triton", TRITON, DTYPES, ANY + window, file))
        wide = "NHWC, 3 x 3, stride 2, C % 8 == 0" if stem else "rows % 8 == 0"
        how = (
            f"; 16-byte accesses where {wide} and pointers are aligned to 16, by element elsewhere"
        )
        rows.append((op, "cuda", cuda_archs(), DTYPES, ANY + window + how, file))
    return rows


def _runs() -> list[dict]:
    """Stages `tests` that ran on a GPU, newest last."""
    runs = []
    for path in RESULTS.glob("gpu*/checks.json"):
        stage = json.loads(path.read_text()).get("stages", {}).get("tests")
        if stage and not stage.get("dry_run"):
            runs.append(stage)
    return sorted(runs, key=lambda s: s["environment"].get("date", ""))


def hardware(backend: str, file: str, runs: list[dict]) -> str:
    """Where the tests of an op passed on a GPU, at which commit."""
    if backend == "cpu":
        return "every test run"
    said = []
    for run in runs:
        counts = run.get("by_backend", {}).get(backend, {}).get(file)
        if counts is None and backend == "triton":  # files before by_backend
            counts = run.get("outcomes", {}).get(file)
        if not counts or not counts.get("passed"):
            continue
        env = run["environment"]
        failed = f", {counts['failed']} failed" if counts.get("failed") else ""
        said.append(f"{env['device']} at {env['commit'][:12]}: {counts['passed']} tests{failed}")
    return "; ".join(said) or "**never**"


def page(runs: list[dict]) -> str:
    lines = [HEAD]
    for op, backend, arch, dtype, constraint, file in _rows():
        ran = "-" if arch == "-" else hardware(backend, file, runs)
        lines.append(f"| {op} | {backend} | {arch} | {dtype} | {constraint} | {ran} |")
    return "\n".join([*lines, ""])


def main() -> int:
    text = page(_runs())
    if "--check" in sys.argv:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
