"""convert, revert, report, verify: the contract with the user (DESIGN.md section 2)."""

from __future__ import annotations

import copy
import io
import json
import time

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import resnet

import fastres
from fastres import counters
from fastres.convert.verify import difference

FAMILY = {
    "resnet18": 9, "resnet34": 17, "resnet50": 17, "resnet101": 34, "resnet152": 51,
    "resnext50_32x4d": 17, "resnext101_32x8d": 34, "resnext101_64x4d": 34,
    "wide_resnet50_2": 17, "wide_resnet101_2": 34,
}  # fmt: skip


def small(seed: int = 0, block=resnet.Bottleneck, **kwargs) -> nn.Module:
    """A whole torchvision ResNet, few and thin blocks, channels_last, batch norms away from their
    initial values."""
    torch.manual_seed(seed)
    if block is not resnet.BasicBlock:
        kwargs = {"width_per_group": 16} | kwargs
    model = resnet.ResNet(block, [2, 1, 1, 1], num_classes=10, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
    return model.to(memory_format=torch.channels_last)


def batch(n: int = 4, size: int = 64, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=g).to(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()


@pytest.mark.parametrize("name", FAMILY)
def test_every_torchvision_resnet_is_fused_whole(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    before = fastres.report(model)
    assert sum(r.status == "would fuse" for r in before.rows) + len(before.left) == FAMILY[name]


def test_convert_keeps_everything_but_the_forward() -> None:
    model = small()
    twin = copy.deepcopy(model)
    fired = []
    model.layer1[0].register_forward_hook(lambda *_: fired.append("block"))
    model.layer2.eval()
    parameters, buffers = list(map(id, model.parameters())), list(map(id, model.buffers()))
    flags = [m.training for m in model.modules()]
    assert fastres.convert(model) is model
    assert list(map(id, model.parameters())) == parameters
    assert list(map(id, model.buffers())) == buffers
    assert [m.training for m in model.modules()] == flags
    assert list(model.state_dict()) == list(twin.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in twin.named_modules()]
    assert isinstance(model, resnet.ResNet) and isinstance(model.layer1[0], resnet.Bottleneck)
    assert type(model.layer1[0]).__name__ == "FastBottleneck"
    assert fastres.report(model).fused == 6 and not fastres.report(model).left
    model(batch())
    assert fired == ["block"]


def test_checkpoints_go_both_ways() -> None:
    plain, fused = small(0), fastres.convert(small(1))
    fused.load_state_dict(plain.state_dict())
    x = batch()
    plain.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    step(fused.train(), x)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    again = small(2)
    again.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), fused.eval()(x), rtol=1e-4, atol=1e-5)


def test_converting_twice_is_once_and_revert_is_exact() -> None:
    model, twin = small(), small()
    fastres.convert(fastres.convert(model))
    assert fastres.report(model).fused == 6
    fastres.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in twin.modules()]
    x = batch()
    assert torch.equal(model(x), twin(x))
    assert fastres.revert(model) is model


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_network_matches_original(block) -> None:
    model = small(block=block)
    result = fastres.verify(model, fastres.convert(copy.deepcopy(model)), batch(8, 48))
    assert result.ok, str(result)
    assert len(result.differences) > 100


@pytest.mark.parametrize(
    "kwargs",
    [
        {"groups": 4, "width_per_group": 8},
        {"width_per_group": 32},
        {"replace_stride_with_dilation": [False, True, True]},
    ],
    ids=["resnext", "wide", "dilated"],
)
def test_variants_match_original(kwargs) -> None:
    model = small(**kwargs)
    result = fastres.verify(model, fastres.convert(copy.deepcopy(model)), batch(8))
    assert result.ok, str(result)


