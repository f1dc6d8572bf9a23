"""`pytest bench/ --benchmark-only`: options, the choice of cases, and what the JSON says of the
machine. docs/benchmarking.md."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.bench.options import ROOM
from fastres.bench.report import write_json

from . import cases, session, timing
from .session import Session

KEY = pytest.StashKey[Session]()
JSON = "--benchmark-json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres")
    group.addoption("--full", action="store_true", help="every case, not the thin default set")
    group.addoption(
        "--compile",
        action="store_true",
        help="torch.compile beside every op, block and network: each is compiled, minutes for a "
        "deep network",
    )
    group.addoption(
        "--tiny",
        action="store_true",
        help="tiny shapes and two rounds: shows that everything works, the times mean nothing",
    )
    group.addoption(
        "--family",
        metavar="NAME[,NAME]",
        default="",
        help=f"these only: {', '.join(cases.SUITES)}, or a kernel, op, block or model",
    )
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any"
    )
    group.addoption(
        "--backend", metavar="NAME", help="run fastres on this backend: cpu, triton, reference"
    )
    group.addoption(
        "--case-seconds",
        type=float,
        metavar="S",
        help="of timing a case (0.3; a block: 1, a network: 3)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install 'fastres[bench]'")
    config.addinivalue_line("markers", "benchmark: of pytest-benchmark")
    seconds = config.getoption("--case-seconds")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise pytest.UsageError(f"--case-seconds: {seconds:g} is not a positive number of seconds")
    found = config.getoption("--device")
    if found == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: cuda, but torch sees no GPU; accepted here: cpu, auto")
    if found == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        only = cases.check_families(n for n in config.getoption("--family").split(",") if n)
    except ValueError as error:
        raise pytest.UsageError(f"--family: {error}") from None
    _check_json_path(config)
    tiny = config.getoption("--tiny")
    made = Session(found, config.getoption("--full"), tiny, _backend(config, found), only=only)
    made.compile = config.getoption("--compile")
    made.case_seconds = 0.0 if tiny else seconds
    config.stash[KEY] = made
    timing.CLOCK.cuda = found == "cuda"
    torch.backends.cudnn.benchmark = True
    if found == "cpu" and not config.option.collectonly:
        from fastres import memory

        memory.keep_buffers()  # eager's buffers too: all variants share this process
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is not None and benchmarks.json:
        benchmarks.save_json = lambda found: _save_json(config, Path(benchmarks.json), found)


def _backend(config: pytest.Config, device: str) -> str:
    from fastres import backends

    name = config.getoption("--backend")
    if name is None:
        return "triton" if device == "cuda" else "cpu"
    if name not in backends.MODULES:
        raise pytest.UsageError(
            f"--backend: unknown backend '{name}'; known: {', '.join(backends.MODULES)}"
        )
    reason = backends.unavailable(name)
    if reason is not None:
        raise pytest.UsageError(f"--backend: {name} is not available: {reason}")
    return name


def _check_json_path(config: pytest.Config) -> None:
    """A path that cannot be written is told before the minutes of timing, not after."""
    path = config.getoption("benchmark_json", None)
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise pytest.UsageError(f"{JSON}: '{path}' is a folder; a file name is needed")
    if not folder.is_dir():
        raise pytest.UsageError(f"{JSON}: the folder of '{path}' does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise pytest.UsageError(f"{JSON}: '{path}' cannot be written: {error.strerror}") from None


def _save_json(config: pytest.Config, path: Path, found: dict[str, Any]) -> None:
    """Writes the results, in one step; elsewhere when there is no room, and says so."""
    say = config.pluginmanager.get_plugin("terminalreporter").write_line
    try:
        write_json(found, str(path))
        say(f"wrote {path}")
        return
    except OSError as error:
        reason = error.strerror or str(error)
    spare = Path(tempfile.gettempdir()) / f"{path.stem}-{os.getpid()}.json"
    config.stash[KEY].unsaved = f"{path} could not be written: {reason}"
    try:
        write_json(found, str(spare))
        config.stash[KEY].unsaved += f"; the results are in {spare}"
    except OSError as error:
        config.stash[KEY].unsaved += f"; nor could {spare}: {error.strerror}"


def pytest_report_header(config: pytest.Config) -> list[str]:
    made = config.stash[KEY]
    chosen = {
        suite: len(cases.chosen(suite, made.device, made.full, made.tiny, made.only))
        for suite in cases.SUITES
    }
    made.counts = {suite: (n, cases.count(suite, made.device)) for suite, n in chosen.items()}
    run, total = sum(chosen.values()), sum(n for _, n in made.counts.values())
    what = ", ".join(f"{suite} {n} of {m}" for suite, (n, m) in made.counts.items())
    kind = "tiny shapes" if made.tiny else "all" if made.full else "default set"
    left = f"; {total - run} left out, --full runs all" if run < total and not made.tiny else ""
    return [
        f"fastres bench: {kind} on {made.device}, backend {made.backend}, "
        f"{made.threads()} threads: {run} cases ({what}){left}"
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    made = metafunc.config.stash[KEY]
    suite = metafunc.module.SUITE
    found = cases.chosen(suite, made.device, made.full, made.tiny, made.only)
    metafunc.parametrize("case", found, ids=[case.id for case in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the placeholder that pytest collects for a suite that has no case to run."""
    mine = [item for item in items if hasattr(item, "callspec")]
    empty = [i for i in mine if not isinstance(i.callspec.params.get("case"), cases.Case)]
    gone = set(map(id, empty))
    items[:] = [item for item in items if id(item) not in gone]


@pytest.fixture
def bench_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    yield request.config.stash[KEY]
    session.release()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    from fastres.bench import environment

    made = config.stash[KEY]
    machine_info["fastres"] = environment.gather(made.device, made.threads())
    if made.device == "cuda":
        machine_info["fastres"]["driver"] = session.driver()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    """Adds the block `fastres`, and brings every percentage to the best that the whole session saw
    of the machine."""
    made = config.stash[KEY]
    output_json["fastres"] = session.header(made, list(config.invocation_params.args))
    for row in output_json["benchmarks"]:
        row["params"] = None  # a Case, which is no JSON; extra_info says the same
        row.get("stats", {}).pop("data", None)  # extra_info has them
        info = row["extra_info"]
        if "kernels" in info:
            info["percent_of_roofline"] = session.percent(
                made, info["kernels"], info["dtype"], info["seconds"]
            )


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    made = config.stash[KEY]
    lines = [*made.halved]
    if made.unsaved:
        lines.append(made.unsaved)
    if lines or made.rows:
        terminalreporter.section("fastres")
    for line in session.summary(made):
        terminalreporter.write_line(line)
    for line in lines:
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    made = session.config.stash.get(KEY, None)
    if made is not None and made.unsaved and exitstatus == 0:
        session.exitstatus = 1
