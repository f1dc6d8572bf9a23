"""Bytes per kernel, counted from the loads and stores of compiled kernels, are the model's
(fastres.roofline), for each rung: compiled_bytes.py on a part of what it does for the committed
files; and ptx.py, which does the counting, on PTX written by hand.

Compiling happens in a subprocess: under TRITON_INTERPRET=1 triton.jit makes interpreted functions.
"""

from __future__ import annotations

import functools
import json

import compiled_bytes
import numpy as np
import ptx
import pytest
from test_triton_aot import subprocess_of

# Thin: each rung of training and inference once, and the stem, of widths whose kernels
# test_triton_aot compiles, too, where it has that form. The committed files have the others.
PARTS = ("resnet18.stem:c2", "resnet18.layer1:b,c1,c2", "resnet50.layer1:d,folded")
KERNELS = {
    "resnet18.stem c2": 5, "resnet18.layer1 b": 20, "resnet18.layer1 c1": 19,
    "resnet18.layer1 c2": 15, "resnet50.layer1 d": 25, "resnet50.layer1 folded": 10,
}  # fmt: skip


def test_compiled_kernels_move_what_the_model_says():
    """Kernel by kernel and tensor by tensor, in bf16 on sm_90."""
    pytest.importorskip("triton")
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip(f"this Triton build has no backend for sm_90: {sorted(backends)}")
    done = subprocess_of(["compiled_bytes.py", "sm_90", *PARTS])
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["counted"] == row["model"], (row["part"], row["rung"])
        loaded, stored = row["workspaces"]
        assert loaded == stored
    assert {f"{r['part']} {r['rung']}": len(r["counted"]) for r in rows} == KERNELS


def test_the_committed_files_are_of_these_kernels():
    """Part by part: no kernel, form, tile, size or number of programs has changed since they were
    written, and no launch has come or gone. Thin: sm_90's."""
    pytest.importorskip("triton")
    version = compiled_bytes.aot.triton_version()
    if not list(compiled_bytes.TABLE.glob(f"triton-{version}-*.json")):
        pytest.skip(f"no file of Triton {version} is committed")
    done = subprocess_of(["compiled_bytes.py", "--check", "sm_90"])
    assert done.returncode == 0, f"stale:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


FILES = sorted(compiled_bytes.TABLE.glob("*.json"))


def test_every_target_has_a_file():
    versions = {path.stem.split("-")[1] for path in FILES}
    names = {f"triton-{v}-{target}" for v in versions for target in compiled_bytes.TARGETS}
    assert versions and {path.stem for path in FILES} == names


CHANGES = """
import pathlib, sys
import compiled_bytes as cb
cb.PARTS = {"resnet18.stem": ("c1",)}
assert cb.stale(["sm_90"]) == []
before = cb.digest("sm_90", "resnet18.stem", "c1")
step, chunks = cb.step, cb.CHUNKS
cb.CHUNKS = 2  # more or fewer programs of the same machine code
assert cb.digest("sm_90", "resnet18.stem", "c1") != before
cb.CHUNKS, cb.step = chunks, lambda *args: (step(*args), step(*args))  # each launch once more
assert cb.digest("sm_90", "resnet18.stem", "c1") != before
assert cb.stale(["sm_90"]) == ["sm_90 resnet18.stem c1"]
cb.PARTS = {"resnet18.stem": ("d",)}
assert cb.stale(["sm_90"]) == ["sm_90 resnet18.stem d"]  # no such row
cb.TABLE = pathlib.Path(sys.argv[1])
print(cb.stale(["sm_90"])[0])
"""


