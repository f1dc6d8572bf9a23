"""Which kernels run a block: what was measured on this device, and what is done where nothing was.

A *choice* is "eager" (the original forward) or a rung of the fusion ladder, above b with the passes
of single convs that the vendor's kernels run, and those that the CUDA C++ ones do, on a tile of
their list: "c2 vendor conv2.wgrad cuda conv1.fprop=pointwise-128x64". It is made for each (block,
input shape, dtype, layout, training or inference, autocast) on one device, in this order:

    1. explicit: `fastres.convert(model, fusion=...)`
    2. the table in the package (fastres/tables/), made like the cache and reviewed
    3. the user's cache, written by `fastres.tune` or `fastres tune`
    4. a heuristic: rung b, on any device (see `HEURISTIC`); on a CPU the original forward where a
       block is too small to gain by it (see `fastres._heuristic`)

A table or cache holds for one identity: device, driver, torch, Triton and fastres versions, and the
kernels themselves. Others are left alone, with one line in the log where they are of this device,
and so is an entry with a tile that this build does not have. The cache is a sorted JSON file for
each identity in $FASTRES_CACHE (default $XDG_CACHE_HOME/fastres or ~/.cache/fastres), written
atomically under a lock, so that two processes may tune at once; a corrupt file is set aside, never
fatal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("fastres")

SCHEMA = 1
EAGER = "eager"
# Rung b is vendor convs with the passes around them fused: it can only remove traffic, whereas c1
# and up replace the vendor's convs and are worth it where a measurement says so.
HEURISTIC = "b", "heuristic: vendor convs with the passes around them fused; fastres.tune measures"
TABLES = Path(__file__).parent / "tables"
ROOM = 1 << 18  # bytes, of the plan of a few networks


@dataclass(frozen=True, order=True)
class Key:
    """What a choice is made for. block: its layers, see `fastres._chosen.signature`."""

    block: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    mode: str  # "training" or "inference"

    @classmethod
    def of(cls, block: str, x: Tensor, dtype: torch.dtype, training: bool) -> Key:
        """dtype: that of the convs, autocast's where it is on."""
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        return cls(
            block,
            tuple(x.shape),
            str(dtype).removeprefix("torch."),
            "channels_last" if nhwc else "contiguous",
            "training" if training else "inference",
        )


@dataclass(frozen=True)
class Entry:
    """A measured choice. milliseconds: median of each candidate; ratio: eager's time over the
    choice's, median over interleaved rounds; rejected: candidate -> why it was not timed."""

    choice: str
    milliseconds: dict[str, float]
    ratio: float
    rejected: dict[str, str] = field(default_factory=dict)
    measured: str = ""

    def __str__(self) -> str:
        times = ", ".join(f"{k} {v:.3g} ms" for k, v in sorted(self.milliseconds.items()))
        text = f"measured {self.ratio:.2f}x eager ({times})"
        if self.rejected:
            text += "; rejected " + ", ".join(f"{k}: {v}" for k, v in sorted(self.rejected.items()))
        return text


@functools.cache
def identity(device_type: str, index: int | None = None) -> dict[str, str]:
    """What a measurement depends on besides the key."""
    from fastres.bench import environment

    found = {
        "fastres": environment.fastres_version(),
        "torch": torch.__version__,
        "triton": environment.version_of("triton") or "none",
        "kernels": _kernels_digest(),
    }
    if device_type == "cuda":
        found["device"] = torch.cuda.get_device_name(index)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = environment.command_output(query)
        found["driver"] = driver.splitlines()[0] if driver else "unknown"
    else:
        found["device"] = f"{environment.cpu_model()}, {torch.get_num_threads()} threads"
        found["driver"] = torch.backends.cpu.get_cpu_capability()
    return dict(sorted(found.items()))


