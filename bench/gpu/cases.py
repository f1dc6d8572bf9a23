"""The kernels of a ResNet as cases: operands, the call of each variant, what it must give.

A case is one kernel form on one shape, read off fastres.roofline's list of a network's kernels, so
that nothing here can fall behind it. Variants of a streaming kernel: ours (Triton) and cuda (CUDA
C++). Of a convolution:

    fused     the kernel of fastres.kernels
    cuda      the CUDA C++ backend's (Hopper), with the passes that form its operands
    cutlass   the same of a 1x1 on CUTLASS's collectives, where the backend has another kernel
    passes    the vendor's convolution, and the passes of rung b around it that do the same
    vendor    the vendor's convolution alone: a yardstick, it does less

and of a layer's whole backward (op "backward") b, c1, c2, d: what each rung runs there. Every call
takes the module of the kernels, so that the reference backend gives the truth by the same words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastres import roofline
from fastres._contract import Gradient, Normalise, NormGradient, Previous, Shortcut, Sums
from fastres._layout import mask_shape
from fastres.roofline import ConvShape

Run = Callable[[Any, "Set"], None]
EPS = 1e-5
POOL = (3, 2, 1)
NONE4 = (None,) * 4


@dataclass(frozen=True)
class Case:
    """op: as in fastres.roofline, or "backward"; dy, h: prologues of the gradient and of the
    input; count: how often the network runs it on its rung; c2: in training on rung c2."""

    op: str
    shape: tuple[int, ...] | ConvShape
    dy: str = "none"
    h: str = "none"
    epilogue: str = "none"
    path: str = field(default="", compare=False)
    count: int = field(default=1, compare=False)
    c2: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        form = [v for v in (self.dy, self.h, self.epilogue) if v != "none"]
        return "/".join([self.op, *form, self.where])

    @property
    def where(self) -> str:
        s = self.shape
        if isinstance(s, ConvShape):
            down = f" s{s.stride[0]}" if s.stride[0] > 1 else ""
            return f"{s.N}x{s.C}x{s.H}x{s.W}>{s.K} {s.R}x{s.S}{down}"
        return "x".join(map(str, s))


class Set(dict):
    """Named operands and outputs of one rotation."""

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.values() if isinstance(t, Tensor))


# --- which cases there are ------------------------------------------------------------------------


def conv_cases(net: Any, shape: tuple[int, ...], dtype: str) -> list[Case]:
    """Every convolution kernel of rungs c1, c2, d and of folded inference, each form once; then
    each layer's backward."""
    seen: dict[tuple, Case] = {}
    counts: dict[tuple, dict[str, int]] = {}

    def add(rung: str, case: Case) -> None:
        key = (case.op, case.shape, case.dy, case.h, case.epilogue)
        seen.setdefault(key, case)
        uses = counts.setdefault(key, {})
        uses[rung] = uses.get(rung, 0) + 1

    for rung, training in (("c1", True), ("c2", True), ("d", True), ("folded", False)):
        found = roofline.model(net, shape, dtype, rung, training)
        backward: dict[str, dict[str, Any]] = {}
        for k in found.kernels:
            if k.op not in ("fprop", "dgrad", "wgrad", "dgrad_wgrad") or k.shape is None:
                continue
            dy, h = _prologues(k.op, k.prologue)
            add(rung, Case(k.op, k.shape, dy, h, k.epilogue, k.path))
            if rung == "c2" and k.op in ("dgrad", "wgrad"):
                backward.setdefault(k.path, {})[k.op] = (k.shape, dy, h, k.epilogue)
        for path, both in backward.items():
            if set(both) == {"dgrad", "wgrad"}:
                where, dy, _, epilogue = both["dgrad"]
                add(rung, Case("backward", where, dy, both["wgrad"][2], epilogue, path))
    return [
        replace(c, count=max(counts[key].values()), c2=counts[key].get("c2", 0))
        for key, c in seen.items()
    ]


def _prologues(op: str, text: str) -> tuple[str, str]:
    """(of the gradient, of the input) from the model's note: "dbn,norm_relu" and the like."""
    parts = [p for p in text.split(",") if p != "none"]
    if op == "fprop":
        return "none", parts[0] if parts else "none"
    dy = next((p for p in parts if p.endswith("dbn")), "none")
    return dy, next((p for p in parts if p.startswith("norm")), "none")


