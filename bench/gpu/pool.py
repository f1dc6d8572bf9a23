"""Jobs in worker processes: a job that crashes or hangs costs itself, and nothing else."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

CLOSE_SECONDS = 5.0
SILENT = "no answer within"


class _Worker:
    """One process of `bench.gpu.child work`."""

    def __init__(self, stage: str, dry: bool) -> None:
        argv = [sys.executable, "-m", "bench.gpu.child", "work", stage, *(["dry"] if dry else [])]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""

    def ask(self, name: str, seconds: float) -> dict[str, Any]:
        """The job's answer; a reason when there is none in time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        end = time.monotonic() + seconds
        try:
            self.process.stdin.write((json.dumps(name) + "\n").encode())
            self.process.stdin.flush()
            while b"\n" not in self.buffer:
                left = max(0.0, end - time.monotonic())
                ready, _, _ = select.select([self.process.stdout], [], [], left)
                if not ready or time.monotonic() > end:
                    self.stop()
                    return {"ok": False, "error": f"{SILENT} {seconds:.0f} s"}
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    return {"ok": False, "error": self.death()}
                self.buffer += part
        except (OSError, ValueError):
            return {"ok": False, "error": self.death()}
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def death(self) -> str:
        try:
            code = self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()
            return "its process lives, but answers no more: killed"
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its process died: {why}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()


def run_jobs(
    stage: str, names: Sequence[str], dry: bool, parallel: int, job_seconds: float, seconds: float
) -> dict[str, dict[str, Any]]:
    """{name: {"ok", ...}} of every job; those not begun within `seconds` say so."""
    end = time.monotonic() + seconds
    waiting, found = list(names), {}
    lock = threading.Lock()
    workers: list[_Worker] = []

    def serve() -> None:
        worker: _Worker | None = None
        while True:
            with lock:
                if not waiting:
                    break
                name = waiting.pop(0)
            left = min(job_seconds, end - time.monotonic())
            if left <= 0:
                found[name] = {"ok": False, "error": "not checked: no time left"}
                continue
            if worker is None or not worker.alive:
                worker = _Worker(stage, dry)
                workers.append(worker)
            found[name] = worker.ask(name, left)
            if left < job_seconds and str(found[name].get("error")).startswith(SILENT):
                found[name]["error"] = f"not checked: no time left after {left:.0f} s"
        if worker is not None:
            worker.close()

    threads = [
        threading.Thread(target=serve, daemon=True) for _ in range(min(parallel, len(names)))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without timeout would hold Ctrl-C back
                thread.join(0.2)
    finally:
        for worker in workers:
            if worker.alive:
                worker.stop()
    return {name: found[name] for name in names if name in found}


def parallel_workers(dry: bool, most: int = 10) -> int:
    """Workers that compile side by side; each holds a context and a few tensors on the device."""
    return 1 if dry else max(1, min(most, (os.cpu_count() or 2) - 2))
