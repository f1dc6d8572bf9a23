"""Reads the machine code of the CUDA C++ kernels in the built fastres._C.

    python tests/cuda_sass.py           # the table of the installed module
    python tests/cuda_sass.py --write   # into bench/results/cuda/nvcc-X.Y.json

The budget (`problems`): no stack, no local memory, registers for two blocks an SM, and in the
kernels of 8-element units 16-byte accesses to the activations. The pointwise convolutions have one
block of 384 threads an SM, wgmma and the copy engine; on other archs than sm_90a they are empty.
The convolutions on CUTLASS's collectives likewise, for sm_90a alone, and with the registers handed
from the warps that load to those that multiply (USETMAXREG). Both wait for several wgmmas at once:
a wait for each means that ptxas serialised them (its note C7514). For each pointwise conv of
ResNet-50 the table has the ring that its launch will have."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import pointwise_model  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "cuda"
ARCHS = ("sm_80", "sm_90a", "sm_100a")
COLUMNS = ("arch", "kernel", "dtype", "lanes", "dual", "registers", "stack", "local", "shared",
           "wide_loads", "wide_stores", "half_loads", "half_stores", "local_accesses",
           "wgmma", "copies", "setmaxnreg", "wide_stage", "waits")  # fmt: skip
# of a pointwise conv of ResNet-50: tile, ring, dynamic shared memory
LAYER_COLUMNS = ("pass", "C", "K", "H", "columns", "stages", "shared", "resident", "blocks")
DTYPES = {"f": "fp32", "NS0_4BF16E": "bf16", "NS0_3F16E": "fp16"}
NAME = re.compile(r"\d+([a-z_]+_kernel)(?:I(f|NS0_4BF16E|NS0_3F16E)(?:Li(\d+)E)?(?:L[bi](\d)E)?E)?")
CONV = re.compile(
    r"conv_kernelINS0_\d+([A-Z]\w+?)EpilogueELNS0_8ConvPassE(\d)ENS0_(4BF16|3F16)ELi(\d+)ELi(\d+)E"
)
PASSES = ("fprop", "dgrad", "wgrad")
CONVS = ("conv_fprop stats", "conv_fprop act", "conv_dgrad gradient", "conv_wgrad partial")
CONV_ARCH = "sm_90a"
CONV_REGISTERS = 168  # of a thread at the launch: 65,536 over three warpgroups
REGISTERS = 128  # 65,536 of an SM over two blocks of 256 threads
SHARED = 48 << 10  # of a block without asking for more
MOST_SHARED = 227 << 10
POINTWISE = 168  # registers at launch: 65,536 over 384 threads; setmaxnreg gives consumers 232
# Four wgmmas for each of the two buffers of fragments, the copies that keep a ring full, and the
# 16-byte stores of an epilogue (wgrad stores fragments, 8 bytes a lane).
FORMS = ("", " block", " act")
WGMMA = {
    "pointwise_fprop_kernel": (8, 3, 4),
    "pointwise_fprop_kernel block": (8, 4, 4),
    "pointwise_fprop_kernel act": (8, 3, 4),
    "pointwise_dgrad_kernel": (8, 3, 4),
    "pointwise_wgrad_kernel": (8, 3, 0),
}

# 16-byte loads and stores in flight of an 8-element kernel, by tensors x 64 bytes (bn_apply dual
# and the backward passes: 32 bytes a tensor; the statistics: 128); the pool's are of one unit.
WIDE = {
    "add_relu_kernel": (8, 4),
    "relu_bwd_kernel": (8, 4),
    "bn_apply_kernel": (8, 4),
    "bn_apply_kernel dual": (4, 2),
    "bn_stats_kernel": (8, 0),
    "bn_bwd_reduce_kernel": (8, 0),
    "bn_bwd_reduce_kernel dual": (6, 0),
    "bn_bwd_apply_kernel": (4, 4),
    "bn_bwd_apply_kernel dual": (6, 4),
    "bn_relu_maxpool_kernel": (9, 1),
    "bn_relu_maxpool_bwd_reduce_kernel": (5, 0),
    "bn_relu_maxpool_bwd_apply_kernel": (5, 1),
}
# of a conv's epilogue: the residual's 4 rows in flight; dres, y and the shortcut's likewise; 8 rows
# are stored, or the 4 in flight; dw's partials are fp32, two stores each
CONV_WIDE = {
    "conv_fprop stats": (0, 8),
    "conv_fprop act": (4, 4),
    "conv_dgrad gradient": (12, 4),
    "conv_wgrad partial": (0, 8),
}


def cuobjdump() -> str | None:
    """Triton's package carries one."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if os.access(path, os.X_OK) else None