def stream_cases(net: Any, shape: tuple[int, ...], dtype: str) -> list[Case]:
    """Every streaming kernel on every shape it runs on."""
    kernels = roofline.model(net, shape, dtype, "b").kernels
    convs = {k.path: k.shape for k in kernels if k.op == "fprop" and k.shape is not None}
    stem, *rest = convs
    ends = {
        convs[k.path].y: k.epilogue.startswith("dual")
        for k in sorted(kernels, key=lambda k: k.epilogue)
        if k.op == "bn_apply" and "add" in k.epilogue and k.path in convs
    }
    inner = dict.fromkeys(convs[p].y for p in rest if convs[p].y not in ends)
    y = convs[stem].y
    found = [
        Case("bn_stats", y), Case("bn_relu_maxpool", y), Case("bn_relu_maxpool_bwd_reduce", y),
        Case("bn_relu_maxpool_bwd_apply", y),
    ]  # fmt: skip
    for s in inner:
        found += [
            Case("bn_stats", s),
            Case("bn_apply", s, epilogue="relu"),
            Case("bn_bwd_reduce", s, dy="recompute"),
            Case("bn_bwd_apply", s, dy="recompute"),
            Case("bn_bwd_apply", s, dy="none"),
        ]
    for s, dual in ends.items():
        kinds = ("add", "dual") if dual else ("add",)
        found += [Case("bn_stats", s), Case("relu_bwd", s)]
        for kind in kinds:
            found += [
                Case("bn_apply", s, epilogue=f"{kind}_relu"),
                Case("bn_bwd_reduce", s, dy="mask", epilogue=kind),
                Case("bn_bwd_apply", s, dy="mask", epilogue=kind),
            ]
    return [*found, Case("add_relu", next(iter(ends)))]


# --- operands -------------------------------------------------------------------------------------


