"""The run-book's files in docs/benchmarks.md and in the comparison of two runs. What a dry run
wrote is rendered in test_gpu_runbook.py; here is what only a GPU's files hold."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench import compare, report, results

ENV = {
    "date": "2026-12-01T10:00:00+00:00", "commit": "abcdef0123", "fastres": "0.1.0",
    "python": "3.12.3", "cpu": "Xeon", "cores": 16, "torch": "2.11.0+cu130", "cuda": "13.0",
    "device": "NVIDIA H200", "driver": "580.159.04", "uuid": "GPU-12", "triton": "3.6.0",
    "cudnn": 91900,
}  # fmt: skip
CLOCK = {"clocks.sm": "1980", "clocks.mem": "3201", "power.draw": "500", "power.limit": "700"}


EXPECTED = {
    "cases": 6, "convs": {"fprop": 3, "dgrad": 3, "wgrad": 3}, "layers": 2,
    "streams": {"add_relu (triton)": 1, "add_relu (cuda)": 2, "bn_stats (cuda)": 1},
    "forms": {"fprop": {"cuda": 2}},
}  # fmt: skip
VARIANTS = {
    "resnet50|256|train": ["compile bf16", "fastres b", "fastres c2", "fastres d"],
    "resnet50|32|train": ["eager bf16", "fastres b"],
    "resnet18|256|train": ["eager bf16", "fastres b"],
}


def stage(rows: list, **values) -> dict:
    return {
        "status": "done", "dry_run": False, "command": "python -m bench.gpu --stages x",
        "seconds": 7.0, "notes": [], "clocks": [CLOCK], "environment": ENV, "rows": rows, **values,
    }  # fmt: skip


def case(op: str, where: str, c2: int = 0, **variants) -> dict:
    return {
        "case": f"{op}/{where}", "op": op, "dy": "none", "h": "none", "epilogue": "none",
        "where": where, "path": "layer1", "count": c2, "c2": c2, "failed": {},
        "checks": {v: {"ok": True} for v in variants}, "variants": variants,
    }  # fmt: skip


def x(ratio: float) -> dict:
    return {"x": ratio, "x_q1": ratio - 0.01, "x_q3": ratio + 0.01}


def network(variant: str, speed: float, best: float, batch: int = 256) -> dict:
    return {
        "model": "resnet50", "mode": "train", "batch": batch, "variant": variant, "status": "ok",
        "us": 1e9 / speed, "img/s": speed, "percent": 50.0,
        "against": {"eager bf16": x(best), "best baseline": {"name": "compile bf16", **x(best)},
                    "best baseline or graph": {"name": "compile bf16 +graph", **x(best - 0.1)}},
    }  # fmt: skip


def block(path: str, choice: str, ms: dict, rejected: dict, tiled: bool) -> dict:
    return {
        "path": path, "shape": [256, 64, 56, 56], "mode": "training", "choice": choice, "ms": ms,
        "ratio": ms["eager"] / ms[choice], "rejected": rejected, "per_conv": tiled,
    }  # fmt: skip


def files() -> dict[str, dict]:
    machine = {"bandwidth": 4e12, "rate": 8e14}
    wrong = case("bn_stats", "2x2", ours={"us": 1.0})
    wrong |= {"variants": {}, "checks": {"ours": {"ok": False, "error": "wrong: y: rms error"}}}
    kernels = [
        case("fprop", "a", 3, cuda={"us": 10.0, "TFLOP/s": 600.0, "percent": 80.0,
                                    "against": {"passes": x(2.0)}},
             vendor={"us": 9.0}, passes={"us": 20.0}),
        case("dgrad", "a", 3, cuda={"us": 10.0}, vendor={"us": 11.0}, passes={"us": 11.0}),
        case("fprop", "images", 1, vendor={"us": 5.0}, passes={"us": 6.0}),
        case("add_relu", "8x8", ours={"us": 2.0, "GB/s": 3800.0, "percent": 95.0},
             cuda={"us": 2.1, "GB/s": 3600.0, "percent": 90.0}),
        case("backward", "a", 1, b={"us": 7.0}), wrong,
    ]  # fmt: skip
    missing = {"model": "resnet50", "mode": "train", "batch": 256, "variant": "fastres d",
               "status": "not measured", "error": "wrong: outputs"}  # fmt: skip
    train = [network("compile bf16", 2000.0, 1.0), network("fastres b", 2200.0, 1.1),
             network("fastres c2", 2400.0, 1.2), missing,
             network("fastres b", 900.0, 1.3, batch=32)]  # fmt: skip
    memory = {"model": "resnet50", "batch": 256, "variant": "fastres b", "saved": 2.56e8,
              "peak": 5.12e8, "saved_x": 0.5, "peak_x": 0.75}  # fmt: skip
    broken = {"model": "resnet50", "batch": 256, "variant": "fastres d", "error": "no kernel"}
    single = "c2 vendor conv2.wgrad"
    tuned = [
        block("layer1.1", single, {"eager": 3.0, "b": 2.0, "c2": 1.5, single: 1.0},
              {"c2 cuda conv1.fprop=a": "wrong", "c2 vendor conv1.dgrad": "wrong", "d": "wrong"},
              True),
        block("layer2.0", "b", {"eager": 3.0, "b": 2.0}, {"c2": "out of memory"}, False),
    ]  # fmt: skip
    shape = {"N": 256, "C": 64, "H": 56, "W": 56, "K": 64, "R": 3, "S": 3, "stride": [2, 2]}
    probe = {"form": "conv+genstats", "dtype": "bfloat16", "shape": shape}
    probes = [{**probe, "supported": True, "us": 33.0, "against conv": x(0.8)},
              {**probe, "dtype": "float16", "supported": None, "reason": "no time"}]  # fmt: skip
    tests = {"triton": {"test_conv.py": {"passed": 4, "failed": 1}}}
    return {
        "checks": {"tests": stage([{"test": "test_conv.py::t", "error": "E"}], by_backend=tests,
                                  status="failed", error="1 failed, 4 passed"),
                   "sanitizer": stage([{"tool": "memcheck", "errors": 0, "state": "exit code 0"}])},
        "kernels": {"kernels": stage(kernels, machine=machine, expected=EXPECTED)},
        "train": {"train": stage(train, machine=machine, expected=VARIANTS)},
        "inference": {"memory": stage([memory, broken], expected={"rows": 2})},
        "probes": {"cudnn": stage(probes, shapes=12),
                   "tune": stage(tuned, expected={"blocks": 3, "tiled": 1}, status="timeout",
                                 error="stopped")},
    }  # fmt: skip


def write(folder: Path, which: dict[str, dict]) -> Path:
    folder.mkdir(parents=True)
    for name, stages in which.items():
        whole = {"schema": 1, "kind": "fastres-gpu", "stages": stages}
        (folder / f"{name}.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, list[str]]:
    folder = tmp_path_factory.mktemp("page")
    write(folder / "results" / "gpu-h200", files())
    count, written = report.write(folder / "results", folder / "page.md")
    assert count == 5
    return (folder / "page.md").read_text(), written


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_what_the_issues_ask_stands_beside_what_was_measured(page):
    text, _ = page
    assert "x cuDNN (wanted 0.95) | x cuDNN + passes (wanted 1.2)" in text
    assert lines(text, "| fprop |") == [
        "| fprop | 30 | 27 | 60 | 0.9, NOT reached | 2, reached | 3 of 3 | 1 |"
    ]
    assert lines(text, "| dgrad |") == [
        "| dgrad | 30 | 33 | 33 | 1.1, reached | 1.1, NOT reached | 3 of 3 | 0 |"
    ]
    assert lines(text, "| wgrad |")[0].split(" | ")[4:6] == ["not measured", "not measured"]
    assert lines(text, "| all |")[0].split(" | ")[4:7] == [
        "1, not complete: 6 of 9", "1.55, not complete: 6 of 9", "6 of 9"
    ]  # fmt: skip
    network = "| **the network** |  |  | not complete: 1 of 2 | not complete: 0 of 2 |"
    assert lines(text, network)
    assert "\n5 of 6 cases were timed.\n" in text
    assert "| add_relu (triton) | 1 of 1 | 95% | 95% | 1 of 1 | 95, reached |" in text
    assert "| add_relu (cuda) | 1 of 2 | 90% | 90% | 0 of 2 | 90, not complete: 1 of 2 |" in text
    assert "| bn_stats (cuda) | 0 of 1 |  |  | 0 of 1 | not measured |" in text
    assert "| `bn_stats/2x2` | ours | wrong: y: rms error |" in text


def test_networks_memory_probes_and_tests_are_in_the_page(page):
    text, _ = page
    assert lines(text, "| resnet50 | train | 256 |")[0].split(" | ")[3:] == [
        "1.10 [1.09-1.11]", "fastres c2", "1.20 [1.19-1.21]", "1.10 [1.09-1.11]",
        "2 of 3, not complete", "1 of 1 |",
    ]  # fmt: skip
    assert lines(text, "| resnet50 | train | 32 |")[0].endswith(
        " | 1 of 1 | 0 of 1, not complete |"
    )
    # what was never begun has a line, too
    assert lines(text, "| resnet18 | train | 256 |")[0].split(" | ")[3:] == [
        "not measured", "not measured", "", "", "0 of 1, not complete", "0 of 1, not complete |"
    ]  # fmt: skip
    assert "- fastres d, not measured: wrong: outputs" in text
    assert "| resnet50 | **fastres b** | 256 | 1.00 | 0.50 | 2.00 | 0.75 |" in text
    assert "\nMeasured: 1 of 2, not complete.\n" in text
    assert "| conv+genstats | bfloat16 | 1/1 | 1/1 | 1 of 12 | 1.25 |" in text
    assert "| 256x64x56x56>64 3x3 s2 | float16 | not tried |" in text
    assert "**failed**: 1 failed, 4 passed" in text and "**timeout**: stopped" in text
    assert "| `test_conv.py` | triton | 4 | 1 | 0 |" in text
    assert "| `test_conv.py::t` | E |" in text
    assert "Dry run" not in text


def test_of_how_many_blocks_tune_says_what(page):
    text, _ = page
    said = "Measured: 2 of 3, not complete, of the network's distinct blocks; pass by pass: 1 of 1."
    assert f"\n{said}\n" in text
    start = text.index("| candidate | chosen |")
    assert text[start : text.index("\n\n", start)].splitlines()[2:] == [
        "| `b` | 1 of 3 | 2 of 3 | 0 of 3 |",
        "| `c2` | 0 of 3 | 1 of 3 | 1 of 3 |",
        "| `c2, single passes` | 1 of 1 | 1 of 1 | 1 of 1 |",
        "| `d` | 0 of 3 | 0 of 3 | 1 of 3 |",
        "| `eager` | 0 of 3 | 2 of 3 | 0 of 3 |",
    ]
    assert lines(text, "| `layer1.1` |")[0].startswith(
        "| `layer1.1` | 256x64x56x56 | training | c2 vendor conv2.wgrad | 3.00 | 3 | 2 | 1.5 | 1 |"
    )


def test_every_stage_names_its_command_card_versions_and_commit(page):
    text, _ = page
    whole = (
        "NVIDIA H200, uuid GPU-12, driver 580.159.04; Xeon, 16 cores; fastres 0.1.0 (abcdef0123)"
    )
    stages = sum(len(s) for s in files().values())
    assert text.count("`python -m bench.gpu --stages x`, [bench/results/gpu-h200/") == stages
    assert text.count(whole) == stages and text.count("triton 3.6.0") == stages


def test_charts_are_drawn_where_there_are_data(page):
    _, written = page
    names = ("kernels-roofline", "train-train-throughput", "train-train-batch", "inference-memory")
    assert sorted(written[1:]) == sorted(f"gpu-h200-{name}.png" for name in names)


def test_the_chart_of_kernels_has_a_bar_for_a_form_not_for_a_shape():
    from bench import charts

    def percents(**values) -> dict:
        return {name: {"percent": value} for name, value in values.items()}

    rows = [case("bn_stats", f"{n}x8", ours={"percent": n}) for n in (40.0, 60.0, 95.0)]
    rows += [case("fprop", "a", **percents(fused=50.0, cuda=70.0, vendor=99.0))]
    of = {"bn_stats": {"triton": 3}, "fprop": {"triton": 1, "cuda": 4}}
    (chart,) = charts._gpu_kernels(rows, of, "")
    drawn, colours = {}, set()

    class Axis:
        def barh(self, at, widths, width, label, color):
            drawn[label] = widths
            colours.add(color)

        def set_yticks(self, at, names, fontsize):
            drawn["names"] = names

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    chart.draw(Axis())
    names = ["bn_stats", "fprop (not complete: cuda 1 of 4)"]
    assert drawn == {"names": names, "triton": [60.0, 50.0], "cuda": [0, 70.0]}
    assert len(colours) == 2
    assert charts._gpu_kernels([case("fprop", "a", vendor={"percent": 1.0})], {}, "") == []


def test_a_file_that_lacks_something_is_named_and_the_others_are_rendered(tmp_path):
    broken = files()
    del broken["train"]["train"]["rows"][1]["mode"]
    write(tmp_path / "results", broken)
    text, _ = report.render(tmp_path / "results")
    assert "`train.json`: is incomplete: KeyError at 'mode'" in text
    assert "## kernels" in text and "## train" not in text


def test_two_runs_are_compared_by_their_ratios(tmp_path, capsys):
    old = write(tmp_path / "old", files())
    changed = files()
    row = changed["train"]["train"]["rows"][1]
    row["against"]["best baseline"] = x(0.9)
    changed["kernels"]["kernels"]["rows"][0]["variants"]["cuda"]["against"]["passes"] = x(2.5)
    new = write(tmp_path / "new", changed)
    assert compare.main([str(old / "train.json"), str(new / "train.json"), "--changed"]) == 1
    said = capsys.readouterr().out
    assert "train resnet50 batch 256 fastres b  best baseline  1.100" in said
    assert "-18.2%  worse" in said and "1 worse" in said
    assert compare.main([str(old / "kernels.json"), str(new / "kernels.json")]) == 0
    assert "fprop/a cuda  passes" in capsys.readouterr().out
    assert compare.main([str(old / "inference.json"), str(new / "inference.json")]) == 0
    assert "eager's saved bytes  2.000" in capsys.readouterr().out


def test_a_dry_run_and_another_version_are_refused_by_name(tmp_path, capsys):
    real = write(tmp_path / "real", files())
    dry = copy.deepcopy(files())
    dry["train"]["train"]["dry_run"] = True
    made = write(tmp_path / "dry", dry)
    assert compare.main([str(real / "train.json"), str(made / "train.json")]) == 2
    assert "NEW is a dry run, the other is not" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema": 9, "kind": "fastres-gpu", "stages": {}}))
    with pytest.raises(results.Unreadable, match="is version 9 of the run-book's results; this"):
        results.load(other)
    other.write_text(json.dumps({"schema": 1, "kind": "fastres-gpu", "stages": {}}))
    with pytest.raises(results.Unreadable, match="is incomplete"):
        results.load(other)
