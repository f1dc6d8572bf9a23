"""fastres.tune where memory runs out: of a candidate, of the original, of the command."""

from __future__ import annotations

import json

import pytest
import torch
from test_plan import TUNE, cache, entry, network, sample  # noqa: F401 (cache: a fixture of every test here)

import fastres
from fastres import cli, plan, tuning
from fastres.plan import EAGER

CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory\nstack")


def exhaust(monkeypatch, candidate: str, error: Exception) -> None:
    """Memory runs out where the candidate is about to be timed."""
    step_of = tuning.step_of

    def step(target, name):
        if name == candidate:
            raise error
        return step_of(target, name)

    monkeypatch.setattr(tuning, "step_of", step)
    monkeypatch.setattr(tuning, "check", lambda *args: None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), CPU])
def test_a_candidate_without_memory_is_rejected(monkeypatch, error):
    exhaust(monkeypatch, "b", error)
    found = fastres.tune(network(), sample(), modes=("inference",), seconds=0.1)
    assert len(found.entries) == 5
    assert all(e.rejected == {"b": "out of memory"} for e in found.entries.values())


def test_other_errors_of_a_step_are_raised(monkeypatch):
    exhaust(monkeypatch, "b", RuntimeError("no such kernel"))
    with pytest.raises(RuntimeError, match="no such kernel"):
        fastres.tune(network(), sample(), modes=("inference",), seconds=0.1)


def test_the_original_without_memory_ends_the_command_with_a_line(monkeypatch, capsys):
    exhaust(monkeypatch, EAGER, CPU)
    assert cli.main(TUNE) == 1
    err = capsys.readouterr().err
    assert "tune: the original (stem) itself cannot run: out of memory; a smaller --batch" in err
    assert "nothing was measured yet" in err and "Traceback" not in err


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory. Tried to"),
    (CPU, "can't allocate memory;"),
    (MemoryError(), "no memory is left"),
])  # fmt: skip
def test_the_command_says_that_there_is_no_memory(monkeypatch, capsys, error, said):
    found = iter([entry(), entry(), error])

    def measure(target, *args):
        if isinstance(one := next(found), Exception):
            raise one
        return one

    monkeypatch.setattr(tuning, "measure", measure)
    assert cli.main(TUNE) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and said in err and "a smaller --batch or --size" in err
    file = plan.cache_file(plan.identity("cpu"))
    assert len(json.loads(file.read_text())["entries"]) == 2
    assert f"2 blocks are saved in {file}" in err