class Maker:
    """Random operands: activations about 1 in size, statistics and affines that keep them so."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def activation(self, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(
            shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last
        )
        return out.normal_(generator=self.generator)

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        like = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
        outer, width = mask_shape(like)
        return torch.randint(
            0, 256, (outer, width), generator=self.generator, device=self.device, dtype=torch.uint8
        )

    def norm(self, channels: int) -> Normalise:
        mean, beta = 0.1 * self.normal(channels), 0.3 * self.normal(channels)
        gamma = 1 + 0.1 * self.normal(channels)
        return Normalise(mean, 1 + 0.1 * self.normal(channels).abs(), gamma, beta)


def operands(case: Case, make: Maker) -> Set:
    """The inputs of a case; outputs are added by `outputs`."""
    return _conv_operands(case, make) if isinstance(case.shape, ConvShape) else _stream(case, make)


def _conv_operands(case: Case, make: Maker) -> Set:
    s = case.shape
    assert isinstance(s, ConvShape)
    fan = s.C * s.R * s.S
    w = (make.normal(s.K, s.C, s.R, s.S) * fan**-0.5).to(make.dtype)
    found = Set(
        x=make.activation(s.x), w=w.contiguous(memory_format=torch.channels_last),
        geometry=[*s.stride, *s.padding, *s.dilation, s.groups], n_in=make.norm(s.C),
        n_out=make.norm(s.K), shape=s,
    )  # fmt: skip
    if case.op == "fprop":
        if case.h in ("norm_add_relu", "dual_add_relu"):
            found["r"] = make.activation(s.x)
            found["n_r"] = make.norm(s.C) if case.h == "dual_add_relu" else None
        if case.epilogue == "affine_add_relu":
            found["r"] = make.activation(s.y)
        return found
    found["g"] = make.activation(s.y)
    found["g_mask"] = make.bits(s.y) if case.dy == "mask_dbn" else None
    if case.dy != "none" or case.op == "backward":
        found["y"] = make.activation(s.y)
        found["dgamma"], found["dbeta"] = make.normal(s.K), make.normal(s.K)
    if "add" in case.epilogue:
        found["dres"] = make.activation(s.x)
    if case.epilogue.endswith("add_gate_sums"):
        found["y_end"], found["z_mask"] = make.activation(s.x), make.bits(s.x)
        found["n_end"] = make.norm(s.C)
        if case.epilogue.startswith("dual"):
            found["y_short"], found["n_short"] = make.activation(s.x), make.norm(s.C)
    return found


def pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    n, c, h, w = shape
    kernel, stride, padding = POOL
    return n, c, (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1


def _stream(case: Case, make: Maker) -> Set:
    assert isinstance(case.shape, tuple)
    n, c, h, w = shape = case.shape
    found = Set(x=make.activation(shape), n=make.norm(c), shape=shape)
    op = case.op
    if op in ("bn_bwd_reduce", "bn_bwd_apply", "relu_bwd"):
        found["dz"] = make.activation(shape)
        found["mask_in"] = make.bits(shape) if case.dy == "mask" or op == "relu_bwd" else None
        found["dgamma"], found["dbeta"], found["res_dgamma"] = (make.normal(c) for _ in range(3))
    if "add" in case.epilogue or "dual" in case.epilogue or op in ("add_relu", "relu_bwd"):
        found["r"] = make.activation(shape)
        found["n_r"] = make.norm(c)
    if op.startswith("bn_relu_maxpool_bwd"):
        found["dz"] = make.activation(pooled(shape))
        index = torch.randint(
            0, 9, pooled(shape), generator=make.generator, device=make.device, dtype=torch.uint8
        )
        found["index_in"] = index.contiguous(memory_format=torch.channels_last)
        found["dgamma"], found["dbeta"] = make.normal(c), make.normal(c)
    return found


def outputs(case: Case, s: Set) -> dict[str, Tensor]:
    """Fresh outputs, full of NaN (bytes: 0xA5): what is not written shows."""
    x, shape = s["x"], s["shape"]

    def activation(size: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(
            size, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
        )
        return out.fill_(0xA5 if dtype == torch.uint8 else float("nan"))

    def vectors(*names: str, channels: int) -> dict[str, Tensor]:
        nan = float("nan")
        return {n: torch.full((channels,), nan, device=x.device) for n in names}

    def mask(size: tuple[int, ...]) -> Tensor:
        like = torch.empty(size, device="meta").to(memory_format=torch.channels_last)
        return torch.full(mask_shape(like), 0xA5, dtype=torch.uint8, device=x.device)

    if isinstance(shape, ConvShape):
        if case.op == "fprop":
            if case.epilogue.startswith("affine"):
                return {"z": activation(shape.y)}
            found = {"y": activation(shape.y)}
            if case.epilogue == "stats":
                found["stats"] = torch.full((3, shape.K), float("nan"), device=x.device)
            if "add" in case.h:
                found |= {"z": activation(shape.x), "mask": mask(shape.x)}
            return found
        found = {}
        if case.op != "wgrad":
            found["dx"] = activation(shape.x)
            if case.epilogue.endswith("gate_sums"):
                found |= vectors("dgamma_in", "dbeta_in", channels=shape.C)
            if case.epilogue.startswith("dual"):
                found |= vectors("res_dgamma_in", channels=shape.C)
        if case.op != "dgrad":
            found["dw"] = torch.full_like(s["w"], float("nan"))
        return found
    c, op = shape[1], case.op
    dual = case.epilogue.startswith("dual")
    if op == "bn_stats":
        return vectors("mean", "var", "rstd", channels=c)
    if op in ("bn_apply", "add_relu"):
        found = {"z": activation(shape)}
        return found | ({"mask": mask(shape)} if case.epilogue != "relu" else {})
    if op == "bn_bwd_reduce":
        names = ("out_dgamma", "out_dbeta", *(("out_res_dgamma",) if dual else ()))
        return vectors(*names, channels=c)
    if op == "bn_bwd_apply":
        return {"dx": activation(shape)} | ({"dres": activation(shape)} if dual else {})
    if op == "relu_bwd":
        return {"dx": activation(shape)}
    if op == "bn_relu_maxpool":
        size = pooled(shape)
        return {"z": activation(size), "index": activation(size, torch.uint8)}
    if op == "bn_relu_maxpool_bwd_reduce":
        return vectors("out_dgamma", "out_dbeta", channels=c)
    assert op == "bn_relu_maxpool_bwd_apply", op
    return {"dx": activation(shape)}


# --- calls ----------------------------------------------------------------------------------------


def variants(case: Case) -> dict[str, Run]:
    """The calls of a case, ours first."""
    if not isinstance(case.shape, ConvShape):
        from fastres import _cuda

        return {
            "ours": lambda m, s: _run_stream(case, m, s),
            "cuda": lambda m, s: _run_stream(case, _cuda, s),
        }
    from fastres import _cuda, _cuda_cutlass

    if case.op == "fprop":
        cutlass = {"cutlass": lambda m, s: _fprop(case, _cuda_cutlass, s)}
        return {
            "fused": lambda m, s: _fprop(case, m, s),
            "cuda": lambda m, s: _fprop(case, _cuda, s),
            **(cutlass if case.shape.pointwise else {}),
            "passes": lambda m, s: _fprop_passes(case, m, s),
            "vendor": lambda m, s: _put(s, "y", _conv(s, s["x"])),
        }
    if case.op == "backward":
        rungs = {
            "b": lambda m, s: _backward_b(case, m, s),
            "c1": lambda m, s: _backward_c1(case, m, s),
            "c2": lambda m, s: _backward_c2(case, m, s),
        }
        if case.shape.pointwise:
            rungs["d"] = lambda m, s: _both(case, m, s)
        return rungs
    ours = {"dgrad": _dgrad, "wgrad": _wgrad, "dgrad_wgrad": _both}[case.op]
    which = {"dgrad": (True, False), "wgrad": (False, True), "dgrad_wgrad": (True, True)}[case.op]

    def vendor(m: Any, s: Set) -> None:
        dx, dw = _conv_bwd(s, s["g"], s["x"], which)
        _put(s, "dx", dx)
        _put(s, "dw", dw)

    fused = {"fused": lambda m, s: ours(case, m, s)}
    if case.op == "dgrad_wgrad":
        return {**fused, "vendor": vendor}
    # wgrad has dy from dgrad's passes and h from the forward's: the vendor's conv is all there is
    passes = {"passes": lambda m, s: _backward_passes(case, m, s, which)}
    return {
        **fused,
        "cuda": lambda m, s: ours(case, _cuda, s),
        **(passes if case.op == "dgrad" else {}),
        "vendor": vendor,
    }


def truth(case: Case) -> Run:
    """The call that the reference backend answers as the truth of every variant."""
    if case.op == "backward":
        return lambda m, s: _backward_c2(case, m, s)
    return next(iter(variants(case).values()))


def compared(case: Case, variant: str, names: list[str]) -> list[str]:
    """The outputs in which a variant must agree with the truth: "vendor" does less than the others,
    and rung b gates a gradient where it is read next."""
    if variant == "vendor":
        plain = {"fprop": case.h == "none" and not case.epilogue.startswith("affine")}
        same = plain.get(case.op, case.dy == "none" and case.h == "none")
        if not same:
            return []
        gated = case.epilogue not in ("none", "stats")
        return [n for n in names if n in ("y", "dw") or (n == "dx" and not gated)]
    if variant in ("b", "passes") and case.epilogue.endswith("gate_sums"):
        return [n for n in names if n != "dx"]
    return names


def _put(s: Set, name: str, value: Tensor | None) -> None:
    """A vendor's op allocates its output; ours are given."""
    if value is not None:
        s[name] = value


