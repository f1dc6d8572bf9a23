"""What happened behind the user's back, counted: layout copies and unfused calls, shown by
`fastres.report`."""

from __future__ import annotations

from collections import Counter

_events: Counter[str] = Counter()


def count(event: str) -> None:
    _events[event] += 1


def events() -> dict[str, int]:
    """Event -> how often, since the process started or `reset()`."""
    return dict(_events)


def reset() -> None:
    _events.clear()