def digest() -> str:
    """Of the sources in csrc/cuda and the flags."""
    hashed = hashlib.sha256()
    folder = ROOT / "csrc" / "cuda"
    arguments = ROOT / "csrc" / "cpu" / "blocks.h"  # blocks that the kernels take by value
    for path in sorted([*folder.glob("*.cu*"), *folder.glob("*.h"), arguments]):
        hashed.update(path.name.encode() + path.read_bytes())
    hashed.update("".join(re.findall(r"set\((?:conv_)?flags[^)]*\)", _cmake())).encode())
    return hashed.hexdigest()[:16]


def _cmake() -> str:
    return (ROOT / "csrc" / "cuda" / "build.cmake").read_text()


def _named(mangled: str) -> dict | None:
    if found := CONV.search(mangled):
        epilogue, which, dtype, m, n = found.groups()
        return {"kernel": f"conv_{PASSES[int(which)]} {epilogue.lower()}", "dual": False,
                "dtype": {"4BF16": "bf16", "3F16": "fp16"}[dtype],
                "lanes": int(n)}  # fmt: skip
    found = NAME.search(mangled)
    if found is None:
        return None
    kernel, dtype, lanes, dual = found.groups()
    if kernel == "pointwise_fprop_kernel":
        kernel, dual = kernel + FORMS[int(dual)], None
    return {"kernel": kernel, "dtype": DTYPES.get(dtype or "", "any"), "lanes": int(lanes or 1),
            "dual": dual == "1"}  # fmt: skip