def _conv(s: Set, h: Tensor) -> Tensor:
    sh, sw, ph, pw, dh, dw, groups = s["geometry"]
    return torch.ops.aten.convolution.default(
        h, s["w"], None, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups
    )


def _conv_bwd(s: Set, dy: Tensor, h: Tensor, which: tuple[bool, bool]) -> tuple:
    sh, sw, ph, pw, dh, dw, groups = s["geometry"]
    return torch.ops.aten.convolution_backward.default(
        dy, h, s["w"], None, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups, [*which, False]
    )[:2]


def _fprop(case: Case, m: Any, s: Set) -> None:
    if case.epilogue.startswith("affine"):
        m.conv_fprop_act(
            s["z"], s["x"], s["w"], s["geometry"], s["n_out"], s.get("r"),
            case.epilogue.endswith("relu"),
        )  # fmt: skip
        return
    norm = None if case.h == "none" else s["n_in"]
    shortcut = Shortcut(s["r"], s["n_r"]) if "add" in case.h else None
    m.conv_fprop(
        s["y"], s.get("stats"), s.get("z"), s.get("mask"), s["x"], s["w"], s["geometry"], norm,
        shortcut, EPS,
    )  # fmt: skip


def _fprop_passes(case: Case, m: Any, s: Set) -> None:
    h = s["x"]
    if case.h != "none":
        h = s["z"] if "z" in s else torch.empty_like(h)
        res = (s.get("r"), *(s.get("n_r") or NONE4))
        m.bn_apply(h, s.get("mask"), s["x"], *s["n_in"], *res, True)
    y = _conv(s, h)
    if case.epilogue.startswith("affine"):
        relu = case.epilogue.endswith("relu")
        m.bn_apply(y, None, y, *s["n_out"], s.get("r"), *NONE4, relu)
        s["z"] = y
        return
    s["y"] = y
    if case.epilogue == "stats":
        m.bn_stats(*s["stats"], y, EPS)


