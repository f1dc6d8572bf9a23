"""Stages `train`, `inference`, `autotune` and `memory`: networks against all baselines.

Every variant of a configuration lives in one process and takes its turn, so that ratios are within
a round. What could crash or hang goes through a worker first: fastres's rungs are compared with
float64 by the rule of `fastres bench` and run once at full size, torch.compile fills its cache
under a time limit of its own. A variant that fails there is listed with its reason, and not timed.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.device import Device, Shot, one_line, ratio, summary, table, take_turns
from bench.gpu.kernels import machine
from bench.gpu.networks import DRY_SIZE, SIZE, network
from bench.gpu.numbers import completed
from bench.gpu.pool import parallel_workers, run_jobs
from bench.gpu.record import Record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = {"bf16": 1.0, "fp16": 1024.0}  # of the loss: fixed, since a GradScaler asks the host
ROUNDS = 9
CHECKED = 8  # images compared with float64
CHECK_SECONDS, CHECK_SHARE = 180.0, 0.55  # of one check; of the stage's time, for all of them
MAX_SHARE = 0.7  # of the stage's time, for max-autotune to choose its kernels
MEMORY_BATCH = 256
LOSS_LIMIT = 0.03  # first loss, against eager's: a wrong variant is off by far more


GRAPH = " +graph"


@dataclass(frozen=True)
class Variant:
    """kind: "eager", "compile", "compile-max" or "fastres"; rung: of fastres; backend: whose
    kernels, Triton's if not "cuda"."""

    kind: str
    dtype: str = "bf16"
    rung: str = ""
    backend: str = ""

    @property
    def name(self) -> str:
        return " ".join(v for v in (self.kind, self.backend, self.rung or self.dtype) if v)

    @property
    def graph(self) -> str:
        """The name of the same as one CUDA graph."""
        return f"{self.name}{GRAPH}"

    @property
    def graphed(self) -> bool:
        return self.kind != "compile-max"  # it has graphs of its own


EAGER, HALF = Variant("eager"), Variant("eager", "fp16")
COMPILE, COMPILE_MAX = Variant("compile"), Variant("compile-max")
RUNGS = tuple(Variant("fastres", rung=r) for r in ("b", "c1", "c2", "d"))
# the vendor's convs with the C++ passes; all convs that the C++ backend has
CUDA = tuple(Variant("fastres", rung=r, backend="cuda") for r in ("b", "c2"))
BY_NAME = {v.name: v for v in (EAGER, HALF, COMPILE, COMPILE_MAX, *RUNGS, *CUDA)}
BASELINES = tuple(v.name for v in (EAGER, HALF, COMPILE, COMPILE_MAX))


@dataclass(frozen=True)
class Config:
    """One network at one batch size, in training or inference, and its variants."""

    model: str
    batch: int
    mode: str  # "train" or "inference"
    variants: tuple[Variant, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model}|{self.batch}|{self.mode}"

    @property
    def training(self) -> bool:
        return self.mode == "train"

    @property
    def timed(self) -> list[str]:
        """The names of all that is timed."""
        return [n for v in self.variants for n in ((v.name, v.graph) if v.graphed else (v.name,))]

    def has(self, row: dict[str, Any]) -> bool:
        return (self.model, self.batch, self.mode) == tuple(row[k] for k in CONFIG)


