"""The process of one stage, and of its workers.

python -m bench.gpu.child run STAGE OUT SECONDS [dry]
python -m bench.gpu.child work STAGE [dry]      jobs on standard input, a JSON line each
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from bench.gpu.stages import BY_NAME

ROOT = Path(__file__).resolve().parents[2]
FAILED, PARTIAL, INTERRUPTED = 1, 3, 130


def find_kernels() -> None:
    """Makes fastres.kernels importable from a checkout whose installation failed."""
    import fastres  # noqa: F401

    if importlib.util.find_spec("fastres.kernels") is not None:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "fastres.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastres.kernels"] = module
    spec.loader.exec_module(module)
    fastres.kernels = module  # type: ignore[attr-defined]


def command(stage: str, dry: bool) -> str:
    return f"python -m bench.gpu --stages {stage}" + (" --dry-run" if dry else "")


def run(stage: str, out: str, seconds: float, dry: bool) -> int:
    """Runs the stage; its error, if any, is on record."""
    from bench.gpu.device import Device, one_line
    from bench.gpu.record import Record

    if stage != "build":
        find_kernels()
    record = Record(Path(out), stage, dry, seconds, command(stage, dry))
    # the tests' way to break a stage
    fail = os.environ.get("FASTRES_GPU_TEST_FAIL", "").split(",")
    entry = BY_NAME[stage]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if f"{stage}:crash" in fail:
            os.kill(os.getpid(), signal.SIGSEGV)
        if f"{stage}:raise" in fail:
            raise RuntimeError("asked to fail")
        if f"{stage}:hang" in fail:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pause()
        if f"{stage}:wait" in fail:
            record.add(measured=1)
            record.save()
            signal.pause()
        if f"{stage}:partial" in fail:
            record.unfinished("asked to leave something")
        module = importlib.import_module(f"bench.gpu.{entry.module}")
        getattr(module, entry.function)(Device(dry), record)
    except KeyboardInterrupt:
        for again in (signal.SIGINT, signal.SIGTERM):  # the file is written in peace
            signal.signal(again, signal.SIG_IGN)
        record.note("stopped; what was measured until then is kept")
        record.save("interrupted")
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        record.set(error=one_line(error))
        record.save("failed")
        return FAILED
    if record.waiting:
        record.unfinished("what an earlier run measured is kept; this one did not go on with it")
    record.clocks()
    record.save("partial" if record.partial else "done")
    if record.unsaved is not None:
        return FAILED  # to be repeated where there is room: --resume
    return PARTIAL if record.partial else 0


def work(stage: str, dry: bool) -> int:
    """Jobs of a stage: names in, {"name", "ok", ...} out. It ends when the device is broken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage's process decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a job prints is no answer
    from bench.gpu.device import Device, one_line

    find_kernels()
    device = Device(dry)
    module = importlib.import_module(f"bench.gpu.{BY_NAME[stage].module}")
    job = getattr(module, f"{BY_NAME[stage].function}_job")
    for line in sys.stdin:
        name = json.loads(line)
        try:
            found = {"ok": True, **job(device, name)}
        except Exception as error:
            traceback.print_exc()
            found = {"ok": False, "error": one_line(error)}
        broken = device.broken()
        if broken is not None:
            found = {"ok": False, "error": found.get("error") or broken}
        print(json.dumps({"name": name, **found}), file=answers, flush=True)
        if broken is not None:
            return FAILED
        gc.collect()
        device.empty()  # others work beside this process
    return 0


def main(argv: list[str]) -> int:
    dry = argv[-1] == "dry"
    if argv[0] == "work":
        return work(argv[1], dry)
    return run(argv[1], argv[2], float(argv[3]), dry)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
