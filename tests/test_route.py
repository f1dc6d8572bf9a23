"""Routes in C++: they give what the same steps give from Python, stop where those stop, and hold
and free what they should."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_convert import batch
from test_inference import pair
from test_network import MODELS

import fastres
from fastres import _native, _route, counters, inference
from fastres._route import Native, Route, Step

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(
    _native.why_missing() is not None or _route.why_interpreted() is not None,
    reason=f"no routes in C++: {_native.why_missing() or _route.why_interpreted()}",
)


def routed(name: str, dtype=torch.float32) -> tuple[torch.nn.Module, torch.Tensor, list[Route]]:
    """A converted model, its input, its routes."""
    fused = fastres.convert(MODELS[name]().eval())
    x = batch(3, 64)
    with torch.inference_mode(), torch.autocast("cpu", BF16, enabled=dtype == BF16):
        fused(x)
    return fused, x, routes_of(fused)


def routes_of(model: torch.nn.Module) -> list[Route]:
    found = []
    for m in model.modules():
        if hasattr(m, "_fastres"):
            found += m._fastres.routes._routes.values()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_from_python(name: str, dtype) -> None:
    fused, _, routes = routed(name, dtype)
    other = torch.randn(3, 3, 64, 64)  # NCHW
    in_cpp = [isinstance(part, Native) for route in routes for part in route._parts]
    assert any(in_cpp) and (all(in_cpp) or name == "own")
    winograd = [
        p.channels is not None
        for route in routes
        for step in route.steps
        if step.folded is not None
        for p in step.folded.packs
    ]
    assert any(winograd) == (name != "groups") and not all(winograd)
    with torch.inference_mode(), torch.autocast("cpu", BF16, enabled=dtype == BF16):
        counters.reset()
        ours = fused(other)
        found = counters.events()
        for route in routes:
            route._parts = route._plain
        counters.reset()
        assert torch.equal(fused(other), ours) and ours.isfinite().all()
        assert counters.events() == found


@pytest.mark.parametrize("where", range(5))
def test_it_stops_at_the_block_that_does_not_take_its_input(where: int) -> None:
    """0: the stem; n: the n-th block."""
    fused, x, (route,) = routed("basic")
    (native,) = route._parts
    stem = _route._packed(route.stem.folded.packs[0])
    cpp = _native.module().Route(0)
    tight = (0.0, 1.0, 0.5)  # |z| <= 1, of |x| <= 0.5
    cpp.add_stem(stem, (0.0, 1.0, -1.0 if where == 0 else 1e30), *route.stem.window)
    for i, step in enumerate(route.steps):
        packs = [_route._packed(p) for p in step.folded.packs]
        projected = step.block._fastres.spec.shortcut is not None
        cpp.add_block(packs, tight if i + 1 == where else (0.0, 1.0, 1e30), projected)
    with torch.inference_mode():
        x = route.stem.given(x)
        z, largest, done = Native(cpp, route.stem, route.steps).run(x, None)
        assert done == where
        ends = [x, *_by_python(route, x)]
        assert torch.equal(z, ends[where])
        assert largest == z.abs().max().item()  # measured, as no bound did
        # and the model's own answer is what the blocks by themselves give from there
        route._parts = [native._replace(route=cpp)]
        expected = fused(batch(3, 64))
        fastres.invalidate(fused)
        torch.testing.assert_close(fused(batch(3, 64)), expected, rtol=1e-4, atol=1e-4)


def _by_python(route: Route, x: torch.Tensor) -> list[torch.Tensor]:
    """What the stem and each block give."""
    found = [route.stem.run(x)[0]]
    for step in route.steps:
        projected = step.block._fastres.spec.shortcut is not None
        found.append(inference.block(found[-1], step.folded.packs, projected, own_input=False))
    return found


def test_an_unknown_or_exceeded_bound_is_measured() -> None:
    """The stem's bound of z is far above what z holds, so that the next block measures z."""
    _, x, (route,) = routed("basic")
    with torch.inference_mode():
        x = route.stem.given(x)
        z = route.stem.run(x)[0]
        largest = z.abs().max().item()
        for safe, runs in ((largest, True), (largest * 0.999, False)):
            cpp = _native.module().Route(0)
            stem = _route._packed(route.stem.folded.packs[0])
            cpp.add_stem(stem, (1e30, 0.0, 1e30), *route.stem.window)
            packs = [_route._packed(p) for p in route.steps[0].folded.packs]
            cpp.add_block(packs, (2.0, 1.0, safe), False)
            _, bound, done = Native(cpp, route.stem, route.steps[:1]).run(x, None)
            assert done == 1 + runs
            assert bound == (2 * largest + 1 if runs else largest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_bad_images_are_the_models_own_business(value: float) -> None:
    fused, x, (route,) = routed("basic")
    plain = fastres.revert(copy.deepcopy(fused))
    assert isinstance(route._parts[0], Native)
    x[1, 2, 3, 4] = value
    with torch.inference_mode():
        ours, theirs = fused(x), plain(x)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def test_an_error_of_torchs_is_raised_by_the_steps_themselves(capfd) -> None:
    fused, x, (route,) = routed("basic")
    with torch.inference_mode():
        expected = fused(x)
        packs = route.steps[1].folded.packs
        wrong = packs[0]._replace(weight=torch.randn(8, 3, 3, 3), channels=None)
        bad = route.steps[1]._replace(
            folded=route.steps[1].folded._replace(packs=[wrong, *packs[1:]])
        )
        steps = [route.steps[0], bad, *route.steps[2:]]
        route._parts = [Native.of(route.stem, steps)]
        assert route._parts[0].run(route.stem.given(x), None) is None
        assert torch.equal(fused(x), expected)  # by the steps, which are whole
        route.steps[:], route._plain[1:] = steps, steps
        with pytest.raises(RuntimeError, match="channels|size|dimension|weight"):
            fused(x)
    capfd.readouterr()  # torch's log of it


def test_the_profiler_sees_the_convolutions() -> None:
    fused, x, (route,) = routed("bottleneck")
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused(x)
    direct = sum(
        p.channels is None
        for folded in (route.stem.folded, *(s.folded for s in route.steps))
        for p in folded.packs
    )
    seen = [e for e in profile.events() if e.name.startswith("mkldnn::_convolution_pointwise")]
    assert len(seen) == direct > 10


def test_references_are_taken_and_given_back() -> None:
    fused, x, (route,) = routed("basic")
    weights = [p.weight for step in route.steps for p in step.folded.packs]
    weights += [route.stem.folded.packs[0].weight]
    with torch.inference_mode():
        h = route.stem.given(x).contiguous(memory_format=torch.channels_last)
        (native,) = route._parts
        before = h._use_count(), [w._use_count() for w in weights]
        for _ in range(3):
            z, _, _ = native.run(h, None)
        assert z._use_count() == 1
        assert (h._use_count(), [w._use_count() for w in weights]) == before
        del native
        route._parts = []
        assert [w._use_count() for w in weights] == [n - 1 for n in before[1]]


def test_the_input_is_not_written_to() -> None:
    fused = fastres.convert(MODELS["own"]().eval())
    x = batch(2, 64)
    with torch.inference_mode():
        y = torch.relu(fused.bn(fused.conv(x)))
        y = y.contiguous(memory_format=torch.channels_last)
        copied = y.clone()
        for _ in range(3):
            fused.first(y)
        assert isinstance(routes_of(fused.first)[0]._parts[0], Native)
        assert torch.equal(y, copied)


def test_a_mixed_network_has_parts_of_both_kinds() -> None:
    *_, routes = routed("own")
    parts = [part for route in routes for part in route._parts]
    assert {type(p) for p in parts} == {Native, Step}


def test_threads_run_one_route_at_a_time_each() -> None:
    fused, _, _ = routed("basic")
    inputs = [batch(3, 64, seed=i) for i in range(8)]
    with torch.inference_mode():
        expected = [fused(x) for x in inputs]

    def run(x):
        with torch.inference_mode():
            return [fused(x) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for found, z in zip(pool.map(run, inputs), expected, strict=True):
            assert all(torch.equal(f, z) for f in found)


def test_without_torchs_functions_python_runs_it(monkeypatch) -> None:
    fused, x, _ = routed("basic")
    with torch.inference_mode():
        expected = fused(x)
        monkeypatch.setattr(_route, "why_interpreted", lambda: "not exported")
        fastres.invalidate(fused)
        fused(x)
        assert torch.equal(fused(x), expected)
        *_, route = routes_of(fused)
        assert route._parts is route._plain


def test_the_extension_refuses_what_makes_no_route() -> None:
    native = _native.module()
    with pytest.raises(ValueError, match="one address for each"):
        native.set_torch_shims([1, 2])
    with pytest.raises(ValueError, match="no convolutions"):
        native.Route(0).add_block([], (1.0, 0.0, 1.0), False)


def test_the_bounds_of_routes_and_blocks_agree() -> None:
    """C++ carries the bound from block to block as Python does."""
    _, fused = pair()
    x = batch(2, 64)
    with torch.inference_mode():
        fused(x)
        (route,) = routes_of(fused)
        h = route.stem.given(x)
        _, ours, parts = route._parts[0].run(h, None)
        z, largest = route.stem.run(h)
        for step in route.steps:
            z, largest = _route.run_folded(step.block, step.folded, z, True, largest)
    assert parts == 1 + len(route.steps)
    assert ours == largest >= z.abs().max().item()
