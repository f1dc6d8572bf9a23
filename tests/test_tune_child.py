"""fastres.tune checks candidates in a process of its own: crashes, hangs, starts, self-checks."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from test_plan import cache, network, sample  # noqa: F401 (cache: a fixture of every test here)

import fastres
from fastres import tuning
from fastres.plan import EAGER

CRASHES = """
import json, os, sys, time
folder, *names = sys.argv[1:]
print("last words", file=sys.stderr)
for name in names:
    if name == "b": os.abort()
    if name == "c1": time.sleep(60)
    if name == "d": sys.exit(3)
    with open(folder + "/answers", "a") as file: print(json.dumps([name, None]), file=file)
"""


def block(path="layer2.0", training=True) -> tuning.Target:
    (target,) = [t for t in tuning.distinct(network(), sample(), training) if t.path == path]
    return target


def test_a_crash_or_a_hang_is_an_answer(monkeypatch):
    monkeypatch.setattr(tuning, "CHILD", ("-S", "-c", CRASHES))
    monkeypatch.setattr(tuning, "START_SECONDS", 1.0)
    names = [EAGER, "c2", "b", "c1", "d", "c2 vendor conv1.wgrad"]
    assert tuning.rejections(block(), names, True, seconds=2.0) == {
        EAGER: None, "c2": None, "b": "crashed (SIGABRT)", "c1": "no answer in 2 s",
        "d": "crashed (exit code 3): last words", "c2 vendor conv1.wgrad": None,
    }  # fmt: skip


STARTS = """
import json, sys, time
def say(*lines):
    with open(sys.argv[1] + "/answers", "a") as file:
        for line in lines: print(json.dumps([line, None]), file=file)
time.sleep(2.5)  # longer than a candidate may take
say("checking", "started", sys.argv[2], "checking")
time.sleep(2.5)
say("started")
time.sleep(60)  # until killed
"""


def test_the_start_of_a_child_is_not_a_candidates_time(monkeypatch):
    """Nor are its self-checks."""
    monkeypatch.setattr(tuning, "CHILD", ("-S", "-c", STARTS))
    found = tuning.rejections(block(), ["c1", "c2"], True, seconds=2.0)
    assert found == {"c1": None, "c2": "no answer in 2 s"}


BROKEN = """
import os, pathlib, signal, sys
from fastres import _tune_child, selfcheck
def verdict(name, device, family, dtype):
    if family == "convs": os.kill(os.getpid(), signal.SIGKILL)
selfcheck.ENABLED, selfcheck._verdict = True, verdict
_tune_child.main(pathlib.Path(sys.argv[1]), sys.argv[2:])
"""


def test_convs_that_crash_in_their_self_check_reject_the_rungs_of_convs(monkeypatch):
    monkeypatch.setattr(tuning, "CHILD", ("-c", BROKEN))
    with fastres.use_backend("reference"):
        found = tuning.rejections(block(), ["b", "c2"], True)
    assert found == {"b": None, "c2": "crashed (SIGKILL), in a self-check"}


def test_convs_whose_self_check_raises_reject_the_rungs_of_convs(monkeypatch, tmp_path):
    """An AttributeError, too, which loading a class of the user's script may raise."""
    from fastres import _tune_child, selfcheck

    def verdict(name, device, family, dtype):
        if family == "convs":
            raise AttributeError("no such kernel")

    monkeypatch.setattr(selfcheck, "ENABLED", True)
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_verdict", verdict)
    torch.save({"target": block(), "backend": "reference"}, tmp_path / "block.pt")
    _tune_child.main(tmp_path, ["b", "c2"])
    found = dict(tuning._lines(tmp_path / "answers"))
    assert tuning.NOT_LOADED not in found and found["b"] is None
    assert found["c2"] == "AttributeError: no such kernel"


def test_a_child_that_says_nothing_is_an_answer(monkeypatch):
    """Whatever it was sent: here 2 MB, which a pipe to a dead child would not take."""
    monkeypatch.setattr(tuning, "CHILD", ("-S", "-c", ""))
    target = block()
    target.module.register_buffer("large", torch.zeros(1 << 19))
    assert tuning.rejections(target, ["b"], True) == {"b": "no answer"}
    monkeypatch.setattr(tuning, "CHILD", ("-m", "fastres.no_such_module"))
    assert "No module named fastres.no_such" in str(tuning.rejections(target, ["b"], True)["b"])


def test_the_time_limit_ends_a_child(monkeypatch):
    monkeypatch.setattr(tuning, "CHILD", ("-S", "-c", "import time; time.sleep(60)"))
    target, start = block(), time.monotonic()
    with pytest.raises(tuning.TimeLimit):
        tuning.rejections(target, ["b"], True, start + 0.5)
    assert time.monotonic() - start < 20


def test_candidates_are_checked_in_a_process_of_their_own():
    """What raises there says what it would say here."""
    target, names = block(), [EAGER, "b", "c2"]
    found = tuning.rejections(target, names, isolate=True)
    assert found == tuning.rejections(target, names, isolate=False)
    assert found["b"] is None and "BackendError" in str(found["c2"])  # cpu: no convs
    with fastres.use_backend("reference"):
        assert tuning.rejections(target, ["c2"], isolate=True) == {"c2": None}


def test_a_script_without_a_main_guard_can_tune(tmp_path):
    """Its process for the candidates must not run the script again. A class of the script cannot
    get there: its block is checked in the script's own process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, fastres\n"
        "from torchvision.models.resnet import BasicBlock\n"
        "print('started', flush=True)\n"
        "class Own(torch.nn.Module): pass\n"
        "block = fastres.convert(torch.nn.Sequential(BasicBlock(64, 64)).eval())\n"
        "block[0].own = Own()\n"
        "x = torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)\n"
        "print(fastres.tune(block, x, modes=('inference',), seconds=0.1, isolate=True))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0] == "started" and "rejected" not in lines[1], lines
    assert done.stderr.count("is checked in this process") == 1 and "'Own'" in done.stderr
