"""Bytes per kernel, counted from compiled kernels, against the model's (fastres.roofline), by rung.

    python tests/compiled_bytes.py --write           # bench/results/compiled-bytes/, this Triton
    python tests/compiled_bytes.py --check           # which rows are of other kernels than today's
    python tests/compiled_bytes.py sm_90 resnet50.layer1:c2,d    # a part, as JSON, a rung a line

A training step of a part of a ResNet, as wide as it is and on small images, runs on CPU tensors
with the Triton backend's functions. Their launches are compiled for a GPU that is not here
(aot.py) instead of run, and ptx.py evaluates the machine code's PTX for every address that is
loaded or stored. What is compared is what the model counts: of each kernel and tensor the distinct
bytes. A vendor's convs (rung b) are torch's, and no kernel of ours."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {"FASTRES_SELFCHECK": "0", "FASTRES_SMALL_BLOCK": "0"}  # launches compute nothing

import aot  # noqa: E402
import aot_cases  # noqa: E402
import ptx  # noqa: E402
import torch  # noqa: E402
from aot_cases import Launch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from traffic import Call, in_formulas_words, metered  # noqa: E402

import fastres  # noqa: E402
from fastres import roofline  # noqa: E402

TABLE = aot.TABLE.parent / "compiled-bytes"
TARGETS = ("sm_80", "sm_90", "sm_100")  # AMD's kernels have no PTX
RUNGS = ("b", "c1", "c2", "d", "folded")  # folded: inference
PARTS = {
    "resnet18.layer1": RUNGS[:-1],
    "resnet18.layer2": RUNGS,
    "resnet50.layer1": RUNGS,
    "resnet50.layer2": RUNGS,
    "resnext50_32x4d.layer2": RUNGS,
    "resnet18.stem": RUNGS[:3],
}
# Chunks of a reduction: a few, so that a program makes several trips on small images, too.
CHUNKS = 3


# --- a launch -------------------------------------------------------------------------------------


def launched(kernel, args, num_warps, num_stages=None, maxnreg=None, **constants) -> Launch:
    """A call of `fastres.kernels._launch.launch`, whose case nobody asks for."""
    return Launch("", "", "", kernel, args, num_warps, num_stages, maxnreg, constants)


def parameters(launch: Launch, source, compiled) -> list:
    """The launch's arguments as its PTX takes them."""
    boxes = iter(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    out: list = []
    for name, value in launch.named().items():
        if source.signature[name] == "constexpr":
            continue
        if isinstance(value, Tensor):
            assert value.data_ptr() % 16 == 0, f"{name}: compiled for an aligned tensor"
            out.append(value.data_ptr())
        elif hasattr(value, "block_shape"):
            shape, strides = tuple(value.shape), tuple(value.strides)
            box, t = next(boxes)["block_size"], value.base
            out.append(ptx.Descriptor(t.data_ptr(), shape, strides, tuple(box), t.element_size()))
            out += [*shape, *strides]
        else:
            out.append(value)
    return out


@contextlib.contextmanager
def few_chunks(target: str) -> Iterator[None]:
    """Tiles, and so kernels, stay those of the target's table."""
    from fastres.kernels import _conv_config, _launch

    before = _launch._MAX_CHUNKS, _conv_config._MAX_CHUNKS
    _launch._MAX_CHUNKS = _conv_config._MAX_CHUNKS = CHUNKS
    try:
        yield
    finally:
        _launch._MAX_CHUNKS, _conv_config._MAX_CHUNKS = before


def compiled_for(target: str, seen: Callable[[str, object], None] = lambda name, compiled: None):
    """How traffic.metered counts a launch compiled for `target`."""

    @contextlib.contextmanager
    def counted() -> Iterator[Callable]:
        def run(memory, _, kernel, programs, *options, **constants):
            launch = launched(kernel, *options, **constants)
            source, compiled = aot.compiled_of(target, launch)
            seen(kernel.__name__, compiled)
            given = parameters(launch, source, compiled)
            ptx.run(compiled.asm["ptx"], programs, given, memory.touch)

        with aot_cases.capture(target), few_chunks(target):
            yield run

    return counted


# --- a part of a network --------------------------------------------------------------------------


def part_of(part: str, rung: str) -> tuple[nn.Module, Tensor]:
    """The network, or a layer of it behind a conv, so that x needs a gradient; images that make
    several tiles, the last ragged."""
    import torchvision

    name, layer = part.split(".")
    net = getattr(torchvision.models, name)()
    if layer == "stem":
        x = torch.randn(2, 3, 34, 31)
    else:
        blocks = getattr(net, layer)
        c = blocks[0].conv1.in_channels
        net = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), blocks)
        x = torch.randn(2, c, 18, 17)
    net.train(rung != "folded").to(memory_format=torch.channels_last)
    return net, x.contiguous(memory_format=torch.channels_last)


