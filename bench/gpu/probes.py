"""Stages `cudnn` (what cuDNN's fused graphs take, and how fast) and `tune`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.device import Device, one_line, ratio, summary, table, take_turns
from bench.gpu.kernels import ROUNDS, SHOT_SECONDS
from bench.gpu.networks import DRY_SIZE, SIZE, network
from bench.gpu.numbers import completed, cudnn_counts, tune_counts
from bench.gpu.record import Record

CANDIDATE_SECONDS = 60.0  # for the check of one: a hang must not take the stage
# the blocks whose passes are tried one by one, on every tile: few channels and many, and a stride
TILED = ("layer1.1", "layer2.0", "layer3.1", "layer4.1")
TILED_SHARE = 0.6  # of the stage's time: some forty candidates a block, checked in two processes
FORMS = ("conv", "conv+genstats", "scale-bias-relu-conv+genstats", "conv+scale-bias-relu")


def conv_shapes(dry: bool) -> list[Any]:
    """The convolutions of ResNet-50, then what ResNet-18 adds, each once: the deeper ResNets have
    no others, but for ResNeXt's groups."""
    from fastres import roofline

    shape = (2, 3, DRY_SIZE, DRY_SIZE) if dry else (256, 3, SIZE, SIZE)
    found: dict[Any, None] = {}
    for name in ("resnet50", "resnet18"):
        net = network(name, dry).to("meta")
        kernels = roofline.model(net, shape, "bf16", "a").kernels
        found |= dict.fromkeys(k.shape for k in kernels if k.shape is not None)
    return list(found)


def frontend() -> tuple[Any, str | None]:
    """(the module, None) or (None, why not)."""
    try:
        import cudnn
    except Exception as error:  # a missing libcudnn raises what it likes
        return None, f"nvidia-cudnn-frontend cannot be imported: {one_line(error)}"
    return cudnn, None


def declare_graph(
    cudnn: Any, handle: Any, form: str, s: Any, dtype: torch.dtype, where: str = "cuda"
) -> tuple[Any, dict[Any, torch.Tensor]]:
    """The operation graph of `form`, and fresh tensors of shape s for it; raises when cuDNN cannot
    express it. Needs no GPU (with a frontend whose graphs need none)."""
    kind = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    float32 = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=float32, compute_data_type=float32, handle=handle
    )

    def activation(*size: int) -> torch.Tensor:
        t = torch.randn(size, device=where).to(dtype)
        return t.contiguous(memory_format=torch.channels_last)

    def vector(n: int) -> torch.Tensor:
        return torch.rand(1, n, 1, 1, device=where).to(dtype)

    def declare(t: torch.Tensor, name: str) -> Any:
        """By the strides of channels_last: torch leaves NCHW's where a size is 1."""
        _, c, h, w = t.shape
        nhwc = [c * h * w, 1, w * c, c]
        return graph.tensor(name=name, dim=list(t.shape), stride=nhwc, data_type=kind)

    pack: dict[Any, torch.Tensor] = {}

    def given(t: torch.Tensor, name: str) -> Any:
        node = declare(t, name)
        pack[node] = t
        return node

    image = given(activation(*s.x), "x")
    weight = given(activation(s.K, s.C, s.R, s.S), "w")
    if form.startswith("scale-bias-relu"):
        scaled = graph.scale(input=image, scale=given(vector(s.C), "scale"))
        image = graph.relu(input=graph.bias(input=scaled, bias=given(vector(s.C), "bias")))
    y = graph.conv_fprop(
        image=image, weight=weight, padding=list(s.padding), stride=list(s.stride),
        dilation=list(s.dilation),
    )  # fmt: skip
    y.set_data_type(kind)
    if form.endswith("genstats"):
        for node in graph.genstats(input=y):
            node.set_output(True).set_data_type(float32)
            pack[node] = torch.empty(1, s.K, 1, 1, device=where)
    if form.endswith("scale-bias-relu"):
        scaled = graph.scale(input=y, scale=given(vector(s.K), "oscale"))
        y = graph.relu(input=graph.bias(input=scaled, bias=given(vector(s.K), "obias")))
        y.set_data_type(kind)
    y.set_output(True)
    pack[y] = activation(*s.y)
    graph.validate()
    graph.build_operation_graph()
    return graph, pack


def build_graph(cudnn: Any, handle: Any, form: str, s: Any, dtype: torch.dtype) -> Callable:
    """A call that runs `form` on fresh tensors of shape s; raises when cuDNN has no engine."""
    graph, pack = declare_graph(cudnn, handle, form, s, dtype)
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    space = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")

    def run() -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, space, handle=handle)

    return run


def cudnn(device: Device, record: Record) -> None:
    """Which forms cuDNN's graph API takes on this card, by shape and dtype, and how long each
    takes beside its bare convolution."""
    module, why = frontend()
    shapes = conv_shapes(device.dry)
    record.set(forms=FORMS, shapes=len(shapes))
    if why is None and device.dry:
        why = f"a dry run has no GPU; {declared(module, shapes)}"
    if why is not None:
        record.note(f"not measured: {why}")
        table("cudnn", ("shapes", "state"), [(len(shapes), "not measured")])
        return
    handle = module.create_handle()
    record.set(versions={"cudnn": module.backend_version(), "frontend": module.__version__})
    taken = [r for r in record.before.get("rows", []) if r["supported"] is not None]
    tried = Counter(_shape_of(row) for row in taken)
    kept = record.keep(lambda r: r["supported"] is not None and tried[_shape_of(r)] == len(FORMS))
    done = set(map(_shape_of, kept))
    for dtype in (torch.bfloat16, torch.float16):  # all shapes in bf16 first
        for s in shapes:
            if _shape_of({"dtype": _name(dtype), "shape": vars(s)}) in done:
                continue
            probe(device, record, module, handle, s, dtype)
            device.empty()
    lines = cudnn_counts(record.rows, len(shapes))
    heads = ("form", "dtype", "shapes", "3x3 stride 2", "tried", "time / bare conv")
    table("cudnn", heads, lines)
    untried = sum(r["supported"] is None for r in record.rows)
    record.set(not_tried=untried)
    if untried:
        record.unfinished(f"not tried: {untried} of {len(record.rows)}, for lack of time")


