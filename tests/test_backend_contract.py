"""Every backend has the functions of docs/kernels.md, with the signatures written there."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from fastres.backends import MODULES

CONTRACT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
SIGNATURE = re.compile(r"^`(\w+)\(([\w, ]+)\)`$", re.MULTILINE)


def contract() -> dict[str, list[str]]:
    return {name: args.split(", ") for name, args in SIGNATURE.findall(CONTRACT.read_text())}


def test_the_contract_lists_the_functions() -> None:
    assert len(contract()) == 9
    assert contract()["relu_bwd"] == ["dx", "dy", "dz", "mask"]


@pytest.mark.parametrize("backend", MODULES)
def test_backend_keeps_the_signatures(backend: str) -> None:
    module = importlib.import_module(MODULES[backend])
    assert backend == module.NAME
    for name, args in contract().items():
        assert list(inspect.signature(getattr(module, name)).parameters) == args, name
