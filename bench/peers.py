"""Baselines: eager, torch.compile, ONNX Runtime, OpenVINO, and cuDNN's fused graphs.

Each is a function that returns a `Variant`, one that says why it was not measured where the engine
is not installed or not for the case, and one that failed where it could not be built."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastres.memory import exhausted

from .cases import Case
from .session import Session
from .timing import Variant


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast below fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype)


def attempt(name: str, make: Callable[[], Callable[[], Any]]) -> Variant:
    """The variant that `make` builds, or one that says how it failed. Running out of memory is the
    case's matter."""
    try:
        return Variant(name, make())
    except Exception as error:
        if exhausted(error):
            raise
        found = Variant(name, None)
        found.fail(error)
        return found


COMPILED = {"compile": None, "compile max-autotune": "max-autotune-no-cudagraphs"}


def not_compiled(session: Session, case: Case, what: str) -> str | None:
    """Why torch.compile is not among a case's baselines; None when it is."""
    if session.tiny:
        return "not on tiny shapes"
    if case.compile or session.compile or session.full:
        return None
    return f"of this {what} with --compile or --full only"


def compiles(
    full: bool, why_not: str | None, build: Callable[[str | None], Callable[[], Any]]
) -> list[Variant]:
    """The variants of torch.compile that `build` makes, each from its mode: the default one, and
    --full max-autotune beside it. One that says why_not, where that is not None."""
    if why_not is not None:
        return [Variant.missing("compile", why_not)]
    torch._dynamo.reset()  # once: a second time would throw away what the first compiled
    modes = COMPILED if full else {"compile": None}
    return [attempt(name, functools.partial(build, mode)) for name, mode in modes.items()]


def compiled(module: nn.Module, mode: str | None, freeze: bool) -> Callable[..., Any]:
    """torch.compile of a copy, called through so that its first call compiles with `freezing` where
    asked (CPU inference)."""
    from torch._inductor import config

    call = torch.compile(copy.deepcopy(module), mode=mode)

    def run(*args: Any) -> Any:
        with config.patch(freezing=freeze):
            return call(*args)

    first = {"done": False}

    def once(*args: Any) -> Any:
        if first["done"]:
            return call(*args)
        first["done"] = True
        return run(*args)

    once.module = getattr(call, "_orig_mod", call)  # type: ignore[attr-defined]
    return once


def onnxruntime(model: nn.Module, x: Tensor, dtype: str) -> Variant:
    """ONNX Runtime's CPU provider: fp32, all graph optimisations."""
    name = "onnxruntime"
    if dtype != "fp32":
        return Variant.missing(name, f"has no {dtype} mode on the CPU")
    absent = [p for p in ("onnxruntime", "onnx") if find_spec(p) is None]
    if absent:
        return Variant.missing(name, f"not installed (pip install {' '.join(absent)})")

    def make() -> Callable[[], Any]:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        # Threads that spin on after the run would take the next variant's cores.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        batch = x.contiguous()
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            torch.onnx.export(
                copy.deepcopy(model).eval(), (batch,), file.name, dynamo=False, input_names=["x"]
            )
            session = ort.InferenceSession(file.name, settings, providers=["CPUExecutionProvider"])
        feed = {"x": batch.numpy()}
        return lambda: session.run(None, feed)

    return attempt(name, make)


def openvino(model: nn.Module, x: Tensor, dtype: str) -> Variant:
    """OpenVINO's CPU plugin, latency hint; bf16 by the precision hint."""
    name = "openvino"
    if dtype not in ("fp32", "bf16"):
        return Variant.missing(name, f"has no {dtype} mode here")
    if find_spec("openvino") is None:
        return Variant.missing(name, "not installed (pip install openvino)")

    def make() -> Callable[[], Any]:
        import openvino as ov

        batch = x.contiguous()
        converted = ov.convert_model(
            copy.deepcopy(model).eval(), example_input=batch, input=list(batch.shape)
        )
        request = (
            ov.Core()
            .compile_model(
                converted,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                },
            )
            .create_infer_request()
        )
        inputs = [batch.numpy()]
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)

    return attempt(name, make)


def _nhwc(t: Tensor) -> Tensor:
    """t in channels_last by its strides, too: torch leaves those of NCHW on a 1x1 weight, which
    cuDNN would take at their word."""
    _, c, h, w = t.shape
    dense = t.contiguous(memory_format=torch.channels_last)
    return dense.as_strided(t.shape, (c * h * w, 1, w * c, c))


def cudnn_conv(
    x: Tensor,
    weight: Tensor,
    geometry: list[int],
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> Variant:
    """relu(conv(x) * scale + shift [+ residual]) as one cuDNN graph (nvidia-cudnn-frontend)."""
    name = "cudnn graph"
    if not x.is_cuda:
        return Variant.missing(name, "needs a CUDA device")
    if find_spec("cudnn") is None:
        return Variant.missing(name, "not installed (pip install nvidia-cudnn-frontend)")
    if x.dtype == torch.float32:
        return Variant.missing(name, "its fused graphs take bf16 and fp16")

    def make() -> Callable[[], Any]:
        import cudnn

        kind = {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
        }[x.dtype]
        handle = cudnn.create_handle()  # of its own, so that it can follow torch's stream
        graph = cudnn.pygraph(
            handle=handle,
            io_data_type=kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        c = weight.shape[0]
        s, b = (_nhwc(t.float().view(1, c, 1, 1)) for t in (scale, shift))
        w = _nhwc(weight)
        tensors = {"x": x, "w": w, "s": s, "b": b}
        if residual is not None:
            tensors["r"] = residual
        node = {key: graph.tensor_like(t) for key, t in tensors.items()}
        y = graph.conv_fprop(
            image=node["x"], weight=node["w"], stride=geometry[:2], padding=geometry[2:4],
            dilation=geometry[4:6],
        )  # fmt: skip
        y = graph.add(a=graph.mul(a=y, b=node["s"]), b=node["b"])
        if residual is not None:
            y = graph.add(a=y, b=node["r"])
        if relu:
            y = graph.relu(input=y)
        y.set_output(True).set_data_type(kind)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        shape = torch.nn.functional.conv2d(
            x, w, None, geometry[:2], geometry[2:4], geometry[4:6]
        )  # for its shape and layout
        out = torch.empty_like(shape)
        workspace = torch.empty(
            max(graph.get_workspace_size(), 1), device=x.device, dtype=torch.uint8
        )
        pack = {node[key]: t for key, t in tensors.items()} | {y: out}

        def run() -> Tensor:
            stream = torch.cuda.current_stream().cuda_stream
            cudnn.set_stream(handle=handle, stream=stream)
            graph.execute(pack, workspace, handle=handle)
            return out

        run()
        return run

    return attempt(name, make)