def step(part: str, rung: str, counted) -> list[Call]:
    """The backend's calls in a training step of the part in bf16, its blocks one stage."""
    from fastres._chosen import block_of
    from fastres.ops import residual_stage

    net, x = part_of(part, rung)
    stem = part.endswith("stem")
    fused = fastres.convert(net, fusion=rung if stem else "b")
    x = x.bfloat16().requires_grad_(not stem and rung != "folded")
    with metered(counted) as calls, torch.autocast("cpu", torch.bfloat16):
        if stem:
            z = fused.fused_forward(x)
        elif rung == "b":
            z = fused[1](x)
        else:
            blocks = [block_of(b, b._fastres.spec) for b in fused[1]]
            with torch.set_grad_enabled(rung != "folded"):
                z = residual_stage(x, blocks, "d" if rung == "folded" else rung)
        if rung != "folded":
            z.backward(torch.ones_like(z))
    return calls


def model(part: str, rung: str) -> list[tuple[str, dict[str, int], dict[str, int]]]:
    """(op, reads, writes) of our kernels in the part."""
    net, x = part_of(part, rung)
    own = ("conv1", "maxpool") if part.endswith("stem") else "1."
    return [
        (k.op, {a.tensor: a.bytes for a in k.reads}, {a.tensor: a.bytes for a in k.writes})
        for k in roofline.model(net, x, "bf16", rung, training=rung != "folded").kernels
        if k.path.startswith(own)
        and k.op != "grad_add"
        and not (k.shape is not None and rung == "b")
    ]


def listed(kernels) -> list:
    """(op, reads, writes) as JSON has them, in order."""
    return sorted([op, sorted(r.items()), sorted(w.items())] for op, r, w in kernels)


def compare(target: str, part: str, rung: str, counted=None) -> dict:
    """One row: the kernels, each as [op, reads, writes] by tensor, as counted and as the model has
    them, and bytes of workspaces [loaded, stored]."""
    calls = step(part, rung, counted or compiled_for(target))
    workspaces = [
        sum(n for c in calls for name, n in c.small.items() if name.startswith(f"{kind} workspace"))
        for kind in ("load", "store")
    ]
    return {
        "target": target,
        "part": part,
        "rung": rung,
        "counted": listed(in_formulas_words(c) for c in calls),
        "model": listed(model(part, rung)),
        "workspaces": workspaces,
    }


def digest(target: str, part: str, rung: str) -> str:
    """Changes when one of the row's launches would be of other machine code, of other sizes or of
    another number of programs, or one more or less; compiles nothing."""
    found: list[tuple] = []

    @contextlib.contextmanager
    def captured() -> Iterator[Callable]:
        def run(memory, _, kernel, programs, *options, **constants):
            launch = launched(kernel, *options, **constants)
            sizes = [v for v in launch.args if isinstance(v, int)]
            found.append((kernel.__name__, aot.digest(launch), programs, sizes))

        with aot_cases.capture(target), few_chunks(target):
            yield run

    step(part, rung, captured)
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:12]


def stale(targets) -> list[str]:
    """The rows of this Triton's files that are missing, or whose launches are others now."""
    import triton

    out = []
    for target in targets:
        path = TABLE / f"triton-{triton.__version__}-{target}.json"
        if not path.exists():
            out.append(f"{target}: there is no {path.name}; --write {target} makes it")
            continue
        rows = {(r["part"], r["rung"]): r["digest"] for r in json.loads(path.read_text())["rows"]}
        for part, rungs in PARTS.items():
            for rung in rungs:
                if rows.get((part, rung)) != digest(target, part, rung):
                    out.append(f"{target} {part} {rung}")
    return out


# --- everything -----------------------------------------------------------------------------------


def accesses_of_ptx(text: str) -> Counter:
    """(instruction's kind, bytes a thread) -> how many are written down."""
    every = [i for block in ptx.parse(text).blocks for i in block if i.access()]
    copies = [i for i in every if i.op.startswith("cp.async.bulk")]
    out = Counter((i.access(), i.width()) for i in every if i not in copies)
    return out + Counter({("copy engine", 0): len(copies)})


