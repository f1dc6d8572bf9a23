"""Convs left to the vendor or given to the `cuda` backend, pass by pass, on whole stages: what a
choice's name means, and that it is exact. Stages and criterion are those of test_ladder.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from common import TOLERANCES, backend
from test_ladder import STAGES, error, fused, leaves, make, plain, step

import fastres
from fastres.ops import _choice, _ladder, _ladder_bwd

VENDOR = [
    "c1 vendor conv2.fprop",
    "c2 vendor conv2.dgrad",
    "c2 vendor conv3.wgrad",
    "d vendor conv1.dgrad",
    "d vendor conv3.wgrad shortcut.dgrad",
    "d vendor conv1.fprop",
    "c2 vendor shortcut.fprop shortcut.wgrad",
    "d vendor conv1.fprop conv2.dgrad conv2.fprop conv2.wgrad conv3.dgrad",
]


@pytest.mark.parametrize("name", ["bottleneck", "some BN frozen", "some weights frozen"])
@pytest.mark.parametrize("fusion", VENDOR)
def test_passes_left_to_the_vendor_are_exact_in_float64(name, fusion):
    frozen = name == "some weights frozen"
    stage = make("bottleneck", frozen=True, blocks=3) if frozen else STAGES[name]()
    truth = step(plain, stage, torch.float64)
    with fastres.use_backend("reference"):
        got = step(fused, stage, torch.float64, fusion)
    assert got.keys() == truth.keys()
    for key, want in truth.items():
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fusion", VENDOR[-1:])
def test_passes_left_to_the_vendor_on_triton(fusion):
    backend("triton")
    stage = STAGES["bottleneck"]()
    truth = step(plain, stage, torch.float64, values_of=torch.float32)
    eager = step(plain, stage, torch.float32)
    with fastres.use_backend("triton"):
        got = step(fused, stage, torch.float32, fusion)
    for key, want in truth.items():
        ours, theirs = error(got[key], want, False), error(eager[key], want, False)
        assert ours <= 2 * theirs + 4 * TOLERANCES[torch.float32], key


@pytest.mark.parametrize("fusion", VENDOR)
def test_the_named_passes_and_no_others_are_the_vendors(fusion, monkeypatch):
    stage = make("bottleneck", blocks=1)
    convs = ["conv1", "conv2", "conv3", "shortcut"]
    names = {
        (tuple(layer.weight.shape), layer.stride): name
        for layer, name in zip(stage.layers(), convs, strict=True)
    }
    assert len(names) == 4
    vendor, ours = [], []
    fwd, bwd = _ladder.conv_fwd, _ladder_bwd.conv_bwd

    def of(w, geometry):
        return names[tuple(w.shape), geometry[0]]

    def conv_fwd(x, w, bias, geometry, batch_statistics=False):
        vendor.append(f"{of(w, geometry)}.fprop")
        return fwd(x, w, bias, geometry, batch_statistics)

    def conv_bwd(dy, x, w, geometry, *needs):
        asked = zip(("dgrad", "wgrad"), needs, strict=False)
        vendor.extend(f"{of(w, geometry)}.{n}" for n, need in asked if need)
        return bwd(dy, x, w, geometry, *needs)

    def counting(run, weight, geometry, passes):
        def call(*args):
            ours.extend(f"{of(args[weight], args[geometry])}.{p}" for p in passes)
            run(*args)

        return call

    monkeypatch.setattr(_ladder, "conv_fwd", conv_fwd)
    monkeypatch.setattr(_ladder_bwd, "conv_bwd", conv_bwd)
    reference = importlib.import_module("fastres._reference_backend")
    for kernel, *where in (
        ("conv_fprop", 5, 6, ["fprop"]), ("conv_dgrad", 3, 4, ["dgrad"]),
        ("conv_wgrad", 0, 3, ["wgrad"]), ("conv_bwd_pointwise", 5, 6, ["dgrad", "wgrad"]),
    ):  # fmt: skip
        monkeypatch.setattr(reference, kernel, counting(getattr(reference, kernel), *where))
    with fastres.use_backend("reference"):
        step(fused, stage, torch.float64, fusion)
    assert sorted(vendor) == sorted(fusion.split()[2:])
    assert sorted(vendor + ours) == sorted(f"{c}.{p}" for c in convs for p in _choice.PASSES)


@pytest.mark.parametrize("fusion, message", [
    ("c2 vendor", "unknown fusion 'c2 vendor'"),
    ("c3 vendor conv1.fprop", "unknown fusion"),
    ("b vendor conv1.fprop", "on rung b all convs are the vendor's"),
    ("c2 vendor conv2", "'conv2' is not a pass of a conv"),
    ("c2 vendor conv2.bprop", "'conv2.bprop' is not a pass of a conv"),
    ("c2 vendor conv3.fprop", "names conv3.fprop; the convs are conv1, conv2, shortcut"),
    ("c2 cuda", "unknown fusion 'c2 cuda'"),
    ("b cuda all", "on rung b all convs are the vendor's"),
    ("c2 cuda conv2", "'conv2' is not a pass of a conv"),
    ("c2 vendor conv1.wgrad cuda conv1.wgrad=cutlass-256x64", "wgrad is given to vendor and to"),
    ("c2 cuda conv2.fprop=wide", "'conv2.fprop=wide' is no pass and its tile"),
])  # fmt: skip
def test_a_choice_that_cannot_be_met_is_named(fusion, message):
    stage = make("basic", blocks=1)
    x = stage.x.contiguous(memory_format=torch.channels_last)
    with fastres.use_backend("reference"), pytest.raises(ValueError, match=message):
        fused(x, stage, leaves(stage, torch.float64), fusion)


CUDA = [
    ("c2 cuda all", {"conv1.dgrad": "", "conv9.fprop": ""}),
    ("c2 cuda conv1.fprop=cutlass-256x64", {"conv1.fprop": "cutlass-256x64", "conv2.fprop": None}),
    (
        "d vendor conv1.wgrad cuda all conv2.fprop=pointwise-128x64",
        {"conv1.wgrad": None, "conv1.fprop": "", "conv2.fprop": "pointwise-128x64"},
    ),
]


@pytest.mark.parametrize("fusion, tiles", CUDA)
def test_a_choice_names_the_tiles_of_the_cuda_convs(fusion, tiles):
    choice = _choice.parse(fusion)
    assert {name: choice.tile(name) for name in tiles} == tiles


def test_equal_choices_have_one_name():
    passes = ["conv1.fprop", "conv2.fprop", "conv2.wgrad", "shortcut.fprop"]

    def path(fusion, *steps):
        for name, to in steps:
            fusion = _choice.with_pass(fusion, name, to, passes)
        return fusion

    vendor = path("c2", ("shortcut.fprop", "vendor"), ("conv2.wgrad", "vendor"))
    assert vendor == "c2 vendor conv2.wgrad shortcut.fprop"
    assert path(vendor, ("conv1.fprop", "vendor")) == (
        "c2 vendor conv1.fprop conv2.wgrad shortcut.fprop"
    )
    tile = ("conv1.fprop", "cuda=cutlass-256x64")
    mixed = path(vendor, tile, ("shortcut.fprop", "cuda"))
    assert mixed == "c2 vendor conv2.wgrad cuda conv1.fprop=cutlass-256x64 shortcut.fprop"
    assert path(mixed, ("conv1.fprop", "own"), ("shortcut.fprop", "vendor")) == vendor
    every = path("c2 cuda all", tile, ("conv2.wgrad", "vendor"))
    assert every == "c2 vendor conv2.wgrad cuda all conv1.fprop=cutlass-256x64"
    assert path(every, ("conv1.fprop", "cuda"), ("conv2.wgrad", "cuda")) == "c2 cuda all"
    assert path(every, ("conv2.fprop", "own")) == (
        "c2 vendor conv2.wgrad cuda conv1.fprop=cutlass-256x64 shortcut.fprop"
    )
