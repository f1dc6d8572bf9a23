"""Every Triton kernel, compiled ahead of time for GPUs that are not here, and held to a budget.

The launchers run on meta tensors with the one launch function replaced: what is compiled is exactly
what they would
launch on the shapes of a ResNet at batch 256. Budget: no local memory, registers and shared memory
within the
architecture, 16-byte accesses where channels_last is aligned.

    python tests/test_triton_aot.py sm_90            # records as JSON, one a line
    python tests/test_triton_aot.py sm_90 --table    # the table of docs/triton.md

Compiling happens in a subprocess: under TRITON_INTERPRET=1 triton.jit makes interpreted functions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# (dtype, layout, C, H): one aligned NHWC shape for each dtype, NCHW aligned, and ragged both ways.
# sm_90 gets all, the other targets the first: the kernels are the same, and a set costs about 8 s
# on one core.
SETS = [
    ("bfloat16", "nhwc", 256, 14),
    ("float32", "nhwc", 64, 56),
    ("float16", "nhwc", 2048, 7),
    ("bfloat16", "nchw", 64, 56),
    ("float32", "nchw", 35, 7),
]
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Record:
    """One compiled kernel; wide: global accesses of 16 bytes; narrow: all others."""

    target: str
    case: str
    kernel: str
    dtype: str
    layout: str
    wide_wanted: tuple[int, int]  # loads, stores in the aligned NHWC main path; (0, 0): not asked
    registers: int
    threads: int
    shared: int
    local: int  # bytes of stack; on gfx942 with the spilled vector registers
    local_accesses: int
    wide: tuple[int, int]
    narrow: tuple[int, int]

    def problems(self) -> list[str]:
        out = []
        if self.local or self.local_accesses:
            out.append(
                f"spills: {self.local} bytes of local memory, {self.local_accesses} accesses"
            )
        if self.shared > SHARED_LIMIT[self.target]:
            out.append(f"shared memory {self.shared} > {SHARED_LIMIT[self.target]}")
        if self.target != "gfx942" and self.registers * self.threads > 65536:
            out.append(f"{self.registers} registers x {self.threads} threads do not fit an SM")
        for what, i in (("loads", 0), ("stores", 1)):
            if self.wide[i] < self.wide_wanted[i]:
                out.append(f"{self.wide[i]} 16-byte {what}, wanted {self.wide_wanted[i]}")
            # vectors, mask bytes, the partials: few. A tile read element by element has dozens.
            if any(self.wide_wanted) and self.narrow[i] > 8:
                out.append(f"{self.narrow[i]} narrow {what} in an aligned NHWC kernel")
        return out


def _cases(kernels, dtype_name: str, layout: str, channels: int, side: int):
    """(case, (wide loads, wide stores) of its first launch, thunk): every kernel, in the forms the
    ops use.
    """
    import torch

    dtype = getattr(torch, dtype_name)
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def act(c, h, dt=dtype):
        return torch.empty((256, c, h, h), dtype=dt, device="meta").contiguous(memory_format=fmt)

    def mask_of(t):
        outer, inner = (
            (256 * side * side, channels) if layout == "nhwc" else (256 * channels, side**2)
        )
        return torch.empty((outer, (inner + 7) // 8), dtype=torch.uint8, device="meta")

    x, v = act(channels, side), torch.empty(channels, device="meta")
    m = mask_of(x)
    stem_c = 64 if channels % 8 == 0 else channels
    s, p, i = act(stem_c, 112), act(stem_c, 56), act(stem_c, 56, torch.uint8)
    w = torch.empty(stem_c, device="meta")
    none4 = (None,) * 4
    # 64 bytes per thread and tensor are four 16-byte accesses, in reductions of two or three
    # tensors, too; a reduction of one tensor has eight, a 3 x 3 window nine loads of one.
    yield "bn_stats", (8, 0), lambda: kernels.bn_stats(v, v, v, x, 1e-5)
    yield (
        "bn_apply dual relu",
        (8, 4),
        lambda: kernels.bn_apply(x, m, x, v, v, v, v, x, v, v, v, v, True),
    )
    yield (
        "bn_apply relu",
        (4, 4),
        lambda: kernels.bn_apply(x, None, x, v, v, v, v, None, *none4, True),
    )
    yield (
        "bn_bwd_reduce dual mask",
        (12, 0),
        lambda: kernels.bn_bwd_reduce(v, v, v, x, m, x, v, v, v, v, x, v, v, "mask"),
    )
    yield (
        "bn_bwd_reduce recompute",
        (8, 0),
        lambda: kernels.bn_bwd_reduce(
            v, v, None, x, None, x, v, v, v, v, None, None, None, "recompute"
        ),
    )
    yield (
        "bn_bwd_apply dual mask",
        (12, 8),
        lambda: kernels.bn_bwd_apply(
            x, x, x, m, x, v, v, v, v, v, v, x, v, v, v, v, "mask", True, True
        ),
    )
    yield (
        "bn_bwd_apply recompute",
        (8, 4),
        lambda: kernels.bn_bwd_apply(
            x, None, x, None, x, v, v, v, v, v, v, None, *none4, "recompute", True, False
        ),
    )
    yield (
        "bn_bwd_apply identity mask",
        (8, 8),
        lambda: kernels.bn_bwd_apply(
            x, x, x, m, x, v, v, v, v, v, v, None, *none4, "mask", True, False
        ),
    )
    yield "add_relu", (8, 4), lambda: kernels.add_relu(x, m, x, x)
    yield "relu_bwd", (8, 4), lambda: kernels.relu_bwd(x, x, x, m)
    yield "bn_relu_maxpool", (9, 1), lambda: kernels.bn_relu_maxpool(p, i, s, w, w, w, w, 3, 2, 1)
    yield (
        "bn_relu_maxpool_bwd_reduce",
        (4, 0),
        lambda: kernels.bn_relu_maxpool_bwd_reduce(w, w, p, i, s, w, w, 3, 2, 1),
    )
    yield (
        "bn_relu_maxpool_bwd_apply",
        (8, 2),
        lambda: kernels.bn_relu_maxpool_bwd_apply(s, p, i, s, w, w, w, w, w, 3, 2, 1, True),
    )


def _source(kernel, args, constants):
    """ASTSource as the JIT would specialise these arguments."""
    import torch
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    pointer = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16", "torch.float16": "*fp16"}
    signature, constexprs, attributes = {}, dict(constants), {}
    for position, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(arg, torch.Tensor):
            signature[name] = pointer.get(str(arg.dtype), "*u8")
        elif isinstance(arg, TensorDescriptor):
            element = pointer[str(arg.base.dtype)][1:]
            block = ",".join(str(v) for v in arg.block_shape)
            signature[name] = f"tensordesc<{element}[{block}]>"
        elif isinstance(arg, float):
            signature[name] = "fp32"
        elif arg is None or arg == 1:
            constexprs[name] = arg
        else:
            assert isinstance(arg, int) and abs(arg) < 2**31, (name, arg)
            signature[name] = "i32"
        if isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg != 1 and arg % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    signature.update({name: "constexpr" for name in constexprs})
    return ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, constexprs, attributes)


def _read_cuda(cubin: bytes) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+).*?STACK:(\d+)", usage, re.S).groups()

    def count(pattern):
        return len(re.findall(pattern, sass))

    wide = (count(r"\bLDG\.E\.128"), count(r"\bSTG\.E\.128"))
    return {
        "registers": int(registers),
        "local": int(stack),
        "local_accesses": count(r"\b(?:LDL|STL)\b"),
        "wide": wide,
        "narrow": (count(r"\bLDG\.E") - wide[0], count(r"\bSTG\.E") - wide[1]),
    }


def _read_hip(amdgcn: str) -> dict:
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", amdgcn).group(1))

    def count(op):
        every = len(re.findall(rf"\b(?:global|buffer)_{op}_", amdgcn))
        wide = len(re.findall(rf"\b(?:global|buffer)_{op}_dwordx4", amdgcn))
        return wide, every - wide

    loads, stores = count("load"), count("store")
    return {
        "registers": field("vgpr_count"),
        # Spilled scalar registers go to lanes of a vector register, not to memory.
        "local": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "local_accesses": len(re.findall(r"\bscratch_(?:load|store)", amdgcn)),
        "wide": (loads[0], stores[0]),
        "narrow": (loads[1], stores[1]),
    }


def compile_all(target: str, sets) -> list[Record]:
    """Capture every launch of every set and compile each distinct one."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget

    from fastres import kernels

    captured = []
    for module in ("_bn_stats", "_bn_apply", "_bn_bwd", "_add_relu", "_bn_relu_maxpool"):
        importlib.import_module(f"fastres.kernels.{module}").launch = (
            lambda kernel, programs, args, num_warps, **constants: captured.append(
                (kernel, args, num_warps, constants)
            )
        )
    backend, arch, warp = TARGETS[target]
    records, seen = [], set()
    for dtype, layout, channels, side in sets:
        for case, wanted, thunk in _cases(kernels, dtype, layout, channels, side):
            captured.clear()
            thunk()
            for position, (kernel, args, num_warps, constants) in enumerate(captured):
                source = _source(kernel, args, constants)
                if source.hash() in seen:
                    continue
                seen.add(source.hash())
                compiled = triton.compile(
                    source,
                    target=GPUTarget(backend, arch, warp),
                    options={"num_warps": num_warps * 32 // warp},  # as `launch` does
                )
                if backend == "cuda":
                    found = _read_cuda(compiled.asm["cubin"])
                else:
                    found = _read_hip(compiled.asm["amdgcn"])
                asked = position == 0 and layout == "nhwc"
                records.append(
                    Record(
                        target=target,
                        case=case,
                        kernel=kernel.__name__,
                        dtype=dtype,
                        layout=layout,
                        wide_wanted=wanted if asked else (0, 0),
                        threads=num_warps * 32,
                        shared=compiled.metadata.shared,
                        **found,
                    )
                )
    return records


def _subprocess(code_or_script: list[str]) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code_or_script],
        env=env,
        cwd=Path(__file__).parent,  # not the repository root, where `fastres` is a folder
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_triton_kernels_compile_within_budget(target):
    pytest.importorskip("triton")
    from triton.backends import backends

    if {"cuda": "nvidia", "hip": "amd"}[TARGETS[target][0]] not in backends:
        pytest.skip(f"this Triton build has no backend for {target}: {sorted(backends)}")
    done = _subprocess([str(Path(__file__).resolve()), target])
    assert done.returncode == 0, done.stderr[-4000:]
    records = [Record(**json.loads(line)) for line in done.stdout.splitlines()]
    kernels = {r.kernel for r in records}
    assert len(kernels) >= (13 if target == "sm_90" else 10), sorted(kernels)
    problems = [
        f"{r.kernel} [{r.case}, {r.dtype}, {r.layout}]: {p}" for r in records for p in r.problems()
    ]
    assert not problems, "\n".join(problems)


