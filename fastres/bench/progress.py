"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """`step(text)` moves on by one unit of work; `say(text)` is a line of its own."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._total = total
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<34}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """How many units there are, where that is known later than the start."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def say(self, text: str) -> None:
        """What is being done now; off a terminal, a line with the seconds since the start."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            print(
                f"[{time.monotonic() - self._start:6.1f} s] {text}", file=self._stream, flush=True
            )

    def step(self, text: str | None = None, units: int = 1) -> None:
        """So many units done; `text` is shown on a terminal only."""
        if self._bar is not None:
            self._bar.advance(self._task, units)
            if text is not None:
                self._bar.update(self._task, description=text)
