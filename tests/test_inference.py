"""CPU inference on folded, prepacked convs: values, and every way a cached weight can go stale."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
import torchvision
from test_convert import batch, small
from torch.func import functional_call
from torchvision.models import resnet

import fastres
from fastres import _route, counters, inference

CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(small(5).state_dict()),
    "in-place on a weight": lambda m: m.layer2[0].conv2.weight.mul_(1.5),
    "in-place on a running variance": lambda m: m.layer1[1].bn3.running_var.mul_(3),
    "in-place on the stem's bias": lambda m: m.bn1.bias.add_(0.5),
    "a new Parameter": lambda m: setattr(
        m.layer1[0].conv1, "weight", torch.nn.Parameter(m.layer1[0].conv1.weight * 2)
    ),
    ".data replaced": lambda m: setattr(
        m.layer1[0].conv1.weight, "data", m.layer1[0].conv1.weight * 2
    ),
    ".data replaced by another view of the same memory": lambda m: setattr(
        m.layer1[1].conv2.weight, "data", m.layer1[1].conv2.weight.data.transpose(0, 1)
    ),
    "another stride": lambda m: (
        setattr(m.layer2[0].conv2, "stride", (1, 1))
        or setattr(m.layer2[0].downsample[0], "stride", (1, 1))
    ),
    "eps": lambda m: setattr(m.layer4[0].bn2, "eps", 0.5),
}


def pair():
    plain = small().eval()
    return plain, fastres.convert(copy.deepcopy(plain)).eval()


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_is_refolded(change: str) -> None:
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        before = fused(x).clone()
        for m in (plain, fused):
            CHANGES[change](m)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(fused(x), before, rtol=1e-3)


def test_an_optimiser_step_and_training_statistics_are_seen() -> None:
    plain, fused = pair()
    x = batch()
    for m in (plain, fused):
        with torch.no_grad():
            m.eval()(x)
        m.train()
        opt = torch.optim.SGD(m.parameters(), 0.01)
        m(x).square().mean().backward()
        opt.step()
        m.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


def test_to_another_dtype_and_back() -> None:
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        fused(x)
        for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float32, 0.01)):
            plain.to(dtype), fused.to(dtype)
            out, expected = fused(x.to(dtype)), plain(x.to(dtype))
            assert out.dtype == dtype
            error = (out - expected).float().abs().max() / expected.float().abs().max()
            assert error < tolerance, (dtype, error)


def test_a_write_through_data_needs_invalidate() -> None:
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        fused(x)
        for m in (plain, fused):
            m.layer1[0].conv1.weight.data.mul_(2)
        fastres.invalidate(fused)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_output_is_as_near_to_float64_as_eager(dtype: torch.dtype) -> None:
    from fastres.convert.verify import difference

    plain, fused = pair()
    x = batch(8)
    with torch.inference_mode():
        truth = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            theirs, ours = plain(x), fused(x)
    assert ours.dtype == theirs.dtype == dtype
    assert difference("logits", ours, theirs, truth).ok


def _randoms(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=g) * 0.05 for k, p in model.named_parameters()}


def test_parameters_of_a_call_are_seen_where_freed_ones_lay() -> None:
    """functional_call: each call's tensors are freed after it, and the next ones get their ids,
    addresses and version counters."""
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        ours = [functional_call(fused, _randoms(fused, seed), (x,)) for seed in range(6)]
        theirs = [functional_call(plain, _randoms(plain, seed), (x,)) for seed in range(6)]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["parameter", "data"])
def test_new_weights_where_freed_ones_lay_are_seen(how: str) -> None:
    plain, fused = pair()
    x = batch(1, 32)
    for seed in range(6):
        for m in (plain, fused):
            conv = m.layer1[0].conv2
            g = torch.Generator().manual_seed(seed)
            if how == "parameter":
                del conv.weight
                conv.weight = torch.nn.Parameter(torch.randn(16, 16, 3, 3, generator=g))
            else:
                conv.weight.data = torch.empty(0)
                conv.weight.data = torch.randn(16, 16, 3, 3, generator=g)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


def test_shapes_may_change_between_calls() -> None:
    plain, fused = pair()
    with torch.no_grad():
        for n, size in ((1, 64), (3, 96), (2, 33), (1, 64)) * 2:
            x = batch(n, size)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


def test_images_of_one_channel_in_more_shapes_than_are_packed() -> None:
    """torch takes them, and an unpacked weight, for NCHW."""
    plain = small().eval()
    plain.conv1 = torch.nn.Conv2d(1, plain.conv1.out_channels, 7, 2, 3, bias=False)
    fused = fastres.convert(copy.deepcopy(plain)).eval()
    with torch.no_grad():
        for size in range(32, 32 + inference.PACKS_KEPT + 2):
            # a slice of three channels is not dense; one channel is dense in both layouts
            x = batch(1, size)[:, :1].contiguous()
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


def test_a_default_device_is_not_where_cpu_inference_runs() -> None:
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        expected = plain(x)
        with torch.device("meta"):
            for _ in range(2):
                torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)


def test_many_shapes_are_folded_once_and_packed_within_bounds(monkeypatch) -> None:
    plain, fused = pair()
    folds = []
    fold = inference.fold
    monkeypatch.setattr(inference, "fold", lambda c, bn: folds.append(c) or fold(c, bn))
    kept, calls = inference.PACKS_KEPT, inference.CALLS_TO_REPLACE
    sizes = [32 + 4 * i for i in range(kept + 2)]
    counters.reset()

    def run(size: int) -> None:
        x = batch(1, size)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)

    def packed(size: int) -> bool:
        return (torch.float32, (1, 3, size, size)) in fused._fastres.cache._variants

    with torch.no_grad():
        for size in sizes * (calls - 1):
            run(size)
        assert [packed(size) for size in sizes] == [True] * kept + [False] * 2
        assert "were not packed" in str(counters.events())
        run(sizes[-1])  # it keeps coming
        assert packed(sizes[-1]) and not packed(sizes[0])
        assert len(fused._fastres.cache) == kept
    # once for the first shape, once to keep what more shapes are packed from
    assert all(folds.count(c) <= 2 for c in folds)


def test_threads_that_fold_pack_and_evict_at_once() -> None:
    plain, fused = pair()
    batches = [batch(1, 32 + 8 * i) for i in range(inference.PACKS_KEPT + 2)]
    with torch.no_grad():
        expected = [plain(x) for x in batches]
    wrong: list = []

    def work(k: int) -> None:
        with torch.no_grad():
            for i in range(40):
                j = (i * (k + 1) + k) % len(batches)
                try:
                    torch.testing.assert_close(fused(batches[j]), expected[j], rtol=1e-3, atol=1e-4)
                    if i % 10 == 9:
                        fastres.invalidate(fused)
                except BaseException as e:
                    wrong.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pixel_spreads_as_in_eager(value: float) -> None:
    plain, fused = pair()
    x = batch(3)
    x[1, 2, 30, 31] = value
    counters.reset()
    with torch.no_grad():
        out, expected = fused(x), plain(x)
        assert torch.equal(out.isnan(), expected.isnan()) and expected[1].isnan().any()
        torch.testing.assert_close(out[0], expected[0], rtol=1e-3, atol=1e-4)
        features = fused.layer1(plain.maxpool(plain.relu(plain.bn1(plain.conv1(x)))))
        assert features[1].isnan().any() and not features[0].isnan().any()
    assert any("non-finite input" in event for event in counters.events())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_written_between_blocks_spreads_as_in_eager(value: float, mode) -> None:
    plain, fused = pair()
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    found = []
    with mode():
        for m in (plain, fused):
            y = m.layer1[0](x)
            y[0, 0, 0, 0] = value
            found.append(m.layer1[1](y))
    assert torch.equal(found[1].isnan(), found[0].isnan()) and found[0][0].isnan().any()
    assert torch.equal(found[1].isinf(), found[0].isinf())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("path", ["layer1", "layer1.0", "maxpool"])
def test_a_hook_that_writes_a_bad_value_is_seen(path: str, mode) -> None:
    plain, fused = pair()
    for m in (plain, fused):
        m.get_submodule(path).register_forward_hook(lambda m, args, out: out.div_(0))
    with mode():
        ours, theirs = fused(batch()), plain(batch())
    assert theirs.isnan().any() and torch.equal(ours.isnan(), theirs.isnan())


def _bad(t: torch.Tensor) -> tuple[int, int]:
    return int(t.isnan().sum()), int(t.isinf().sum())


def _grow_one(m):
    m.layer1[0].bn2.weight.fill_(1e20)


def _grow_three(m):
    _grow_one(m)
    m.layer1[1].bn1.weight.fill_(1e20)
    m.layer1[1].bn2.weight.fill_(-1e20)


def _grow_and_shrink(m):
    """Eager overflows in the conv, though the folded weights are ordinary."""
    m.layer2[0].conv2.weight.mul_(1e38)
    m.layer2[0].bn2.running_var.mul_(1e38)
    m.layer2[0].bn2.weight.mul_(1e-19)


def _diverge(m):
    for layer in (m.layer1, m.layer2):
        for block in layer:
            block.conv1.weight.copy_(block.conv1.weight.sign() * 1e10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grow", [_grow_one, _grow_three, _grow_and_shrink, _diverge])
def test_overflow_inside_the_network_is_eagers(grow, dtype: torch.dtype) -> None:
    plain, fused = pair()
    counters.reset()
    with torch.no_grad():
        for m in (plain, fused):
            grow(m)
            m.to(dtype)
        bad = set()
        for scale in (1e-3, 1.0, 1e6):
            x = (batch() * scale).to(dtype)
            bad.add(_bad(plain(x)))
            assert _bad(fused(x)) == _bad(plain(x)), scale
    if bad != {(0, 0)}:
        assert any("took the unfolded path" in event for event in counters.events())


def test_large_inputs_overflow_as_in_eager() -> None:
    plain, fused = pair()
    with torch.no_grad():
        for scale in (1e20, 1e30, 1e34, 1e35, 1e36, 1e37, 1e38):
            ours, theirs = fused(batch() * scale), plain(batch() * scale)
            assert _bad(ours) == _bad(theirs), scale
            if _bad(theirs) == (0, 0):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("path", ["layer1.0", "layer1.1", "layer4.0"])
def test_the_bound_holds_and_is_not_idle(path: str) -> None:
    _, fused = pair()
    block = fused.get_submodule(path)
    channels = block.conv1.in_channels
    worst = 0.0
    with torch.no_grad():
        for seed in range(5):
            g = torch.Generator().manual_seed(seed)
            x = torch.randn(2, channels, 8, 8, generator=g).to(memory_format=torch.channels_last)
            z, bound = block._fused(x.sign(), False, 1.0, "b")
            worst = max(worst, float(z.abs().max()) / bound)
    assert 1e-4 < worst <= 1


def test_a_resnet50_is_measured_at_the_input_and_rarely_after(monkeypatch) -> None:
    """Each measurement is a pass over memory; the bounds carry through many blocks."""
    torch.manual_seed(0)
    model = fastres.convert(torchvision.models.resnet50()).eval()
    x = batch(1, 64)
    measured = []
    abs_max = inference.abs_max
    monkeypatch.setattr(_route, "why_interpreted", lambda: "C++ measures by itself")
    with torch.inference_mode():
        model(x)
        monkeypatch.setattr(
            inference, "abs_max", lambda t: measured.append(t.numel()) or abs_max(t)
        )
        counters.reset()
        model(x)
    assert not counters.events()
    assert measured[0] == x.numel() and len(measured) <= 4


def test_a_shape_that_does_not_fit_is_trainings_error() -> None:
    def stride(m):
        m.layer1[1].conv2.stride = (2, 2)

    def shortcut(m):
        m.layer2[0].downsample[0].stride = (8, 8)

    cases = [
        (stride, "layer1.1", (2, 256, 8, 8)),
        (shortcut, "layer2.0", (2, 256, 8, 8)),
        (lambda m: None, "layer1.0", (2, 32, 8, 8)),
        (lambda m: None, "layer1.0", (64, 8, 8)),
    ]
    for change, path, shape in cases:
        _, fused = pair()
        change(fused)
        x = torch.randn(shape)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        messages = []
        for training in (False, True):
            with torch.no_grad(), pytest.raises(ValueError) as error:
                fused.train(training).get_submodule(path)(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_nchw_images_are_copied_once_for_a_whole_network() -> None:
    plain = small().to(memory_format=torch.contiguous_format).eval()
    fused = fastres.convert(copy.deepcopy(plain))
    x = batch().contiguous()
    features = torch.randn(2, 64, 8, 8)
    counters.reset()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)
        assert counters.events() == {"inference: a batch of images copied to channels_last": 1}
        assert len(fused.layer4[0]._fastres.cache) == 1
        # a block on its own keeps the layout, and says what that costs
        counters.reset()
        z = fused.layer1[0](features)
        assert z.is_contiguous()
        torch.testing.assert_close(z, plain.layer1[0](features), rtol=1e-3, atol=1e-4)
        assert list(counters.events()) == [
            "inference: convs and batch norms were not folded: the input is not channels_last"
        ]
        # a hook inside sees the layout that eager has
        strides = []
        fused.layer2.register_forward_hook(lambda m, a, out: strides.append(out.is_contiguous()))
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)
    assert strides == [True]
    assert "model.to(memory_format=torch.channels_last)" in fastres.report(fused).rows[0].reason


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_use_backend_is_respected(backend: str, monkeypatch) -> None:
    plain, fused = pair()
    calls = []
    conv = inference.conv
    monkeypatch.setattr(inference, "conv", lambda *a, **k: calls.append(1) or conv(*a, **k))
    with torch.no_grad(), fastres.use_backend(backend):
        torch.testing.assert_close(fused(batch()), plain(batch()), rtol=1e-3, atol=1e-4)
    assert bool(calls) == (backend == "cpu")


def test_nan_weights_are_not_folded_away() -> None:
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        for m in (plain, fused):
            m.layer3[0].conv2.weight[0, 0, 0, 0] = float("nan")
        assert plain(x).isnan().all() and fused(x).isnan().all()


def test_block_input_is_never_overwritten() -> None:
    _, fused = pair()
    x = torch.randn(2, 256, 14, 14).to(memory_format=torch.channels_last)
    for block in (fused.layer1[1], fused.layer2[0]):
        kept = x.clone()
        with torch.inference_mode():
            first, second = block(x), block(x)
        assert torch.equal(x, kept) and torch.equal(first, second)


def test_parameters_made_in_inference_mode_still_work() -> None:
    with torch.inference_mode():
        plain = small().eval()
        fused = fastres.convert(copy.deepcopy(plain)).eval()
        torch.testing.assert_close(fused(batch()), plain(batch()), rtol=1e-3, atol=1e-4)


def test_eval_with_gradients_is_not_folded() -> None:
    """Fine-tuning in eval mode: gradients flow, nothing is cached."""
    plain, fused = pair()
    x = batch()
    for m in (plain, fused):
        m(x).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-3, atol=1e-4, msg=name)
    assert not len(fused.layer1[0]._fastres.cache)


def test_caches_die_with_revert() -> None:
    _, fused = pair()
    with torch.no_grad():
        fused(batch())
    assert len(fused.layer1[0]._fastres.cache)
    fastres.revert(fused)
    assert type(fused.layer1[0]) is resnet.Bottleneck and not hasattr(fused.layer1[0], "_fastres")


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_tensors_that_hooks_see_are_never_written_over(block) -> None:
    """Inference adds in place where nobody looks; a hook's tensors must keep their values."""
    fused = fastres.convert(small(block=block)).eval()
    x = batch()
    with torch.no_grad():
        expected = fused(x).clone()
        for path in ("layer1", "layer1.0", "layer1.1", "layer2", "layer2.0", "maxpool"):
            seen: list[tuple[torch.Tensor, torch.Tensor]] = []

            def hook(m, args, out, seen=seen):
                seen.extend((t, t.clone()) for t in (*args, out))

            handle = fused.get_submodule(path).register_forward_hook(hook)
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
            assert len(seen) == 2, path
            assert all(torch.equal(t, then) for t, then in seen), path
        assert torch.equal(fused(x), expected)
