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


def contract(part: int) -> dict[str, list[str]]:
    """The functions every backend has (part 0), and the convolutions, which some have (part 1)."""
    text = CONTRACT.read_text().split("## Convolutions")[part]
    return {name: args.split(", ") for name, args in SIGNATURE.findall(text)}


def test_the_contract_lists_the_functions() -> None:
    assert len(contract(0)) == 9
    assert contract(0)["relu_bwd"] == ["dx", "dy", "dz", "mask"]
    assert len(contract(1)) == 8


@pytest.mark.parametrize("backend", MODULES)
def test_backend_keeps_the_signatures(backend: str) -> None:
    module = importlib.import_module(MODULES[backend])
    assert backend == module.NAME
    functions = contract(0)
    if hasattr(module, "conv_fprop"):
        functions |= contract(1)
    else:
        assert not any(hasattr(module, name) for name in contract(1))
    for name, args in functions.items():
        assert list(inspect.signature(getattr(module, name)).parameters) == args, name


def test_which_backends_have_convolutions() -> None:
    with_convs = [b for b in MODULES if hasattr(importlib.import_module(MODULES[b]), "conv_fprop")]
    assert with_convs == ["triton", "cuda", "reference"]