def _previous(case: Case, s: Set) -> tuple[Gradient | None, Previous | None, Sums | None]:
    dres = Gradient(s["dres"]) if "dres" in s else None
    if not case.epilogue.endswith("gate_sums"):
        return dres, None, None
    sums = Sums(s["dgamma_in"], s["dbeta_in"], s.get("res_dgamma_in"))
    if case.epilogue == "gate_sums":
        return dres, Previous(s["x"], s["n_in"]), sums
    short = Shortcut(s["y_short"], s["n_short"]) if "y_short" in s else Shortcut(s["y_end"])
    return dres, Previous(s["y_end"], s["n_end"], s["z_mask"], short), sums


def _gradient(case: Case, s: Set) -> tuple[Gradient, NormGradient | None]:
    bn = None
    if case.dy != "none":
        bn = NormGradient(s["y"], s["n_out"], s["dgamma"], s["dbeta"], True)
    return Gradient(s["g"], s["g_mask"]), bn


def _input_norm(case: Case, s: Set) -> Normalise | None:
    return s["n_in"] if case.h == "norm_relu" else None


def _dgrad(case: Case, m: Any, s: Set) -> None:
    g, bn = _gradient(case, s)
    dres, prev, sums = _previous(case, s)
    m.conv_dgrad(s["dx"], sums, g, s["w"], s["geometry"], bn, dres, prev)


def _wgrad(case: Case, m: Any, s: Set) -> None:
    g, bn = _gradient(case, s)
    m.conv_wgrad(s["dw"], g, s["x"], s["geometry"], bn, _input_norm(case, s))


def _both(case: Case, m: Any, s: Set) -> None:
    g, bn = _gradient(case, s)
    dres, prev, sums = _previous(case, s)
    norm = _input_norm(case, s)
    m.conv_bwd_pointwise(
        s["dx"], sums, s["dw"], g, s["x"], s["w"], s["geometry"], bn, norm, dres, prev
    )


def _backward_c2(case: Case, m: Any, s: Set) -> None:
    _dgrad(case, m, s)
    _wgrad(case, m, s)


def _dy(case: Case, m: Any, s: Set) -> Tensor:
    """dy of the conv's output by its own pass."""
    dy = torch.empty_like(s["y"])
    gate = "none" if s["g_mask"] is None else "mask"
    m.bn_bwd_apply(
        dy, None, s["g"], s["g_mask"], s["y"], *s["n_out"], s["dgamma"], s["dbeta"],
        None, *NONE4, gate, True, False,
    )  # fmt: skip
    return dy


def _backward_c1(case: Case, m: Any, s: Set) -> None:
    g = Gradient(_dy(case, m, s))
    dres, prev, sums = _previous(case, s)
    m.conv_dgrad(s["dx"], sums, g, s["w"], s["geometry"], None, dres, prev)
    m.conv_wgrad(s["dw"], g, s["x"], s["geometry"], None, _input_norm(case, s))


def _backward_b(case: Case, m: Any, s: Set) -> None:
    _backward_passes(case, m, s, (True, True))


