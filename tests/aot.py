"""Compiles the Triton kernels for GPUs that are not here, and reads the machine code.

    python tests/aot.py --write            # bench/results/aot/: every target, this Triton version
    python tests/aot.py --write sm_90      # one target; what has not changed is not compiled again
    python tests/aot.py --check            # says what of the table is stale, compiles nothing
    python tests/aot.py --some sm_90       # what CI compiles, as JSON, one record a line

The table holds what the budget (`Record.problems`) is about: registers, shared memory, programs an
SM, and which instructions load, store and multiply (tests/aot_read.py reads them)."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import json
import os
import re
import sys
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import aot_read

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Of one program, and of all programs of an SM (CU); CUDA keeps 1 KB a program for itself.
SHARED = {
    "sm_80": (163 << 10, 164 << 10),
    "sm_90": (227 << 10, 228 << 10),
    "sm_100": (227 << 10, 228 << 10),
    "gfx942": (64 << 10, 64 << 10),
}
TABLE = Path(__file__).resolve().parent.parent / "bench/results/aot"


@dataclass(frozen=True)
class Record:
    """One compiled kernel. wide: global accesses of 16 bytes (loads, stores), a copy by descriptor
    (TMA) being one; narrow: all others; narrow_tile: those of `narrow` that move activations,
    weights or gradients, not vectors of the channels, mask bytes or partial sums; local_in_loop:
    accesses to the stack inside the loop of the dots (without dots: any loop); matrix:
    instruction -> count; dots: those that Triton lowers to matrix instructions, and to plain
    FMAs."""

    target: str
    kernel: str
    case: str
    dtype: str
    layout: str
    tile: str
    warps: int
    stages: int
    registers: int
    shared: int
    programs: int  # an SM (CU) holds at once
    local: int  # bytes of stack; on gfx942 with the spilled vector registers
    local_accesses: int
    local_in_loop: int
    wide: tuple[int, int]
    narrow: tuple[int, int]
    narrow_tile: tuple[int, int]
    matrix: dict[str, int]
    dots: tuple[int, int]
    wide_wanted: tuple[int, int] | None
    digest: str

    @property
    def conv(self) -> bool:
        return "_conv_" in self.kernel

    @property
    def grouped(self) -> bool:
        return " groups of " in self.case

    @property
    def odd(self) -> bool:
        """Of channels that are no whole 16 bytes."""
        return self.case.split(" (")[0].endswith(" odd channels")

    @property
    def small(self) -> bool:
        """Whether a tile is so small that it leaves less than 16 bytes a thread to load of the
        second operand (CIFAR's first stage: a weight of 16 x 16 per tap, which stays in the L1), or
        of wgrad that it has fewer rows than wgmma's and tcgen05's 64."""
        if not self.tile or not sum(self.dots):
            return False
        _, n, k = map(int, self.tile.split("x"))
        if self.kernel == "_conv_wgrad_kernel":
            return k < 64
        itemsize = 2 if self.dtype in ("bf16", "fp16") else 4
        return n * k * itemsize < 16 * TARGETS[self.target][2] * self.warps

    @property
    def images(self) -> bool:
        """Of the kernels of few input channels."""
        return "_conv_few_" in self.kernel

    def instructions(self) -> tuple[str, ...]:
        """What a dot should compile to: one of these; none: no matrix unit takes this dtype.

        fp32 without TF32 runs on plain FMAs, on gfx942 on the matrix unit's fp32. wgmma takes TF32
        operands only with the summed dimension contiguous, and tcgen05 alike: Triton transposes
        the others on the way, or uses the older mma.sync. That is used, too, for the few channels
        of a group, or of a small stem, below the 64 rows of wgmma and tcgen05."""
        if self.target == "gfx942":
            return ("v_mfma",)
        if self.dtype == "fp32":
            return ()
        best = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC"}[self.target]
        few = self.grouped or self.images or (self.small and "wgrad" in self.kernel)
        return (best, "HMMA") if self.dtype == "tf32" or few else (best,)

    def _narrow_allowed(self, what: str) -> bool:
        """wgmma and tcgen05 take TF32 operands only as described in `instructions`: Triton copies
        the others 4 bytes a thread, 128 a warp, to transpose them on the way. On gfx942 it stores
        from the layout of the matrix unit, 8 bytes a lane. A group's channels, or an image's, may
        be fewer than 16 bytes, odd ones are no whole 16 bytes, and a weight may be small."""
        if self.grouped or self.odd or (self.images and what == "loads"):  # of 3 channels
            return True
        if self.small and what == "loads":
            return True
        if self.target == "gfx942":
            return what == "stores"
        return self.dtype == "tf32" and self.target != "sm_80" and what == "loads"

    def problems(self) -> list[str]:
        """Where the kernel breaks its budget."""
        out = []
        if self.local or self.local_accesses:
            out.append(
                f"spills: {self.local} bytes of stack, {self.local_accesses} accesses, "
                f"{self.local_in_loop} in the loop"
            )
        if self.shared > SHARED[self.target][0]:
            out.append(f"shared memory {self.shared} > {SHARED[self.target][0]}")
        if self.programs < 1:
            out.append(f"{self.registers} registers x {self.warps} warps do not fit")
        if self.conv:
            accepted = self.instructions()
            wanted = {"_conv_bwd_pointwise_kernel": 2, "_conv_wgrad_finalise_kernel": 0}
            if accepted and (self.dots[0] < wanted.get(self.kernel, 1) or self.dots[1]):
                out.append(f"{self.dots[0]} dots on the matrix unit, {self.dots[1]} on plain FMAs")
            if accepted and self.dots[0] and not self.matrix:
                out.append("no matrix instruction")
            if other := [m for m in self.matrix if not m.startswith(accepted or "none")]:
                out.append(f"{', '.join(other)} where {' or '.join(accepted)} was expected")
            for what, n in zip(("loads", "stores"), self.narrow_tile, strict=True):
                if n and not self._narrow_allowed(what):
                    out.append(f"{n} {what} of activations or weights under 16 bytes")
        for i, what in enumerate(("loads", "stores")) if self.wide_wanted else ():
            if self.wide[i] < self.wide_wanted[i]:
                out.append(f"{self.wide[i]} 16-byte {what}, wanted {self.wide_wanted[i]}")
            # vectors, mask bytes, the partials: few. A tile read element by element has dozens.
            if self.narrow[i] > 8:
                out.append(f"{self.narrow[i]} narrow {what} in an aligned NHWC kernel")
        return out

    @property
    def key(self) -> tuple:
        return self.kernel, self.case, self.dtype, self.layout, self.tile, self.warps, self.stages


# --- compile --------------------------------------------------------------------------------------


def _source(launch):
    """ASTSource as the JIT would specialise these arguments."""
    import torch
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    pointer = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16", "torch.float16": "*fp16"}
    signature, constexprs, attributes = {}, dict(launch.constants), {}
    for position, (name, arg) in enumerate(launch.named().items()):
        special = not launch.kernel.params[position].do_not_specialize
        if isinstance(arg, torch.Tensor):
            signature[name] = pointer.get(str(arg.dtype), "*u8")
        elif isinstance(arg, TensorDescriptor):
            element = pointer[str(arg.base.dtype)][1:]
            block = ",".join(str(v) for v in arg.block_shape)
            signature[name] = f"tensordesc<{element}[{block}]>"
        elif isinstance(arg, float):
            signature[name] = "fp32"
        elif arg is None or (arg == 1 and special):
            constexprs[name] = arg
        else:
            assert isinstance(arg, int) and abs(arg) < 2**31, (name, arg)
            signature[name] = "i32"
        if isinstance(arg, torch.Tensor) or (
            special and isinstance(arg, int) and arg != 1 and arg % 16 == 0
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    signature.update({name: "constexpr" for name in constexprs})
    names = {n: signature[n] for n in launch.kernel.arg_names}
    return ASTSource(launch.kernel, names, constexprs, attributes)


def compiled_of(target: str, launch):
    """(what Triton compiles, the compiled kernel)"""
    import triton
    from triton.backends.compiler import GPUTarget

    backend, _, lanes = TARGETS[target]
    options = {"num_warps": launch.warps * 32 // lanes}  # as `launch` does
    if launch.stages is not None:
        options["num_stages"] = launch.stages
    if launch.maxnreg is not None and backend == "cuda":
        options["maxnreg"] = launch.maxnreg
    source = _source(launch)
    return source, triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def compile_launch(target: str, launch) -> Record:
    """Compile, read, count."""
    _, compiled = compiled_of(target, launch)
    read = aot_read.read_cuda if TARGETS[target][0] == "cuda" else aot_read.read_hip
    found = read(compiled, aot_read.pointers_of(launch.kernel))
    shared = compiled.metadata.shared
    # None and 0: not asked for
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    identity = _identity(target, launch)
    programs = _programs(target, identity["warps"], found["registers"], shared, columns)
    return Record(**identity, shared=shared, programs=programs, **found, wide_wanted=launch.wide)


def _identity(target: str, launch) -> dict:
    c = launch.constants
    tile = [c[b] for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if b in c] if launch.conv else []
    return {
        "target": target,
        "kernel": launch.kernel.__name__,
        "case": launch.case,
        "dtype": launch.dtype,
        "layout": launch.layout,
        "tile": "x".join(map(str, tile)),
        "warps": launch.warps * 32 // TARGETS[target][2],
        "stages": launch.stages or 0,
        "digest": digest(launch),
    }


def _programs(target: str, warps: int, registers: int, shared: int, columns: int) -> int:
    """How many programs an SM (CU) holds at once; 0: not even one."""
    if target == "gfx942":  # 4 SIMDs of 512 registers a lane and 8 waves
        waves = min(8, 512 // max(-(-registers // 8) * 8, 8))
        limits = [4 * waves // warps, SHARED[target][1] // max(shared, 1), 32]
    else:
        one = -(-registers * 32 // 256) * 256 * warps
        limits = [65536 // one, SHARED[target][1] // (shared + 1024), 64 // warps, 32]
        if columns:  # of tensor memory
            limits.append(512 // columns)
    return min(limits)


def digest(launch) -> str:
    """Changes when the kernel would compile to something else: device code (not its comments or
    place), specialisation, tile."""
    source = _source(launch)
    shape = (sorted(source.signature.items()), sorted(map(str, source.constants.items())))
    rest = shape, sorted(source.attrs), launch.warps, launch.stages
    if launch.maxnreg is not None:
        rest += (launch.maxnreg,)
    hashed = _hash_of(launch.kernel).copy()
    hashed.update(repr(rest)[1:].encode())
    return hashed.hexdigest()[:12]


@functools.cache
def _hash_of(kernel):
    """Begun with the device code (some 50 KB), once for all launches of a kernel."""
    return hashlib.sha256(f"({_device_code(kernel)!r}, ".encode())


@functools.cache
def _device_code(kernel) -> str:
    """The syntax of a jitted function and of those it calls."""
    seen: dict[str, str] = {}

    def add(function):
        if function.__name__ in seen:
            return
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]
        if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
            del tree.body[0]
        # alike on every Python: 3.12 adds type parameters, 3.13 leaves out what is empty
        options = {"show_empty": True} if sys.version_info >= (3, 13) else {}
        dumped = ast.dump(tree, **options)
        seen[function.__name__] = dumped.replace(", type_params=[]", "")
        for node in ast.walk(tree):
            called = isinstance(node, ast.Name) and function.fn.__globals__.get(node.id)
            if type(called) is type(kernel):
                add(called)

    add(kernel)
    return repr(sorted(seen.items()))


# --- the table ------------------------------------------------------------------------------------

_COLUMNS = [
    "kernel", "case", "dtype", "layout", "tile", "warps", "stages", "registers", "shared",
    "programs", "local", "local_accesses", "local_in_loop", "wide", "narrow", "narrow_tile",
    "matrix", "dots", "wide_wanted", "digest",
]  # fmt: skip


def triton_version() -> str:
    import triton

    return triton.__version__


def path_of(target: str, version: str | None = None) -> Path:
    return TABLE / f"triton-{version or triton_version()}-{target}.json"


def write_table(path: Path, target: str, records: list[Record]) -> None:
    head = {"triton": triton_version(), "target": target, "columns": _COLUMNS}
    rows = [json.dumps([getattr(r, c) for c in _COLUMNS]) for r in records]
    text = json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def from_dict(row: dict) -> Record:
    """A Record from JSON, whose lists were tuples."""
    return Record(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


def read_table(path: Path) -> list[Record]:
    if not path.exists():
        return []
    table = json.loads(path.read_text())
    if table["columns"] != _COLUMNS:  # of another time
        return []
    return [
        from_dict(dict(zip(_COLUMNS, row, strict=True), target=table["target"]))
        for row in table["rows"]
    ]


def summary(records: list[Record]) -> str:
    """One line of docs/triton.md's table."""
    convs = [r for r in records if r.conv and sum(r.dots)]
    spilled = [r for r in records if r.local or r.local_accesses]
    programs = Counter(r.programs for r in convs)
    matrix = {}
    for r in convs:
        kinds = "+".join(r.matrix) or "FMA"
        matrix.setdefault(r.dtype, Counter())[re.sub(r"UTC(\w*)MMA", r"UTC\1MMA", kinds)] += 1
    return " | ".join(
        [
            str(len(records)),
            str(len(spilled)),
            f"{min(r.registers for r in convs)} to {max(r.registers for r in convs)}",
            f"{max(r.shared for r in convs) >> 10} KB",
            ", ".join(f"{n} x {k}" for k, n in sorted(programs.items())),
            "; ".join(
                f"{d}: {', '.join(k for k, _ in m.most_common())}" for d, m in matrix.items()
            ),
        ]
    )


def _launches(which: str, target: str):
    import aot_cases

    return aot_cases.some(target) if which == "some" else aot_cases.everything(target, digest)


def _write(target: str, every: bool) -> list[str]:
    """Bring a target's table up to date; the problems found."""
    path = path_of(target)
    known = {(r.key, r.digest): r for r in ([] if every else read_table(path))}
    records = []
    for launch in _launches("everything", target):
        i = _identity(target, launch)
        fields = ("kernel", "case", "dtype", "layout", "tile", "warps", "stages")
        record = known.get((tuple(i[f] for f in fields), i["digest"]))
        if record is None:
            record = compile_launch(target, launch)
            print(f"{target} {len(records)} {record.kernel} {record.case}", file=sys.stderr)
        records.append(record)
        if len(records) % 20 == 0:
            write_table(path, target, records + [r for r in known.values() if r not in records])
    write_table(path, target, records)
    print(f"| {target} | {summary(records)} |")
    return [f"{r.target} {r.kernel} [{r.case}, {r.dtype}, {r.tile}]: {p}"
            for r in records for p in r.problems()]  # fmt: skip


def _check(target: str) -> list[str]:
    """What of a target's table is stale."""
    path = path_of(target)
    if not path.exists():
        return [f"{path.name} is missing"]
    have = {(*r.key, r.digest) for r in read_table(path)}
    want = {(*_key(_identity(target, x)),) for x in _launches("everything", target)}
    return [
        f"{path.name}: {len(rows)} rows {what}, first: {' '.join(map(str, min(rows)))}"
        for what, rows in (("are missing or changed", want - have), ("no longer run", have - want))
        if rows
    ]


def _key(i: dict) -> tuple:
    fields = ("kernel", "case", "dtype", "layout", "tile", "warps", "stages", "digest")
    return tuple(i[f] for f in fields)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="regenerate the committed table")
    what.add_argument("--check", action="store_true", help="is the committed table up to date")
    what.add_argument("--some", action="store_true", help="compile what CI compiles")
    what.add_argument("--everything", action="store_true", help="compile all, write nothing")
    parser.add_argument("--all", action="store_true", help="with --write: compile unchanged rows")
    parser.add_argument("targets", nargs="*", default=[], metavar="target", help=", ".join(TARGETS))
    options = parser.parse_args()
    problems = []
    for target in options.targets or TARGETS:
        if options.write:
            problems += _write(target, options.all)
        elif options.check:
            problems += _check(target)
        else:
            for launch in _launches("some" if options.some else "everything", target):
                print(json.dumps(asdict(compile_launch(target, launch))), flush=True)
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: triton.jit would make interpreted functions")
    sys.exit(main())
