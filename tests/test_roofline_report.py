"""What shows the traffic and FLOP model: `fastres roofline`, and percent of roofline in
`fastres bench`."""

from __future__ import annotations

import io
import json
import timeit

import pytest
import torch
from test_roofline import BYTES_TOLERANCE, DESIGN, LADDER, resnet

from fastres import cli, roofline
from fastres.bench import report
from fastres.bench.machine import Machine, measure
from fastres.bench.options import Case, Options

# ---------------------------------------------------------------- the command


def run(capsys, *argv):
    code = cli.main(["roofline", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_command_prints_the_table(capsys):
    code, out, err = run(capsys, "resnet50")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "│ all " in line]
    values = [float(v) for v in line.replace("│", " ").split()[1:]]
    expected = [v for v, _ in (DESIGN["resnet50"] | LADDER["resnet50"]).values()]
    assert values == pytest.approx(expected, rel=BYTES_TOLERANCE)
    assert "4,300 GB/s and 790 TFLOP/s" in out and "layer1.0.conv1" not in out


def test_command_prints_layers_and_json(capsys):
    code, out, _ = run(capsys, "resnet18", "--batch", "8", "--rung", "d", "--layers")
    assert code == 0 and "layer4.1.conv2" in out and "norm_relu" in out
    argv = ("resnet18", "--batch", "8", "--inference", "--dtype", "fp32", "--layers", "--json")
    code, out, _ = run(capsys, *argv, "--bandwidth", "40", "--rate", "0.2")
    found = json.loads(out)
    assert code == 0 and (found["bandwidth"], found["rate"]) == (4e10, 2e11)
    assert [r["rung"] for r in found["rungs"]] == ["a", "b", "folded"]
    folded = found["rungs"][-1]
    expected = roofline.model(resnet("resnet18"), (8, 3, 224, 224), "fp32", training=False)
    assert folded["bytes"] == expected.bytes == sum(k["bytes"] for k in folded["kernels"])
    assert folded["ceiling_img_per_s"] == pytest.approx(expected.ceiling(4e10, 2e11))
    stem = folded["kernels"][0]
    assert (stem["op"], stem["epilogue"], stem["C"], stem["K"]) == ("fprop", "affine_relu", 3, 64)
    assert (stem["R"], stem["stride"]) == (7, [2, 2])


@pytest.mark.parametrize(
    "argv, words",
    [
        ("resnet51", "unknown model 'resnet51'; did you mean resnet50?"),
        ("resnet18 --batch 0", "argument --batch: '0' is not a whole number of at least 1"),
        ("resnet18 --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("resnet18 --rung e", "argument --rung: unknown rung 'e' for training; accepted: a, b, c1"),
        ("resnet18 --rung d --inference", "for inference; accepted: a, b, folded"),
        ("resnet18 --rate -1", "argument --rate: '-1' is not a positive number of TFLOP/s"),
        ("resnet18 --bandwidth nan", "'nan' is not a positive number of GB/s"),
    ],
)
def test_command_refuses_bad_input(capsys, argv, words):
    code, out, err = run(capsys, *argv.split())
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("fastres: error: ") and words in err


# ---------------------------------------------------------------- percent of roofline in the bench


def bench_result(mode="train", device="cpu"):
    options = Options("resnet18", batch=4, size=64, device=device)
    case = Case("fp32", mode)
    times = {"eager": [1.0], "fastres": [0.5], "compile": []}
    found = report.case_result(case, options, 1, times, {}, {}, {})
    machine = Machine()
    machine.add("fp32", {"bandwidth": 1e9, "rate": 5e9})
    machine.add("fp32", {"bandwidth": 2e9, "rate": 3e9})  # the best of each counts
    report.add_roofline([found], options, machine)
    return {"options": options.to_dict(), "cases": [found]}


@pytest.mark.parametrize(
    "mode, device, rung",
    [("train", "cpu", "b"), ("inference", "cpu", "folded"), ("inference", "cuda", "b")],
)
def test_bench_reports_percent_of_roofline(mode, device, rung):
    (case,) = bench_result(mode, device)["cases"]
    expected = roofline.model(
        resnet("resnet18"), (4, 3, 64, 64), "fp32", rung, training=mode == "train"
    )
    ceiling = expected.ceiling(2e9, 5e9)
    assert case["roofline"] == {
        "rung": rung, "bandwidth": 2e9, "rate": 5e9, "bytes": expected.bytes,
        "flops": expected.flops, "img_per_s": pytest.approx(ceiling),
    }  # fmt: skip
    percents = {row["name"]: row["percent_of_roofline"] for row in case["variants"]}
    assert percents == {
        "eager": pytest.approx(100 * 4 / ceiling), "fastres": pytest.approx(100 * 8 / ceiling),
        "compile": None,
    }  # fmt: skip


def test_bench_table_says_what_the_percentage_is_of():
    from rich.console import Console

    result, out = bench_result(), io.StringIO()
    report.print_result(result, Console(file=out, width=150), "a CPU")
    (case,) = result["cases"]
    share = case["variants"][1]["percent_of_roofline"]
    line = next(row for row in out.getvalue().splitlines() if "│ fastres " in row)
    assert f" {share:.0f}% " in line
    said = next(row for row in out.getvalue().splitlines() if row.startswith("roof: "))
    assert "(2 GB/s)" in said and "fp32 0.01" in said and "(rung b)" in said


def test_a_machine_that_was_not_measured_has_no_roofline():
    result = bench_result()
    report.add_roofline(result["cases"], Options(**result["options"]), Machine())
    assert result["cases"][0]["roofline"] is None
    assert {row["percent_of_roofline"] for row in result["cases"][0]["variants"]} == {None}
    assert not any(line.startswith("roof:") for line in report.notes(result))


def test_measured_bandwidth_and_rate_are_those_of_copies_and_products():
    found = measure("cpu", "fp32", seconds=0.01)
    x = torch.ones(1 << 26)
    y = torch.empty_like(x)
    a = torch.ones(1024, 1024)
    seconds = {
        "bandwidth": min(timeit.repeat(lambda: y.copy_(x), number=1, repeat=5)),
        "rate": min(timeit.repeat(lambda: a @ a, number=1, repeat=5)),
    }
    # a factor of 5: other processes run beside the tests
    assert 0.2 < found["bandwidth"] / (2 * 4 * 2**26 / seconds["bandwidth"]) < 5
    assert 0.2 < found["rate"] / (2 * 1024**3 / seconds["rate"]) < 5
