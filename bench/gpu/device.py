"""The one place that knows whether this is a GPU or a dry run on the CPU, and the timer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastres.bench.stats import rotation, spread

Call = Callable[[], Any]
CACHE_FACTOR = 2.5  # the operands of all rotations together, in L2 caches
MAX_SETS = 24


class Shot:
    """Some calls that are timed together: `run()` -> seconds of one call."""

    def __init__(self, fire: Callable[[], float], calls: int, method: str) -> None:
        self._fire, self.calls, self.method = fire, calls, method

    def run(self) -> float:
        return self._fire() / self.calls


class Timer:
    """perf_counter around the calls: the dry run's."""

    kind = "cpu"

    def shot(
        self, calls: Sequence[Call], seconds: float = 0.0, graph: bool = True, pool: Any = None
    ) -> Shot:
        """The calls, one after another, repeated for about `seconds` in one batch.

        graph: whether a CUDA graph may replay them, which leaves launches out of the time."""
        return self._plain(calls)

    def _plain(self, calls: Sequence[Call]) -> Shot:
        def fire() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            self.synchronize()
            return time.perf_counter() - start

        return Shot(fire, len(calls), "perf_counter")

    def synchronize(self) -> None:
        pass


class CudaTimer(Timer):
    """Events around a synchronised batch of calls, or around the replay of their CUDA graph."""

    kind = "cuda"

    def shot(
        self, calls: Sequence[Call], seconds: float = 0.0, graph: bool = True, pool: Any = None
    ) -> Shot:
        # 1. warm up, where a capture would run: compilation, cuDNN's choice of algorithm
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if graph else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for call in (*calls, *calls):
                call()
        current.wait_stream(stream)
        self.synchronize()
        # 2. as many calls as fill the batch
        once = self._plain(calls).run()
        repeat = max(1, round(seconds / max(once * len(calls), 1e-7)))
        batch = list(calls) * min(repeat, max(1, 256 // len(calls)))
        if not graph:
            return self._plain(batch)
        # 3. capture
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=pool):
            for call in batch:
                call()
        self.synchronize()
        return Shot(lambda: self._between(captured.replay), len(batch), "graph")

    def _plain(self, calls: Sequence[Call]) -> Shot:
        def all_calls() -> None:
            for call in calls:
                call()

        return Shot(lambda: self._between(all_calls), len(calls), "events")

    def _between(self, what: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        what()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Device:
    """cuda, or in a dry run the CPU with Triton's interpreter."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.type = "cpu" if dry else "cuda"
        self.torch = torch.device(self.type)
        self.timer = Timer() if dry else CudaTimer()
        if dry:  # the interpreter is one thread; others only wait for each other on a busy machine
            torch.set_num_threads(1)
        # of vendor and ours alike: fp32 stays fp32, and cuDNN measures its algorithms
        torch.backends.cudnn.benchmark = True

    @property
    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size

    def sets(self, bytes_of_one: int) -> int:
        """How many sets of operands, used in turn, are past the cache when their turn comes."""
        if self.dry:
            return 1
        wanted = -(-int(CACHE_FACTOR * self.l2_bytes) // max(bytes_of_one, 1))
        return max(2, min(MAX_SETS, wanted))

    def empty(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def pool(self) -> Any:
        return None if self.dry else torch.cuda.graph_pool_handle()

    def peak(self, call: Call) -> int:
        """Peak bytes that the allocator handed out during a call (0 on the CPU)."""
        if self.dry:
            call()
            return 0
        self.empty()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def broken(self) -> str | None:
        """The error that makes this process's device unusable (a bad access is sticky), or None."""
        if self.dry:
            return None
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
        except Exception as error:
            return one_line(error)
        return None

    def triton(self) -> Any:
        """Context in which fastres runs its Triton kernels; in the dry run they are asked for."""
        import fastres

        stack = contextlib.ExitStack()
        if self.dry:  # oneDNN off: CPU inference has a path of its own, which a GPU does not take
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(fastres.use_backend("triton"))
        return stack

    def kernels(self, backend: str) -> Any:
        """Context of another backend's kernels; of none when it is "". The dry run has no C++
        kernels: the reference backend takes the same calls."""
        import fastres

        if not backend:
            return contextlib.nullcontext()
        return fastres.use_backend("reference" if self.dry else backend)


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def take_turns(
    shots: dict[str, Shot], rounds: int, time_left: Callable[[], float] = lambda: 1.0
) -> dict[str, list[float]]:
    """Every shot once a round, in rotating order: {name: seconds of a call, by round}."""
    found: dict[str, list[float]] = {name: [] for name in shots}
    for turn in range(rounds):
        if turn >= 3 and time_left() < 0:
            break
        for name in rotation(list(shots), turn):
            found[name].append(shots[name].run())
    return found


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    s = spread(seconds)
    return {"us": s.median * 1e6, "us_q1": s.q1 * 1e6, "us_q3": s.q3 * 1e6}


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """How many times faster than the baseline, within each round: median and quartiles."""
    s = spread([b / a for a, b in zip(seconds, baseline, strict=True)])
    return {"x": s.median, "x_q1": s.q1, "x_q3": s.q3}


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A short table on standard output; numbers to three digits."""

    def cell(v: Any) -> str:
        return f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v)

    cells = [[str(h) for h in heads], *[[cell(v) for v in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip())
    print(flush=True)
