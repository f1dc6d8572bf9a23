"""Reads the machine code of a compiled Triton kernel, for tests/aot.py: registers, stack, accesses
and what they move, matrix instructions. Accesses and tensor-core instructions are traced to the
source line they come from, through inlining, by the debug information."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path


def pointers_of(kernel) -> dict[tuple[str, int], str]:
    """(file name, line) -> "function:pointer argument" of the load or store there, in the kernel's
    own file and those of the functions that all share."""
    path = Path(inspect.getsourcefile(kernel.fn))
    return {k: v for p in ("_conv.py", "_tile.py", path.name) for k, v in _of(path.parent / p)}


@functools.cache
def _of(path: Path) -> list[tuple[tuple[str, int], str]]:
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        assigned: dict[str, list[ast.Assign]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node)

        def names(node, line, assigned=assigned):
            for n in ast.walk(node):
                if not isinstance(n, ast.Name):
                    continue
                if n.id.endswith("ptr"):
                    yield n.id
                else:  # the last assignment before the line
                    before = [a for a in assigned.get(n.id, []) if a.lineno < line]
                    if before:
                        yield from names(before[-1].value, before[-1].lineno)

        accesses = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store")
        ]
        for node in accesses:
            what = f"{function.name}:{next(iter(names(node.args[0], node.lineno)), '?')}"
            # in a helper with one load, its return has the load's name, too
            span = function if len(accesses) == 1 else node
            found += [((path.name, i), what) for i in range(span.lineno, span.end_lineno + 1)]
    return found


# Of these no tile of activations or weights is made: vectors of the channels, the bits of a ReLU,
# partial sums, and the fp32 partials of dw, which are written once a program.
_SMALL = ("load_vector:", "load_gate:", "zmask_ptr", "part_ptr", "finalise_kernel:")


def _is_tile(frames: list[tuple[str, int]], pointers: dict) -> bool:
    """Whether an access whose source lines are `frames`, innermost first, moves a tile. What cannot
    be told counts as one."""
    what = next((pointers[f] for f in frames if f in pointers), "?")
    return not any(word in what for word in _SMALL)


def _count(instructions, wide: str, pointers: dict) -> tuple[int, int, int]:
    """(16-byte, other, other of tiles) of (text, frames)."""
    counted = [0, 0, 0]
    for text, frames in instructions:
        narrow = not re.search(wide, text)
        counted[narrow] += 1
        counted[2] += narrow and _is_tile(frames, pointers)
    return tuple(counted)


def _found(instructions, loads, stores, wide, matrix, pointers, compiled) -> dict:
    """The fields of a Record from [(instruction, frames)]."""
    accesses = [
        _count([i for i in instructions if re.match(kind, i[0])], wide, pointers)
        for kind in (loads, stores)
    ]
    mma = Counter(m[0] for m in (re.match(matrix, text) for text, _ in instructions) if m)
    return {
        "wide": tuple(a[0] for a in accesses),
        "narrow": tuple(a[1] for a in accesses),
        "narrow_tile": tuple(a[2] for a in accesses),
        "matrix": dict(sorted(mma.items())),
        "dots": _dots(compiled.asm["ttgir"]),
    }


def _dots(ttgir: str) -> tuple[int, int]:
    """Dots that Triton lowers to matrix instructions, and those it makes of plain FMAs."""
    matrix = len(re.findall(r"= ttng\.warp_group_dot |ttng\.tc_gen5_mma ", ttgir))
    layouts = re.findall(r"= tt\.dot .*-> tensor<[^>]*, (#\w+)>", ttgir)
    own = [layout for layout in layouts if re.match(r"#(mma|linear)", layout)]
    return matrix + len(own), len(layouts) - len(own)


def _in_loop(local: list[int], instructions, labels, jumps, matrix: str) -> int:
    """How many of the instructions `local` are in the innermost loops around matrix instructions,
    or in any loop where there are none."""
    loops = [(labels[to], at) for at, to in jumps if to in labels and labels[to] < at]
    mma = [i for i, (op, _) in enumerate(instructions) if re.match(matrix, op)]
    around = [[(a, b) for a, b in loops if a <= i < b] for i in mma]
    main = {min(found, key=lambda r: r[1] - r[0]) for found in around if found}
    return sum(any(a <= i < b for a, b in (main if mma else loops)) for i in local)


def read_cuda(compiled, pointers) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def run(*command):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            command = [tools / command[0], *command[1:], f.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = run("cuobjdump", "-res-usage")
    registers, stack = re.search(r"REG:(\d+).*?STACK:(\d+)", usage, re.S).groups()
    instructions, frames, annotated, labels, jumps = [], [], False, {}, []
    for line in run("nvdisasm", "-gi", "-c").splitlines():
        if place := re.search(r'//## File "([^"]+)", line (\d+)', line):
            # innermost first, one line a frame
            frames = [*frames, _place(place)] if annotated else [_place(place)]
            annotated = True
        elif op := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\S*)", line):
            instructions.append((op[1], frames))
            annotated = False
            if target := re.search(r"BRA.*`\((\S+)\)", line):
                jumps.append((len(instructions), target[1]))
        elif label := re.match(r"(\.L\S*):", line):
            labels[label[1]] = len(instructions)
    matrix = r"HGMMA|HMMA|UTC\w*MMA"
    local = [i for i, (op, _) in enumerate(instructions) if op.startswith(("LDL", "STL"))]
    return {
        "registers": int(registers),
        "local": int(stack),
        "local_accesses": len(local),
        "local_in_loop": _in_loop(local, instructions, labels, jumps, matrix),
        **_found(
            instructions, r"LDG\.|LDGSTS|UTMALDG", r"STG|UTMASTG", r"\.128|UTMA",
            matrix, pointers, compiled,
        ),
    }  # fmt: skip


def _place(match: re.Match) -> tuple[str, int]:
    return Path(match[1]).name, int(match[2])


def read_hip(compiled, pointers) -> dict:
    asm = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", asm).group(1))

    instructions, frames, labels, jumps = [], [], {}, []
    for line in asm.splitlines():
        if re.match(r"\s+\.loc\s", line):
            chain = line.partition(";")[2]
            frames = [(m[1], int(m[2])) for m in re.finditer(r"([\w.]+\.py):(\d+):", chain)]
        elif op := re.match(r"\s+([a-z]\w+)", line):
            instructions.append((op[1], frames))
            if target := re.match(r"\s+s_c?branch\w*\s+(\.LBB\w+)", line):
                jumps.append((len(instructions), target[1]))
        elif label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
    scratch = [i for i, (op, _) in enumerate(instructions) if re.match("scratch_(load|store)", op)]
    return {
        "registers": field("vgpr_count"),
        # Spilled scalar registers go to lanes of a vector register, not to memory.
        "local": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "local_accesses": len(scratch),
        "local_in_loop": _in_loop(scratch, instructions, labels, jumps, "v_mfma"),
        **_found(
            instructions, r"(global|buffer)_load_", r"(global|buffer)_store_", r"dwordx4",
            r"v_mfma", pointers, compiled,
        ),
    }  # fmt: skip