@functools.cache
def _kernels_digest() -> str:
    """Changes with the kernels' code: another commit's measurements and self-checks do not hold."""
    spec = importlib.util.find_spec("fastres.kernels")  # not imported: that takes Triton along
    folders = [] if spec is None else spec.submodule_search_locations or []
    native = Path(__file__).parent.glob("_C*.so")
    python = (p for folder in folders for p in Path(folder).glob("*.py"))
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted([*native, *python], key=lambda p: p.name):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where the user's caches are."""
    if "FASTRES_CACHE" in os.environ:
        return Path(os.environ["FASTRES_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastres"


def cache_file(who: dict[str, str]) -> Path:
    """The cache of one identity; the name says the device."""
    digest = hashlib.sha256(json.dumps(who, sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(c if c.isalnum() else "-" for c in who["device"]).strip("-").lower()
    return cache_folder() / f"plan-{name[:40]}-{digest}.json"


# --- files ----------------------------------------------------------------------------------------


class PlanFileError(ValueError):
    """A plan file that cannot be used; the message says why."""


def encode(who: dict[str, str], entries: dict[Key, Entry], commit: str | None) -> str:
    """The file's text: sorted, so that two runs differ only where the measurements do."""
    rows = [
        {**dataclasses.asdict(key), **dataclasses.asdict(entries[key])} for key in sorted(entries)
    ]
    content = {"schema": SCHEMA, "identity": who, "commit": commit, "entries": rows}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def decode(text: str) -> tuple[dict[str, str], dict[Key, Entry]]:
    """(identity, entries) of a file's text; raises PlanFileError."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or "schema" not in content:
            raise PlanFileError("not a plan file")
        if content["schema"] != SCHEMA:
            raise PlanFileError(f"schema {content['schema']}, this version reads {SCHEMA}")
        keys = {f.name for f in dataclasses.fields(Key)}
        entries = {}
        for row in content["entries"]:
            fields: dict[str, Any] = {k: row[k] for k in keys}
            key = Key(**{**fields, "shape": tuple(fields["shape"])})
            entry = Entry(**{k: v for k, v in row.items() if k not in keys})
            entries[key] = _checked(entry)
        return dict(content["identity"]), entries
    except PlanFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise PlanFileError(f"{type(e).__name__}: {e}") from e


def _checked(entry: Entry) -> Entry:
    from fastres.ops._choice import parse

    if entry.choice != EAGER:
        try:
            parse(entry.choice)
        except ValueError as e:
            raise PlanFileError(f"unknown choice {entry.choice!r}: {e}") from None
    if not isinstance(entry.milliseconds, dict) or not isinstance(entry.rejected, dict):
        raise PlanFileError("milliseconds and rejected must be objects")
    for value in (entry.ratio, *entry.milliseconds.values()):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise PlanFileError(f"{value!r} where a finite number is needed")
    for text in (entry.measured, *entry.rejected.values()):
        if not isinstance(text, str):
            raise PlanFileError(f"{text!r} where a text is needed")
    return entry


def read(path: Path, who: dict[str, str]) -> dict[Key, Entry]:
    """The entries of a file for this identity; nothing, with a line in the log, where it is foreign
    or corrupt. A corrupt file is renamed."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as e:
        log.warning("fastres: the plan %s cannot be read (%s); ignored", path, e)
        return {}
    try:
        found, entries = decode(text)
    except PlanFileError as e:
        aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
        with contextlib.suppress(OSError):
            path.rename(aside)
        log.warning("fastres: the plan %s is corrupt (%s); set aside as %s", path, e, aside.name)
        return {}
    if found != who:
        differ = [k for k in who if found.get(k) != who[k]]
        log.warning(
            "fastres: the plan %s was measured with another %s; ignored",
            path,
            ", ".join(f"{k} ({found.get(k)}, here {who[k]})" for k in differ) or "identity",
        )
        return {}
    return entries


def tell_stale(who: dict[str, str]) -> None:
    """A line in the log where this device was tuned, or has a table in the package, but with other
    versions or another driver."""
    mine = cache_file(who)
    others = mine.parent.glob(f"{mine.name.rpartition('-')[0]}-*.json")
    caches: list[Path] = []
    with contextlib.suppress(OSError):  # gone meanwhile
        caches = sorted((p for p in others if p != mine), key=lambda p: p.stat().st_mtime)
    for path in [*caches[-1:], *_tables()]:
        with contextlib.suppress(OSError, ValueError):  # gone meanwhile, or corrupt
            found = decode(path.read_text())[0]
            if found.get("device") != who["device"]:
                continue
            what = "plan" if path in caches else "table in the package,"
            differ = [f"{k} ({found.get(k)}, here {who[k]})" for k in who if found.get(k) != who[k]]
            log.warning(
                "fastres: this device's %s %s is left aside, it was measured with another %s; "
                "fastres.tune measures again", what, path.name, ", ".join(differ),
            )  # fmt: skip
            return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; where the system has no such locks, the atomic rename still holds."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_name(path.name + ".lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def why_not_writable(path: Path) -> str | None:
    """None when a file of ROOM can be written beside path, whose folder is made, otherwise the
    reason."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(bytes(ROOM))
        finally:
            partial.unlink(missing_ok=True)
    except OSError as e:
        return str(e)
    return None


def merge(path: Path, who: dict[str, str], entries: dict[Key, Entry]) -> None:
    """Add entries to a file, atomically; what others wrote meanwhile is kept."""
    from fastres.bench.environment import commit

    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        text = encode(who, {**read(path, who), **entries}, commit())
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# --- lookup ---------------------------------------------------------------------------------------


def _known(
    path: Path | str, entries: dict[Key, Entry], advice: str = "run fastres.tune again"
) -> dict[Key, Entry]:
    """The entries without those on CUDA convs, or a tile, that this build does not have."""
    from fastres.ops._choice import parse, unbuilt

    found = {}
    for key, entry in entries.items():
        reason = None if entry.choice == EAGER else unbuilt(parse(entry.choice))
        if reason is None:
            found[key] = entry
            continue
        shape = "x".join(map(str, key.shape))
        log.warning(
            "fastres: the plan %s has %r for %s on %s: %s; ignored, %s",
            path, entry.choice, key.block, shape, reason, advice,
        )  # fmt: skip
    return found


def _tables() -> list[Path]:
    return sorted(TABLES.glob("*.json"))


class Plan:
    """The measured choices of one device: the package's table over the user's cache."""

    def __init__(self, who: dict[str, str]) -> None:
        self.who = who
        self.unsaved: str | None = None  # why the last measurements are not in the file
        self.packaged: dict[Key, Entry] = {}
        for path in _tables():
            try:
                found, entries = decode(path.read_text())
            except (OSError, UnicodeDecodeError, PlanFileError) as e:
                log.warning("fastres: the packaged table %s cannot be used: %s", path.name, e)
                continue
            if found == who:
                self.packaged |= _known(path, entries)
        file = cache_file(who)
        self.cached: dict[Key, Entry] = _known(file, read(file, who))
        if self.empty:
            tell_stale(who)
        self.version = next(_versions)  # moves when a choice may have changed

    @property
    def empty(self) -> bool:
        """Whether nothing was measured on this device."""
        return not (self.packaged or self.cached)

    def lookup(self, key: Key) -> tuple[str, str] | None:
        """(choice, why) of a measurement, if there is one."""
        for where, entries in (("table", self.packaged), ("cache", self.cached)):
            entry = entries.get(key)
            if entry is not None:
                return entry.choice, f"{where}: {entry}"
        return None

    def add(self, entries: dict[Key, Entry]) -> None:
        """Take in new measurements and save them; where they cannot be saved, they hold in this
        process, and the log says so once."""
        self.cached |= entries
        self.version = next(_versions)
        try:
            merge(cache_file(self.who), self.who, entries)
        except OSError as e:
            if self.unsaved is None:
                log.warning(
                    "fastres: the plan cannot be saved (%s): it holds in this process only; "
                    "FASTRES_CACHE names another folder",
                    e,
                )
            self.unsaved = str(e)


_versions = itertools.count(1)
_plans: dict[tuple[str, int | None], Plan] = {}


def current(device: torch.device) -> Plan:
    """The plan of a device, read once in a process."""
    key = device.type, device.index
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = Plan(identity(*key))
    return plan


def forget() -> None:
    """Read tables and caches anew at the next use."""
    _plans.clear()
    identity.cache_clear()


def synchronise(device: torch.device) -> None:
    """Take over rank 0's plan on every rank of the default process group, but for what a rank's
    build does not have, which is left to the heuristic there; without a group, nothing.

    Collective: call it on all ranks. `fastres.convert` and `fastres.tune` do."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    plan = current(device)
    box: list[Any] = [(plan.packaged, plan.cached) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0, device=_wire(device))
    if distributed.get_rank() > 0:
        advice = "install fastres with these kernels on every rank"
        plan.packaged, plan.cached = (_known("of rank 0", e, advice) for e in box[0])
    plan.version = next(_versions)


def _wire(device: torch.device) -> torch.device:
    """Where the default group's collectives work."""
    nccl = torch.distributed.get_backend() == "nccl"
    return device if nccl else torch.device("cpu")
