"""CPU inference on folded, prepacked convs: values, and every way a cached weight can go stale."""

from __future__ import annotations

import copy

import pytest
import torch
from test_convert import batch, small
from torchvision.models import resnet

import fastres
from fastres import counters, inference

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


def test_shapes_may_change_between_calls() -> None:
    plain, fused = pair()
    with torch.no_grad():
        for n, size in ((1, 64), (3, 96), (2, 33), (1, 64)) * 2:
            x = batch(n, size)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)


def test_no_module_keeps_more_packs_than_promised() -> None:
    _, fused = pair()
    with torch.no_grad():
        for size in range(64, 64 + 8 * 4, 4):
            fused(batch(1, size))
    cache = fused._fastres.cache("conv1")
    assert len(cache._packs) == inference.PACKS_KEPT


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
    assert not fused.layer1[0]._fastres.caches


def test_caches_die_with_revert() -> None:
    _, fused = pair()
    with torch.no_grad():
        fused(batch())
    assert fused.layer1[0]._fastres.caches
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
