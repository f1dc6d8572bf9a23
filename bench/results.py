"""Reads result files: those of `fastres bench`, of `pytest bench/ --benchmark-json`, and of the GPU
run-book (`python -m bench.gpu`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from fastres.bench.report import SCHEMA_VERSION as BENCH_VERSION
from fastres.bench.stats import speed_ratios

from .gpu.record import KIND as GPU_KIND
from .gpu.record import SCHEMA as GPU_VERSION
from .gpu.record import STATE_KIND
from .session import KIND
from .session import SCHEMA_VERSION as SUITES_VERSION

OURS = "fastres"
# tables of this project's own measurements, each told where it decides something
TABLES = {
    "fastres-plan-overhead": "fusion.md",
    "fastres-pointwise": "numerics.md",
    "fastres-small-blocks": "fusion.md",
    "fastres-wgrad": "numerics.md",
    "fastres-winograd": "numerics.md",
}
VENDORS = ("vendor", "passes")  # of the run-book's kernels


class Unreadable(Exception):
    """A file that is no result known here. str() is the reason, without the file's name."""


@dataclass(frozen=True)
class Result:
    """kind: "bench" (`fastres bench`), "suites" (`pytest bench/`) or "gpu" (the run-book); data:
    the JSON as it is."""

    kind: str
    data: dict[str, Any]

    def _own(self) -> dict[str, Any]:
        """The part that says how it was made; of a run-book's file, its first stage's."""
        if self.kind == "gpu":
            return next(iter(self.data["stages"].values()))
        return self.data if self.kind == "bench" else self.data["fastres"]

    @property
    def command(self) -> str:
        return str(self._own()["command"])

    @property
    def environment(self) -> dict[str, Any]:
        return self._own()["environment"]

    @property
    def dry(self) -> bool:
        """Whether a stage of the run-book was a dry run, whose times mean nothing."""
        return self.kind == "gpu" and any(s["dry_run"] for s in self.data["stages"].values())

    def rows(self) -> list[dict[str, Any]]:
        """The extra_info of each case of the suites, timed ones only."""
        found = [b.get("extra_info", {}) for b in self.data["benchmarks"]]
        return [row for row in found if row.get("seconds")]


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a baseline, over the rounds of a run."""

    median: float
    q1: float
    q3: float


def _version(found: Any, known: int, what: str) -> None:
    if found != known:
        raise Unreadable(f"is version {found} of {what}; this checkout reads version {known}")


def load(path: Path) -> Result:
    """The result in a file. Raises Unreadable."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or not error.doc[error.pos :].strip():
            cut = f"is cut short: its JSON ends in line {error.doc.rstrip().count(chr(10)) + 1}"
            raise Unreadable(cut if error.doc.strip() else "is empty") from error
        raise Unreadable(f"is not JSON: {str(error).splitlines()[0]}") from error
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise Unreadable(f"holds a JSON {type(data).__name__}, not an object")
    own = data.get("fastres")
    if isinstance(own, dict) and own.get("kind") == KIND and "benchmarks" in data:
        _version(own.get("schema_version"), SUITES_VERSION, "the suites' results")
        return _whole(Result("suites", data))
    if data.get("kind") == GPU_KIND:
        _version(data.get("schema"), GPU_VERSION, "the run-book's results")
        return _whole(Result("gpu", data))
    if data.get("kind") == STATE_KIND:
        raise Unreadable("is the list of a run-book's stages; their results are beside it")
    if "cases" in data and "verification" in data and "schema_version" in data:
        _version(data["schema_version"], BENCH_VERSION, "fastres bench's results")
        return _whole(Result("bench", data))
    if "benchmarks" in data and "machine_info" in data:
        raise Unreadable("is of pytest-benchmark, but not of this project's suites")
    if data.get("kind") in TABLES:
        made = str(data.get("command", "")).split(" --")[0]
        raise Unreadable(f"is the table of `{made}`, see {TABLES[data['kind']]}")
    if "rows" in data and "triton" in data and "kernels" in data:
        raise Unreadable("counts the bytes of compiled kernels, see roofline.md; nothing is timed")
    if "rows" in data and ("nvcc" in data or "triton" in data):
        page = "cuda" if "nvcc" in data else "triton"
        raise Unreadable(f"is a table of machine code, see {page}.md; nothing is timed")
    keys = ", ".join(sorted(map(str, data))[:4])
    raise Unreadable(f"has a schema that is not known here (keys {keys}, ...)")


