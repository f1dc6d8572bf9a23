"""The process in which `fastres.tune` checks the candidates of a block:
`python -m fastres._tune_child FOLDER CANDIDATE...`, with the block in FOLDER/block.pt. The answers
go to FOLDER/answers, one JSON line [candidate, why not or null] as each is known.

A fresh process, not multiprocessing's: that would run the user's script again."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastres import _chosen, backends, tuning


def main(folder: Path, names: list[str]) -> None:
    with (folder / "answers").open("a") as file:

        def answer(name: str, reason: str | None) -> None:
            print(json.dumps([name, reason]), file=file, flush=True)

        try:
            check_all(folder, names, answer)
        except (AttributeError, ImportError) as e:  # a class of the user's script
            answer(tuning.NOT_LOADED, tuning.explain(e))
        except Exception as e:
            for name in names:
                answer(name, tuning.explain(e))


def check_all(folder: Path, names: list[str], answer: Callable[[str, str | None], None]) -> None:
    found = torch.load(folder / "block.pt", weights_only=False)
    target: tuning.Target = found["target"]
    kind = target.x.device.type
    with contextlib.ExitStack() as stack:
        if found["backend"] is not None:
            stack.enter_context(backends.use_backend(found["backend"]))
        if target.dtype is not None:
            stack.enter_context(torch.autocast(kind, target.dtype))
        self_check(target)
        for name in names:
            answer(tuning.CHECKING, None)
            self_check(target, name)
            answer(tuning.STARTED, None)
            answer(name, tuning.attempt(target, name))
            try:
                if kind == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
            except RuntimeError as e:
                # an illegal access, say: whatever the check said, this candidate is why, and the
                # rest is for another process
                return answer(name, f"{tuning.LOST}: {tuning.explain(e)}")


def self_check(target: tuning.Target, name: str | None = None) -> None:
    """What this candidate, or else every one, would ask of fastres.selfcheck first, which is not to
    be of its time; the verdicts are kept for it. Not all candidates' at once: a crash is to be the
    answer of those whose kernels crashed."""
    module: Any = target.module
    with contextlib.suppress(Exception):  # the candidate's to say
        if name is None:
            _chosen.unproven(target.x, *module.families)
        else:
            x = target.x if target.dtype is None else target.x.to(target.dtype)
            _chosen.checked_rung("tune", name, x)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
