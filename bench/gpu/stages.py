"""The stages: order, time limits, files. The most valuable come first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """limit: seconds it is planned for; it is given what the stages before it left, too, up to
    MOST; module, function: what runs there; group: the JSON file that holds its results; call:
    which of the run-book's calls it belongs to; always: run in every call."""

    name: str
    about: str
    limit: int
    module: str
    function: str
    group: str
    call: int
    always: bool = False


# a machine that is lent for three calls of ten minutes, and bare at each: docs/gpu.md
STAGES = (
    Stage("build", "install fastres where it is not", 150, "checks", "build", "checks", 1, True),
    Stage("doctor", "what is installed, and what works", 20, "checks", "doctor", "checks", 1),
    Stage("kernels", "kernels against roofline and vendor", 230, "kernels", "run", "kernels", 1),
    Stage("tests", "the kernels' tests on the GPU", 100, "checks", "tests", "checks", 1),
    Stage("train", "training against all baselines", 265, "nets", "train", "train", 2),
    Stage("inference", "inference against all baselines", 175, "nets", "inference", "inference", 2),
    Stage("memory", "bytes saved for backward, peak memory", 60, "nets", "memory", "inference", 2),
    Stage("cudnn", "what cuDNN's fused graphs support", 80, "probes", "cudnn", "probes", 3),
    Stage("tune", "fastres.tune on ResNet-50", 180, "probes", "tune", "probes", 3),
    Stage("sanitizer", "compute-sanitizer on a few tests", 60, "checks", "sanitizer", "checks", 3),
    Stage("autotune", "torch.compile max-autotune", 180, "nets", "autotune", "train", 3),
)
NAMES = tuple(s.name for s in STAGES)
BY_NAME = {s.name: s for s in STAGES}
MOST = 480  # seconds of any stage
SOFT = 0.85  # of the limit: a stage starts nothing new after that
DRY_LIMIT = 300  # seconds of any stage in a dry run: for a hang, where others use the machine, too
CALLS = tuple(sorted({s.call for s in STAGES}))
LENT_SECONDS = 1800  # that a machine is lent for, its starts included
START_SECONDS = 100  # of a machine, and of what a command does before and after the stages
# of all stages of a call: it ends at 600 s, and has Python to start and results to copy
CALL_SECONDS = min(560, LENT_SECONDS // len(CALLS) - START_SECONDS)


def of_call(number: int, unfinished: Collection[str] = ()) -> list[Stage]:
    """The stages of a call, in order; then those of earlier calls that left something, with nothing
    planned for them: they get what is left."""
    own = [s for s in STAGES if s.call == number or s.always]
    late = [s for s in STAGES if s.call < number and s.name in unfinished and s not in own]
    return [*own, *(replace(s, limit=0) for s in late)]


def allowance(stages: list[Stage], seconds: float) -> float:
    """How long the first of the stages may take when all of them have `seconds` together: what it
    is planned for, and what the others do not need."""
    others = sum(s.limit for s in stages[1:])
    return min(MOST, seconds, max(stages[0].limit, seconds - others))
