"""A pytest plugin: outcomes to $FASTRES_TEST_LOG, a JSON line each, as they come; only the tests of
$FASTRES_TEST_ONLY (a JSON list of file::test), and none of the node ids in the file
$FASTRES_TEST_DONE, which passed before; and a worker whose GPU is broken ends, so that its
other tests run in a fresh one (a bad access is sticky)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.gpu.child import find_kernels

find_kernels()


def _log(test: str, outcome: str, error: str) -> None:
    file = os.environ.get("FASTRES_TEST_LOG")
    if file:
        with open(file, "a") as log:
            log.write(json.dumps({"test": test, "outcome": outcome, "error": error[-600:]}) + "\n")


def pytest_collection_modifyitems(config, items):
    only = os.environ.get("FASTRES_TEST_ONLY")
    if only:
        names = set(json.loads(only))
        items[:] = [i for i in items if f"{i.path.name}::{i.name}" in names]
    done = os.environ.get("FASTRES_TEST_DONE")
    if done:
        passed = set(json.loads(Path(done).read_text()))
        items[:] = [i for i in items if i.nodeid not in passed]


def pytest_collectreport(report):
    """A file that skips itself skips those of its tests that were asked for by name."""
    for name in json.loads(os.environ.get("FASTRES_TEST_ONLY") or "[]") if report.skipped else ():
        if name.partition("::")[0] == Path(report.nodeid).name:
            _log(name, "skipped", "")


def pytest_runtest_logreport(report):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return  # the controller hears of it
    if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
        crash = getattr(report.longrepr, "reprcrash", None)
        error = getattr(crash, "message", None) or (str(report.longrepr) if report.failed else "")
        _log(report.nodeid, report.outcome, error)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    if call.excinfo is None or not os.environ.get("PYTEST_XDIST_WORKER"):
        return
    import torch

    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        # before the report is sent: the controller then names this test, and replaces the worker
        _log(item.nodeid, "failed", "broke the GPU: " + str(result.get_result().longrepr))
        os._exit(70)