def test_what_is_missing_or_changed_is_stale(tmp_path):
    pytest.importorskip("triton")
    version = compiled_bytes.aot.triton_version()
    if not list(compiled_bytes.TABLE.glob(f"triton-{version}-*.json")):
        pytest.skip(f"no file of Triton {version} is committed")
    done = subprocess_of(["-c", CHANGES, str(tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"sm_90: there is no triton-{version}-sm_90.json; --write sm_90")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_committed_bytes_are_the_models(path):
    """Thin: those of a bottleneck; the others as they were found when the file was written."""
    rows = {(r["part"], r["rung"]): r for r in json.loads(path.read_text())["rows"]}
    assert list(rows) == [(p, r) for p, rungs in compiled_bytes.PARTS.items() for r in rungs]
    for (part, rung), row in rows.items():
        assert row["equal"], (part, rung)
        if part == "resnet50.layer1":
            assert row["ops"] == expected(part, rung), (part, rung)


@functools.cache
def expected(part: str, rung: str) -> dict[str, list[int]]:
    return compiled_bytes.totals(compiled_bytes.listed(compiled_bytes.model(part, rung)))


# --- the counting itself --------------------------------------------------------------------------


def counted(body: str, grid: int, *params, threads: int = 64) -> dict[str, list[int]]:
    """The bytes that a kernel loads and stores, each time that it does; p0, p1, ...: its
    parameters."""
    kinds = ["u64 .ptr .global" if isinstance(p, int) and p > 999 else "u32" for p in params]
    kinds = [
        f".param .align 64 .b8 p{i}[128]" if isinstance(p, ptx.Descriptor) else f".param .{k} p{i}"
        for i, (k, p) in enumerate(zip(kinds, params, strict=True))
    ]
    text = ".visible .entry k(\n" + ",\n".join(kinds) + f"\n)\n.reqntid {threads}\n{{\n"
    found: dict[str, list[int]] = {"load": [], "store": []}

    def touch(kind, addresses, width):
        found[kind] += [a + i for a in addresses.ravel().tolist() for i in range(width)]

    ptx.run(text + body + "\n$L__func_end0:\n}\n", grid, list(params), touch)
    return {kind: sorted(a) for kind, a in found.items()}


START = "ld.param.b64 %rd1, [p0];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n"


def test_every_trip_of_a_loop_is_counted_under_its_mask():
    """Program i makes i + 1 trips; a trip loads 8 bytes a thread, of threads below 40."""
    body = (
        START
        + """
        setp.lt.s32 %p1, %r1, 40;
        mul.wide.u32 %rd2, %r1, 8;
        add.s64 %rd3, %rd1, %rd2;
        mad.wide.s32 %rd3, %r2, 4096, %rd3;
        mov.b32 %r3, 0;
    $L__BB0_1:
        @%p1 ld.global.v2.b32 { %r5, %r6 }, [ %rd3 + 0 ];
        add.s64 %rd3, %rd3, 512;
        add.s32 %r3, %r3, 1;
        setp.le.s32 %p2, %r3, %r2;
        @%p2 bra $L__BB0_1;
        ret;"""
    )
    expected = [
        1 << 20 | (pid << 12) + (trip << 9) + byte
        for pid in range(3)
        for trip in range(pid + 1)
        for byte in range(8 * 40)
    ]
    assert counted(body, 3, 1 << 20) == {"load": expected, "store": []}


def test_threads_part_and_meet_again():
    """Threads from 32 on skip a block that moves their pointer, and store with the others."""
    body = (
        START
        + """
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        setp.gt.u32 %p1, %r1, 31;
        @%p1 bra $L__BB0_2;
        add.s64 %rd3, %rd3, 1024;
    $L__BB0_2:
        st.global.b32 [ %rd3 + 4 ], { %r9 };
        ret;"""
    )
    low = [2048 + 1028 + i for i in range(128)]
    assert counted(body, 1, 2048)["store"] == sorted(low + [2052 + 128 + i for i in range(128)])


def test_an_asynchronous_copy_of_no_bytes_reads_nothing():
    body = (
        START
        + """
        setp.lt.s32 %p1, %r1, 2;
        selp.b32 %r3, 16, 0, %p1;
        shl.b32 %r4, %r1, 4;
        cvt.u64.u32 %rd2, %r4;
        add.s64 %rd3, %rd1, %rd2;
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x10, %r3;
        ret;"""
    )
    assert counted(body, 1, 4096)["load"] == [4096 + i for i in range(32)]


def test_the_copy_engine_stops_at_the_tensors_border():
    """A box of 4 rows and 8 columns at (6, 8) of a tensor of 9 by 12, by one thread, after waiting
    in inline assembly of its own labels and registers."""
    copy = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
    body = (
        START.replace("ld.param.b64 %rd1, [p0]", "mov.b64 %rd2, p0")
        + f"""
        cvta.param.u64 %rd1, %rd2;
    {{
        .reg .pred complete;
        waitLoop:
        mbarrier.try_wait.parity.shared::cta.b64 complete, [%r7], %r8;
        @!complete bra.uni waitLoop;
    }}
        elect.sync %r3|%p1, -1;
        setp.lt.u32 %p2, %r1, 32;
        and.pred %p3, %p1, %p2;
        @%p3 {copy} [%r9], [%rd1, {{8, 6}}], [%r8];
        ret;"""
    )
    descriptor = ptx.Descriptor(1 << 16, (9, 12), (16, 1), (4, 8), 2)
    rows = [
        (1 << 16) + 2 * (16 * r + c) + b for r in (6, 7, 8) for c in range(8, 12) for b in (0, 1)
    ]
    assert counted(body, 1, descriptor)["load"] == rows


@pytest.mark.parametrize(
    "line, said",
    [
        ("ld.global.b32 %r3, [ %rd1 + 0 ];", "depends on what ld.global.b32 loads"),
        ("ld.shared.b32 %r3, [ %r1 ];", "depends on ld.shared.b32"),
        ("cvt.rzi.s32.f32 %r3, %r1;", "depends on cvt.rzi.s32.f32"),
        ("popc.b32 %r3, %r1;", "depends on popc.b32"),
        ("atom.global.add.u32 %r3, [ %rd1 ], 1;", "PTX: atom.global.add.u32"),
        ("ld.b32 %r3, [ %rd1 ];", "PTX: ld.b32"),
    ],
)
def test_what_cannot_be_told_is_an_error(line, said):
    end = "\nmad.wide.s32 %rd3, %r3, 4, %rd1;\nst.global.b32 [ %rd3 + 0 ], { %r1 };\nret;"
    with pytest.raises(NotImplementedError, match=said):
        counted(START + line + end, 1, 1 << 20)


@pytest.mark.parametrize(
    "line, value",
    [
        ("sub.s32 %r3, 3, 5;", -2),
        ("mul.lo.s32 %r3, 65536, 65535;", -65536),
        ("mul.hi.s32 %r3, -3, 1431655766;", -2),
        ("mul.hi.u32 %r3, -3, 1431655766;", 1431655764),
        ("div.s32 %r3, -7, 2;", -3),
        ("rem.s32 %r3, -7, 2;", -1),
        ("min.s32 %r3, -7, 2;", -7),
        ("min.u32 %r3, -7, 2;", 2),
        ("shr.s32 %r3, -8, 1;", -4),
        ("shr.u32 %r3, -8, 28;", 15),
        ("shl.b32 %r3, 3, 31;", -(2**31)),
        ("bfe.u32 %r3, 240, 4, 4;", 15),
        ("bfe.s32 %r3, 240, 4, 4;", -1),
        ("shf.l.wrap.b32 %r3, -2147483648, 5, 1;", 11),
        ("mad.lo.s32 %r3, 3, 4, -20;", -8),
        ("not.b32 %r3, 0;", -1),
        ("mov.b64 %rd4, { 7, 9 };\nmov.b64 { %r4, %r3 }, %rd4;", 9),
        ("mov.b64 %rd4, { 7, %r9 };\nmov.b64 { %r3, _ }, %rd4;", 7),
        ("cvt.u16.u32 %rs1, 65537;\ncvt.u32.u16 %r3, %rs1;", 1),
        ("shfl.sync.idx.b32 %r3, %r1, 0, 31, -1;", 0),
        ("setp.lt.u32 %p1, -1, 5;\nselp.b32 %r3, 1, 2, %p1;", 2),
    ],
)  # fmt: skip
def test_arithmetic_is_that_of_ptx(line, value):
    """The value is where a byte is stored, of thread 0."""
    end = "\ncvt.s64.s32 %rd2, %r3;\nadd.s64 %rd3, %rd1, %rd2;\nst.global.b8 [ %rd3 + 0 ], { %r1 };"
    base = 1 << 40
    found = counted(START + line + end + "\nret;", 1, base, threads=32)["store"]
    assert np.unique(found)[0] - base == value
