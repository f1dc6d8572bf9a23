"""`python -m bench.plan_overhead`: host time that the plan adds to a converted network's forward.

The lookups that a forward makes (fastres._chosen.choice_of, one a block or stem) are recorded, then
made again by themselves: with nothing measured, and with a plan that has an entry for each.
Microseconds a forward, median and quartiles."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

import fastres
from fastres import nn as fused_nn
from fastres import plan
from fastres._chosen import plan_key
from fastres.bench.models import build_model

from .winograd import save

USERS = ("fastres._network", "fastres.convert.torchvision")  # beside fastres.nn


def lookups(model: torch.nn.Module, x: torch.Tensor, training: bool) -> list[tuple[Any, Any]]:
    """(module, input) of every lookup of a forward."""
    found: list[tuple[Any, Any]] = []
    choice_of = fused_nn.choice_of
    users: list[Any] = [fused_nn, *map(sys.modules.get, USERS)]

    def recorded(module: Any, x: torch.Tensor) -> tuple[str, str]:
        found.append((module, x.detach()))
        return choice_of(module, x)

    model.train(training)
    try:
        for user in users:
            user.choice_of = recorded
        with torch.set_grad_enabled(training):
            model(x)
    finally:
        for user in users:
            user.choice_of = choice_of
    return found


def measure(model: torch.nn.Module, batch: int, repeats: int, training: bool) -> list[dict]:
    x = torch.randn(batch, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    calls = lookups(model, x, training)
    rows = []
    for state in ("nothing measured", "all measured"):
        if state == "all measured":
            entry = plan.Entry("b", {"b": 1.0, "eager": 1.2}, 1.2)
            with torch.set_grad_enabled(training):
                keys = {plan_key(m, x, training) for m, x in calls}
            plan.current(x.device).add(dict.fromkeys(keys, entry))
        times = []
        with torch.set_grad_enabled(training):
            for _ in range(repeats):
                start = time.perf_counter()
                for module, h in calls:
                    fused_nn.choice_of(module, h)
                times.append(1e6 * (time.perf_counter() - start))
        low, middle, high = statistics.quantiles(times, n=4)
        rows.append({
            "mode": "training" if training else "inference", "plan": state, "lookups": len(calls),
            "us": middle, "q1": low, "q3": high,
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan_overhead", description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--repeats", type=int, default=2000, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.repeats < 2:
        parser.error("--repeats must be at least 2")
    rows: list[dict] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, FASTRES_CACHE=folder),  # the user's own plan is left alone
    ):
        for training in (True, False):
            plan.forget()
            for file in Path(folder).glob("plan-*"):
                file.unlink()
            model = fastres.convert(build_model(options.model))
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            rows += measure(model, 2, options.repeats, training)
    plan.forget()
    table = Table(title=f"Host time of the plan's lookups in a forward of {options.model}")
    for column in ("mode", "plan", "lookups", "us a forward", "quartiles"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r["mode"], r["plan"], str(r["lookups"]), f"{r['us']:.1f}",
            f"{r['q1']:.1f}-{r['q3']:.1f}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        save(options.json, "fastres-plan-overhead", "plan_overhead", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