def _backward_passes(case: Case, m: Any, s: Set, which: tuple[bool, bool]) -> None:
    """The vendor's dgrad, wgrad or both, and rung b's passes around them."""
    h = s["x"]
    if which[1] and case.h == "norm_relu":
        h = torch.empty_like(h)
        m.bn_apply(h, None, s["x"], *s["n_in"], None, *NONE4, True)
    dx, dw = _conv_bwd(s, s["g"] if case.dy == "none" else _dy(case, m, s), h, which)
    _put(s, "dw", dw)
    if dx is None:
        return
    if "dres" in s:
        dx.add_(s["dres"])
    s["dx"] = dx
    if case.epilogue == "gate_sums":
        m.bn_bwd_reduce(
            s["dgamma_in"], s["dbeta_in"], None, dx, None, s["x"], *s["n_in"],
            None, None, None, "recompute",
        )  # fmt: skip
    elif case.epilogue.endswith("gate_sums"):
        res = (None, None, None)
        if "y_short" in s:
            res = (s["y_short"], s["n_short"].mean, s["n_short"].rstd)
        m.bn_bwd_reduce(
            s["dgamma_in"], s["dbeta_in"], s.get("res_dgamma_in"), dx, s["z_mask"], s["y_end"],
            *s["n_end"], *res, "mask",
        )  # fmt: skip


def _run_stream(case: Case, m: Any, s: Set) -> None:
    op, x, n = case.op, s["x"], s["n"]
    dual = case.epilogue.startswith("dual")
    if op == "bn_stats":
        m.bn_stats(s["mean"], s["var"], s["rstd"], x, EPS)
    elif op == "bn_apply":
        res = (s.get("r"), *(s["n_r"] if dual else NONE4))
        m.bn_apply(s["z"], s.get("mask"), x, *n, *res, True)
    elif op == "add_relu":
        m.add_relu(s["z"], s["mask"], x, s["r"])
    elif op == "relu_bwd":
        m.relu_bwd(s["dx"], s["r"], s["dz"], s["mask_in"])
    elif op == "bn_bwd_reduce":
        res = (s["r"], s["n_r"].mean, s["n_r"].rstd) if dual else (None, None, None)
        m.bn_bwd_reduce(
            s["out_dgamma"], s["out_dbeta"], s.get("out_res_dgamma"), s["dz"], s["mask_in"], x, *n,
            *res, case.dy,
        )  # fmt: skip
    elif op == "bn_bwd_apply":
        res = (None,) * 5
        if dual:
            n_r = s["n_r"]
            res = (s["r"], n_r.mean, n_r.rstd, n_r.gamma, s["res_dgamma"])
        m.bn_bwd_apply(
            s["dx"], s.get("dres"), s["dz"], s["mask_in"], x, *n, s["dgamma"], s["dbeta"], *res,
            case.dy, True, dual,
        )  # fmt: skip
    elif op == "bn_relu_maxpool":
        m.bn_relu_maxpool(s["z"], s["index"], x, *n, *POOL)
    elif op == "bn_relu_maxpool_bwd_reduce":
        m.bn_relu_maxpool_bwd_reduce(
            s["out_dgamma"], s["out_dbeta"], s["dz"], s["index_in"], x, n.mean, n.rstd, *POOL
        )
    else:
        m.bn_relu_maxpool_bwd_apply(
            s["dx"], s["dz"], s["index_in"], x, n.mean, n.rstd, n.gamma, s["dgamma"], s["dbeta"],
            *POOL, True,
        )  # fmt: skip


def unique(cases: list[Case]) -> list[Case]:
    """The first case of each name."""
    return list({c.name: c for c in cases}.values())


def thinned(cases: list[Case]) -> list[Case]:
    """One case of every form, the smallest: a dry run's."""

    def key(c: Case) -> tuple:
        pointwise = c.op == "backward" and isinstance(c.shape, ConvShape) and c.shape.pointwise
        return c.op, c.dy, c.h, c.epilogue, pointwise

    def size(c: Case) -> int:
        shape = c.shape.x if isinstance(c.shape, ConvShape) else c.shape
        return torch.Size(shape).numel()

    groups = itertools.groupby(sorted(cases, key=key), key)
    return [min(group, key=size) for _, group in groups]