def test_plain_nchw_input_and_weights() -> None:
    model = small().to(memory_format=torch.contiguous_format)
    x = batch(8).contiguous()
    result = fastres.verify(model, fastres.convert(copy.deepcopy(model)), x)
    assert result.ok, str(result)
    assert fastres.convert(model).layer1(torch.randn(2, 64, 8, 8)).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_matches_eager_autocast(dtype: torch.dtype) -> None:
    model = small(block=resnet.BasicBlock)
    fused = fastres.convert(copy.deepcopy(model))
    truth = copy.deepcopy(model).double()
    x = batch(8)
    found = []
    for m, cast in ((model, True), (fused, True), (truth, False)):
        with torch.autocast("cpu", dtype, enabled=cast):
            out = m(x.double() if m is truth else x)
        (out.float() if cast else out).square().mean().backward()
        assert all(p.grad.dtype == p.dtype for p in m.parameters())
        grads = torch.cat([p.grad.flatten().double() for p in m.parameters()])
        found.append((out.detach(), grads, torch.cat([b.flatten().double() for b in m.buffers()])))
    assert found[0][0].dtype == found[1][0].dtype == dtype
    theirs, ours, exact = found
    for name, o, t, e in zip(("output", "gradient", "buffers"), ours, theirs, exact, strict=True):
        d = difference(name, o, t.to(dtype), e, network=True)
        assert d.ok, str(d)


def test_batch_norm_options() -> None:
    for options in (
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 1e-2, "momentum": 0.5},
    ):
        model = small(block=resnet.BasicBlock)
        for name, m in list(model.named_modules()):
            if type(m) is nn.BatchNorm2d:
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], nn.BatchNorm2d(m.num_features, **options))
        fused = fastres.convert(copy.deepcopy(model))
        assert fastres.report(fused).fused == 6
        result = fastres.verify(model, fused, batch(8, 48))
        assert result.ok, (options, str(result))
        model.train(), fused.train()
        for seed in range(3):
            x = batch(8, seed=seed)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
        for (name, b), c in zip(model.named_buffers(), fused.buffers(), strict=True):
            torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5, msg=f"{options} {name}")


def test_frozen_batch_norm_in_a_training_model() -> None:
    model = small()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.requires_grad_(False)
    fused = fastres.convert(copy.deepcopy(model))
    x = batch()
    step(model, x), step(fused, x)
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
        else:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), fused.buffers(), strict=True))


def test_frozen_stem_and_first_block() -> None:
    """Fine-tuning: no gradient is computed for, nor reaches, what is frozen."""
    model = small()
    for part in (model.conv1, model.bn1, model.layer1[0]):
        part.requires_grad_(False)
    fused = fastres.convert(copy.deepcopy(model))
    x = batch()
    step(model, x), step(fused, x)
    for (name, p), q in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name


