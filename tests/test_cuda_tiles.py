"""The tiles of the `cuda` backend's convolutions: every one against the reference, on a Hopper GPU
or the host shim (tests/test_cuda_host.py); and how `fastres.tune` and a plan choose among them, on
a native module that notes what it is called with."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import test_conv as conv
import torch
from common import cuda_convs
from test_conv import Layer, check, poison  # noqa: F401 (a fixture of every test here)
from test_plan import cache  # noqa: F401 (likewise)
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import fastres
from fastres import _cuda, _cuda_tiles, _tune_child, backends, counters, plan, tuning
from fastres.ops import _choice
from fastres.plan import EAGER, Entry

PAIR, TALL = "cutlass-128x128-pair", "cutlass-256x64"
WIDE, NARROW = "cutlass-128x128", "cutlass-128x64"
POINT = [f"pointwise-128x{n}" for n in (64, 128, 256)]
TILES = {
    "fprop": [*POINT, PAIR, TALL],
    "fprop_act": [*POINT[:2], PAIR, TALL],
    "dgrad": [*POINT[:2], PAIR, TALL],
    "wgrad": [*POINT, WIDE, NARROW],
}
# more than 128 channels on either side, and several tiles of pixels
LAYER = Layer(2, 136, 13, 11, 264, 1, 1, 1, 0, 1)
# the CUTLASS stand-in multiplies by plain loops; a launch has other blocks on each tile
SMALL, SMALL_DGRAD = (Layer(2, c, 13, 11, k, 1, 1, 1, 0, 1) for c, k in ((72, 40), (40, 72)))


def case(op: str, layer: Layer, dtype):
    """Outputs, call and inputs of an op with the most in its prologue and epilogue."""
    if op == "fprop":
        outputs, inputs = conv.fprop_case(layer, dtype, True)
        return outputs, conv._fprop, inputs
    if op == "fprop_act":
        _, (x, w, geometry, _) = conv.fprop_case(layer, dtype, False)
        random = conv.Random(dtype, "act", layer)
        inputs = x, w, geometry, random.norm(layer.k), random.activation(*layer.out), True
        return {"z": layer.out}, conv._act, inputs
    random, x, w, g, bn = conv.gradient_case(layer, dtype, "bn", True)
    if op == "wgrad":
        inputs = g, x, layer.geometry, bn, random.norm(layer.c)
        return {"dw": tuple(w.shape)}, conv._wgrad, inputs
    dres, prev = conv.residual_of(random, x, "mask"), conv.previous_of(random, x, "dual")
    return conv.gradient_outputs(x, "dual"), conv._dgrad, (g, w, layer.geometry, bn, dres, prev)


@pytest.fixture
def cuda(gpu):
    return cuda_convs()


def blocks_of(op: str, place: int, tile: str, layer: Layer) -> int:
    """Blocks of an op's product on the tile at a place of its list."""
    native = _cuda._module()
    m, n = (int(v) for v in tile.split("-")[1].split("x"))
    pixels, c, k = layer.n * layer.h * layer.w, layer.c, layer.k
    if tile in POINT:  # columns of tiles, times the chunks that the workspace is for
        if op == "dgrad":
            return -(-c // n) * native.pointwise_dgrad_floats(pixels, c, k, 3, place) // (3 * c)
        if op == "wgrad":
            tiles = -(-k // m) * -(-c // n)
            return tiles * native.pointwise_wgrad_floats(pixels, c, k, place) // (k * c)
        return -(-k // n) * native.pointwise_fprop_floats(pixels, c, k, place) // (2 * k)
    rows, columns, depth = {"dgrad": (pixels, c, k), "wgrad": (k, c, pixels)}.get(
        op, (pixels, k, c)
    )
    which = _cuda_tiles._CUTLASS_PASS[op]
    found = native.conv_schedule(which, rows, columns, 1, depth, place)
    assert found["tile"] == (m, n, 2 if tile == PAIR else 1)
    return found["workers"] * found["columns"] * found["splits"]


@pytest.mark.parametrize("op, tile", [(op, t) for op, names in TILES.items() for t in names])
def test_every_tile_matches_the_reference(cuda, op, tile):
    """On the kernels that its name says, with a workspace of its own size, and on the host shim,
    which keeps them, in the blocks that this tile cuts and no other."""
    layer = LAYER if tile in POINT else SMALL_DGRAD if op == "dgrad" else SMALL
    outputs, call, inputs = case(op, layer, torch.bfloat16)
    counters.reset()
    check(_cuda.Convs(tile), torch.bfloat16, outputs, call, *inputs)
    assert not counters.events()  # no other tile in its place
    if _cuda.on_host():
        family = [t for t in TILES[op] if (t in POINT) == (tile in POINT)]
        want = {t: blocks_of(op, i, t, layer) for i, t in enumerate(family, 1)}
        assert len(set(want.values())) == len(family)
        launches = [blocks for name, blocks in _cuda._module().recent() if name == f"conv_{op}"]
        last = 1 if op == "fprop_act" else 2  # others add up the blocks' sums in a second launch
        assert launches[-last] == want[tile]


@pytest.mark.parametrize("op", TILES)
def test_the_build_has_the_tiles_and_one_is_chosen(cuda, op):
    found = [*_cuda_tiles.tiles(op, "pointwise"), *_cuda_tiles.tiles(op, "cutlass")]
    assert [t.name for t in found] == TILES[op] and all(len(t.why) > 10 for t in found)
    for layer in (LAYER, SMALL, Layer(2, 16, 9, 9, 64, 3, 3, 1, 1, 1)):
        x = torch.empty(layer.n, layer.c, layer.h, layer.w, dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.empty(layer.k, layer.c, layer.r, layer.s, device="meta")
        configs = _cuda_tiles.configs(op, x, w, layer.geometry)
        width = layer.k if op.startswith("fprop") else layer.c
        point = [n for i, n in enumerate(POINT) if i == 0 or 64 << i < 2 * width]
        want = [n for n in TILES[op] if (n in point if n in POINT else True)]
        assert [c.name for c in configs] == [n for n in want if layer.pointwise or n not in POINT]
        assert sum(c.chosen for c in configs) == 1
        (chosen,) = [c.name for c in configs if c.chosen]
        assert chosen.startswith("pointwise" if layer.pointwise else "cutlass")
    assert _cuda_tiles.configs(op, x.float(), w, layer.geometry) == []


def test_a_tile_that_does_not_take_the_tensors_is_counted(cuda):
    layer, dtype = SMALL, torch.bfloat16
    outputs, call, (x, *rest) = case("fprop", layer, dtype)
    odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
    counters.reset()
    check(_cuda.Convs(POINT[0]), dtype, outputs, call, odd.copy_(x), *rest)
    _, call, inputs = case("fprop_act", layer, dtype)
    check(_cuda.Convs(POINT[2]), dtype, {"z": layer.out}, call, *inputs)
    said = [e for e in counters.events() if "by shape instead" in e]
    assert [e.split()[2] for e in said] == [POINT[0], POINT[2]]
    y = conv.empty(layer.out, dtype)
    with pytest.raises(
        ValueError,
        match=r"no tile 'cutlass-64x64' of conv_fprop; it has pointwise-128x64, .*, "
        r"cutlass-256x64; the tensors are \(2, 40, 13, 11\), \(2, 72, 13, 11\), \(40, 72, 1, 1\)$",
    ):
        _cuda.Convs("cutlass-64x64").conv_fprop(y, None, None, None, x, *rest, None, 1e-5)
    with pytest.raises(ValueError, match="tile 3 of a list of 2"):
        _cuda._module().conv_schedule(0, 8, 8, 1, 8, 3)


MIXED = (
    f"c2 vendor conv3.wgrad cuda conv1.fprop={POINT[1]} conv2.dgrad={TALL} conv2.wgrad "
    f"shortcut.dgrad={PAIR}"
)


@pytest.mark.parametrize("fusion", ["c2 cuda all", MIXED], ids=["cuda-all", "cuda-mixed"])
def test_a_block_runs_its_passes_where_the_choice_says(cuda, fusion):
    """Beside another backend's convs: the reference's."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64))
    block = nn.Sequential(Bottleneck(32, 16, 1, down)).half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 9, 7).half().contiguous(memory_format=torch.channels_last)

    def step(model, x):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        z = model(x)
        z.double().square().mean().backward()
        return [z.detach(), x.grad, *(p.grad for p in model.parameters())]

    truth, eager = step(copy.deepcopy(block).double(), x.double()), step(copy.deepcopy(block), x)
    fastres.convert(block, fusion=fusion)
    with fastres.use_backend("reference"):
        got = step(block, x)

    def error(v: Tensor, want: Tensor) -> float:
        return float((v.double() - want).norm() / want.norm())

    worst = max(error(e, t) for e, t in zip(eager, truth, strict=True))
    for g, e, t in zip(got, eager, truth, strict=True):
        assert error(g, t) <= max(2 * error(e, t), worst)


# --- chosen by a plan: the native module is a note-taker ------------------------------------------


class Native:
    """Lists as the build's; launchers that note (name, tile) and leave their outputs at 0."""

    def __init__(self, lists=TILES) -> None:
        self.lists, self.launched, self.listed = lists, [], 0

    def _tiles(self, op: str, family: str):
        self.listed += 1
        sizes = (n.split("-")[1].split("x") for n in self.lists[op] if n.startswith(family))
        names = [n for n in self.lists[op] if n.startswith(family)]
        return [(n, int(a), int(b), 1, "a reason") for n, (a, b) in zip(names, sizes, strict=True)]

    def pointwise_tiles(self, op: int):
        return self._tiles(_cuda_tiles.OPS[op], "pointwise")

    def conv_tiles(self, which: int):
        return self._tiles(("fprop", "dgrad", "wgrad")[which], "cutlass")

    def conv_schedule(self, *_):
        return {"tile": (128, 128, 1)}

    def __getattr__(self, name: str):
        if name.endswith(("why_not", "refuses", "missing")):
            return lambda *_: ""
        if name.endswith("_shape"):
            return lambda *_: {"columns": 64}
        if name.endswith("_floats"):
            return lambda *_: 1
        return lambda *args: self.launched.append((name, args))


@pytest.fixture
def native(monkeypatch):
    """The reference stands for the backend that runs by itself."""
    monkeypatch.setattr(_cuda, "_host", Native())
    monkeypatch.setattr(backends, "choose", lambda device, dtype: ("reference", "a test"))
    monkeypatch.setattr(backends, "_selected", {})
    return _cuda._host


def blocks():
    torch.manual_seed(0)
    model = nn.Sequential(Bottleneck(64, 16)).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    return fastres.convert(model), x


def target(training: bool) -> tuning.Target:
    (found,) = tuning.distinct(*blocks(), training)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_tune_enumerates_the_cuda_convs(native, training):
    here = target(training)
    assert tuning.candidates(here) == [EAGER, "b", "c1", "c2", "d", "c2 cuda all"]
    passes = tuning.passes_of(here)
    own = tuning._tune_cuda.ways(here, _choice.parse("c2"), passes)
    assert list(own) == passes
    assert own["conv2.fprop"] == ["vendor", "cuda", f"cuda={TALL}"]
    assert own["conv1.fprop"] == ["vendor", "cuda", f"cuda={PAIR}", f"cuda={TALL}"]  # 16 channels
    if training:
        assert own["conv2.wgrad"] == ["vendor", "cuda", f"cuda={NARROW}"]
        assert own["conv3.dgrad"] == ["vendor", "cuda", f"cuda={PAIR}", f"cuda={TALL}"]
    every = tuning._tune_cuda.ways(here, _choice.parse("c2 cuda all"), passes)
    assert every["conv2.fprop"] == ["vendor", "own", f"cuda={TALL}"]
    float32 = fastres.convert(
        nn.Sequential(Bottleneck(64, 16)).to(memory_format=torch.channels_last)
    )
    (wide,) = tuning.distinct(float32, blocks()[1].float(), training)
    assert tuning.candidates(wide) == [EAGER, "b", "c1", "c2", "d"]


def test_without_the_cuda_backend_nothing_is_enumerated(native, monkeypatch):
    monkeypatch.setattr(_cuda, "_host", None)
    monkeypatch.setattr(_cuda, "why_missing", lambda: "no CUDA device")
    assert tuning.candidates(target(True)) == [EAGER, "b", "c1", "c2", "d"]


def test_tune_checks_and_chooses_tiles_pass_by_pass(cache, native, monkeypatch):  # noqa: F811
    """The choice is saved, read and passed down to the launchers; a wrong tile is rejected."""
    gains = {("conv1.fprop", TALL): 0.3, ("conv2.wgrad", ""): 0.2, ("conv2.wgrad", NARROW): 0.1}
    cost = {EAGER: 3.0, "b": 2.0, "c1": 1.0, "c2": 1.5, "d": 1.5}
    wrong = f"c1 cuda conv2.dgrad={TALL}"

    def seconds_of(name: str) -> float:
        if name == EAGER:
            return cost[name]
        choice = _choice.parse(name)
        changed = [*choice.vendor, *choice.cuda]
        return cost[name.split()[0]] - sum(gains.get(c, -0.1) for c in changed)

    def race(steps, *_):
        return {name: [seconds_of(name)] * 5 for name in steps}

    monkeypatch.setattr(tuning, "_race", race)
    monkeypatch.setattr(tuning, "check", lambda t, n: "wrong: dx" if n == wrong else None)
    here = target(True)
    entry = tuning.measure(here, 0.1, False, per_conv=True)
    best = f"c1 cuda conv1.fprop={TALL} conv2.wgrad"
    assert entry.choice == best and entry.rejected == {wrong: "wrong: dx"}
    plan.current(here.x.device).add({here.key: entry})
    plan.forget()  # from the file
    model, x = blocks()
    native.launched.clear()
    model(x.requires_grad_()).float().sum().backward()
    ran = [(name, args[-5]) for name, args in native.launched if name.startswith("conv")]
    assert ran == [("conv_fprop", 2), ("conv_wgrad", 0)]  # before dtype, sizes, device and stream
    assert f"training on 2x64x6x6: {best} (cache: measured" in str(fastres.report(model))


def test_a_tile_that_the_build_does_not_have_is_left_alone(cache, native, monkeypatch, caplog):  # noqa: F811
    here = target(True)
    gone = f"c2 cuda conv1.fprop={TALL}"
    device = here.x.device
    plan.current(device).add({here.key: Entry(gone, {EAGER: 2.0, gone: 1.0}, 2.0)})
    plan.forget()
    assert plan.current(device).lookup(here.key)[0] == gone
    plan.forget()
    monkeypatch.setattr(_cuda, "_host", Native(TILES | {"fprop": [PAIR]}))
    with caplog.at_level(logging.WARNING, "fastres"):
        found = plan.current(device)
    assert found.lookup(here.key) is None
    assert f"no tile '{TALL}' of conv_fprop; it has {PAIR}; ignored" in caplog.text
    model, x = blocks()
    assert fastres._chosen.choice_of(model[0], x)[0] == "b"
    assert gone in plan.cache_file(found.who).read_text()  # for the build that has it
    monkeypatch.setattr(_cuda, "_host", None)
    monkeypatch.setattr(_cuda, "built", lambda: "fastres._C was built without them: no nvcc")
    plan.forget()
    assert plan.current(device).lookup(here.key) is None and "no nvcc; ignored" in caplog.text


def test_a_tile_that_is_asked_for_and_missing_is_an_error(native):
    model, x = blocks()
    fastres.convert(model, fusion="c2 cuda conv1.fprop=cutlass-64x64")
    with pytest.raises(fastres.BackendError, match="cannot run: this build has no tile 'cutlass-6"):
        model(x)
    assert not native.launched


def test_a_tile_that_hangs_is_the_last_that_is_tried(cache, native, monkeypatch):  # noqa: F811
    """By themselves, behind the others; in the block that hung, and in those after it."""
    asked = []

    def run_child(folder, names, seconds, deadline):
        asked.append((names, seconds))
        if names[0] == "c2 cuda all":
            return {}, "no answer in 60 s"
        return dict.fromkeys(names), None

    monkeypatch.setattr(tuning, "run_child", run_child)
    monkeypatch.setattr(tuning, "_race", lambda steps, *_: {n: [1.0] * 5 for n in steps})
    own = ["b", "c1", "c2", "d"]
    model, x = blocks()
    result = fastres.tune(model, x, seconds=0.1, isolate=True)
    assert asked == [(own, 300.0), (["c2 cuda all"], 60.0), (own, 300.0)]  # training; inference
    rejected = [e.rejected for e in result.entries.values()]
    assert rejected == [{"c2 cuda all": "no answer in 60 s"}, {}]
    left = tuning._tune_cuda.give_up("c2 cuda conv1.fprop", "a crash", ["c2", "c2 cuda all"])
    assert left == {"c2 cuda all": "not tried: c2 cuda conv1.fprop: a crash"}
    assert tuning._tune_cuda.give_up("c2", "a crash", ["c2 cuda all"]) == {}


def test_a_candidate_that_loses_the_device_is_blamed_alone(native, monkeypatch):
    whole, one, two = "c2 cuda all", "c2 cuda conv1.fprop", "c2 cuda conv2.fprop"
    asked = []

    def run_child(folder, names, seconds, deadline):
        asked.append(names)
        return {whole: None, one: f"{tuning.LOST}: illegal address"}, None

    monkeypatch.setattr(tuning, "run_child", run_child)
    monkeypatch.setattr(tuning._tune_cuda, "lost", None)
    found = tuning._isolated(target(True), [whole, one, two], float("inf"), 300.0)
    assert found[whole] is None and found[one].endswith("illegal address")
    assert found[two] == f"not tried: {one}: {tuning.LOST}: illegal address"
    assert asked == [[whole, one, two]] and tuning._tune_cuda.lost == one


def test_the_child_says_which_candidate_lost_the_device(monkeypatch, tmp_path):
    """The fault of a kernel is reported by the synchronisation after its check."""
    here = SimpleNamespace(x=SimpleNamespace(device=torch.device("cuda")), dtype=None)
    monkeypatch.setattr(torch, "load", lambda *a, **k: {"target": here, "backend": None})
    monkeypatch.setattr(tuning, "attempt", lambda t, n: None)
    answers: list = []
    monkeypatch.setattr(_tune_child, "self_check", lambda t, n=None: answers.append(("proven", n)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    calls = []

    def synchronize():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    _tune_child.check_all(tmp_path, ["b", "c1", "c2"], lambda *a: answers.append(a))
    checking, started = (tuning.CHECKING, None), (tuning.STARTED, None)
    assert answers[:5] == [("proven", None), checking, ("proven", "b"), started, ("b", None)]
    assert answers[5:-1] == [checking, ("proven", "c1"), started, ("c1", None)]
    name, reason = answers[-1]
    assert name == "c1" and reason.startswith(tuning.LOST) and "illegal memory access" in reason
