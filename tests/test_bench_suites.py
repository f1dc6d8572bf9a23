"""bench/: the suites run, check and record; wrong results fail; report and compare."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastres

ROOT = Path(fastres.__file__).resolve().parents[1]
if not (ROOT / "bench" / "report.py").is_file():
    pytest.skip("bench/ is part of a checkout", allow_module_level=True)

from bench import (  # noqa: E402
    cases,
    compare,
    networks,
    report,
    results,
    session,
    shapes,
)

COMMITTED = ROOT / "bench" / "results" / "cpu-resnet50.json"


def bench(*args: str, cwd: Path = ROOT, path: str = "") -> subprocess.CompletedProcess[str]:
    """`pytest bench/ args` as a user runs it; one thread, since tests run side by side."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    env.pop("TRITON_INTERPRET", None)
    argv = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "-p", "no:cacheprovider"]
    return subprocess.run(
        [*argv, "--device", "cpu", *args], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, str]:
    """A result file with a tiny case of every suite, and what the run printed."""
    file = tmp_path_factory.mktemp("bench") / "tiny.json"
    done = bench(
        "--tiny", "--benchmark-only", "--benchmark-json", str(file),
        "--family", "bn_apply,bn_relu,conv_bn_relu,BasicBlock,cifar_resnet20",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return file, done.stdout


# --- the list of shapes ---------------------------------------------------------------------------


def test_shapes_add_up_to_the_networks():
    """torchvision's own numbers: 4.089 and 11.514 GMAC of which the linear layer is 2.05 M."""
    for model, gmac in (("resnet50", 4.089), ("resnet152", 11.514), ("resnet18", 1.814)):
        flops = sum(
            conv.shape.flops * times for conv in shapes.convs() for m, times in conv.users
            if m == model
        )  # fmt: skip
        linear = 1000 * (512 if model == "resnet18" else 2048)
        assert flops / 2 + linear == pytest.approx(gmac * 1e9, rel=2e-3)
    of50 = {n.chw: n.role for n in shapes.norms() if dict(n.users).get("resnet50")}
    assert (2048, 7, 7) in of50 and of50[64, 112, 112] == "stem"
    blocks = {b.label: b for b in shapes.blocks()}
    assert blocks["resnet50.layer2.0"].projection and not blocks["resnet50.layer2.1"].projection
    assert sum(t for b in shapes.blocks() for m, t in b.users if m == "resnet152") == 50


def test_cifar_networks_are_the_papers():
    """He et al. 2015, table 6: 0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M parameters."""
    wanted = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6}
    for depth, parameters in wanted.items():
        net = networks.build(f"cifar_resnet{depth}")
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.03)
    x = torch.randn(2, 3, 32, 32)
    net.eval()
    before = net(x)
    fastres.convert(net)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
    left = networks.unfused(net)
    assert [line.split()[0] for line in left] == ["bn1"]  # the stem's; option A is fused around


# --- the suites -----------------------------------------------------------------------------------


