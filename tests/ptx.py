"""Which bytes of global memory a compiled kernel loads and stores: its PTX, evaluated.

    run(text, grid, params, touch)

Of the PTX only what decides addresses, predicates and branches is evaluated, for every thread of
every program of the grid, loop trip by loop trip; data (what a load returns, floating point) is
not. An address or a branch that depends on data, or on an instruction unknown here, is an error,
never a guess.

Registers are numpy arrays that broadcast to (programs, threads): what all threads share has one
column. Programs and threads part and meet again at branches: of the blocks that threads wait at the
first in the text runs next, under a mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LANES = 32


@dataclass(frozen=True)
class Descriptor:
    """A 2-d tensor map (TMA): what one copy moves is `box` of it, cut off at its borders."""

    base: int
    shape: tuple[int, int]
    strides: tuple[int, int]  # elements
    box: tuple[int, int]
    itemsize: int


# touch(kind, addresses, width): "load" or "store" of `width` bytes at each address
Touch = Callable[[str, np.ndarray, int], None]


_LOCAL = ("shared", "param")  # state spaces that are not memory
_REFUSED = ("atom", "red", "prefetch", "prefetchu", "multimem", "brx", "call", "exit", "trap")


@dataclass(frozen=True)
class Instruction:
    guard: str | None  # register of the predicate
    negated: bool
    op: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    def access(self) -> str | None:
        """ "load" or "store", of global memory."""
        words = self.op.split(".")
        if words[0] in ("ld", "ldu") and "global" in words:
            return "load"
        if words[0] == "st" and "global" in words:
            return "store"
        if self.op.startswith("cp.async.") and "global" in self.op:
            # destination first, as everywhere
            return "store" if self.op.find("global") < self.op.find("shared") else "load"
        generic = words[0] in ("ld", "st") and words[1].partition("::")[0] not in _LOCAL
        if words[0] in _REFUSED or generic or self.op.startswith("cp.reduce"):
            raise NotImplementedError(f"PTX: {self.op}")
        return None

    def width(self) -> int:
        """Bytes that an access of one thread moves."""
        if self.name == "cp":
            return int(self.operands[2], 0)
        vector = re.search(r"\.v(\d)", self.op)
        return int(re.search(r"\.[bsuf](\d+)$", self.op)[1]) // 8 * int(vector[1] if vector else 1)

    def defines(self) -> list[str]:
        if self.name in ("bra", "bar", "barrier") or not self.operands:
            return []
        return [] if self.operands[0].startswith("[") else _registers(self.operands[0])

    def uses(self) -> list[str]:
        """What its result depends on; of an access what decides which bytes it moves."""
        guard = [self.guard] if self.guard else []
        if (kind := self.access()) is not None:
            if self.op.startswith("cp.async.bulk"):
                where = self.operands[1 if kind == "load" else 0]
            elif self.name == "cp":  # cp.async: bytes beyond the source's are zeros
                where = ",".join(self.operands[1:])
            else:
                where = self.operands[1 if kind == "load" else 0]
            return guard + _registers(where)
        if self.name == "mbarrier":
            return guard
        return guard + _registers(",".join(self.operands[1:]))


def _registers(text: str) -> list[str]:
    return re.findall(r"%(?!tid|ntid|ctaid|nctaid|laneid|warpid)[\w#]+", text)


@dataclass
class Program:
    """A kernel's parameters, threads of a program, and basic blocks."""

    params: list[str]  # names
    pointers: list[bool]
    threads: int
    blocks: list[list[Instruction]]
    at: dict[str, int]  # label -> block