_MEMORY = ("LD", "ST", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG", "UTMASTG", "UTMAREDG")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def accesses_of_sass(compiled) -> Counter:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        done = subprocess.run([tool, "-c", f.name], capture_output=True, text=True, check=True)
    out: Counter = Counter()
    for m in re.finditer(r"\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", done.stdout):
        name, *words = m[1].split(".")
        width = next((_WIDTHS[w] for w in words if w in _WIDTHS), 4)
        if name in ("LDG", "LDGSTS", "STG"):
            out["store" if name == "STG" else "load", width] += 1
        elif name == "UTMALDG":
            out["copy engine", 0] += 1
        elif name in _MEMORY:  # PTX has none of these
            out[name, width] += 1
    return out


def totals(kernels: list) -> dict[str, list[int]]:
    """op -> kernels, bytes read, bytes written."""
    out: dict[str, list[int]] = {}
    for op, *moved in kernels:
        sums = [1, *(sum(n for _, n in side) for side in moved)]
        out[op] = [a + b for a, b in zip(out.get(op, [0, 0, 0]), sums, strict=True)]
    return out


def write(target: str) -> list[str]:
    """A target's file: by part and rung op -> [calls, bytes read, bytes written]; by kernel how
    many were compiled, and how many of them have the accesses of their PTX, one for one, in SASS.
    Answers with where kernels and model differ."""
    import triton

    kernels: dict[str, tuple[str, bool]] = {}

    def seen(name, compiled):
        if compiled.hash not in kernels:
            written, run = accesses_of_ptx(compiled.asm["ptx"]), accesses_of_sass(compiled)
            kernels[compiled.hash] = name, written == run
            if written != run:
                print(f"{name}: PTX {dict(written)}, SASS {dict(run)}", file=sys.stderr)

    rows, wrong = [], []
    for part, rungs in PARTS.items():
        for rung in rungs:
            row = compare(target, part, rung, compiled_for(target, seen))
            equal = row["counted"] == row["model"] and len(set(row["workspaces"])) == 1
            what = f"{target} {part} {rung}: {len(row['counted'])} kernels"
            print(what, "equal" if equal else "DIFFER", file=sys.stderr, flush=True)
            if not equal:
                wrong.append(what)
            of = {"part": part, "rung": rung, "digest": digest(target, part, rung)}
            rows.append({**of, "equal": equal, "ops": totals(row["counted"])})
    every = Counter(name for name, _ in kernels.values())
    same = Counter(name for name, equal in kernels.values() if equal)
    parts = {
        "rows": [json.dumps(row) for row in rows],
        "kernels": [json.dumps({name: [every[name], same[name]]}) for name in sorted(every)],
    }
    text = json.dumps({"triton": triton.__version__, "target": target})[:-1]
    for key, lines in parts.items():
        text += f', "{key}": [\n' + ",\n".join(lines) + "\n]"
    TABLE.mkdir(parents=True, exist_ok=True)
    (TABLE / f"triton-{triton.__version__}-{target}.json").write_text(text + "}\n")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="every part and rung, to a file")
    parser.add_argument("--check", action="store_true", help="which rows of the files are stale")
    parser.add_argument(
        "target", nargs="?", choices=TARGETS, help="default, with --write and --check: all"
    )
    parser.add_argument("parts", nargs="*", metavar="part:rung,rung")
    options = parser.parse_args()
    targets = [options.target] if options.target else TARGETS
    if options.write:
        wrong = [w for target in targets for w in write(target)]
        print("\n".join(wrong), file=sys.stderr)
        return bool(wrong)
    if options.check:
        found = stale(targets)
        print("\n".join(found))
        return bool(found)
    asked = [
        (p, r)
        for p, _, rungs in (x.partition(":") for x in options.parts)
        for r in rungs.split(",")
    ]
    known = [(p, r) for p, rungs in PARTS.items() for r in rungs]
    if not asked or not set(asked) <= set(known):
        parser.error("name a target and " + ", ".join(f"{p}:{','.join(PARTS[p])}" for p in PARTS))
    for part, rung in asked:
        print(json.dumps(compare(options.target, part, rung)), flush=True)
    return 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: triton.jit would make interpreted functions")
    sys.exit(main())