def test_collection_lists_every_family():
    done = bench("--tiny", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    from bench.kernels import KERNELS
    from bench.ops import OPS

    for kernel in KERNELS:
        assert f"test_kernel[{kernel.name.replace('[', '.').rstrip(']').replace(',', '+')}-" in (
            done.stdout
        )
    assert all(f"test_op[{op}-" in done.stdout for op in OPS)
    assert all(f"test_network[{name}-train" in done.stdout for name in networks.NETWORKS)
    assert "test_block[resnet18.layer1.0" in done.stdout
    assert "test_block[resnet50.layer1.0" in done.stdout


def test_default_set_is_thin_and_has_every_network_in_both_modes():
    for device in ("cpu", "cuda"):
        found = [c for s in cases.SUITES for c in cases.chosen(s, device, False, False, ())]
        assert len({c.id for c in found}) == len(found)
        names = {(c.name, c.mode) for c in found if c.suite == "network"}
        assert names == {(n, m) for n in networks.NETWORKS for m in ("train", "inference")}
        assert {c.dtype for c in found} >= {"bf16"}
        assert len(found) < sum(cases.count(s, device) for s in cases.SUITES) / 5
    batches = {c.batch for c in cases.chosen("network", "cpu", True, False, ())}
    assert {1, 8, 32, 128, 256} <= batches


def test_tiny_cases_of_each_suite_are_recorded(tiny):
    file, printed = tiny
    result = results.load(file)
    rows = result.rows()
    assert {row["suite"] for row in rows} == set(cases.SUITES)
    for row in rows:
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        least = sum(
            max(b / result.data["fastres"]["machine"]["bandwidth"],
                f / result.data["fastres"]["machine"]["rate"]["fp32"])
            for b, f in row["kernels"]
        )  # fmt: skip
        assert row["percent_of_roofline"] == pytest.approx(100 * least / row["seconds"])
        assert row["bytes"] == sum(b for b, _ in row["kernels"])
        assert 0 <= row["check"]["excess"] <= 1 and row["check"]["tensors"] > 0
        eager = next(b for b in row["baselines"] if b["name"] == "eager")
        assert eager["ratio"]["q1"] <= eager["ratio"]["median"] <= eager["ratio"]["q3"]
        assert len(eager["seconds"]) == 2
        for base in row["baselines"]:
            assert base["status"] == "ok" or base["reason"]
        assert row["id"] in printed
        if row["suite"] in ("block", "network") and row["mode"] == "train":
            assert 0 < row["saved_ratio"] < 1
        if row["suite"] == "network":
            assert row["img_per_s"] == pytest.approx(row["batch"] / row["seconds"])
            assert [note.split()[0] for note in row["notes"]] == ["bn1"]
        if row["suite"] == "kernel":
            assert {b["name"] for b in row["baselines"]} == {"eager", "copy"}
    own = result.data["fastres"]
    assert own["command"].startswith("pytest ") and "--tiny" in own["command"]
    assert own["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert result.data["machine_info"]["fastres"]["commit"] == own["environment"]["commit"]
    stats = {b["extra_info"]["id"]: b["stats"] for b in result.data["benchmarks"]}
    assert all(stats[r["id"]]["median"] == pytest.approx(r["seconds"]) for r in rows)


def test_conv_kernels_run_on_a_backend_that_has_them():
    done = bench("--tiny", "--backend", "reference", "--family", "conv_fprop,conv_bwd_pointwise",
                 "--benchmark-disable")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout and "skipped" not in done.stdout


def test_wrong_kernel_fails_its_benchmark(tmp_path):
    (tmp_path / "wrongkernel.py").write_text(
        "import fastres._cpu as cpu\n"
        "right = cpu.relu_bwd\n"
        "def relu_bwd(dx, dy, dz, mask):\n"
        "    right(dx, dy, dz, mask)\n"
        "    dx[0, 0, 0, 0] += 1\n"
        "cpu.relu_bwd = relu_bwd\n"
    )
    file = tmp_path / "out.json"
    done = bench("--tiny", "-p", "wrongkernel", "--family", "relu_bwd,bn_apply,add_relu",
                 "--benchmark-json", str(file), path=str(tmp_path))  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "WrongResult: wrong result: relu_bwd[plain] out" in done.stdout
    assert "add_relu: wrong result: train" in done.stdout  # the op, whose backward it is
    names = {row["name"] for row in results.load(file).rows()}
    assert "bn_apply[relu]" in names and "relu_bwd[plain]" not in names


def test_unknown_family_is_one_line_and_exit_code_4():
    done = bench("--family", "bn_aply")
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 4 and "Traceback" not in said
    assert "--family: unknown benchmark 'bn_aply'; did you mean bn_apply?" in said


def test_unknown_backend_and_paths_are_told_before_anything_runs(tmp_path):
    from bench import conftest

    def config(**options):
        return SimpleNamespace(
            getoption=lambda name, default=None: options.get(name.lstrip("-"), default)
        )

    with pytest.raises(pytest.UsageError, match="unknown backend 'cudnn'; known: cpu, triton"):
        conftest._backend(config(backend="cudnn"), "cpu")
    assert conftest._backend(config(), "cuda") == "triton"
    with pytest.raises(pytest.UsageError, match="is a folder; a file name is needed"):
        conftest._check_json_path(config(benchmark_json=tmp_path))
    with pytest.raises(pytest.UsageError, match="the folder of .* does not exist"):
        conftest._check_json_path(config(benchmark_json=tmp_path / "none" / "new.json"))
    conftest._check_json_path(config(benchmark_json=tmp_path / "new.json"))


def test_full_disk_keeps_the_results_elsewhere(tmp_path, monkeypatch):
    from bench import conftest

    def full(result, file):
        if file.startswith(str(tmp_path / "full")):
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(file).write_text(json.dumps(result))

    monkeypatch.setattr(conftest, "write_json", full)
    monkeypatch.setattr(conftest.tempfile, "gettempdir", lambda: str(tmp_path))
    made = session.Session()
    reporter = SimpleNamespace(write_line=lambda line: None)
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter), stash={conftest.KEY: made}
    )
    conftest._save_json(config, tmp_path / "full" / "out.json", {"a": 1})
    assert "No space left on device; the results are in" in made.unsaved
    (spare,) = tmp_path.glob("out-*.json")
    assert json.loads(spare.read_text()) == {"a": 1}