def _whole(result: Result) -> Result:
    """The result, when its parts can be read too."""
    try:
        _ = result.command, result.environment["cpu"], result.dry
        found = ratios(result)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise incomplete(error) from error
    except ArithmeticError as error:
        raise Unreadable(f"is damaged: a time in it is 0 ({error})") from error
    for (case, base), ratio in found.items():
        for value in () if ratio is None else (ratio.median, ratio.q1, ratio.q3):
            if not (isinstance(value, (int, float)) and 0 < value < inf):
                raise Unreadable(f"is damaged: {value!r} times the speed of {base} in {case}")
    return result


def incomplete(error: Exception) -> Unreadable:
    """Of a file that lacks something, or has it of another type."""
    return Unreadable(f"is incomplete: {type(error).__name__} at {error}")


def bench_cases(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name of the case, case) of `fastres bench`."""
    model = data["options"]["model"]
    return [
        (f"{model} {c['mode']} {c['dtype']} batch {c['batch']} {c['size']} px", c)
        for c in data["cases"]
    ]


def ratios(result: Result) -> dict[tuple[str, str], Ratio | None]:
    """(case, baseline) -> ratio within the run's rounds; None where fastres failed."""
    found: dict[tuple[str, str], Ratio | None] = {}
    if result.kind == "gpu":
        return {
            key: ratio for stage in result.data["stages"].items() for key, ratio in _gpu(*stage)
        }
    if result.kind == "suites":
        for row in result.rows():
            name = row["id"] if row["batch"] == row["asked_batch"] else f"{row['id']} (halved)"
            for base in row["baselines"]:
                if base["ratio"] is not None:
                    found[name, base["name"]] = Ratio(**base["ratio"])
        return found
    for name, case in bench_cases(result.data):
        ours = next((v for v in case["variants"] if v["name"] == OURS), None)
        for base in case["variants"]:
            if ours is None or base is ours or not base["seconds"]:
                continue
            rounds = len(ours["seconds"]), len(base["seconds"])
            if rounds[0] == 0:
                found[name, base["name"]] = None
            elif rounds[0] != rounds[1]:
                what = f"{rounds[0]} rounds of {OURS} and {rounds[1]} of {base['name']} in {name}"
                raise Unreadable(f"is damaged: {what}")
            else:
                spread = speed_ratios(ours["seconds"], base["seconds"])
                found[name, base["name"]] = Ratio(**spread.to_dict())
    return found


def _gpu(stage: str, found: dict[str, Any]) -> Iterator[tuple[tuple[str, str], Ratio]]:
    """The ratios of a run-book's stage: of our kernels and networks, and of the bytes they save."""
    for row in found["rows"]:
        if stage == "kernels":
            for variant, entry in row.get("variants", {}).items():
                for base, r in entry.get("against", {}).items():
                    if variant not in VENDORS:
                        yield (f"{row['case']} {variant}", base), _ratio(r)
        elif row.get("variant", "").startswith(OURS):
            mode = f" {row['mode']}" if row.get("mode", stage) != stage else ""
            name = f"{stage}{mode} {row['model']} batch {row['batch']} {row['variant']}"
            for base, r in row.get("against", {}).items():
                yield (name, base), _ratio(r)
            if row.get("saved_x"):
                yield (name, "eager's saved bytes"), Ratio(*[1 / row["saved_x"]] * 3)


def _ratio(found: dict[str, float]) -> Ratio:
    return Ratio(found["x"], found["x_q1"], found["x_q3"])
