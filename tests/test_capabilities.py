"""docs/capabilities.md is what the code and the committed results say."""

from __future__ import annotations

import importlib
import re

from bench import capabilities
from fastres.backends import FUSED_DTYPES, MODULES

RUN = {
    "dry_run": False,
    "environment": {"device": "A Card", "commit": "0123456789abcdef", "date": "2027"},
    "by_backend": {
        "cuda": {
            "test_bn_stats.py": {"passed": 7, "failed": 1},
            "test_cuda_pointwise.py": {"passed": 3},
        }
    },
}


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {(r[0], r[1]): r[2:] for r in rows[1:]}


def test_the_page_is_current():
    text = capabilities.page(capabilities._runs())
    assert capabilities.PAGE.read_text() == text, "run: python -m bench.capabilities"


def test_the_page_agrees_with_the_backends():
    found = cells(capabilities.page([]))
    assert {b for _, b in found} == set(MODULES) - {"reference"}
    for (op, backend), (arch, dtypes, *_) in found.items():
        module = importlib.import_module(MODULES[backend])
        functions = [re.sub(r" .*", "", f) for f in op.split(", ") if "_" in f]
        has = all(hasattr(module, f) for f in functions if f.isidentifier())
        assert has == (arch != "-"), (op, backend)
        few = (op.split(", ")[0], backend) == ("conv_fprop", "cuda")  # no fp32
        count = len(FUSED_DTYPES) - few
        assert arch == "-" or len(dtypes.replace(" (TF32)", "").split(", ")) == count


def test_hardware_is_claimed_by_a_file_only():
    never = cells(capabilities.page([]))
    code = [r for (_, b), r in never.items() if b != "cpu" and r[0] != "-"]
    assert {r[-1] for r in code} == {"**never**"}
    ran = cells(capabilities.page([RUN]))
    changed = {k: r[-1] for k, r in ran.items() if r != never[k]}
    pointwise = capabilities.HALVES + " (1x1, stride 1)"
    assert changed == {
        ("bn_stats", "cuda"): "A Card at 0123456789ab: 7 tests, 1 failed",
        (pointwise, "cuda"): "A Card at 0123456789ab: 3 tests",  # not CUTLASS's
    }


def test_the_page_says_where_no_convolutions_are():
    (row,) = (
        r
        for (op, b), r in cells(capabilities.page([])).items()
        if (op, b) == ("convolutions on sm_80, sm_100", "cuda")
    )
    assert row[0] == row[-1] == "-" and "Triton's" in row[2] and "vendor's" in row[2]