CONFIG = ("model", "batch", "mode")
ALL = (EAGER, HALF, COMPILE, *RUNGS, *CUDA)
TRAIN = (
    Config("resnet50", 256, "train", ALL),
    Config("resnet18", 256, "train", ALL),
    Config("resnet50", 32, "train", ALL),
    Config("resnet50", 1, "train", (EAGER, HALF, RUNGS[0], CUDA[1])),
    Config("resnet18", 32, "train", (EAGER, HALF, *RUNGS, *CUDA)),
)
# c2 and d differ from c1 in the backward only
FORWARD = (EAGER, HALF, COMPILE, RUNGS[0], RUNGS[1], *CUDA)
SHORT = (EAGER, HALF, RUNGS[0], RUNGS[1], CUDA[1])
INFERENCE = (
    Config("resnet50", 1, "inference", FORWARD),
    Config("resnet50", 256, "inference", FORWARD),
    Config("resnet50", 32, "inference", FORWARD),
    Config("resnet18", 1, "inference", SHORT),
    Config("resnet18", 256, "inference", SHORT),
)
# compiles for minutes: a stage of its own, so that it takes no time from the others
AUTOTUNE = (
    Config("resnet50", 256, "train", (EAGER, COMPILE, COMPILE_MAX, RUNGS[0], CUDA[1])),
    Config("resnet50", 256, "inference", (EAGER, COMPILE, COMPILE_MAX, RUNGS[1], CUDA[1])),
)
DRY = {
    "train": (Config("resnet50", 2, "train", (EAGER, COMPILE, RUNGS[0], CUDA[1])),),
    "inference": (Config("resnet18", 2, "inference", (EAGER, HALF, RUNGS[1], CUDA[1])),),
    "autotune": (Config("resnet18", 2, "inference", (EAGER, COMPILE_MAX, CUDA[0])),),
}


