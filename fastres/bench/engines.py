"""What a worker runs: one Engine per (variant, case), built from the fixture."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastres.bench.models import build_model
from fastres.bench.options import Case, Options
from fastres.bench.saved import saved_bytes
from fastres.bench.truth import training_pass
from fastres.bench.verify import all_errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 1024.0  # loss scale of the one checked step; timed steps use a GradScaler


class Engine(ABC):
    """Inference of one batch, or one training step, repeatable."""

    warmups = 2

    @abstractmethod
    def step(self) -> None:
        """One timed iteration."""

    def run(self, iters: int) -> float:
        """Seconds that `iters` iterations take."""
        start = time.perf_counter()
        for _ in range(iters):
            self.step()
        return time.perf_counter() - start

    def errors(self) -> dict[str, dict[str, float]]:
        """Errors against float64, by quantity; empty when they cannot be had."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What else the report should say: saved bytes, fused modules."""
        return {}


class TorchEngine(Engine):
    """eager, compile or fastres; channels_last; autocast below fp32."""

    def __init__(self, kind: str, case: Case, options: Options, fixture: dict[str, Any]) -> None:
        self.kind, self.case, self.fixture = kind, case, fixture
        self.device = torch.device(options.device)
        self.batch = fixture["batch"].to(self.device, memory_format=torch.channels_last)
        self.labels = fixture["labels"].to(self.device)
        model = build_model(options.model)
        model.load_state_dict(fixture["state_dict"])
        model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train(case.mode == "train")
        if kind == "fastres":
            import fastres

            model = fastres.convert(model)
        self.model: torch.nn.Module = model
        self.call: Any = model
        if kind == "compile":
            self.warmups = 3
            if case.mode == "inference" and self.device.type == "cpu":
                from torch._inductor import config as inductor_config

                inductor_config.freezing = True
            torch._dynamo.reset()
            self.call = torch.compile(model)
        if case.mode == "train":
            # A tiny learning rate: the numbers stay those of a ResNet, whatever the round.
            self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=case.dtype == "fp16")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.case.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.case.dtype])

    def _no_grad(self) -> contextlib.AbstractContextManager[Any]:
        # Freezing needs no_grad; torch.compile under inference_mode would fall back.
        return torch.no_grad() if self.kind == "compile" else torch.inference_mode()

    def step(self) -> None:
        if self.case.mode == "inference":
            with self._no_grad(), self._autocast():
                self.call(self.batch)
            return
        with self._autocast():
            loss = torch.nn.functional.cross_entropy(self.call(self.batch), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, iters: int) -> float:
        start = time.perf_counter()
        for _ in range(iters):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def errors(self) -> dict[str, dict[str, float]]:
        """Of one forward, or one training pass without optimiser step, on the checked images.

        torch.compile would compile once more for another batch size: left out when that differs.
        """
        count = self.fixture["verify_images"]
        truth = self.fixture["truth"][self.case.mode]
        if self.case.mode == "inference":
            with self._no_grad(), self._autocast():
                out = self.call(self.batch)
            return all_errors({"outputs": {"": out[:count]}}, truth)
        if self.kind == "compile" and count != len(self.batch):
            return {}
        with self._autocast():
            out = self.call(self.batch[:count])
        scale = FP16_SCALE if self.case.dtype == "fp16" else 1.0
        result = training_pass(self.model, out.float(), self.labels[:count], scale)
        errors = all_errors(result, truth)
        self.model.zero_grad(set_to_none=True)
        self.model.load_state_dict(self.fixture["state_dict"])
        return errors

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.case.mode == "train" and self.kind in ("eager", "fastres"):
            with self._autocast():
                found["saved_bytes"] = saved_bytes(
                    self.model, lambda: self.call(self.batch), self.batch
                )
        if self.kind == "fastres":
            import fastres

            found["report"] = fastres.report(self.model).to_dict()
        return found


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime, fp32, all graph optimisations."""

    def __init__(self, kind: str, case: Case, options: Options, fixture: dict[str, Any]) -> None:
        import tempfile

        import onnxruntime

        self.fixture = fixture
        model = build_model(options.model).eval()
        model.load_state_dict(fixture["state_dict"])
        batch = fixture["batch"].contiguous()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            torch.onnx.export(model, (batch,), file.name, dynamo=False, input_names=["x"])
            self.session = onnxruntime.InferenceSession(
                file.name, settings, providers=["CPUExecutionProvider"]
            )
        self.feed = {"x": batch.numpy()}

    def step(self) -> None:
        self.session.run(None, self.feed)

    def errors(self) -> dict[str, dict[str, float]]:
        out = torch.from_numpy(self.session.run(None, self.feed)[0])
        return _output_errors(out, self.fixture)


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plugin, latency hint; fp32, or bf16 by the inference_precision hint."""

    def __init__(self, kind: str, case: Case, options: Options, fixture: dict[str, Any]) -> None:
        import openvino

        self.fixture = fixture
        model = build_model(options.model).eval()
        model.load_state_dict(fixture["state_dict"])
        batch = fixture["batch"].contiguous()
        converted = openvino.convert_model(model, example_input=batch, input=list(batch.shape))
        compiled = openvino.Core().compile_model(
            converted,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[case.dtype],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            },
        )
        self.request = compiled.create_infer_request()
        self.input = batch.numpy()

    def step(self) -> None:
        self.request.infer([self.input], share_inputs=True, share_outputs=True)

    def errors(self) -> dict[str, dict[str, float]]:
        self.step()
        return _output_errors(
            torch.from_numpy(self.request.get_output_tensor().data.copy()), self.fixture
        )


def _output_errors(out: Tensor, fixture: dict[str, Any]) -> dict[str, dict[str, float]]:
    outputs = {"outputs": {"": out[: fixture["verify_images"]]}}
    return all_errors(outputs, fixture["truth"]["inference"])


def make_engine(kind: str, case: Case, options: Options, fixture: dict[str, Any]) -> Engine:
    """The engine named `kind`, built and ready to warm up."""
    peers = {"onnxruntime": OnnxRuntimeEngine, "openvino": OpenVinoEngine}
    return peers.get(kind, TorchEngine)(kind, case, options, fixture)
