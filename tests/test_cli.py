"""The command line: exit codes and messages, without timing anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image

import fastres
from fastres import cli, doctor
from fastres.bench.options import MODELS, Case

ROOT = Path(fastres.__file__).resolve().parents[1]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as stop:  # argparse's --help
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def error_of(result):
    """The message of a run that must have failed as bad input does: one line, exit code 2."""
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("[")]  # progress log
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("fastres: error: "), err
    assert "Traceback" not in err
    return lines[0].removeprefix("fastres: error: ")


def test_bare_command_prints_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(word in out for word in ("bench", "report", "doctor"))


def test_help_of_bench_names_models_and_options(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    options = "--batch --size --dtype --mode --images --weights --iters --rounds --seconds"
    others = "--threads --quick --json --png --no-compile --peers --device --seed"
    for word in f"{options} {others} resnet50 wide_resnet101_2".split():
        assert word in out, word


def test_version(run):
    assert run("--version") == (0, f"fastres {fastres.__version__}\n", "")


def test_unknown_model_lists_the_accepted_ones(run):
    message = error_of(run("bench", "resnet-51"))
    assert "unknown model 'resnet-51'; did you mean resnet50?" in message
    assert all(name in message for name in MODELS)
    assert "did you mean" not in error_of(run("report", "zebra"))
    for command in ("tune", "report", "bench", "roofline"):
        message = error_of(run(command, "model.pt"))
        assert (
            "'model.pt' looks like a file" in message and "fastres.tune(model, sample)" in message
        )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["bench"], "the following arguments are required: MODEL"),
        (["bench", "resnet18", "--batch", "0"], "'0' is not a whole number of at least 1"),
        (["bench", "resnet18", "--batch", "two"], "'two' is not a whole number of at least 1"),
        (["bench", "resnet18", "--size", "31"], "'31' is not a whole number of at least 32"),
        (["bench", "resnet18", "--seconds", "nan"], "'nan' is not a positive number of seconds"),
        (["bench", "resnet18", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["bench", "resnet18", "--dtype", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["bench", "resnet18", "--images", "nowhere"], "--images: 'nowhere' is not a folder"),
        (["bench", "resnet18", "--weights", "no.pt"], "--weights: there is no file 'no.pt'"),
        (["bench", "resnet18", "--json", "no/x.json"], "the folder of 'no/x.json' does not exist"),
        (["bench", "resnet18", "--json", "."], "--json: '.' is a folder"),
        # not by permissions, which root has
        (["bench", "resnet18", "--json", "/proc/x.json"], "--json: cannot write '/proc/x.json'"),
        (["bench", "resnet18", "--png", "x" * 300], "--png: cannot write 'xxx"),
        (["bench", "resnet18", "--batch", "1", "--size", "32"], "on a single value a channel"),
        (["tune", "resnet18", "--batch", "1", "--size", "32"], "--batch 2 or --size 33 can"),
        (["report", "resnet18", "--batch", "1", "--size", "32"], "one image of 32 px is 1x1"),
        (["bench", "resnet18", "--what"], "unrecognized arguments: --what"),
        (["bench", "resnet18", "--batch", "1000000000"], "need 7,024,640 GB of memory or more"),
        (["roofline", "resnet18", "--batch", "9" * 20], f"'{'9' * 20}' is more than 2,147,483,647"),
        *(
            ([c, "resnet18", "--batch", "2147483647", "--size", "100000"], "than torch can count")
            for c in ("bench", "report", "roofline", "tune")
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(run, argv, words):
    assert words in error_of(run(*argv))


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from fastres import cli; sys.exit(cli.main(['report', 'resnet18']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_a_full_disk_is_told_before_anything_runs(run, monkeypatch, tmp_path):
    full = SimpleNamespace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    message = error_of(run("bench", "resnet18", "--json", "x.json"))
    assert "--json: no room for 'x.json': its disk has 4,096 bytes left, 1,048,576" in message
    assert not list(tmp_path.iterdir())

    def write(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    message = error_of(run("tune", "resnet18", "--batch", "2", "--size", "32"))
    assert "the plan cannot be saved" in message and "No space left on device" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_cuda_without_a_gpu(run):
    assert "--device: cuda, but torch sees no GPU" in error_of(
        run("bench", "resnet18", "--device", "cuda")
    )


def test_folder_without_images(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "readme.txt").write_text("none here")
    message = error_of(run("bench", "resnet18", "--images", "photos"))
    assert "no .jpg, .jpeg, .png file in" in message and "photos" in message


def test_unreadable_image_is_named(run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"this is not a photograph")
    message = error_of(run("bench", "resnet18", "--images", "photos"))
    assert "b.jpg' is not a readable image" in message


def checkpoints():
    """(name, object or bytes, words in the error)"""
    good = torchvision.models.resnet18().state_dict()
    short = {k: v for k, v in good.items() if k != "fc.bias"}
    wide = {**good, "fc.weight": torch.zeros(10, 512)}
    return [
        ("text", b"hello", "not a checkpoint that can be read"),
        ("list", [1, 2], "a list, not a dict of tensors"),
        ("number", {"epoch": 3}, "a dict, not a dict of tensors"),
        ("empty", {}, "an empty dict"),
        ("short", short, "1 keys missing (fc.bias)"),
        ("extra", {**good, "neck.weight": torch.zeros(1)}, "1 unknown (neck.weight)"),
        ("wide", wide, "fc.weight is (10, 512), not (1000, 512)"),
    ]


@pytest.mark.parametrize("index", range(7), ids=[name for name, _, _ in checkpoints()])
def test_unfit_weights_are_refused_before_anything_runs(run, tmp_path, index):
    _, content, words = checkpoints()[index]
    file = tmp_path / "w.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    message = error_of(run("bench", "resnet18", "--weights", "w.pt"))
    assert words in message and "w.pt" in message
    assert "Accepted: a state_dict of torchvision's resnet18" in message


def test_weights_load_wrapped_and_from_ddp(tmp_path):
    from fastres.bench.models import build_model, load_weights

    good = torchvision.models.resnet18().state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in good.items()}, "epoch": 3}, tmp_path / "w")
    model = build_model("resnet18", seed=1)
    assert not torch.equal(model.conv1.weight, good["conv1.weight"])
    load_weights(model, "resnet18", str(tmp_path / "w"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, good[key]), key


def test_options_give_the_cases_in_order():
    args = cli.make_parser().parse_args(["bench", "resnet18", "--device", "cpu", "--quick"])
    from fastres.bench.options import options_from

    options = options_from(args)
    cases = [Case(d, m) for m in ("inference", "train") for d in ("fp32", "bf16")]
    assert options.cases() == cases
    assert Path(options.json) == Path.cwd() / "fastres-bench-resnet18.json"
    assert Path(options.png) == Path.cwd() / "fastres-bench-resnet18.png"
    assert options.seconds == 6.0 and options.rounds == 12 and options.compile


def test_ctrl_c_is_one_line_and_exit_code_130(run, monkeypatch):
    def interrupt(args, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupt)
    assert run("doctor") == (130, "", "fastres: interrupted\n")


def test_report_of_a_model_by_name(run):
    code, out, _ = run("report", "resnet18")
    assert code == 0
    assert "layer4.1" in out and "BasicBlock" in out
    code, out, _ = run("report", "resnet18", "--json")
    assert code == 0
    assert "layer4.1" in json.dumps(json.loads(out))


def test_report_of_a_batch_says_what_was_chosen_and_why(run, monkeypatch):
    from fastres import _heuristic

    monkeypatch.setattr(_heuristic, "SMALL", 10_000_000)
    monkeypatch.setenv("FASTRES_WINOGRAD", "0")
    code, out, _ = run("report", "resnet18", "--batch", "2", "--size", "64", "--dtype", "bf16")
    assert code == 0 and "training on 2x64x16x16: eager (heuristic" in out
    code, out, _ = run("report", "resnet18", "--batch", "2", "--size", "64", "--mode", "inference")
    assert code == 0 and "fused" in out and "training on" not in out
    rows = [line for line in out.splitlines() if "BasicBlock" in line]
    assert rows and all("; rung b (heuristic: vendor convs" in row for row in rows)
    assert "--batch" in error_of(run("report", "resnet18", "--batch", "0"))


def test_doctor_says_what_is_there(run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == (0 if found["usable"] else 1)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["fastres"]["version"] == fastres.__version__
    assert Path(found["fastres"]["folder"]) == ROOT / "fastres"
    assert found["threads"]["count"] == torch.get_num_threads()
    assert set(found["backends"]) == {"cpu", "triton", "cuda", "reference"}
    assert found["backends"]["reference"] is None
    assert bool(found["gpu"]["devices"]) == torch.cuda.is_available()
    assert (found["gpu"]["why_none"] is None) == torch.cuda.is_available()
    code, out, _ = run("doctor")
    assert "backend cpu" in out and torch.__version__.split("+")[0] in out


def test_doctor_without_the_native_module(run, monkeypatch):
    from fastres import _native

    missing = (None, "the extension does not load", None)
    monkeypatch.setattr(_native, "_load", lambda: missing)
    code, out, _ = run("doctor")
    assert code == 1
    assert "MISSING: the extension does not load" in out
    assert "off: the extension does not load" in out
    assert out.rstrip().endswith("NOT usable: the native module is missing (see above)")
    assert doctor.examine()["threads"]["pool"] == "none: the native module is missing"


def test_a_native_module_of_older_sources_is_missing(monkeypatch):
    """As after `git pull`: said once, not an AttributeError in a training step."""
    from fastres import _native

    old = SimpleNamespace(__file__="there/_C.so", isa=lambda: "portable")
    monkeypatch.setattr(fastres, "_C", old, raising=False)
    module, missing, _ = _native._load.__wrapped__()
    assert module is None and "there/_C.so was built from other sources" in missing
    assert "`pip install -e .` again" in missing


def test_doctor_shows_malloc_variables(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    found = doctor.examine()
    assert found["malloc"]["environment"]["MALLOC_TRIM_THRESHOLD_"] == "123"
    assert "MALLOC_TRIM_THRESHOLD_=123" in doctor.text(found)


def test_module_runs_as_a_process_from_another_folder(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "fastres.cli", "bench", "resnet0"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fastres: error: unknown model 'resnet0'")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