def parse(text: str) -> Program:
    head = re.search(
        r"\.visible \.entry \w+\((.*?)\)\s*(.*?)\n\{\n(.*?)\n\$L__func_end0:", text, re.S
    )
    if head is None:
        raise ValueError("no kernel in this PTX")
    declared = [line.strip().rstrip(",") for line in head[1].strip().splitlines()]
    params = [re.search(r"(\w+)(\[\d+\])?$", d)[1] for d in declared]
    threads = int(re.search(r"\.reqntid (\d+)", head[2])[1])
    blocks: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}
    scopes, opened = [""], 0  # of inline assembly: names of its own
    own: dict[str, set[str]] = {"": set()}

    def local(name: str) -> str:
        return next((name + s for s in reversed(scopes) if name in own[s]), name)

    # labels of a scope may be used before they are met
    lines = [re.sub(r"//.*", "", line).strip() for line in head[3].splitlines()]
    lines = [s for line in lines for s in re.findall(r"^[{}]|[^;]+;|[^;]+$", line)]
    lines = [s.strip() for s in lines if s.strip()]
    for i, line in enumerate(lines):
        if line == "{":
            opened += 1
            scopes.append(f"#{opened}")
            own[scopes[-1]] = set()
            depth = 1
            for inner in lines[i + 1 :]:
                depth += (inner == "{") - (inner == "}")
                if depth == 0:
                    break
                if m := re.match(r"\.reg \.\w+ (.*);|(\w+):$", inner) if depth == 1 else None:
                    own[scopes[-1]] |= {n.strip() for n in (m[1] or m[2]).split(",")}
        elif line == "}":
            scopes.pop()
        elif line.startswith("$L__tmp"):  # of the debug information
            continue
        elif m := re.match(r"([\w$]+):$", line):
            blocks.append([])
            at[local(m[1])] = len(blocks) - 1
        elif not line.startswith("."):
            m = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*?);?$", line, re.S)
            rest = re.sub(r"[%$\w]+", lambda n: _name(local(n[0])), m[4])
            guard = m[2] and _name(local(m[2]))
            operands = tuple(_split(rest))
            blocks[-1].append(Instruction(guard, bool(m[1]), m[3], operands))
            if m[3].split(".")[0] in ("bra", "ret"):
                blocks.append([])
    return Program(params, [".ptr" in d for d in declared], threads, blocks, at)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    out, depth = [""], 0
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            out.append("")
        else:
            out[-1] += c
    return [o.strip() for o in out if o.strip()]


def _name(text: str) -> str:
    """Registers of a scope as %name#scope, so that all registers begin with %."""
    return f"%{text}" if "#" in text and not text.startswith("%") else text


def _slice(blocks: list[list[Instruction]]) -> list[list[Instruction]]:
    """Without what no access, predicate or branch depends on."""
    every = [i for block in blocks for i in block]
    made: dict[str, list[Instruction]] = {}
    for i in every:
        for r in i.defines():
            made.setdefault(r, []).append(i)
    kept = {id(i): i for i in every if i.name in ("bra", "ret") or i.access()}
    todo, seen = [r for i in kept.values() for r in i.uses()], set()
    while todo:
        r = todo.pop()
        if r in seen:
            continue
        seen.add(r)
        for i in made.get(r, []):
            if id(i) not in kept:
                kept[id(i)] = i
                todo += i.uses()
    return [[i for i in block if id(i) in kept] for block in blocks]


# --- evaluation -----------------------------------------------------------------------------------


def _signed(v, bits: int):
    if bits == 64:
        return v
    half = 1 << (bits - 1)
    return ((v + half) & (2 * half - 1)) - half


def _low(v, bits: int):
    """The register: unsigned below 64 bits."""
    return v if bits == 64 else v & ((1 << bits) - 1)