def test_triton_is_not_imported_with_the_package():
    done = _subprocess(["-c", "import fastres.kernels, sys; print('triton' in sys.modules)"])
    # torch itself may import triton: what counts is what fastres adds to it
    alone = _subprocess(["-c", "import torch, sys; print('triton' in sys.modules)"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == alone.stdout


def test_triton_rejects_cpu_tensors_without_the_interpreter():
    pytest.importorskip("triton")
    code = (
        "import torch; from fastres import kernels\n"
        "a = torch.ones(1, 8, 2, 2)\n"
        "try:\n    kernels.add_relu(a, None, a, a)\n"
        "except RuntimeError as e:\n    print(e)\n"
        "print(a.sum().item())"
    )
    done = _subprocess(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    message, total = done.stdout.splitlines()
    assert "CUDA or HIP tensors" in message and "TRITON_INTERPRET=1" in message and "cpu" in message
    assert float(total) == 32.0


def _table(records: list[Record]) -> str:
    lines = [
        "| kernel | case | dtype | layout | registers | threads | shared (bytes) | spills | "
        "16-byte loads, stores | narrow loads, stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.kernel}` | {r.case} | {r.dtype} | {r.layout} | {r.registers} | {r.threads} "
        f"| {r.shared} | {r.local} | {r.wide[0]}, {r.wide[1]} | {r.narrow[0]}, {r.narrow[1]} |"
        for r in records
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = sys.argv[1]
    found = compile_all(chosen, SETS if chosen == "sm_90" else SETS[:1])
    if "--table" in sys.argv:
        print(_table(found))
    else:
        for record in found:
            print(json.dumps(record.__dict__))