class Tweaked(resnet.Bottleneck):
    """A subclass whose forward is its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_not_the_known_block_is_left_with_a_reason() -> None:
    model = resnet.ResNet(Tweaked, [1, 1, 1, 1], num_classes=10)
    model.layer4[0].__class__ = resnet.Bottleneck
    model.layer4[0].bn2 = nn.GroupNorm(8, 512)
    report = fastres.report(fastres.convert(model))
    assert report.fused == 1  # the stem
    reasons = {row.path: row.reason for row in report.left}
    assert "Tweaked is a subclass of Bottleneck that may change its forward" in reasons["layer1.0"]
    assert reasons["layer4.0"] == "bn2 is GroupNorm, not BatchNorm2d"
    with pytest.raises(fastres.ConvertError, match=r"layer1.0 \(Tweaked\): Tweaked is a subclass"):
        fastres.convert(model, strict=True)


def test_sync_batch_norm_and_odd_convs_are_left_with_a_reason() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    report = fastres.report(fastres.convert(model))
    assert report.fused == 0
    assert "bn1 is SyncBatchNorm, not BatchNorm2d" in {row.reason for row in report.left}
    model = small()
    model.layer1[0].conv2.padding_mode = "reflect"
    model.layer2[0].conv1 = nn.Conv2d(256, 128, 1)
    reasons = {row.path: row.reason for row in fastres.report(model).left}
    assert "padding_mode='reflect'" in reasons["layer1.0"]
    assert "conv1 has a bias" in reasons["layer2.0"]


def test_strict_changes_nothing_on_a_miss() -> None:
    model = small()
    model.layer3[0].bn1 = nn.GroupNorm(8, 256)
    types = [type(m) for m in model.modules()]
    with pytest.raises(fastres.ConvertError, match="layer3.0"):
        fastres.convert(model, strict=True)
    assert [type(m) for m in model.modules()] == types
    assert fastres.report(fastres.convert(small(), strict=True)).fused == 6


def test_report_before_and_after_as_text_and_json() -> None:
    model = small()
    before = fastres.report(model)
    assert {row.status for row in before.rows} == {"would fuse"}
    data = json.loads(fastres.report(fastres.convert(model)).to_json())
    assert data["fused"] == 6 and data["left"] == 0
    row = next(r for r in data["rows"] if r["path"] == "layer1.0")
    assert row["type"] == "Bottleneck" and row["backend"] == "cpu" and row["status"] == "fused"
    text = str(fastres.report(model))
    assert "layer1.0" in text and "6 fused, 0 would fuse, 0 left as they are" in text
    stray = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert fastres.report(stray).left[0].reason == "not part of a block that a model family knows"


def test_inner_hook_fires_and_is_reported() -> None:
    model, twin = fastres.convert(small()), small()
    x = batch()
    seen = []
    handle = model.layer1[0].bn2.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    counters.reset()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-3, atol=1e-4)
    assert seen == [torch.Size([4, 16, 16, 16])]
    assert counters.events() == {
        "FastBottleneck ran unfused: bn2 has a hook, which needs the unfused tensors": 1
    }
    handle.remove()
    counters.reset()
    model(x)
    assert counters.events() == {}


def _double(old):
    return lambda *args: old(*args) * 2


@pytest.mark.parametrize("path", ["layer1.0.conv2", "layer1.1", "layer2.0.downsample", "layer3"])
@pytest.mark.parametrize("training", [False, True])
def test_another_forward_of_a_module_is_what_runs(path: str, training: bool) -> None:
    model = small()
    fused = fastres.convert(copy.deepcopy(model))
    for m in (model, fused):
        target = m.train(training).get_submodule(path)
        target.forward = _double(target.forward)
    with torch.no_grad():
        torch.testing.assert_close(fused(batch()), model(batch()), rtol=1e-3, atol=1e-4)
    left = {row.path: row.reason for row in fastres.report(fused).left}
    if path == "layer1.1":
        assert left == {"layer1.1": "it has another forward of its own"}
    elif path != "layer3":
        block, _, inner = path.split(".", 2)[0], None, path.split(".", 2)[2]
        assert left[f"{block}.0"] == f"{inner} has another forward of its own"
    before = copy.deepcopy(model)
    again = fastres.report(fastres.convert(before))
    assert {row.path: row.reason for row in again.left} == left


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (resnet.Bottleneck, "forward"),
        (resnet.ResNet, "_forward_impl"),
        (nn.Conv2d, "forward"),
        (nn.BatchNorm2d, "forward"),
    ],
)
def test_another_forward_of_a_class_is_what_runs(kind: type, name: str, monkeypatch) -> None:
    model = small().eval()
    fused = fastres.convert(copy.deepcopy(model))
    with torch.no_grad():
        before = model(batch())
        monkeypatch.setattr(kind, name, _double(getattr(kind, name)))
        expected = model(batch())
        assert not torch.allclose(expected, before, rtol=1e-2)
        torch.testing.assert_close(fused(batch()), expected, rtol=1e-3, atol=1e-4)
    left = fastres.report(fused).left
    assert left and all(row.reason == f"{kind.__name__}.{name} was replaced" for row in left)
    fresh = fastres.convert(copy.deepcopy(model))
    assert fastres.report(fresh).left == left
    with torch.no_grad():
        torch.testing.assert_close(fresh(batch()), expected, rtol=1e-3, atol=1e-4)


def test_settings_that_no_kernel_takes_are_left_with_a_reason() -> None:
    model = small()
    model.maxpool = nn.MaxPool2d(17, 2, 8)
    model.layer1[0].bn2.running_var = None
    fused = fastres.convert(copy.deepcopy(model))
    left = {row.path: row.reason for row in fastres.report(fused).left}
    assert left == {
        "(model)": "maxpool has kernel_size=17; at most 15 is fused",
        "layer1.0": "bn2 has only one of running_mean and running_var",
    }
    for m in (model, fused):
        with pytest.raises(ValueError, match="running_mean and running_var must either both be"):
            m(batch())
        m.layer1[0].bn2.running_var = torch.ones(16)
    torch.testing.assert_close(fused(batch()), model(batch()), rtol=1e-3, atol=1e-4)


def test_a_refused_batch_is_not_counted() -> None:
    """One value a channel: an error before any buffer of the block is touched."""
    model = fastres.convert(small(block=resnet.BasicBlock))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model.layer4[0](torch.randn(1, 256, 2, 2))
    with pytest.raises(ValueError, match="4 channels"):
        model(torch.randn(2, 4, 64, 64))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    model(batch())
    assert all(int(m.num_batches_tracked) == 1 for m in model.modules() if hasattr(m, "momentum"))


def test_verify_rejects_a_wrong_kernel_and_leaves_the_block(monkeypatch) -> None:
    from fastres import _cpu

    right = _cpu.bn_bwd_apply

    def wrong(dx, dres, dz, mask, x, *rest):
        right(dx, dres, dz, mask, x, *rest)
        if x.shape[1] == 256:
            dx.mul_(1.001)

    monkeypatch.setattr(_cpu, "bn_bwd_apply", wrong)
    model = small()
    fastres.convert(model, verify=batch(4))
    left = {row.path: row.reason for row in fastres.report(model).left}
    assert left and all(
        "verify: " in reason and "relative error" in reason for reason in left.values()
    )
    assert set(left) >= {"layer1.0", "layer1.1"}
    assert type(model.layer1[0]) is resnet.Bottleneck
    monkeypatch.undo()
    fastres.convert(model, verify=batch(4))
    assert not fastres.report(model).left


def test_deepcopy_pickle_and_save() -> None:
    model = fastres.convert(small()).eval()
    x = batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), loaded):
            assert fastres.report(other).fused == 6
            assert torch.equal(other(x), expected)
            other.layer1[0].conv1.weight.zero_()
            assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)
    fastres.revert(loaded)
    assert type(loaded) is resnet.ResNet


def _ddp():
    class Fake(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    return Fake()


BAD = {
    "a string": (lambda: "resnet50", "model must be a torch.nn.Module, got str"),
    "a class": (lambda: resnet.ResNet, "model is the class ResNet; pass an instance"),
    "compiled": (
        lambda: torch.compile(small()),
        r"convert first, then wrap: torch.compile\(fastres.convert",
    ),
    "data parallel": (lambda: nn.DataParallel(small()), "already wrapped by DataParallel"),
    "ddp": (_ddp, "convert first, then wrap"),
}


@pytest.mark.parametrize("what", BAD)
def test_convert_rejects(what: str) -> None:
    make, message = BAD[what]
    model = make()
    with pytest.raises(TypeError, match=message):
        fastres.convert(model)
    if isinstance(model, nn.DataParallel):
        assert type(model.module) is resnet.ResNet


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (
            torch.randn(3, 64, 64),
            ValueError,
            r"non-empty \(N, C, H, W\) batch, got shape \(3, 64, 64\)",
        ),
        (torch.randn(0, 3, 64, 64), ValueError, "non-empty"),
        (torch.randn(1, 3, 64, 64).half(), ValueError, "they must agree"),
        ("x", TypeError, "sample must be a Tensor, got str"),
    ],
)
def test_convert_rejects_a_bad_sample_and_leaves_the_model(sample, error, message) -> None:
    model = small()
    with pytest.raises(error, match=message):
        fastres.convert(model, verify=sample)
    assert type(model.layer1[0]) is resnet.Bottleneck


def test_wrong_input_at_run_time_is_one_clear_error() -> None:
    model = fastres.convert(small())
    before = [b.clone() for b in model.buffers()]
    cases = [
        (
            torch.randn(2, 3, 64, 64).bfloat16(),
            TypeError,
            "the input has dtype torch.bfloat16, but the weights",
        ),
        (torch.randn(2, 4, 64, 64), ValueError, "x has 4 channels, but the conv weight"),
        (torch.randn(2, 3, 64, 64, device="meta"), ValueError, "the input is on meta"),
    ]
    for x, error, message in cases:
        with pytest.raises(error, match=message):
            model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_convert_is_quick() -> None:
    model = torchvision.models.resnet50()
    start = time.perf_counter()
    fastres.convert(model)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_an_empty_batch_gives_what_eager_gives(dtype: torch.dtype, grad: bool) -> None:
    plain = small().eval()
    fused = fastres.convert(copy.deepcopy(plain))
    counters.reset()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for x in (batch(0), batch(2), batch(0)):
            ours, theirs = fused(x), plain(x)
            assert ours.shape == theirs.shape == (len(x), 10) and ours.dtype == theirs.dtype
    assert any("the batch is empty" in event for event in counters.events())
    explicit = fastres.convert(copy.deepcopy(plain), fusion="b")
    with pytest.raises(fastres.BackendError, match="the batch is empty"):
        explicit(batch(0))