def _quotient(a, b):
    """C's division: towards zero."""
    b = np.where(b == 0, 1, b)
    return np.where((a < 0) != (b < 0), -(abs(a) // abs(b)), abs(a) // abs(b))


def _field(v, at, length, signed: bool):
    field = (v >> at) & ((1 << length) - 1)
    return field - ((field >> np.maximum(length - 1, 0)) << length) if signed else field


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_TWO = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum, "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}  # fmt: skip
_ONE = {"neg": np.negative, "not": np.invert, "abs": np.abs}
_LOGIC = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
}  # fmt: skip


class _Run:
    def __init__(self, program: Program, grid: int, params: list, touch: Touch) -> None:
        given, names = len(params), program.params
        # behind the kernel's own come Triton's scratch buffers, which it uses for nothing here
        if given > len(names) or not all(program.pointers[given:]) or len(names) - given > 2:
            raise ValueError(f"{given} arguments for PTX with parameters {names}")
        self.params = dict(zip(names, params, strict=False))
        self.program, self.grid, self.touch = program, grid, touch
        self.registers: dict[str, np.ndarray] = {}
        # register -> threads in which it holds what is not evaluated, and why. No error until one
        # reads it: LLVM gives one register to values of several kinds in turn.
        self.unknown: dict[str, tuple[np.ndarray, str]] = {}
        self.here = np.ones((1, 1), bool)  # threads that run the present block
        thread = np.arange(program.threads)[None, :]
        zero = np.zeros((1, 1), np.int64)
        self.special = {
            "%tid.x": thread, "%laneid": thread % LANES, "%warpid": thread // LANES,
            "%ntid.x": zero + program.threads, "%ctaid.x": np.arange(grid)[:, None],
            "%nctaid.x": zero + grid, "%tid.y": zero, "%tid.z": zero, "%ctaid.y": zero,
            "%ctaid.z": zero,
        }  # fmt: skip

    def run(self) -> None:
        blocks = _slice(self.program.blocks)
        where = np.zeros((1, 1), np.int64)  # the block that each thread is about to run
        while (block := int(where.min())) < len(blocks):
            if (where == where[:, :1]).all():
                where = where[:, :1]
            here = where == block
            self.here = here = np.ones((1, 1), bool) if here.all() else here
            following = block + 1
            for i in blocks[block]:
                if i.name == "bra":
                    to = self.program.at[i.operands[0].lstrip("%")]
                    following = np.where(self.guard(i), to, block + 1)
                elif i.name == "ret":
                    following = np.where(self.guard(i), len(blocks), block + 1)
                elif kind := i.access():
                    self.access(i, kind, here & self.guard(i))
                else:
                    self.set(i)
            where = np.where(here, following, where)

    def guard(self, i: Instruction) -> np.ndarray:
        if i.guard is None:
            return np.ones((1, 1), bool)
        return ~self.value(i.guard) if i.negated else self.value(i.guard)

    def value(self, text: str, bits: int = 32, signed: bool = False) -> np.ndarray:
        """An operand."""
        if text.startswith("%"):
            v = self.special[text] if text in self.special else self.registers.get(text)
            if v is None:
                raise NotImplementedError(f"PTX: {text} is read before it is written")
            where, why = self.unknown.get(text, (None, ""))
            if where is not None and (where & self.here).any():
                raise NotImplementedError(why)
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            n = int(text.rstrip("U"), 0)
            v = np.full((1, 1), _low(n, bits) if bits < 64 else (n + 2**63) % 2**64 - 2**63)
        elif text == "global_smem":
            v = np.zeros((1, 1), np.int64)
        elif text in self.params:  # the address of a descriptor
            v = np.full((1, 1), -1 - list(self.params).index(text))
        else:
            raise NotImplementedError(f"PTX: operand {text}")
        if v.dtype == bool:
            return v
        return _signed(v, bits) if signed else _low(v, bits)

    def address(self, text: str) -> np.ndarray:
        """[ register + offset ]"""
        base, _, offset = text.strip("[] ").partition("+")
        return self.value(base.strip(), 64) + int(offset.strip() or 0)

    # 1. what an access moves
    def access(self, i: Instruction, kind: str, active: np.ndarray) -> None:
        if i.op.startswith("cp.async.bulk"):
            self.copy(i, kind, active)
            return
        width = i.width()
        if i.name == "cp":
            if len(i.operands) > 3:
                size = self.value(i.operands[3])
                if not np.isin(size, (0, width)).all():
                    raise NotImplementedError(f"PTX: {i.op} of a part of {width} bytes")
                active = active & (size > 0)
            where = i.operands[1]
        else:
            where = i.operands[0 if kind == "store" else 1]
        at, active = np.broadcast_arrays(self.address(where), active)
        self.touch(kind, at[active], width)
        self.forget(i, f"PTX: an address depends on what {i.op} loads")

    def copy(self, i: Instruction, kind: str, active: np.ndarray) -> None:
        if ".tensor.2d." not in i.op or kind != "load":
            raise NotImplementedError(f"PTX: {i.op}")
        m = re.fullmatch(r"\[(\S+), \{(\S+), (\S+)\}\]", i.operands[1])
        handles = self.value(m[1], 64)
        if (handles != handles.flat[0]).any():
            raise NotImplementedError("PTX: a copy from one of several descriptors")
        d = list(self.params.values())[-1 - int(handles.flat[0])]
        col, row = (self.value(m[k], 32, True) for k in (2, 3))
        row, col, active = np.broadcast_arrays(row, col, active)
        for r, c in zip(row[active], col[active], strict=True):
            rows = np.arange(max(r, 0), min(r + d.box[0], d.shape[0]))
            cols = np.arange(max(c, 0), min(c + d.box[1], d.shape[1]))
            at = rows[:, None] * d.strides[0] + cols[None, :] * d.strides[1]
            self.touch(kind, d.base + at.ravel() * d.itemsize, d.itemsize)

    # 2. everything else
    def forget(self, i: Instruction, why: str) -> None:
        for register in i.defines():
            self.registers.setdefault(register, np.zeros((1, 1), np.int64))
            before, _ = self.unknown.get(register, (False, ""))
            self.unknown[register] = before | self.here, why

    def set(self, i: Instruction) -> None:
        try:
            active = self.here & self.guard(i)
            results = self.result(i)
        except NotImplementedError as why:
            self.forget(i, str(why))
            return
        for register, new in zip(i.defines(), results, strict=True):
            if not active.all():
                new = np.where(
                    active, new, self.registers.get(register, np.zeros_like(new[:1, :1]))
                )
            self.registers[register] = new
            if register in self.unknown:
                where, why = self.unknown.pop(register)
                if (where := where & ~active).any():
                    self.unknown[register] = where, why

    def result(self, i: Instruction) -> list[np.ndarray]:
        words, o = i.op.split("."), i.operands
        name, kind = words[0], words[-1]
        refused = NotImplementedError(f"PTX: an address or a branch depends on {i.op}")
        if name == "elect":  # the first of each warp, as all of it gets there together
            first = [np.zeros((1, 1), np.int64), self.special["%laneid"] == 0]
            return first[-len(_registers(o[0])) :]
        if name == "mbarrier" and words[1] in ("try_wait", "test_wait"):
            return [np.ones((1, 1), bool)]
        if name == "ld":
            if words[1] != "param":
                raise refused
            return [np.full((1, 1), int(self.params[o[1].strip("[]")]))]
        if name == "cvta":
            return [self.value(o[1], 64)]
        if kind == "pred":
            return [self.logic(name, [self.value(x, 1) != 0 for x in o[1:]], refused)]
        if not re.fullmatch("[bsu](16|32|64)", kind) or "sat" in words:
            raise refused
        bits = int(kind[1:])
        if name == "mov":
            return self.moved(o, bits)
        if name == "shfl":
            return [self.shuffled(words[2], self.value(o[1]), self.value(o[2]), refused)]
        if name == "selp":
            return [np.where(self.value(o[3]), self.value(o[1], bits), self.value(o[2], bits))]
        signed = kind[0] == "s"
        if name == "cvt":
            if not re.fullmatch("[bsu](16|32|64)", words[-2]):
                raise refused
            return [_low(self.value(o[1], bits, signed), int(words[-2][1:]))]
        v = [self.value(x, bits, signed) for x in o[1:3]]
        if kind == "u64" and (v[0] < 0).any():  # int64 holds it
            raise refused
        if name == "setp" and len(words) == 3:
            return [_COMPARE[words[1]](*v)]
        if name in ("mul", "mad"):
            wide = 2 * bits if "wide" in words else bits
            product = v[0] * v[1]
            if "hi" in words:
                if bits == 64 or name == "mad":
                    raise refused
                return [_low(product >> bits, bits)]
            return [_low(product if name == "mul" else product + self.value(o[3], wide), wide)]
        if name in ("shl", "shr"):
            by = np.minimum(self.value(o[2]), 63)
            return [_low(v[0] >> by if name == "shr" else np.where(by < bits, v[0] << by, 0), bits)]
        if name == "bfe":
            return [_low(_field(v[0], self.value(o[2]), self.value(o[3]), signed), bits)]
        if name == "shf" and words[1:3] == ["l", "wrap"]:
            by = self.value(o[3]) & 31
            return [_low((v[1] << by) | (v[0] >> (32 - by)), 32)]
        if name in _ONE:
            return [_low(_ONE[name](v[0]), bits)]
        if name in _TWO:
            return [_low(_TWO[name](*v), bits)]
        raise refused

    def logic(self, name: str, v: list[np.ndarray], refused: Exception) -> np.ndarray:
        if name == "mov":
            return v[0]
        if name not in _LOGIC:
            raise refused
        return _LOGIC[name](*v)

    def moved(self, o: tuple[str, ...], bits: int) -> list[np.ndarray]:
        if o[1].startswith("{"):  # packs
            parts = _split(o[1].strip("{}"))
            each = bits // len(parts)
            # what LLVM never wrote is a half that nobody reads
            known = self.registers.keys() | self.special.keys()
            parts = ["0" if p[0] == "%" and p not in known else p for p in parts]
            low = [self.value(p, each) << (each * n) for n, p in enumerate(parts)]
            return [np.bitwise_or.reduce(np.broadcast_arrays(*low))]
        if o[0].startswith("{"):  # unpacks
            parts = _split(o[0].strip("{}"))
            each = bits // len(parts)
            whole = self.value(o[1], bits)
            return [_low(whole >> (each * n), each) for n, p in enumerate(parts) if p != "_"]
        return [self.value(o[1], bits)]

    def shuffled(self, mode: str, value: np.ndarray, lane: np.ndarray, refused: Exception):
        if mode not in ("idx", "bfly"):
            raise refused
        if value.shape[1] == 1:
            return value
        thread, own = self.special["%tid.x"], self.special["%laneid"]
        source = thread - own + (lane & 31 if mode == "idx" else own ^ lane)
        value, source = np.broadcast_arrays(value, source)
        return np.take_along_axis(value, source, axis=1)


def run(text: str, grid: int, params: list[int | float | Descriptor], touch: Touch) -> None:
    """Every access of `grid` programs of the kernel in `text` to `touch`; params: its arguments, a
    tensor as its address."""
    _Run(parse(text), grid, params, touch).run()
