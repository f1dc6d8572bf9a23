"""Tables in the package (fastres/tables/): made from a cache, for one identity, over the cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastres
from fastres import plan, tuning
from fastres._chosen import choice_of, plan_key
from fastres.plan import EAGER, Entry, Key

torchvision = pytest.importorskip("torchvision")
ROOT = Path(__file__).resolve().parent.parent
WHO = {"device": "a card", "driver": "1", "fastres": "0", "kernels": "f0", "torch": "2",
       "triton": "3"}  # fmt: skip
KEY = Key("3x3 8>8 b", (2, 8, 4, 4), "float32", "channels_last", "training")
ENTRIES = {KEY: Entry("b", {EAGER: 3.0, "b": 2.0}, 1.5)}


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """An empty cache and no tables; the folder for them."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "TABLES", folder)
    plan.forget()
    yield folder
    plan.forget()


def network() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    return fastres.convert(model.to(memory_format=torch.channels_last))


def test_a_tuned_cache_becomes_a_table(tables, caplog, monkeypatch):
    """As docs/fusion.md says: tune, move the file. It serves where there is no cache, is not
    measured again, and comes before what is."""
    monkeypatch.setattr(tuning, "measure", lambda *args: ENTRIES[KEY])
    model = network()
    x = torch.randn(2, 3, 33, 33).contiguous(memory_format=torch.channels_last)
    found = fastres.tune(model, x, modes=("inference",)).entries
    shutil.move(plan.cache_file(plan.identity("cpu")), tables)
    plan.forget()
    here = plan.current(x.device)
    assert here.packaged == found and len(found) == 5 and not here.cached
    with torch.no_grad():
        model.eval()(x)
    assert str(fastres.report(model)).count("(table: measured ") == 5
    assert fastres.tune(model, x, modes=("inference",), missing=True).entries == {}
    assert "comes first" not in caplog.text
    key = next(iter(found))
    here.packaged = {key: found[key]}
    fastres.tune(model, x, modes=("inference",))
    assert "1 of 5 blocks are in the package's table, which comes first" in caplog.text
    assert here.lookup(key)[1].startswith("table: ") and key in here.cached


@pytest.mark.parametrize("other", [k for k in WHO if k != "device"])
def test_a_table_of_another_identity_is_left_aside_with_a_line(tables, caplog, other):
    (tables / "card.json").write_text(plan.encode(WHO | {other: "9"}, ENTRIES, None))
    here = plan.Plan(WHO)
    assert here.empty and here.lookup(KEY) is None
    said = f"table in the package, card.json is left aside, it was measured with another {other} (9"
    assert caplog.text.count(said) == 1 and caplog.text.count("here ") == 1
    caplog.clear()
    here.add(ENTRIES)  # tuned since
    assert not plan.Plan(WHO).empty and not caplog.text


def test_tables_of_other_devices_are_none_of_a_devices_business(tables, caplog):
    for n in range(3):
        (tables / f"{n}.json").write_text(plan.encode(WHO | {"device": f"{n}"}, ENTRIES, None))
    assert plan.Plan(WHO).empty and not caplog.text
    (tables / "card.json").write_text(plan.encode(WHO, ENTRIES, None))
    assert plan.Plan(WHO).packaged == ENTRIES and not caplog.text


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", None], ids=["cut", "binary", "folder"])
def test_a_table_that_cannot_be_read_costs_itself_only(tables, caplog, content):
    (tables / "b.json").write_text(plan.encode(WHO, ENTRIES, None))
    if content is None:
        (tables / "a.json").mkdir()
    else:
        (tables / "a.json").write_bytes(content)
    assert plan.Plan(WHO).packaged == ENTRIES
    assert caplog.text.count("the packaged table a.json cannot be used: ") == 1
    assert (tables / "a.json").exists()


def test_tables_are_part_of_the_package(tmp_path):
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    (tree / "fastres" / "tables").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "kernels", tree / "kernels")
    (tree / "fastres" / "__init__.py").write_text("")
    (tree / "fastres" / "tables" / "card.json").write_text("{}")
    built = tmp_path / "lib"
    argv = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    done = subprocess.run(argv, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (built / "fastres" / "tables" / "card.json").read_text() == "{}"


def test_a_table_serves_the_blocks_it_has_and_the_cache_the_others(tables):
    model = network().train()
    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    first, second = model.layer1[0], model.layer2[0]
    who = plan.identity("cpu")
    mine = {plan_key(b, x, True): Entry(EAGER, {EAGER: 1.0}, 1.0) for b in (first, second)}
    plan.merge(plan.cache_file(who), who, mine)
    table = {plan_key(first, x, True): ENTRIES[KEY]}
    (tables / "this.json").write_text(plan.encode(who, table, None))
    assert choice_of(first, x)[1].startswith("table: ") and choice_of(first, x)[0] == "b"
    assert choice_of(second, x)[1].startswith("cache: ") and choice_of(second, x)[0] == EAGER
