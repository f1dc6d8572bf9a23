"""Starts the workers, and lets them take turns."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fastres.bench
from fastres.bench.stats import rotation
from fastres.bench.variants import Variant, worker_environment

PACKAGE_PARENT = Path(fastres.bench.__file__).resolve().parents[2]
REPLY_TIMEOUT = 1800.0  # seconds; compiling a ResNet-152 on a slow machine takes minutes
MIN_ROUNDS = 3


class WorkerError(Exception):
    """A worker answered with an error, or died. str() is the reason for the table."""


class Runs(Protocol):
    """What take_turns needs of a worker."""

    def request(self, op: str, **fields: Any) -> dict[str, Any]: ...


class WorkerProcess:
    """A child running fastres.bench.worker for one variant."""

    def __init__(self, variant: Variant, threads: int | None, argv: Sequence[str] = ()) -> None:
        self.variant = variant
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._buffer = b""
        # The package's parent as the working folder makes the package importable there, installed
        # or not, and keeps files in the user's folder from shadowing modules.
        self._process = subprocess.Popen(
            argv or [sys.executable, "-m", "fastres.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=PACKAGE_PARENT,
            env=worker_environment(variant, threads),
            start_new_session=True,
        )

    def send(self, op: str, **fields: Any) -> None:
        """Sends a request without waiting for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(self._epitaph()) from error

    def receive(self, timeout: float = REPLY_TIMEOUT) -> dict[str, Any]:
        """The answer to the oldest request. Raises WorkerError for an error, or when none comes."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self.stop()
                raise WorkerError(f"no answer in {timeout:.0f} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise WorkerError(self._epitaph())
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        if not reply["ok"]:
            raise WorkerError(reply["error"])
        return reply

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """send and receive."""
        self.send(op, **fields)
        return self.receive()

    def log(self) -> str:
        """What the worker wrote to stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    def _epitaph(self) -> str:
        self.stop(grace=2.0)
        code = self._process.returncode
        if code is not None and code < 0:
            cause = f"killed by {signal.Signals(-code).name}"
        else:
            cause = f"exited with code {code}"
        lines = self.log().strip().splitlines()
        return f"worker {cause}" + (f": {lines[-1].strip()}" if lines else "")

    def stop(self, grace: float = 0.0) -> None:
        """Ends the worker and whatever it started: after `grace` seconds by force."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def turn_iterations(seconds: float, iters: int | None, turn: float = 0.5) -> int:
    """Steps per turn: as asked, or what fills about `turn` seconds at `seconds` each, 1 to 100."""
    if iters is not None:
        return iters
    return max(1, min(100, round(turn / max(seconds, 1e-9))))


def take_turns(
    workers: dict[str, Runs],
    rounds: int,
    iters: int,
    seconds: float | None = None,
    on_turn: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per step of each worker by round, and the reasons of those that failed.

    In every round each worker runs `iters` steps once; who starts rotates. After `seconds`, no
    round is begun once MIN_ROUNDS are complete. A worker that fails keeps no times and the others
    go on.
    """
    times: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    start = clock()
    for turn in range(rounds):
        if seconds is not None and turn >= MIN_ROUNDS and clock() - start >= seconds:
            break
        for name in rotation(list(workers), turn):
            if name in failed:
                continue
            try:
                reply = workers[name].request("run", iters=iters)
                times[name].append(reply["seconds"] / iters)
            except WorkerError as error:
                failed[name] = str(error)
            on_turn(name)
    for name in failed:
        times[name] = []
    return times, failed