def data(device: Device, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random images (fp32, channels_last) and labels."""
    size = DRY_SIZE if device.dry else SIZE
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    y = torch.randint(8, (batch,), generator=generator)
    return x.to(device.torch, memory_format=torch.channels_last), y.to(device.torch)


class Net:
    """A variant of a network: what it runs, eagerly or as a CUDA graph."""

    def __init__(self, device: Device, config: Config, variant: Variant) -> None:
        import fastres

        self.device, self.variant, self.training = device, variant, config.training
        training = config.training
        self.dtype = DTYPES[variant.dtype]
        self.x, self.y = data(device, config.batch)
        model = network(config.model, device.dry).to(device.torch)
        model = model.to(memory_format=torch.channels_last).train(training)  # type: ignore[call-overload]
        if not training:  # weights in the dtype: no casts in any variant
            model, self.x = model.to(self.dtype), self.x.to(self.dtype)
        if variant.kind == "fastres":
            model = fastres.convert(model, fusion=variant.rung)
        self.model: nn.Module = model
        self.call: Callable[[Tensor], Tensor] = model
        if variant.kind.startswith("compile"):
            kwargs: dict[str, Any] = {"dynamic": False}
            if device.dry:
                kwargs["backend"] = "eager"
            elif variant.kind == "compile-max":
                kwargs["mode"] = "max-autotune"
            self.call = torch.compile(model, **kwargs)
        self.optimizer = None
        if training:
            self.optimizer = torch.optim.SGD(
                model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True
            )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.training)

    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.optimizer is not None
        scale = SCALE[self.variant.dtype]
        self.optimizer.zero_grad(set_to_none=True)
        with self.kernels():
            with self.autocast():
                loss = F.cross_entropy(self.call(x), y)
            (loss if scale == 1.0 else loss * scale).backward()
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.model.parameters()], 1 / scale)
        self.optimizer.step()
        return loss.detach()

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        return self.device.kernels(self.variant.backend)

    def infer(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self.kernels():
            return self.call(x)

    def eager(self) -> Tensor:
        """One step, or one inference."""
        if self.variant.kind == "compile-max" and not self.device.dry:
            torch.compiler.cudagraph_mark_step_begin()
        return self.train_step(self.x, self.y) if self.training else self.infer(self.x)

    def graphed(self, pool: Any) -> Callable[[], Tensor]:
        """The same as one CUDA graph, by fastres.graph."""
        import fastres

        if self.training:
            step = fastres.graph(
                self.model, (self.x, self.y), step=self.train_step, optimizer=self.optimizer,
                pool=pool,
            )  # fmt: skip
            return lambda: step(self.x, self.y)
        infer = fastres.graph(self.model, self.x, step=self.infer, pool=pool)
        return lambda: infer(self.x)


# --- checks, in workers ---------------------------------------------------------------------------


def _job(device: Device, name: str) -> dict[str, Any]:
    model, batch, mode, variant = name.split("|")
    config, v = Config(model, int(batch), mode), BY_NAME[variant]
    found: dict[str, Any] = {}
    with device.triton():
        if v.kind == "fastres":
            found = compare(device, model, v, config.training)
        net = Net(device, config, v)
        for _ in range(1 if device.dry else 3):
            out = net.eager()
        if not device.dry and v.kind != "compile-max":
            device.empty()  # a graph's memory is its own, and others check beside this one
            net.graphed(None)()
        device.timer.synchronize()
        if not bool(out.float().isfinite().all()):
            found = {"ok": False, "error": "wrong: the output is not finite"}
    return found


train_job = inference_job = autotune_job = _job


def compare(device: Device, model: str, v: Variant, training: bool) -> dict[str, Any]:
    """Eager and fastres in the dtype against float64, by the rule of fastres.bench.verify."""
    import fastres
    from fastres.bench.models import settle_running_stats
    from fastres.bench.truth import float64_truth, training_pass
    from fastres.bench.verify import all_errors, checks

    x, y = data(device, 2 if device.dry else CHECKED, seed=2)
    original = network(model, device.dry).to(device.torch).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settle_running_stats(original, x)
    state = {k: t.clone() for k, t in original.state_dict().items()}
    mode = "train" if training else "inference"
    truth = float64_truth(original, x, y)[mode]
    errors = []
    for convert in (False, True):
        net = network(model, device.dry).to(device.torch).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.load_state_dict(state)
        net.train(training)
        if convert:
            net = fastres.convert(net, fusion=v.rung)
        with device.kernels(v.backend if convert else ""):
            if training:
                with torch.autocast(device.type, dtype=DTYPES[v.dtype]):
                    out = net(x)
                errors.append(all_errors(training_pass(net, out.float(), y), truth))
            else:
                net = net.to(DTYPES[v.dtype])
                with torch.no_grad():
                    out = net(x.to(DTYPES[v.dtype]))
                errors.append(all_errors({"outputs": {"": out}}, truth))
    rows = checks(v.dtype, mode, *errors)
    found: dict[str, Any] = {"checks": [r.to_dict() for r in rows]}
    bad = next((r for r in rows if not r.passed), None)
    if bad is not None and not device.dry:  # few channels and images: eager itself is far off
        what = f"{bad.quantity} {bad.measure} error {bad.fastres:.2g} > {bad.limit:.2g}"
        found |= {"ok": False, "error": f"wrong: {what} (eager {bad.eager:.2g})"}
    return found


def checked(
    device: Device, record: Record, stage: str, configs: tuple[Config, ...]
) -> dict[str, dict[str, Any]]:
    """Answers of the workers, by "model|batch|variant"; eager needs none."""
    found: dict[str, dict[str, Any]] = {}
    jobs = [(c, v) for c in configs for v in c.variants if v.kind != "eager"]
    # side by side, what compiles longest first; then max-autotune alone: it chooses by time
    left = record.time_left()
    for kinds, seconds, most, share in (
        (("compile", "fastres"), CHECK_SECONDS, 8, CHECK_SHARE),
        (("compile-max",), MAX_SHARE * left, 1, MAX_SHARE),
    ):
        mine = sorted((j for j in jobs if j[1].kind in kinds), key=lambda j: kinds.index(j[1].kind))
        names = [f"{c.name}|{v.name}" for c, v in mine]
        if names:
            workers = parallel_workers(device.dry, most)
            limit = share * record.time_left()
            answers = run_jobs(stage, names, device.dry, workers, seconds, limit)
            short = [n for n in names if "OutOfMemory" in str(answers.get(n, {}).get("error"))]
            if short and workers > 1:  # side by side they were too many
                limit = share * record.time_left()
                answers |= run_jobs(stage, short, device.dry, 1, seconds, limit)
            found |= answers
    for name, answer in found.items():
        if not answer["ok"]:
            record.note(f"{name}: {answer.get('error')}")
    return found


# --- stages ---------------------------------------------------------------------------------------


def train(device: Device, record: Record) -> None:
    _stage(device, record, TRAIN)


def inference(device: Device, record: Record) -> None:
    _stage(device, record, INFERENCE)


def autotune(device: Device, record: Record) -> None:
    _stage(device, record, AUTOTUNE)


def _stage(device: Device, record: Record, configs: tuple[Config, ...]) -> None:
    configs = DRY[record.stage] if device.dry else configs
    # rows of variants that failed are there before the others are timed: a config is kept whole
    done = [c for c in configs if _whole(c, record.before.get("rows", []))]
    record.keep(lambda row: any(c.has(row) for c in done))
    todo = tuple(c for c in configs if c not in done)
    found = machine(device)
    record.set(machine=found, expected={c.name: c.timed for c in configs})
    answers = checked(device, record, record.stage, todo)
    record.set(checks={**record.before.get("checks", {}), **answers})
    for config in todo:
        if record.time_left() < 0:
            record.unfinished(f"{config.name}: not measured, no time left")
            continue
        with device.triton():
            rows = measure(device, record, config, answers, found)
        if any(map(_late, rows)):
            record.unfinished(f"{config.name}: not all variants, no time left")
        device.empty()
        show(record.stage, config, rows)
        record.save()


def _whole(config: Config, rows: list[dict[str, Any]]) -> bool:
    """Whether every variant has its row, and none is missing for want of time."""
    mine = [row for row in rows if config.has(row)]
    there = {row["variant"] for row in mine}
    return there >= {v.name for v in config.variants} and not any(map(_late, mine))


def _late(row: dict[str, Any]) -> bool:
    """Whether a variant is missing for want of time."""
    return "no time left" in str(row.get("error"))


def measure(
    device: Device,
    record: Record,
    config: Config,
    answers: dict[str, dict[str, Any]],
    found: dict[str, float],
) -> list[dict[str, Any]]:
    """All variants of a configuration, in turns: the rows, those that failed among them."""
    rows = []
    whose = {k: getattr(config, k) for k in CONFIG}
    shots: dict[str, Shot] = {}
    pool, first = device.pool(), None
    nets = []
    seconds = 0.0 if device.dry else 0.08
    torch._dynamo.reset()  # once: a second one would throw away what the variant before compiled
    for v in config.variants:
        answer = answers.get(f"{config.name}|{v.name}", {"ok": v.kind == "eager"})
        if not answer["ok"]:
            why = answer.get("error")
            rows.append(record.add(**whose, variant=v.name, status="not measured", error=why))
            continue
        name = v.name
        try:
            net = Net(device, config, v)
            nets.append(net)
            out = net.eager().float()
            value = float(out.mean() if config.training else out.norm())
            first = value if first is None else first
            if not abs(value - first) <= LOSS_LIMIT * abs(first) + (0.2 if device.dry else 0.0):
                raise ValueError(f"wrong: it gives {value:.4g}, eager {first:.4g}")
            shots[name] = device.timer.shot([net.eager], seconds, graph=False)
            if v.graphed:
                name = v.graph  # what fails from here is the graph: the plain one is timed
                shots[name] = device.timer.shot([net.graphed(pool)], seconds, graph=False)
        except Exception as error:
            why = one_line(error)
            rows.append(record.add(**whose, variant=name, status="failed", error=why))
            if device.broken() is not None:
                raise
    times = take_turns(shots, 1 if device.dry else ROUNDS, record.time_left)
    medians = {name: statistics.median(t) for name, t in times.items()}
    plain = [n for n in BASELINES if n in medians]
    graphs = [n for n in medians if n.removesuffix(GRAPH) in BASELINES]
    ceilings = roofs(device, config, found)
    for name, values in times.items():
        row = {
            **whose, "variant": name, "status": "ok",
            **summary(values), "img/s": config.batch / medians[name], "raw": values,
        }  # fmt: skip
        if plain:
            best = min(plain, key=lambda n: medians[n])
            row["against"] = {"best baseline": {"name": best, **ratio(values, times[best])}}
            if "eager bf16" in times:
                row["against"]["eager bf16"] = ratio(values, times["eager bf16"])
            best = min(graphs, key=lambda n: medians[n])
            row["against"]["best baseline or graph"] = {
                "name": best, **ratio(values, times[best])
            }  # fmt: skip
        rung = name.removesuffix(GRAPH).removeprefix("fastres ").removeprefix("cuda ")
        if rung in ceilings:
            row |= {"ceiling": ceilings[rung], "percent": 100 * row["img/s"] / ceilings[rung]}
        rows.append(record.add(**row))
    return rows


def roofs(device: Device, config: Config, found: dict[str, float]) -> dict[str, float]:
    """img/s that each rung's kernels allow at the measured bandwidth and rate."""
    from fastres import roofline

    size = DRY_SIZE if device.dry else SIZE
    net = network(config.model, device.dry).to("meta")
    shape = (config.batch, 3, size, size)
    names = {"b": "b", "c1": "folded", "c2": "folded"}
    if config.training:
        names = {"b": "b", "c1": "c1", "c2": "c2", "d": "d"}
    return {
        ours: roofline.model(net, shape, "bf16", rung, config.training).ceiling(
            found["bandwidth"], found["rate"]
        )
        for ours, rung in names.items()
    }


def show(stage: str, config: Config, rows: list[dict[str, Any]]) -> None:
    lines = [
        (
            r["variant"], r["img/s"], r["us"] / 1e3,
            *(r.get("against", {}).get(k, {}).get("x") for k in
              ("eager bf16", "best baseline", "best baseline or graph")),
            r.get("percent"),
        )
        for r in rows if r["status"] == "ok"
    ]  # fmt: skip
    heads = ("variant", "img/s", "ms", "x eager", "x best", "x best or graph", "% roof")
    table(f"{stage}: {config.model}, {config.mode}, batch {config.batch}", heads, lines)


def memory(device: Device, record: Record) -> None:
    """Bytes that a forward saves for its backward, and the peak of a step."""
    from fastres.bench.saved import saved_bytes

    batch = 2 if device.dry else MEMORY_BATCH
    lines = []
    models = ("resnet50",) if device.dry else ("resnet50", "resnet18")
    variants = (EAGER, *(RUNGS[:1] if device.dry else RUNGS), CUDA[1])
    record.set(expected={"rows": len(models) * len(variants)})
    kept = record.keep(lambda row: row.get("saved_x") is not None)
    for model in models:
        before = {row["variant"]: row for row in kept if row["model"] == model}
        eager: dict[str, float] = before.get(EAGER.name, {})
        for v in variants:
            if v.name in before:
                continue
            if record.time_left() < 0:
                record.unfinished(f"{model} {v.name}: not measured, no time left")
                continue
            row: dict[str, Any] = {"model": model, "batch": batch, "variant": v.name}
            try:
                with device.triton():
                    net = Net(device, Config(model, batch, "train"), v)
                    net.eager()

                    def forward(net: Net = net) -> Tensor:
                        with net.kernels(), net.autocast():
                            return net.call(net.x)

                    row["saved"] = saved_bytes(net.model, forward, net.x)
                    row["peak"] = device.peak(net.eager)
                del net, forward
            except Exception as error:
                row["error"] = one_line(error)
                record.add(**row)
                if device.broken() is not None:
                    raise
                continue
            device.empty()
            if v is EAGER:
                eager = row
            for key in ("saved", "peak"):  # without eager there is no "x eager"
                row[f"{key}_x"] = row[key] / eager[key] if eager.get(key) else None
            record.add(**row)
            mb = [row[k] / batch / 1e6 for k in ("saved", "peak")]
            lines.append((model, v.name, mb[0], row["saved_x"], mb[1], row["peak_x"]))
    heads = ("model", "variant", "saved MB/img", "x eager", "peak MB/img", "x eager")
    done = completed(sum("saved" in r for r in record.rows), record.found["expected"]["rows"])
    table(f"memory, batch {batch}: {done}", heads, lines)
