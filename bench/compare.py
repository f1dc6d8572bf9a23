"""python -m bench.compare OLD NEW [--threshold PERCENT] [--changed] [--allow-missing]

Compares two result files case by case, by the ratio to each baseline inside each run, so that the
machine's mood cancels. A case got worse when the median ratio fell by more than the threshold and
the quartiles of the two runs do not overlap. Exit code: 0 nothing got worse, 1 something did, 2 the
files cannot be compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .results import Ratio, Result, Unreadable, load, ratios

THRESHOLD = 5.0  # percent; what rerunning an unchanged commit may move a ratio by
WORSE, USAGE = 1, 2


class Incomparable(Exception):
    """Two files that have nothing to compare. str() is the line for the user."""


@dataclass(frozen=True)
class Change:
    """One case against one baseline: verdict "worse", "better" or "same"."""

    case: str
    baseline: str
    old: Ratio
    new: Ratio | None
    verdict: str

    @property
    def percent(self) -> float:
        return 100 * (self.new.median / self.old.median - 1) if self.new is not None else -100.0


def verdict(old: Ratio, new: Ratio | None, threshold: float) -> str:
    """Beyond the threshold (percent), and beyond the noise: quartiles apart."""
    if new is None:
        return "worse"
    share = threshold / 100
    if new.median < old.median * (1 - share) and new.q3 < old.q1:
        return "worse"
    if new.median > old.median * (1 + share) and new.q1 > old.q3:
        return "better"
    return "same"


def read(path: str) -> Result:
    """A result file, or Incomparable."""
    try:
        return load(Path(path))
    except Unreadable as error:
        raise Incomparable(f"'{path}' {error}") from None


def changes(old: Result, new: Result, threshold: float) -> list[Change]:
    """Every (case, baseline) that both runs have, in the old run's order."""
    if old.kind != new.kind:
        what = {"bench": "`fastres bench`", "suites": "`pytest bench/`", "gpu": "the run-book"}
        raise Incomparable(f"OLD is of {what[old.kind]}, NEW of {what[new.kind]}")
    if old.dry != new.dry:
        raise Incomparable(f"{'OLD' if old.dry else 'NEW'} is a dry run, the other is not")
    before, after = ratios(old), ratios(new)
    found = []
    for (case, base), ratio in before.items():
        if ratio is not None and (case, base) in after:
            now = after[case, base]
            found.append(Change(case, base, ratio, now, verdict(ratio, now, threshold)))
    if not found:
        raise Incomparable(
            f"the files have no case and baseline in common ({len(before)} in OLD, {len(after)} "
            "in NEW)"
        )
    return found


def remarks(old: Result, new: Result) -> list[str]:
    """What makes the comparison weaker."""
    lines = []
    for key in ("cpu", "gpu", "cores", "threads", "torch", "device", "driver"):
        a, b = old.environment.get(key), new.environment.get(key)
        if a != b:
            lines.append(f"note: {key} differs: {a}, {b}")
    before, after = set(ratios(old)), set(ratios(new))
    for what, only in (("OLD", before - after), ("NEW", after - before)):
        if only:
            names = sorted({case for case, _ in only})
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"note: only in {what}: {len(only)} ratios of {len(names)} cases: {shown}")
    return lines


def _ratio(r: Ratio | None) -> str:
    return "failed" if r is None else f"{r.median:.3f} [{r.q1:.3f}-{r.q3:.3f}]"


def table(found: Sequence[Change]) -> list[str]:
    """Lines: case, baseline, both ratios, the change."""
    rows = [("case", "x baseline", "OLD [quartiles]", "NEW [quartiles]", "change", "")]
    rows += [
        (c.case, c.baseline, _ratio(c.old), _ratio(c.new), f"{c.percent:+.1f}%",
         "" if c.verdict == "same" else c.verdict)
        for c in found
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        left = [row[i].ljust(widths[i]) for i in range(2)]
        right = [row[i].rjust(widths[i]) for i in range(2, 5)]
        lines.append("  ".join([*left, *right, row[5]]).rstrip())
    return lines


def run(
    old_path: str,
    new_path: str,
    threshold: float = THRESHOLD,
    everything: bool = True,
    allow_missing: bool = False,
) -> int:
    """The whole command; prints, and returns the exit code. Raises Incomparable."""
    old, new = read(old_path), read(new_path)
    found = changes(old, new, threshold)
    shown = found if everything else [c for c in found if c.verdict != "same"]
    for line in table(shown):
        print(line)
    for line in remarks(old, new):
        print(line)
    count = {v: sum(1 for c in found if c.verdict == v) for v in ("worse", "better", "same")}
    print(
        f"{len(found)} ratios compared: {count['worse']} worse, {count['better']} better, "
        f"{count['same']} the same within {threshold:g}% or the runs' quartiles"
    )
    missing = len(set(ratios(old)) - set(ratios(new)))
    if missing and not allow_missing:
        print(
            f"{missing} ratios of OLD are not in NEW, which counts as worse: a case that fails has "
            "none; where fewer were run: python -m bench.compare OLD NEW --allow-missing"
        )
        return WORSE
    return WORSE if count["worse"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description="Compares two result files by the ratios to the baselines inside each run. "
        "Exit code: 0 nothing got worse, 1 something did or is missing, 2 bad input.",
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        metavar="PERCENT",
        help="what a ratio may fall by (default %(default)g)",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="NEW may have fewer cases or baselines"
    )
    parser.add_argument("--changed", action="store_true", help="print what changed only")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 100:
        print(
            f"bench.compare: error: argument --threshold: {args.threshold:g} is not a "
            "percentage from 0 to 100",
            file=sys.stderr,
        )
        return USAGE
    try:
        return run(args.old, args.new, args.threshold, not args.changed, args.allow_missing)
    except Incomparable as error:
        print(f"bench.compare: error: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
