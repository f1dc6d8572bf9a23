"""One process per variant: `python -m fastres.bench.worker`, JSON lines on stdin and stdout.

    init     engine, options, fixture   -> threads
    check    dtype, mode                -> errors, facts
    machine  dtype                      -> bandwidth, rate (machine.py)
    prepare  dtype, mode                -> errors, seconds of a step; the case is then warmed up
    run      iters                      -> seconds of all of them
    release                             -> nothing; the case's memory is given back

A request is {"op": ..., fields}, an answer {"ok": true, fields}. A failed request answers
{"ok": false, "error"} and the worker goes on. End of stdin ends the worker, so none outlives its
parent. What libraries print goes to stderr: stdout is for answers only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from typing import Any


class Worker:
    """State of one worker: the fixture, and the engine of the case at hand."""

    def __init__(self) -> None:
        self.engine: Any = None

    def init(self, engine: str, options: dict[str, Any], fixture: str) -> dict[str, Any]:
        import torch

        from fastres.bench.options import Options

        self.kind, self.options = engine, Options(**options)
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(self.options.seed)
        # mmap: the float64 truth is large, and all workers share one copy of it.
        self.fixture = torch.load(fixture, weights_only=True, mmap=True)
        self.fixture["batch"] = self.fixture["batch"].clone()
        return {"threads": torch.get_num_threads()}

    def _make(self, dtype: str, mode: str) -> None:
        from fastres.bench.engines import make_engine
        from fastres.bench.options import Case

        self.release()
        self.engine = make_engine(self.kind, Case(dtype, mode), self.options, self.fixture)

    def check(self, dtype: str, mode: str) -> dict[str, Any]:
        self._make(dtype, mode)
        reply = {"errors": self.engine.errors(), "facts": self.engine.facts()}
        self.release()
        return reply

    def machine(self, dtype: str) -> dict[str, Any]:
        from fastres.bench.machine import measure

        return measure(self.options.device, dtype)

    def prepare(self, dtype: str, mode: str) -> dict[str, Any]:
        self._make(dtype, mode)
        # A training check costs a step; eager and fastres had theirs before the timing began.
        wanted = mode == "inference" or self.kind == "compile"
        errors = self.engine.errors() if wanted else None
        seconds = [self.engine.run(1) for _ in range(self.engine.warmups)]
        return {"errors": errors, "seconds": min(seconds)}

    def run(self, iters: int) -> dict[str, Any]:
        return {"seconds": self.engine.run(iters)}

    def release(self) -> dict[str, Any]:
        """Drops the engine and gives its memory back to the system, so that cases do not add up."""
        self.engine = None
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        if trim is not None:
            trim(0)
        return {}


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def serve(requests: Any, answers: Any) -> None:
    """Answers requests line by line until there are no more."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        op = request.pop("op")
        try:
            if op not in ("init", "check", "machine", "prepare", "run", "release"):
                raise ValueError(f"unknown op '{op}'")
            reply = {"ok": True, **getattr(worker, op)(**request)}
        except Exception as error:  # reported in the table, with the traceback on stderr
            import traceback

            traceback.print_exc()
            reply = {"ok": False, "error": one_line(error)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(sys.stdin, answers)
    answers.flush()
    os._exit(0)  # torch.compile's helpers may hang at exit


if __name__ == "__main__":
    main()
