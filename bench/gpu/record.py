"""The JSON files: environment, and each stage's rows; written atomically after every few rows, so
that a crash, a time limit or Ctrl-C loses nothing that was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.stages import BY_NAME

SCHEMA = 1
KIND, STATE_KIND = "fastres-gpu", "fastres-gpu-state"
MAX_BYTES = 8 << 20  # of a file; the limit outside is 16 MB
SAVE_EVERY = 2.0  # seconds
SAME = ("commit", "fastres", "torch", "triton", "device")  # of a run that another goes on with
SMI = (
    "name,uuid,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total,pci.bus_id"
)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_json(file: Path, value: Any) -> None:
    """Replaces `file` in one step."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(part, file)


def read_json(file: Path) -> dict[str, Any]:
    """The file's content; {} when it is missing or not ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def smi() -> dict[str, str] | None:
    """Clocks, power and temperature from nvidia-smi; None where there is none."""
    from fastres.bench.environment import command_output

    query = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader,nounits"]
    lines = (command_output(query) or "").splitlines()
    if not lines:
        return None
    return dict(zip(SMI.split(","), (v.strip() for v in lines[0].split(",")), strict=False))


def environment(dry: bool) -> dict[str, Any]:
    """What a result must carry to be compared with another."""
    import torch

    from fastres.bench import environment as env

    found: dict[str, Any] = {
        "date": now(),
        "commit": env.commit() or os.environ.get("FASTRES_COMMIT") or "unknown",
        "fastres": env.fastres_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": env.cpu_model(),
        "cores": env.usable_cores(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu (dry run)" if dry else torch.cuda.get_device_name(0),
    }
    for name in ("triton", "torchvision", "nvidia-cudnn-frontend"):
        found[name] = env.version_of(name)
    if not dry:
        prop = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{prop.major}.{prop.minor}",
            "multiprocessors": prop.multi_processor_count,
            "l2_bytes": prop.L2_cache_size,
            "memory_bytes": prop.total_memory,
            "cudnn": torch.backends.cudnn.version(),
        }
        card = smi() or {}  # which card and driver: two of a kind differ
        found |= {"driver": card.get("driver_version"), "uuid": card.get("uuid")}
        found["uuid"] = found["uuid"] or str(getattr(prop, "uuid", "")) or None
    return found


def _short(value: Any) -> Any:
    """Floats to 6 digits: enough, and half the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    return value


class Record:
    """The results of one stage, in its group's file."""

    def __init__(self, out: Path, stage: str, dry: bool, seconds: float, command: str) -> None:
        self.stage, self.dry = stage, dry
        self.file = out / f"{BY_NAME[stage].group}.json"
        self.deadline = time.monotonic() + seconds
        self.started = self._saved = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.partial = self._taken = False
        self.unsaved: str | None = None  # why the file lacks the last rows
        before = read_json(self.file).get("stages", {}).get(stage, {})
        self.found: dict[str, Any] = {
            "status": "running", "dry_run": dry, "command": command, "seconds": 0.0, "notes": [],
            "clocks": [], "environment": environment(dry), "rows": self.rows,
        }  # fmt: skip
        env, old = self.found["environment"], before.get("environment", {})
        other = [k for k in SAME if old.get(k) != env.get(k) or env.get(k) == "unknown"]
        self.before = {} if other else before
        if before.get("rows") and other:
            what = ", ".join(f"{k} ({old.get(k)}, here {env.get(k)})" for k in other)
            self.note(f"an earlier run is written over, it had another {what}")
        self.clocks()
        if not self.before:  # otherwise its rows stay until they are taken over
            self.save()

    def time_left(self) -> float:
        """Seconds until the stage should start nothing new."""
        return self.deadline - time.monotonic()

    def clocks(self) -> None:
        if not self.dry:
            self.found["clocks"].append(smi())

    def add(self, **row: Any) -> dict[str, Any]:
        """One result; what was measured so far is on disk within SAVE_EVERY seconds."""
        self.rows.append(_short(row))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()
        return self.rows[-1]

    def keep(self, whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Takes over those rows of an earlier, unfinished run of the stage, of the same commit and
        versions on such a card, that need no repeating; they are the first rows. Until then the
        file has all that the earlier run had."""
        self._taken = True
        kept = [row for row in self.before.get("rows", []) if whole(row)]
        if kept:
            env = self.before.get("environment", {})
            date = env.get("date")
            self.rows += kept
            self.found["kept"] = [
                *self.before.get("kept", []),
                {"rows": len(kept), "date": date, "uuid": env.get("uuid")},
            ]
            print(f"{self.stage}: {len(kept)} rows are of the run of {date}", flush=True)
        return kept

    @property
    def waiting(self) -> bool:
        """Whether an earlier run's results are in the file, and nothing of this run's."""
        before = self.before.get("rows") or self.before.get("passed")
        return bool(before) and not self._taken and not self.rows

    def unfinished(self, text: str) -> None:
        """A note; --resume goes on with the stage."""
        self.partial = True
        self.note(text)

    def note(self, text: str) -> None:
        """A line for the reader: what was left out, and why."""
        print(f"{self.stage}: {text}", flush=True)
        self.found["notes"].append(text)

    def set(self, **values: Any) -> None:
        self.found |= _short(values)

    def save(self, status: str | None = None) -> None:
        self._saved = time.monotonic()
        self.found["seconds"] = round(time.monotonic() - self.started, 2)
        if status is not None:
            self.found["status"] = status
        found = self.found
        if self.waiting:
            notes = [*self.before.get("notes", []), *found["notes"]]
            found = {k: v for k, v in self.before.items() if k != "error"}
            found |= {k: v for k, v in self.found.items() if k in ("status", "error")}
            found["notes"] = list(dict.fromkeys(notes))
        whole = read_json(self.file)
        whole = {
            "schema": SCHEMA,
            "kind": KIND,
            "stages": {**whole.get("stages", {}), self.stage: found},
        }
        if len(json.dumps(self.found, default=str)) > MAX_BYTES:
            for row in self.rows:
                row.pop("raw", None)
        try:
            write_json(self.file, whole)
            self.unsaved = None
        except OSError as error:  # a full disk stops nothing: later there may be room
            if self.unsaved is None:
                print(f"{self.stage}: {self.file} cannot be written: {error}", flush=True)
            self.unsaved = str(error)
