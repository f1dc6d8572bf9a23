"""The stages: order, time limits, files. The most valuable come first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """limit: seconds after which its process is stopped (480 at most); module, function: what runs
    there; group: the JSON file that holds its results. Eight files come out at most."""

    name: str
    about: str
    limit: int
    module: str
    function: str
    group: str


STAGES = (
    Stage("build", "install fastres where it is not", 120, "checks", "build", "checks"),
    Stage("doctor", "what is installed, and what works", 45, "checks", "doctor", "checks"),
    Stage("tests", "the tests of the Triton kernels on the GPU", 210, "checks", "tests", "checks"),
    Stage("kernels", "every kernel against roofline and vendor", 240, "kernels", "run", "kernels"),
    Stage("train", "training steps against all baselines", 360, "nets", "train", "train"),
    Stage("inference", "inference against all baselines", 180, "nets", "inference", "inference"),
    Stage("memory", "bytes saved for backward, peak memory", 60, "nets", "memory", "inference"),
    Stage("cudnn", "what cuDNN's fused graphs support", 240, "probes", "cudnn", "probes"),
    Stage("tune", "fastres.tune on ResNet-50", 480, "probes", "tune", "probes"),
    Stage("sanitizer", "compute-sanitizer on a few tests", 90, "checks", "sanitizer", "checks"),
)
NAMES = tuple(s.name for s in STAGES)
BY_NAME = {s.name: s for s in STAGES}
SOFT = 0.85  # of the limit: a stage starts nothing new after that
DRY_LIMIT = 120  # seconds of any stage in a dry run
