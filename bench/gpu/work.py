"""Bytes and FLOPs of the variants of a case (cases.py), by fastres.roofline's formulas."""

from __future__ import annotations

from bench.gpu.cases import Case, pooled
from fastres.roofline import ConvShape, Traffic, traffic


def moved(case: Case, variant: str, dtype: str) -> Traffic | None:
    """Bytes and FLOPs of a variant that is one kernel of ours."""
    s = case.shape
    if isinstance(s, ConvShape):
        if variant == "vendor" and case.op in ("fprop", "dgrad", "wgrad"):
            return {"fprop": traffic.fprop, "dgrad": traffic.dgrad, "wgrad": traffic.wgrad}[
                case.op
            ](s, dtype)
        formed = case.h != "none" or case.dy != "none"
        passes = formed and (variant == "cutlass" or not s.pointwise)  # the 1x1 kernels need none
        if variant not in ("fused", "d") and (variant not in ("cuda", "cutlass") or passes):
            return None
        if case.op == "fprop":
            return traffic.fprop(s, dtype, case.h, case.epilogue)
        if case.op == "dgrad":
            return traffic.dgrad(s, dtype, case.dy, case.epilogue)
        if case.op == "wgrad":
            return traffic.wgrad(s, dtype, case.dy, case.h)
        return traffic.dgrad_wgrad(s, dtype, case.dy, case.h, case.epilogue)
    op, dual = case.op, case.epilogue.startswith("dual")
    if op == "bn_stats":
        return traffic.bn_stats(s, dtype)
    if op == "bn_apply":
        plain = case.epilogue == "relu"
        return traffic.bn_apply(s, dtype, residual=not plain, mask=not plain)
    if op == "add_relu":
        return traffic.bn_apply(s, dtype, residual=True, mask=True)
    if op in ("bn_bwd_reduce", "bn_bwd_apply"):
        formula = traffic.bn_bwd_reduce if op == "bn_bwd_reduce" else traffic.bn_bwd_apply
        return formula(s, dtype, mask=case.dy == "mask", dual=dual)
    if op == "relu_bwd":
        return traffic.relu_bwd(s, dtype)
    return getattr(traffic, op)(s, pooled(s), dtype)


def flops(case: Case, variant: str, dtype: str) -> int | None:
    """FLOPs of a conv by the C++ kernels, whoever forms its operands; None of anything else."""
    s = case.shape
    formulas = {"fprop": traffic.fprop, "dgrad": traffic.dgrad, "wgrad": traffic.wgrad}
    if not isinstance(s, ConvShape) or variant not in ("cuda", "cutlass"):
        return None
    return formulas[case.op](s, dtype).flops if case.op in formulas else None