def test_full_disk_is_told_before_anything_runs(tmp_path, monkeypatch):
    from bench import conftest

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *how):
            return None

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    config = SimpleNamespace(getoption=lambda name, default=None: tmp_path / "new.json")
    monkeypatch.setattr(conftest.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(pytest.UsageError, match="new.json' cannot be written: No space left"):
        conftest._check_json_path(config)


def test_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("old")

    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(tmp_path / "none", page)
    assert page.read_text() == "old" and list(tmp_path.iterdir()) == [page]


# --- report ---------------------------------------------------------------------------------------


def test_report_is_deterministic_and_names_what_it_cannot_read(tiny, tmp_path):
    folder = tmp_path / "results"
    (folder / "gpu").mkdir(parents=True)
    (folder / "a.json").write_text(COMMITTED.read_text())
    (folder / "suites.json").write_text(tiny[0].read_text())
    (folder / "gpu" / "stage.json").write_text('{"stage": "tune", "rows": []}')
    (folder / "broken.json").write_text("{")
    newer = json.loads(COMMITTED.read_text()) | {"schema_version": 99}
    (folder / "newer.json").write_text(json.dumps(newer))
    (folder / "part.json").write_text('{"schema_version": 1, "cases": [], "verification": []}')
    pages = [tmp_path / "one" / "b.md", tmp_path / "two" / "b.md"]
    for page in pages:
        page.parent.mkdir()
        count, files = report.write(folder, page)
        assert count == 2 and len(files) > 3
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    pictures = sorted(p.relative_to(pages[0].parent) for p in pages[0].parent.rglob("*.png"))
    assert {p.name for p in pictures} >= {
        "a-throughput.png", "suites-throughput.png", "suites-roofline.png", "suites-memory.png",
    }  # fmt: skip
    for picture in pictures:
        assert f"({picture})" in text
        assert (pages[0].parent / picture).read_bytes() == (pages[1].parent / picture).read_bytes()
    assert "fastres bench resnet50 --peers" in text and "AMD EPYC, 2 cores" in text
    case = json.loads(COMMITTED.read_text())["cases"][0]
    ours = next(v for v in case["variants"] if v["name"] == "fastres")
    row = f"| {case['dtype']} {case['mode']} | **fastres** | {ours['img_per_s']:.1f} | "
    assert row + f"{ours['vs_eager']['median']:.2f} [" in text
    assert "| `cifar_resnet20` |" in text and "| `bn_apply[relu]` |" in text
    assert "Tiny shapes" in text
    omitted = text[text.index(report.OMITTED) :]
    assert "`bench/results/gpu/`: `stage.json`: has a schema that is not known here" in omitted
    assert "`broken.json`: is cut short: its JSON ends in line 1" in omitted
    assert "`newer.json`: is version 99 of fastres bench's results" in omitted
    assert "`part.json`: is incomplete" in omitted


def test_tables_of_machine_code_are_named_for_what_they_are():
    for file, page in (
        ("cuda/nvcc-13.0.json", "cuda.md"),
        ("aot/triton-3.6.0-sm_90.json", "triton"),
    ):
        with pytest.raises(results.Unreadable, match=f"machine code, see {page}"):
            results.load(ROOT / "bench" / "results" / file)


def test_every_committed_file_is_rendered_or_named_for_what_it_is():
    text, _ = report.render(ROOT / "bench" / "results")
    omitted = text.partition(report.OMITTED)[2]
    assert "schema that is not known" not in omitted
    for file, page in (
        ("cpu-winograd.json`: is the table of `python -m bench.winograd`", "numerics.md"),
        ("cpu-plan-overhead.json`: is the table of `python -m bench.plan_overhead`", "fusion.md"),
        ("triton-3.8.0-sm_90.json`: counts the bytes of compiled kernels", "roofline.md"),
    ):
        assert f"{file}, see {page}" in omitted
        assert (ROOT / "docs" / page).is_file()
    for kind, page in results.TABLES.items():
        name = f"cpu-{kind.removeprefix('fastres-')}.json"
        assert name in (ROOT / "docs" / page).read_text()


def test_committed_page_is_what_the_committed_results_render():
    """Up to the files that are not rendered, which others add to."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    text, drawn = report.render(ROOT / "bench" / "results")
    assert page.partition(report.OMITTED)[0].strip() == text.partition(report.OMITTED)[0].strip(), (
        "run: fastres bench --report"
    )
    assert all((ROOT / "docs" / report.CHARTS / name).is_file() for name in drawn)


def test_networks_are_held_against_the_faster_of_eager_and_compile():
    def case(name, **ratios):
        found = [{"name": n, "ratio": r and {"median": r}} for n, r in ratios.items()]
        return {"name": name, "mode": "train", "dtype": "bf16", "batch": 8, "baselines": found}

    rows = [case("a", eager=2.0, compile=0.5, openvino=0.1), case("b", eager=2.0, compile=None)]
    assert report.standing(rows) == (
        "Against the faster of eager and torch.compile (timed in 1 of 2): geometric mean 1.00x, "
        "least 0.50x (a train bf16 batch 8), 1 of 2 at 1.0x or more."
    )


def test_report_without_results_and_without_a_folder(tmp_path, capsys):
    page = tmp_path / "b.md"
    assert report.main(["--results", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert report.main(["--results", str(tmp_path / "empty"), "--page", str(page)]) == 0
    assert "There are no results yet." in page.read_text()
    away = str(tmp_path / "x" / "b.md")
    assert report.main(["--results", str(tmp_path / "empty"), "--page", away]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


# --- compare --------------------------------------------------------------------------------------


def slowed(data: dict, by: float) -> dict:
    """A `fastres bench` result whose fastres takes `by` times as long, in fp32 inference only."""
    data = copy.deepcopy(data)
    (row,) = (v for v in data["cases"][0]["variants"] if v["name"] == "fastres")
    row["seconds"] = [by * s for s in row["seconds"]]
    return data


def test_compare_finds_what_got_worse_beyond_threshold_and_noise(tmp_path, capsys):
    data = json.loads(COMMITTED.read_text())
    for by in (1.0, 1.03, 1.2, 0.8):
        (tmp_path / f"{by}.json").write_text(json.dumps(slowed(data, by)))
    old = str(tmp_path / "1.0.json")
    assert compare.main([old, old]) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out
    assert compare.main([old, str(tmp_path / "1.03.json")]) == 0
    capsys.readouterr()
    assert compare.main([old, str(tmp_path / "1.03.json"), "--threshold", "2"]) == 1
    capsys.readouterr()
    assert compare.main([old, str(tmp_path / "1.2.json"), "--changed"]) == 1
    out = capsys.readouterr().out
    assert "resnet50 inference fp32 batch 8 224 px  eager" in out and "-16.7%  worse" in out
    assert "bf16" not in out
    assert compare.main([old, str(tmp_path / "0.8.json")]) == 0
    assert "+25.0%  better" in capsys.readouterr().out


def test_compare_holds_noise_against_no_one():
    wide, fell = results.Ratio(1.2, 1.0, 1.4), results.Ratio(1.1, 1.05, 1.15)
    assert compare.verdict(wide, fell, 5.0) == "same"
    assert compare.verdict(results.Ratio(1.2, 1.19, 1.21), fell, 5.0) == "worse"
    assert compare.verdict(results.Ratio(1.2, 1.19, 1.21), fell, 10.0) == "same"
    assert compare.verdict(wide, None, 5.0) == "worse"


def test_compare_reads_the_suites(tiny, tmp_path, capsys):
    file = tiny[0]
    assert compare.main([str(file), str(file)]) == 0
    assert "cifar_resnet20-train-fp32-n2" in capsys.readouterr().out
    data = json.loads(file.read_text())
    for b in data["benchmarks"]:
        for base in b["extra_info"]["baselines"]:
            if base["ratio"]:
                base["ratio"] = {k: v / 1000 for k, v in base["ratio"].items()}
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(data))
    assert compare.main([str(file), str(worse)]) == 1
    capsys.readouterr()


def test_compare_counts_a_missing_case_as_worse(tmp_path, capsys):
    data = json.loads(COMMITTED.read_text())
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(data))
    new.write_text(json.dumps({**data, "cases": data["cases"][1:]}))
    assert compare.main([str(old), str(new)]) == 1
    assert "of OLD are not in NEW, which counts as worse" in capsys.readouterr().out
    assert compare.main([str(old), str(new), "--allow-missing"]) == 0
    assert compare.main([str(new), str(old)]) == 0


def timed(data: dict, variant: str, seconds: list) -> str:
    """A `fastres bench` result with other times of a variant in fp32 inference, as JSON."""
    data = copy.deepcopy(data)
    (row,) = (v for v in data["cases"][0]["variants"] if v["name"] == variant)
    row["seconds"] = seconds[: len(row["seconds"])]
    return json.dumps(data)


def test_compare_refuses_with_one_line(tiny, tmp_path, capsys):
    data = json.loads(COMMITTED.read_text())
    rounds = len(data["cases"][0]["variants"][0]["seconds"])
    cut = COMMITTED.read_text()[:3000]
    old = str(COMMITTED)
    other = copy.deepcopy(data)
    other["options"]["model"] = "resnet18"
    files = {
        "no.json": None,
        "text.json": "not json",
        "empty.json": "",
        "cut.json": cut,
        "end.json": COMMITTED.read_text().rstrip()[:-1],
        "nan.json": timed(data, "eager", [float("nan")] * rounds),
        "zero.json": timed(data, "fastres", [0.0] * rounds),
        "short.json": timed(data, "eager", [1.0]),
        "list.json": "[1]",
        "version.json": json.dumps(data | {"schema_version": 2}),
        "other.json": json.dumps(other),
        "foreign.json": '{"benchmarks": [], "machine_info": {}}',
        "part.json": json.dumps({k: v for k, v in data.items() if k != "environment"}),
    }
    wanted = {
        "no.json": "cannot be read: No such file or directory",
        "text.json": "is not JSON: Expecting value: line 1",
        "empty.json": "is empty",
        "cut.json": f"is cut short: its JSON ends in line {cut.count(chr(10)) + 1}",
        "end.json": "is cut short: its JSON ends in line",
        "nan.json": "is damaged: nan times the speed of eager in resnet50 inference fp32 batch 8",
        "zero.json": "is damaged: a time in it is 0",
        "short.json": f"is damaged: {rounds} rounds of fastres and 1 of eager in resnet50",
        "list.json": "holds a JSON list, not an object",
        "version.json": "is version 2 of fastres bench's results; this checkout reads version 1",
        "other.json": "no case and baseline in common",
        "foreign.json": "is of pytest-benchmark, but not of this project's suites",
        "part.json": "is incomplete: KeyError at 'environment'",
    }
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        assert compare.main([old, str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and wanted[name] in said
    assert compare.main([old, str(tiny[0])]) == 2
    assert "OLD is of `fastres bench`, NEW of `pytest bench/`" in capsys.readouterr().err
    assert compare.main([old, old, "--threshold", "nan"]) == 2
    assert "is not a percentage" in capsys.readouterr().err


def test_cli_passes_report_and_compare_on(tmp_path, capsys, monkeypatch):
    from fastres import cli

    assert cli.main(["bench", "--compare", str(COMMITTED), str(COMMITTED)]) == 0
    assert "0 worse" in capsys.readouterr().out
    assert cli.main(["bench", "resnet18", "--report"]) == 2
    assert "argument --report: goes alone" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", "a", "b", "--batch", "4"]) == 2
    assert "argument --compare: goes alone" in capsys.readouterr().err
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastres" / "cli.py"))
    assert cli.main(["bench", "--report"]) == 2
    assert "needs a checkout of fastres" in capsys.readouterr().err
