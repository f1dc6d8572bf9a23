"""The code behind `fastres bench`: inputs, ratios, workers, report; one small run of the whole."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastres
from fastres import cli
from fastres.bench import chart, data, main, models, report, runner, stats, variants, verify, worker
from fastres.bench.options import Case, Options, UsageError
from fastres.bench.saved import saved_bytes

ROOT = Path(fastres.__file__).resolve().parents[1]

# ---------------------------------------------------------------- photographs


def test_sample_photographs_are_the_known_ones():
    (china, china_px), (flower, flower_px) = data.load_photographs(None)
    assert (china, flower) == ("china.jpg", "flower.jpg")
    assert china_px.shape == flower_px.shape == (3, 427, 640)
    assert china_px[:, 0, 0].tolist() == [174, 201, 231]
    means = [photo.float().mean((1, 2)).tolist() for photo in (china_px, flower_px)]
    assert means[0] == pytest.approx([144.720, 145.469, 140.919], abs=0.01)
    assert means[1] == pytest.approx([55.134, 73.579, 57.000], abs=0.01)


def test_batch_is_resized_cropped_and_normalised_as_pillow_and_numpy_do():
    photographs = data.load_photographs(None)
    batch = data.make_batch(photographs, 2, 224, seed=0)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for ours, (_, pixels) in zip(batch, photographs, strict=True):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image = image.resize((round(640 * 256 / 427), 256), Image.Resampling.BILINEAR)
        width, height = image.size
        left, top = round((width - 224) / 2), (height - 224) // 2
        crop = np.asarray(image.crop((left, top, left + 224, top + 224))) / 255.0
        expected = (crop - data.IMAGENET_MEAN) / data.IMAGENET_STD
        difference = np.abs(ours.permute(1, 2, 0).numpy() - expected)
        # Pillow rounds to uint8 between its two passes, and may start the crop one pixel aside.
        assert difference.mean() < 0.15
        assert np.abs(ours.mean((1, 2)).numpy() - expected.mean((0, 1))).max() < 0.01


def test_normalise_known_values():
    image = torch.tensor([0, 255, 128], dtype=torch.uint8).reshape(3, 1, 1)
    expected = [-0.485 / 0.229, (1 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    assert data.normalise(image).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_batch_is_filled_by_other_crops_and_flips_of_the_same_photographs():
    photographs = data.load_photographs(None)
    batch = data.make_batch(photographs, 6, 64, seed=3)
    assert torch.equal(batch, data.make_batch(photographs, 6, 64, seed=3))
    other = data.make_batch(photographs, 6, 64, seed=4)
    assert torch.equal(batch[:2], other[:2]) and not torch.equal(batch[2:], other[2:])
    # The third image is a flipped crop of the first photograph: it can be found in it.
    resized = data.normalise(data.resize_short_side(photographs[0][1], round(64 * 256 / 224)))
    windows = resized.unfold(1, 64, 1).unfold(2, 64, 1)  # (3, top, left, 64, 64)
    distance = (windows - batch[2].flip(2)[:, None, None]).abs().amax((0, 3, 4))
    assert float(distance.min()) == 0.0


def test_own_images_are_read_in_order_and_converted_to_rgb(tmp_path):
    Image.new("L", (80, 40), 255).save(tmp_path / "b.png")
    Image.new("RGBA", (40, 80), (10, 20, 30, 255)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    photographs = data.load_photographs(str(tmp_path))
    assert [name for name, _ in photographs] == ["a.PNG", "b.png"]
    assert photographs[0][1][:, 5, 5].tolist() == [10, 20, 30]
    assert photographs[1][1][:, 5, 5].tolist() == [255, 255, 255]
    batch = data.make_batch(photographs, 3, 32, seed=0)
    white = [(1 - m) / s for m, s in zip(data.IMAGENET_MEAN, data.IMAGENET_STD, strict=True)]
    assert batch[1].amax((1, 2)).tolist() == pytest.approx(white, rel=1e-5)


# ---------------------------------------------------------------- models


def test_settled_statistics_are_those_of_the_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 5 + 2
    models.settle_running_stats(model, x)
    y = model[0](x)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, y.var((0, 2, 3)))
    assert model[1].momentum == 0.1 and not model.training


def test_damped_residuals_change_the_last_norm_of_each_block_only():
    model = models.build_model("resnet18", seed=0)
    models.damp_residuals(model)
    weights = {k: v.unique().tolist() for k, v in model.state_dict().items() if "bn" in k}
    assert weights["layer1.0.bn2.weight"] == pytest.approx([models.RESIDUAL_WEIGHT])
    assert weights["layer1.0.bn1.weight"] == weights["bn1.weight"] == [1.0]


# ---------------------------------------------------------------- ratios and turns


def test_quantiles_are_numpys():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for q in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert stats.quantile(values, q) == pytest.approx(np.quantile(values, q))
    assert stats.quantile([7.0], 0.25) == 7.0


def test_ratios_are_taken_within_rounds():
    # A machine that slows down fourfold: per-round ratios stay 2, a ratio of means would too, but
    # the third round, in which only the baseline was disturbed, must not move the median.
    ratio = stats.speed_ratios([1.0, 2.0, 4.0, 4.0, 4.0], [2.0, 4.0, 80.0, 8.0, 8.0])
    assert ratio == stats.Spread(2.0, 2.0, 2.0)
    assert stats.speed_ratios([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).to_dict() == {
        "median": 2.0,
        "q1": 1.5,
        "q3": 2.5,
    }


def test_best_baseline_is_the_fastest_measured_one():
    times = {"eager": [3.0, 3.0], "compile": [2.0, 9.0, 1.0], "broken": []}
    assert stats.best_of(("eager", "compile"), times) == "compile"
    assert stats.best_of(("eager", "broken"), times) == "eager"
    assert stats.best_of(("broken", "absent"), times) is None


class FakeWorker:
    """Takes 2 s a step by its own clock; writes down when it ran."""

    def __init__(self, name, diary, fail_at=None):
        self.name, self.diary, self.fail_at, self.turns = name, diary, fail_at, 0

    def request(self, op, iters):
        self.diary.append(self.name)
        self.turns += 1
        if self.turns == self.fail_at:
            raise runner.WorkerError("out of memory")
        return {"seconds": 2.0 * iters}


def test_turns_rotate_and_count_per_step():
    diary: list[str] = []
    fakes = {name: FakeWorker(name, diary) for name in "abc"}
    times, failed = runner.take_turns(fakes, rounds=4, iters=5)
    assert "".join(diary) == "abcbcacababc"
    assert times == {name: [2.0] * 4 for name in "abc"} and failed == {}


def test_a_failing_worker_leaves_and_the_others_go_on():
    diary: list[str] = []
    fakes = {n: FakeWorker(n, diary, fail_at=2 if n == "b" else None) for n in "abc"}
    times, failed = runner.take_turns(fakes, rounds=3, iters=1)
    assert "".join(diary) == "abcbcaca"
    assert times == {"a": [2.0] * 3, "b": [], "c": [2.0] * 3}
    assert failed == {"b": "out of memory"}


@pytest.mark.parametrize("seconds, rounds", [(5.0, 5), (0.1, 3), (1e9, 10)])
def test_seconds_end_the_rounds_after_three_at_least(seconds, rounds):
    diary: list[str] = []
    clock = lambda: float(len(diary))  # noqa: E731 - one second per turn
    times, _ = runner.take_turns(
        {"a": FakeWorker("a", diary)}, rounds=10, iters=1, seconds=seconds, clock=clock
    )
    assert len(times["a"]) == rounds


def test_iterations_fill_a_turn():
    assert runner.turn_iterations(0.1, None, turn=0.5) == 5
    assert runner.turn_iterations(3.0, None) == 1
    assert runner.turn_iterations(1e-6, None) == 100
    assert runner.turn_iterations(3.0, 7) == 7


# ---------------------------------------------------------------- saved bytes


def test_saved_bytes_of_known_modules():
    x = torch.randn(4, 8)
    linear = nn.Linear(8, 16)
    assert saved_bytes(linear, lambda: linear(x), x) == 0  # input and weight only
    act = nn.Sequential(linear, nn.Sigmoid())
    assert saved_bytes(act, lambda: act(x), x) == 4 * 16 * 4  # the sigmoid's output
    # relu saves its result, and mul both factors, which are that result: one storage
    shared = lambda: (lambda y: y * y)(torch.relu(linear(x)))  # noqa: E731
    assert saved_bytes(linear, shared, x) == 4 * 16 * 4


def test_saved_bytes_of_conv_bn_relu():
    x = torch.randn(2, 3, 8, 8)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    activation = 2 * 4 * 8 * 8 * 4
    statistics = 2 * 4 * 4  # mean and rstd
    assert saved_bytes(block, lambda: block(x), x) == 2 * activation + statistics


def test_saved_bytes_leave_out_autocast_copies_of_weights():
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    # the batch cast to bf16 and relu's output; not the two cast weights (8 * 16 + 16 * 16) * 2
    assert saved_bytes(net, forward, x) == (4 * 8 + 4 * 16) * 2


# ---------------------------------------------------------------- verification


def test_relative_errors_known_values():
    truth = {"a": torch.tensor([3.0, -4.0]).double(), "b": torch.tensor([10.0]).double()}
    ours = {"a": torch.tensor([3.0, -3.0]), "b": torch.tensor([10.0])}
    errors = verify.relative_errors(ours, truth)
    assert errors["max"] == pytest.approx(1 / 4)
    assert errors["rms"] == pytest.approx(1 / math.sqrt(9 + 16 + 100))


@pytest.mark.parametrize(
    "ours",
    [
        {},
        {"a": torch.tensor([math.nan])},
        {"a": torch.tensor([1.0, 1.0])},
        {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])},
    ],
    ids=["missing", "nan", "shape", "extra"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(ours):
    errors = verify.relative_errors(ours, {"a": torch.tensor([1.0]).double()})
    assert errors == {"max": math.inf, "rms": math.inf}


def test_rule_is_twice_eager_plus_the_floor():
    floor = verify.FLOORS["outputs"]["fp32"]["max"]
    eager = {"outputs": {"max": 1e-3}}

    def passes(error):
        rows = verify.checks("fp32", "inference", eager, {"outputs": {"max": error}})
        return [row.passed for row in rows] == [True]

    assert passes(2e-3) and passes(2e-3 + floor)
    assert not passes(2e-3 + 1.01 * floor) and not passes(math.inf) and not passes(math.nan)
    assert not verify.checks("fp32", "train", eager, {})[0].passed  # a quantity that is absent


# ---------------------------------------------------------------- variants


def test_only_malloc_variants_have_malloc_settings():
    base = {"PATH": "/bin", "MALLOC_MMAP_MAX_": "7"}
    plain = variants.worker_environment(variants.EAGER, None, base)
    assert plain == {"PATH": "/bin"}
    tuned = variants.worker_environment(variants.Variant("x", "eager", malloc=True), 3, base)
    assert tuned == {
        "PATH": "/bin", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3",
    }  # fmt: skip


def test_rows_that_are_not_run_say_why(monkeypatch):
    quick = Options("resnet18", quick=True, peers=True)
    by_name = {v.name: v for v in variants.variants_for(quick)}
    assert list(by_name) == ["eager", "eager+malloc", "compile", "compile+malloc", "fastres",
                             "onnxruntime", "openvino"]  # fmt: skip
    infer, train = Case("fp32", "inference"), Case("bf16", "train")
    why = variants.not_measured
    assert why(by_name["eager"], infer, quick) is None
    assert why(by_name["compile"], infer, quick) == "not measured (--quick)"
    assert why(by_name["compile"], infer, Options("resnet18", compile=False)) == (
        "not measured (--no-compile)"
    )
    assert why(by_name["openvino"], train, quick) == "inference only"
    assert why(by_name["onnxruntime"], Case("bf16", "inference"), quick) == "has no bf16 mode here"
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    assert why(by_name["openvino"], infer, quick) == "not installed (pip install openvino)"
    gpu = [v.name for v in variants.variants_for(Options("resnet18", device="cuda"))]
    assert gpu == ["eager", "compile", "fastres"]


# ---------------------------------------------------------------- workers


def test_worker_answers_errors_and_goes_on(capsys):
    lines = [{"op": "fly"}, {"op": "run", "iters": 1}, {"op": "release"}]
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), answers)
    replies = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert replies[0] == {"ok": False, "error": "ValueError: unknown op 'fly'"}
    assert replies[1]["ok"] is False and replies[1]["error"].startswith("AttributeError")
    assert replies[2] == {"ok": True}
    assert "Traceback" in capsys.readouterr().err


def child(code):
    """A WorkerProcess that runs `code` instead of a worker."""
    return runner.WorkerProcess(variants.EAGER, None, [sys.executable, "-c", code])


def test_a_dead_worker_gives_its_last_words():
    with pytest.raises(runner.WorkerError, match="exited with code 3: no memory left"):
        child(
            "import sys; sys.stderr.write('Traceback\\nno memory left\\n'); sys.exit(3)"
        ).receive()
    with pytest.raises(runner.WorkerError, match="killed by SIGSEGV"):
        child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").receive()


def test_a_silent_worker_is_given_up_and_ended():
    silent = child("import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(runner.WorkerError, match="no answer in 0 s"):
        silent.receive(timeout=0.2)
    assert time.monotonic() - start < 10
    assert silent._process.returncode == -signal.SIGKILL


def test_stop_ends_what_the_worker_started():
    code = ("import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']);"
            "print('{\"ok\": true, \"pid\": %d}' % p.pid, flush=True); time.sleep(60)")  # fmt: skip
    parent = child(code)
    pid = parent.receive()["pid"]
    parent.stop()
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # gone, or a zombie that nobody has collected yet
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild still runs")


# ---------------------------------------------------------------- report


def small_result():
    """A result of one case with a failed, an unmeasured and three good rows."""
    times = {
        "eager": [1.0, 2.0, 1.0], "eager+malloc": [0.8, 1.6, 0.8], "compile": [],
        "fastres": [0.5, 1.0, 0.25], "openvino": [],
    }  # fmt: skip
    reasons = {
        "compile": ("not measured", "not measured (--quick)"),
        "openvino": ("failed", "worker killed by SIGKILL"),
    }
    errors = {"fastres": {"outputs": {"max": 1e-6, "rms": 1e-7},
                          "gradients": {"max": 0.5, "rms": math.inf}}}  # fmt: skip
    saved = {"eager": 200_000_000, "fastres": 100_000_000}
    options = Options("resnet18", batch=4, json="x.json")
    case = report.case_result(Case("fp32", "train"), options, 1, times, reasons, errors, saved)
    return {"schema_version": 1, "options": options.to_dict(), "cases": [case]}


def test_case_result_values():
    case = small_result()["cases"][0]
    rows = {row["name"]: row for row in case["variants"]}
    assert (case["best"], case["best_malloc"]) == ("eager", "eager+malloc")
    assert rows["eager"]["img_per_s"] == 4.0 and rows["fastres"]["img_per_s"] == 8.0
    assert rows["fastres"]["vs_eager"] == {"median": 2.0, "q1": 2.0, "q3": 3.0}
    assert rows["fastres"]["vs_best_malloc"]["median"] == pytest.approx(1.6)
    assert rows["fastres"]["saved_ratio"] == 0.5 and rows["eager+malloc"]["saved_bytes"] is None
    assert rows["fastres"]["max_error"] == 1e-6
    assert rows["openvino"]["status"] == "failed" and rows["openvino"]["vs_eager"] is None
    assert rows["compile"]["reason"] == "not measured (--quick)"


def test_table_shows_every_row_and_reason():
    from rich.console import Console

    out = io.StringIO()
    report.print_result(small_result(), Console(file=out, width=140), "a CPU, torch 9")
    text = out.getvalue()
    line = {name: next(row for row in text.splitlines() if f"│ {name} " in row)
            for name in ("fastres", "compile", "openvino")}  # fmt: skip
    assert "8.0" in line["fastres"] and "2.00x [2.00-3.00]" in line["fastres"]
    assert "100 MB (0.50x)" in line["fastres"] and "1.0e-06" in line["fastres"]
    assert "not measured (--quick)" in line["compile"]
    assert "failed, see below" in line["openvino"]
    assert "openvino: worker killed by SIGKILL" in text
    assert text.rstrip().endswith("a CPU, torch 9")


def test_json_is_strict_and_replaces_the_old_file_whole(tmp_path):
    file = tmp_path / "r.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        report.write_json({"bad": object()}, str(file))
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    report.write_json(small_result(), str(file))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    loaded = json.loads(file.read_text(), parse_constant=refuse)
    assert loaded["cases"][0]["variants"][3]["errors"]["gradients"]["rms"] == "inf"
    assert list(tmp_path.iterdir()) == [file]


def test_results_that_find_no_room_are_written_elsewhere(tmp_path, monkeypatch, capsys):
    write, json_file, png = report.write_json, str(tmp_path / "r.json"), str(tmp_path / "r.png")

    def full(result, file):
        if file == json_file:
            raise OSError(28, "No space left on device")
        write(result, file)

    monkeypatch.setattr(report, "write_json", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    (tmp_path / "spare").mkdir()
    options = Options("resnet18", json=json_file, png=png)
    assert not main.save(small_result(), options, "a CPU")
    said = capsys.readouterr()
    (spare,) = (tmp_path / "spare").glob("r-*.json")
    assert json.loads(spare.read_text())["cases"] and Path(png).stat().st_size > 1000
    assert f"wrote {spare} and {png}" in said.out
    assert f"--json: cannot write '{json_file}': No space left on device" in said.err
    monkeypatch.setattr(report, "write_json", write)
    assert main.save(small_result(), options, "a CPU") and Path(json_file).exists()
    assert len(list((tmp_path / "spare").iterdir())) == 1


def test_chart_is_a_picture_with_a_bar_for_fastres(tmp_path):
    file = tmp_path / "c.png"
    chart.draw(small_result(), str(file), "a CPU, torch 9")
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600

    def area(colour):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return int((np.abs(pixels - rgb).max(2) <= 2).sum())

    # img/s 8 against 4: the bar is twice as long
    ours, eager = area(chart.COLOURS["fastres"]), area(chart.COLOURS["eager"])
    assert ours / eager == pytest.approx(2.0, rel=0.05)


# ---------------------------------------------------------------- the whole


@pytest.mark.slow
def test_whole_run_through_real_workers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "bench resnet18 --size 64 --batch 2 --quick --rounds 3 --iters 1 --threads 1"
    code = cli.main([*argv.split(), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 0, (out, err)
    result = json.loads((tmp_path / "fastres-bench-resnet18.json").read_text())
    assert result["schema_version"] == report.SCHEMA_VERSION
    assert result["command"] == f"fastres {argv} --device cpu"
    assert result["environment"]["torch"] == torch.__version__.split("+")[0]
    assert result["environment"]["threads"] == 1
    assert result["inputs"]["images"] == ["china.jpg", "flower.jpg"]
    assert all(row["passed"] for row in result["verification"])
    # inference: outputs; training: outputs, gradients, running statistics; each max and rms
    assert len(result["verification"]) == 2 * (1 + 3) * 2
    cases = [(case["dtype"], case["mode"]) for case in result["cases"]]
    assert cases == [(d, m) for m in ("inference", "train") for d in ("fp32", "bf16")]
    for case in result["cases"]:
        rows = {row["name"]: row for row in case["variants"]}
        for name in ("eager", "eager+malloc", "fastres"):
            seconds = rows[name]["seconds"]
            assert rows[name]["status"] == "ok" and len(seconds) == 3 and min(seconds) > 0
            assert rows[name]["img_per_s"] == pytest.approx(2 / float(np.median(seconds)))
        assert rows["eager"]["vs_eager"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        assert rows["compile"]["status"] == "not measured"
        error = rows["fastres"]["max_error"]
        assert 0 < error < (1e-4 if case["dtype"] == "fp32" else 0.1)
        if case["mode"] == "train":
            assert 0 < rows["fastres"]["saved_bytes"] < rows["eager"]["saved_bytes"]
    assert "fp32 train" in out and "not measured (--quick)" in out
    image = np.asarray(Image.open(tmp_path / "fastres-bench-resnet18.png").convert("L"))
    assert image.std() > 20
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["fastres-bench-resnet18.json", "fastres-bench-resnet18.png"]


@pytest.mark.slow
def test_wrong_numbers_fail_before_timing(tmp_path):
    """A fastres whose converted model is wrong: FAIL lines, exit code 1, no files."""
    (tmp_path / "sitecustomize.py").write_text(
        "import fastres\n"
        "def convert(model, **options):\n"
        "    model.bn1.weight.data.mul_(1.01)\n"
        "    return model\n"
        "fastres.convert = convert\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    argv = "bench resnet18 --size 64 --batch 2 --quick --dtype fp32 --mode inference --device cpu"
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fastres.cli", *argv.split()],
        cwd=out, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "FAIL fp32 inference outputs (max error against float64): fastres" in done.stdout
    assert "warming up" not in done.stderr
    assert list(out.iterdir()) == []


def _children(pid: int) -> list[str]:
    """The processes whose parent is pid (/proc/PID/task/TID/children may leave some out)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # ended meanwhile
            continue
        if int(parent) == pid:
            found.append(stat.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_the_workers_and_leaves_no_file(tmp_path, number, code):
    argv = "bench resnet18 --size 64 --batch 2 --no-compile --device cpu --rounds 100000"
    argv += " --dtype fp32 --mode inference"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastres.cli", *argv.split()],
        cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    killer = threading.Timer(240, process.kill)
    killer.start()
    assert process.stderr is not None
    for line in process.stderr:
        if "rounds of" in line:
            break
    children = _children(process.pid)
    assert len(children) == 3, children  # eager, eager+malloc, fastres
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    killer.cancel()
    assert process.returncode == code, err
    assert ("fastres: interrupted" in err) == (number == signal.SIGINT) and "Traceback" not in err
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.iterdir()) == [scratch] and list(scratch.glob("fastres*")) == []


def test_options_survive_the_way_to_a_worker():
    options = Options("resnet50", batch=3, threads=2, json="/x.json", png="/x.png")
    assert Options(**json.loads(json.dumps(options.to_dict()))) == options


def test_refused_model_names_never_reach_torchvision():
    with pytest.raises(UsageError, match="unknown model 'alexnet'"):
        models.build_model("alexnet")
