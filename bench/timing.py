"""Timing of variants that take turns, inside pytest-benchmark's own rounds.

Machines drift, so a ratio is taken within a round. pytest-benchmark times our variant in
`benchmark.pedantic`; its `setup` and `teardown`, which it does not time, run the baselines of that
round with the same clock, before and after it. Who starts rotates from round to round.

On a GPU the clock is a pair of events around a synchronised batch of calls, and calls that are
short are captured into a CUDA graph first, all variants alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastres.bench.stats import rotation
from fastres.memory import exhausted

OURS = "fastres"
GRAPH_BELOW = 1e-3  # seconds a call: shorter ones are timed as a CUDA graph
GRAPH_REPEAT = 16  # calls in a graph at least, so that launching the graph is a small part
MIN_ROUNDS, MAX_ROUNDS = 5, 200
FALLBACK_CACHE = 32 << 20
CACHE_FACTOR = 3  # buffers together are so many times the last-level cache


class Clock:
    """Seconds on the device; a timer for pytest-benchmark (`@pytest.mark.benchmark(timer=...)`)."""

    def __init__(self) -> None:
        self.cuda = False
        self._last: Any = None
        self._seconds = 0.0

    def __call__(self) -> float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:  # summed in float64: an event's own float32 loses microseconds
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


CLOCK = Clock()


def timer() -> float:
    """CLOCK as a plain function, which pytest-benchmark can name in its JSON."""
    return CLOCK()


@dataclass
class Variant:
    """Something that takes its turn: `call` does `calls` repetitions of the case.

    status and reason as in `fastres bench`: "ok", "failed" or "not measured"."""

    name: str
    call: Callable[[], Any] | None
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    status: str = "ok"
    reason: str | None = None
    graph: bool = False

    @staticmethod
    def missing(name: str, reason: str) -> Variant:
        return Variant(name, None, status="not measured", reason=reason)

    def fail(self, error: BaseException) -> None:
        self.status, self.reason, self.call, self.seconds = "failed", one_line(error), None, []


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=FALLBACK_CACHE)


def rotations(bytes_of_one: int, device: str) -> int:
    """How many sets of operands are needed so that none is in cache when its turn comes."""
    return max(2, min(64, -(-CACHE_FACTOR * cache_bytes(device) // max(bytes_of_one, 1))))


def in_turn(call: Callable[[Any], Any], sets: Sequence[Any]) -> Callable[[], Any]:
    """`call` on the next of the sets, each time it is called."""
    state = {"next": 0}

    def step() -> Any:
        chosen = sets[state["next"] % len(sets)]
        state["next"] += 1
        return call(chosen)

    return step


def _graph(call: Callable[[], Any], repeat: int) -> Callable[[], Any]:
    """The replay of `repeat` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return graph.replay


def graph_all(variants: Sequence[Variant], repeat: int, capture: Callable = _graph) -> str | None:
    """Every variant as a CUDA graph of `repeat` calls, or none of them: a graph spares host time,
    and a ratio of one with and one without would say that. The reason when it is none."""
    active = [v for v in variants if v.call is not None]
    replays = []
    for variant in active:
        try:
            replays.append(capture(variant.call, repeat))
        except Exception as error:
            if exhausted(error):
                raise
            return f"{variant.name} cannot be captured: {one_line(error)}"
    for variant, replay in zip(active, replays, strict=True):
        variant.call, variant.calls, variant.graph = replay, variant.calls * repeat, True
    return None


def warm_up(variants: Sequence[Variant], repeat: int, graphs: bool = True) -> float:
    """Runs every variant twice or three times; seconds of one call of the fastest.

    A baseline that fails is marked so, ours raises. Where a call on a GPU is short, all become CUDA
    graphs of `repeat` calls, if all can."""
    least: dict[str, float] = {}
    for variant in variants:
        if variant.call is None:
            continue
        try:
            variant.call()
            for _ in range(2):
                start = CLOCK()
                variant.call()
                taken = (CLOCK() - start) / variant.calls
                least[variant.name] = min(least.get(variant.name, taken), taken)
        except Exception as error:
            if variant.name == OURS or exhausted(error):
                raise
            variant.fail(error)
            least.pop(variant.name, None)
    if CLOCK.cuda and graphs and min(least.values()) < GRAPH_BELOW:
        graph_all(variants, max(repeat, GRAPH_REPEAT))
    return min(least.values())


def take_turns(
    benchmark: Any,
    variants: Sequence[Variant],
    seconds: float,
    repeat: int = 1,
    graphs: bool = True,
) -> None:
    """Warms the variants up, then lets them take turns for about `seconds`; fills `.seconds` of
    each, by round and for one call. Ours is timed by pytest-benchmark."""
    fastest = warm_up(variants, repeat, graphs)
    active = [v for v in variants if v.call is not None]
    ours = next(v for v in active if v.name == OURS)
    # A turn is some calls, about 20 ms of the fastest, but a fraction of the time there is.
    iters = max(1, round(min(0.02, seconds / (4 * MIN_ROUNDS)) / (fastest * ours.calls)))
    start = CLOCK()
    for variant in active:
        _calls(variant, iters)
    one_round = max(CLOCK() - start, 1e-9)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, round(seconds / one_round)))
    if seconds == 0:
        rounds = 2
    done = {"rounds": 0}

    def others(before: bool) -> None:
        order = rotation(active, done["rounds"])
        at = order.index(ours)
        for variant in order[:at] if before else order[at + 1 :]:
            if variant.call is None:
                continue
            try:
                begin = CLOCK()
                _calls(variant, iters)
                variant.seconds.append((CLOCK() - begin) / (iters * variant.calls))
            except Exception as error:
                if exhausted(error):
                    raise
                variant.fail(error)

    def setup() -> None:
        if benchmark.stats is not None:  # the calls of a round are ours to count: `target` loops
            benchmark.stats.iterations = iters * ours.calls
        others(before=True)

    def teardown() -> None:
        others(before=False)
        done["rounds"] += 1

    try:
        benchmark.pedantic(
            lambda: _calls(ours, iters), setup=setup, teardown=teardown, rounds=rounds
        )
    except Exception as error:
        if exhausted(error):
            _reuse(benchmark)
        raise
    if benchmark.stats is not None:
        ours.seconds = list(benchmark.stats.stats.data)


def _reuse(benchmark: Any) -> None:
    """Makes the fixture as new after rounds that ran out of memory, for those of half the batch: by
    itself it refuses a second use. The rounds there were are left out of every table and file."""
    if benchmark.stats is not None:
        benchmark.stats.stats.data.clear()
        benchmark.stats.fixture = SimpleNamespace(has_error=True)
    benchmark._mode, benchmark.has_error, benchmark.stats = None, False, None


def _calls(variant: Variant, iters: int) -> None:
    call = variant.call
    assert call is not None
    for _ in range(iters):
        call()


def in_turns(calls: tuple[Callable, ...], budget: float) -> list[list[float]]:
    """Seconds of each call of functions on the CPU that take turns, who starts alternating."""
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    while len(taken[0]) < 5 or time.perf_counter() < end:
        for i in range(len(calls)) if len(taken[0]) % 2 else reversed(range(len(calls))):
            start = time.perf_counter()
            calls[i]()
            taken[i].append(time.perf_counter() - start)
    return taken