def read(library: Path) -> list[dict]:
    """One row for each kernel and arch in the library."""
    tool = cuobjdump()
    assert tool is not None

    def output(option: str) -> list[str]:
        done = subprocess.run([tool, option, str(library)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    rows: dict[tuple[str, str], dict] = {}
    arch, name = "", ""
    for line in output("-res-usage"):
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif "REG:" in line and (about := _named(name)):
            usage = {k: int(v) for k, v in re.findall(r"(\w+(?:\[0\])?):(\d+)", line)}
            rows[arch, name] = dict.fromkeys(COLUMNS, 0) | {
                "arch": arch, **about, "registers": usage["REG"], "stack": usage["STACK"],
                "local": usage["LOCAL"], "shared": usage["SHARED"],
            }  # fmt: skip
    row = None
    for line in output("-sass"):
        if found := re.search(r"(?:arch = |code for )(sm_\w+)", line):
            # CUDA 12.8's says "arch = sm_100a", then "code for sm_100"
            arch = arch if arch.startswith(found[1]) else found[1]
        elif found := re.search(r"Function : (\w+)", line):
            row = rows.get((arch, found[1]))
        elif row is not None and (found := re.search(r"\b(HGMMA|UTMALDG|USETMAXREG)", line)):
            column = {"HGMMA": "wgmma", "UTMALDG": "copies", "USETMAXREG": "setmaxnreg"}
            if found[1] != "USETMAXREG" or row["kernel"] in CONVS:
                row[column[found[1]]] += 1
        elif row is not None and "WARPGROUP.DEPBAR" in line:
            row["waits"] += 1
        elif row is not None and re.search(r"\bLDS\.128", line):
            row["wide_stage"] += row["kernel"] in CONVS
        elif row is not None and (found := re.search(r"\b(LDG|STG|LDL|STL)(\.[\w.]+)?", line)):
            kind, width = found[1], found[2] or ""
            if kind in ("LDL", "STL"):
                row["local_accesses"] += 1
                continue
            what = "loads" if kind == "LDG" else "stores"
            if ".128" in width:
                row[f"wide_{what}"] += 1
            elif ".U16" in width or ".S16" in width:
                row[f"half_{what}"] += 1
    return sorted(rows.values(), key=lambda r: [str(r[c]) for c in COLUMNS[:5]])


def layers(native) -> list[list]:
    """Of the pointwise convs of ResNet-50, batch 256, by LAYER_COLUMNS; no device is needed."""
    rows = []
    for c, k, h in pointwise_model.LAYERS:
        m = pointwise_model.BATCH * h * h
        for name, s in {
            "fprop": native.pointwise_fprop_shape(0, m, c, k),
            "fprop block": native.pointwise_fprop_shape(1, m, c, k),
            "fprop act": native.pointwise_fprop_shape(2, m, c, k),
            "dgrad": native.pointwise_dgrad_shape(m, c, k),
            "wgrad": native.pointwise_wgrad_shape(m, c, k),
        }.items():
            rows.append([name, c, k, h, *(s[v] for v in LAYER_COLUMNS[4:])])
    return rows


def problems(row: dict) -> list[str]:
    """Where a kernel breaks its budget."""
    out = []
    if row["stack"] or row["local"] or row["local_accesses"]:
        out.append(f"stack {row['stack']}, local {row['local']}, {row['local_accesses']} accesses")
    if row["wgmma"] and row["waits"] >= row["wgmma"]:
        out.append(f"{row['waits']} waits for {row['wgmma']} wgmma: serialised")
    if row["kernel"] in CONVS:
        return out + _conv_problems(row)
    most = POINTWISE if row["kernel"] in WGMMA else REGISTERS
    if row["registers"] > most:
        out.append(f"{row['registers']} registers > {most}")
    if row["kernel"] in WGMMA and row["arch"] == "sm_90a":
        want = WGMMA[row["kernel"]]
        for what, n in zip(("wgmma", "copies", "wide_stores"), want, strict=True):
            if row[what] < n:
                out.append(f"{row[what]} {what}, wanted {n}")
    if row["shared"] > SHARED:
        out.append(f"shared memory {row['shared']} > {SHARED}")
    if row["lanes"] == 8:
        want = WIDE[row["kernel"] + (" dual" if row["dual"] else "")]
        for what, n in zip(("loads", "stores"), want, strict=True):
            if row[f"wide_{what}"] < n:
                out.append(f"{row[f'wide_{what}']} 16-byte {what}, wanted {n}")
        # the statistics' shift is one value
        if row["half_loads"] > (row["kernel"] == "bn_stats_kernel") or row["half_stores"]:
            out.append(f"{row['half_loads']} 2-byte loads, {row['half_stores']} 2-byte stores")
    elif "finalise" not in row["kernel"] and row["dtype"] == "any":
        out.append("no dtype in its name")
    return out


def _conv_problems(row: dict) -> list[str]:
    out = []
    if row["arch"] != CONV_ARCH:
        out.append(f"compiled for {row['arch']}")
    if row["registers"] > CONV_REGISTERS:
        out.append(f"{row['registers']} registers > {CONV_REGISTERS}")
    # 64 deep in steps of 16, in the loop and before it; 256 tall: two to a warpgroup
    tall = 2 if row["lanes"] == 64 and row["kernel"] != "conv_wgrad partial" else 1
    if row["wgmma"] < 8 * tall:
        out.append(f"{row['wgmma']} HGMMA, wanted {8 * tall}")
    if row["copies"] < 2:
        out.append(f"{row['copies']} UTMALDG, wanted one for each operand")
    if row["setmaxnreg"] != 2:
        out.append(f"{row['setmaxnreg']} USETMAXREG, wanted 2: the compiler ignored setmaxnreg")
    if row["wide_stage"] < 8:
        out.append(f"{row['wide_stage']} 16-byte loads from the stage, wanted 8")
    for what, n in zip(("loads", "stores"), CONV_WIDE[row["kernel"]], strict=True):
        if row[f"wide_{what}"] < n:
            out.append(f"{row[f'wide_{what}']} 16-byte {what}, wanted {n}")
    if row["half_loads"] or row["half_stores"]:
        out.append(f"{row['half_loads']} 2-byte loads, {row['half_stores']} 2-byte stores")
    return out


def installed() -> Path | None:
    spec = importlib.util.find_spec("fastres._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def table(rows: list[dict], nvcc: str, native) -> str:
    head = json.dumps({"nvcc": nvcc, "digest": digest(), "columns": COLUMNS})
    body = ",\n".join(json.dumps([row[c] for c in COLUMNS]) for row in rows)
    rings = ",\n".join(map(json.dumps, layers(native)))
    return (
        f'{head[:-1]}, "rows": [\n{body}\n],\n'
        f'"layer_columns": {json.dumps(LAYER_COLUMNS)}, "layers": [\n{rings}\n]}}\n'
    )


def committed() -> dict:
    """The newest table."""
    content = json.loads(sorted(RESULTS.glob("nvcc-*.json"))[-1].read_text())
    content["rows"] = [dict(zip(content["columns"], r, strict=True)) for r in content["rows"]]
    return content


def main() -> int:
    from fastres import _native

    build = (_native.build_info() or {}).get("cuda")
    library = installed()
    if build is None or library is None:
        print("fastres._C has no CUDA kernels", file=sys.stderr)
        return 1
    rows = read(library)
    for row in rows:
        flag = " ".join(problems(row))
        print(*(row[c] for c in COLUMNS), flag)
    if "--write" in sys.argv:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"nvcc-{build['nvcc']}.json").write_text(
            table(rows, build["nvcc"], _native.module().cuda)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
