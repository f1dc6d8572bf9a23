"""What is done in a folder of results: state.json, and the results' files, which are believed where
the two differ."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.record import KIND, SCHEMA, STATE_KIND, write_json
from bench.gpu.stages import STAGES

FILE = "state.json"


class UsageError(Exception):
    """One line for the user; exit code 2."""


def say(text: str) -> None:
    print(f"python -m bench.gpu: {text}", file=sys.stderr)


def open_state(out: Path, resume: bool, dry: bool) -> dict[str, Any]:
    """The state to go on from. Raises UsageError rather than write over results."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"argument --out: {out} is not a folder")
    files = {name: out / name for name in (FILE, *sorted({f"{s.group}.json" for s in STAGES}))}
    there = [file for file in files.values() if file.exists()]
    if there and not resume:
        raise UsageError(f"argument --out: {out} has results already; --resume goes on with them")
    stages: dict[str, Any] = {}
    try:
        for name, file in files.items():
            if name == FILE:
                stages |= {k: v for k, v in _read(file, STATE_KIND, dry).items() if _ended(v)}
                continue
            found = _read(file, KIND, dry)
            for stage in (s for s in STAGES if f"{s.group}.json" == name):
                if stage.name not in found:  # set aside, or never written
                    stages.pop(stage.name, None)
                elif stage.name not in stages:
                    known = {k: found[stage.name].get(k) for k in ("status", "seconds", "error")}
                    stages[stage.name] = {k: v for k, v in known.items() if v is not None}
        out.mkdir(parents=True, exist_ok=True)
        state = {"schema": SCHEMA, "kind": STATE_KIND, "dry_run": dry, "stages": stages}
        write_json(files[FILE], state)
    except OSError as error:
        raise UsageError(f"argument --out: cannot write to {out}: {error}") from error
    return state


def _ended(stage: Any) -> bool:
    return isinstance(stage, dict) and isinstance(stage.get("status"), str)


def _read(file: Path, kind: str, dry: bool) -> dict[str, Any]:
    """The stages of a file of ours. A file that cannot be read is set aside, with a line; one of
    another version, or of a dry run beside a real one, is refused."""
    if not file.exists():
        return {}
    try:
        whole = json.loads(file.read_text())
        stages = whole["stages"]
        if whole["kind"] != kind:
            raise UsageError(
                f"argument --resume: {file} is of kind {whole['kind']!r}, not {kind!r}"
            )
        if whole["schema"] != SCHEMA:
            raise UsageError(
                f"argument --resume: {file} is version {whole['schema']} of the run-book's "
                f"results; this checkout writes version {SCHEMA}"
            )
        dries = (
            [whole["dry_run"]] if kind == STATE_KIND else [s["dry_run"] for s in stages.values()]
        )
        if any(d != dry for d in dries):
            raise UsageError(f"argument --resume: {file} mixes a dry run with a real one")
        return dict(stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = file.with_name(f"{file.name}.corrupt-{int(time.time())}")
        os.replace(file, aside)
        say(f"{file} cannot be read ({type(error).__name__}: {error}); set aside as {aside.name}")
        return {}