def declared(module: Any, shapes: list[Any]) -> str:
    """How many graphs can be expressed, which asks no GPU."""
    try:
        for s in shapes:
            for form in FORMS:
                declare_graph(module, None, form, s, torch.bfloat16, "cpu")
    except Exception as error:
        return f"{form} is not expressed: {one_line(error)}"
    return f"{len(shapes) * len(FORMS)} graphs are expressed"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["dtype"], json.dumps(row["shape"], sort_keys=True)


def probe(
    device: Device, record: Record, module: Any, handle: Any, s: Any, dtype: torch.dtype
) -> None:
    """A row for each form. supported is None for one that there was no time to try."""
    shots, reasons, untried = {}, {}, set()
    for form in FORMS:
        if record.time_left() < 0:
            untried.add(form)
            reasons[form] = "not tried: no time left"
            continue
        try:
            call = build_graph(module, handle, form, s, dtype)
            shots[form] = device.timer.shot([call], SHOT_SECONDS, graph=False)
        except Exception as error:
            reasons[form] = one_line(error)
            if device.broken() is not None:
                raise
    times = take_turns(shots, ROUNDS, record.time_left)
    for form in FORMS:
        row: dict[str, Any] = {
            "form": form, "dtype": _name(dtype), "shape": vars(s),
        }  # fmt: skip
        if form in times:
            row |= {"supported": True, **summary(times[form])}
            if "conv" in times:
                row["against conv"] = ratio(times[form], times["conv"])
        else:
            row |= {"supported": None if form in untried else False, "reason": reasons[form]}
        record.add(**row)


def tune(device: Device, record: Record) -> None:
    """fastres.tune on a ResNet-50's blocks in training, TILED first and pass by pass; the choices
    are the stage's result."""
    import os
    import tempfile

    import fastres
    from fastres import plan, tuning

    with tempfile.TemporaryDirectory() as cache:  # the user's own cache stays as it is
        os.environ["FASTRES_CACHE"] = cache
        net = network("resnet50", device.dry).to(device.torch)
        net = fastres.convert(net.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        size = DRY_SIZE if device.dry else SIZE
        x = torch.randn(2 if device.dry else 256, 3, size, size, device=device.torch)
        x = x.contiguous(memory_format=torch.channels_last)
        seconds = 0.2 if device.dry else max(5.0, 0.3 * record.time_left())
        lines: list[tuple] = []

        def each(path: str, key: Any, entry: Any, tiled: bool = False) -> None:
            """At once: the stage may be stopped."""
            times = {k: float(v) for k, v in entry.milliseconds.items()}
            row = record.add(
                block=key.block, path=path, shape=list(key.shape), dtype=key.dtype,
                layout=key.layout, mode=key.mode, choice=entry.choice, ratio=entry.ratio, ms=times,
                rejected=dict(entry.rejected), per_conv=tiled,
            )  # fmt: skip
            record.save()
            where = "x".join(map(str, row["shape"]))
            lines.append((where, row["choice"], row["ratio"], len(row["rejected"])))

        kept = record.keep(
            lambda row: "layout" in row and (row["path"] not in TILED or row["per_conv"])
        )
        plan.current(x.device).add({
            plan.Key(row["block"], tuple(row["shape"]), row["dtype"], row["layout"], row["mode"]):
            plan.Entry(row["choice"], row["ms"], row["ratio"], row["rejected"])
            for row in kept
        })  # fmt: skip
        end = time.monotonic() + TILED_SHARE * record.time_left()
        untried = []
        with torch.autocast(device.type, dtype=torch.bfloat16):
            targets = tuning.distinct(net, x, True)
            blocks = len(targets)
            targets = [t for t in targets if t.path in TILED]
            record.set(expected={"blocks": blocks, "tiled": len(targets)})
            for target in (t for t in targets if plan.current(x.device).lookup(t.key) is None):
                try:
                    if time.monotonic() > end:
                        raise tuning.TimeLimit
                    entry = tuning.measure(
                        target, seconds / len(TILED), not device.dry, True, end, CANDIDATE_SECONDS
                    )
                except tuning.TimeLimit:
                    untried.append(target.path)
                    continue
                plan.current(x.device).add({target.key: entry})
                each(target.path, target.key, entry, True)
            del targets
            found = fastres.tune(
                net, x, modes=("training",), seconds=seconds, limit=max(record.time_left(), 1.0),
                each=each, missing=True, candidate_seconds=CANDIDATE_SECONDS,
            )  # fmt: skip
        if untried:
            record.unfinished(f"not tried pass by pass, for lack of time: {', '.join(untried)}")
        if found.left:
            record.unfinished(f"not measured, for lack of time: {', '.join(found.left)}")
    counts = tune_counts(record.rows, record.found["expected"])
    blocks, tiled = (completed(**counts[k]) for k in ("blocks", "tiled"))
    table(
        f"tune: ResNet-50's blocks: {blocks}; pass by pass: {tiled}",
        ("input", "choice", "x eager", "rejected"),
        lines,
    )
