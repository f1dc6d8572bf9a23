"""It composes: torch.compile, export, fx, checkpointing, DDP, FSDP2, threads, import cost."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from test_convert import batch, small, step
from torch import nn
from torchvision.models import resnet

import fastres


def grads(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend: str, amp: bool) -> None:
    if backend == "inductor" and amp:
        pytest.skip("thinned: autocast goes through aot_eager, inductor through fp32")
    torch._dynamo.reset()
    model = fastres.convert(small(block=resnet.BasicBlock))
    compiled = copy.deepcopy(model)
    x = batch()
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    for m, call in ((model, model), (compiled, run)):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = call(x)
        nn.functional.cross_entropy(out, torch.arange(len(x))).backward()
        m.out = out.detach()
    torch.testing.assert_close(compiled.out, model.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads(compiled), grads(model), rtol=1e-2, atol=1e-4)
    for (name, a), b in zip(model.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
    torch._dynamo.reset()


def test_export_keeps_the_fused_ops() -> None:
    model = fastres.convert(small()).eval()
    x = batch()
    exported = torch.export.export(model, (x,))
    ops = [str(node.target) for node in exported.graph.nodes]
    assert sum("fastres.residual_stage" in op for op in ops) == 5
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_fx_feature_extraction_sees_the_original_layers() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = small().eval()
    fused = fastres.convert(copy.deepcopy(plain))
    x = batch()
    wanted = ["layer1.1.bn2", "layer4"]
    with torch.no_grad():
        theirs = create_feature_extractor(plain, wanted)(x)
        ours = create_feature_extractor(fused, wanted)(x)
    for name in wanted:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing() -> None:
    model = fastres.convert(small())
    twin = copy.deepcopy(model)
    x = batch()
    step(model, x)
    stem = twin.fused_forward(x)
    out = torch.utils.checkpoint.checkpoint(twin.layer1, stem, use_reentrant=False)
    out = twin.layer4(twin.layer3(twin.layer2(out)))
    out = twin.fc(torch.flatten(twin.avgpool(out), 1))
    nn.functional.cross_entropy(out, torch.arange(len(x)) % 10).backward()
    assert torch.equal(grads(model), grads(twin))


WORKER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_convert import batch, small
import fastres
rank = int(sys.argv[2])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])
dist.init_process_group("gloo", rank=rank, world_size=2)
kind = sys.argv[4]
x = batch(8)[rank * 4 : rank * 4 + 4]
# FSDP2 itself takes no channels_last parameters
layout = torch.channels_last if kind == "ddp" else torch.contiguous_format
x = x.contiguous(memory_format=layout)
model, plain = (small().to(memory_format=layout) for _ in range(2))
fastres.convert(model)
def run(m):
    m(x).square().mean().backward()
    found = []
    for p in m.parameters():
        g = p.grad
        found.append((g.full_tensor() if hasattr(g, "full_tensor") else g).flatten())
    return torch.cat(found)
if kind == "ddp":
    wrap = torch.nn.parallel.DistributedDataParallel
else:
    from torch.distributed.fsdp import fully_shard
    def wrap(m):
        for block in (*m.layer1, *m.layer2):
            fully_shard(block)
        return fully_shard(m)
ours, theirs = run(wrap(model)), run(wrap(plain))
error = (ours - theirs).norm() / theirs.norm()
assert error < 1e-2, error
from fastres import counters
assert not [e for e in counters.events() if "unfused" in e], counters.events()
dist.barrier()
print("agrees", float(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(kind: str) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = os.path.dirname(__file__)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, here, str(rank), str(port), kind],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for p in ranks:
        out, err = p.communicate(timeout=240)
        assert p.returncode == 0 and "agrees" in out, err[-2000:]


def test_inference_from_two_threads() -> None:
    model = fastres.convert(small()).eval()
    x = batch()
    with torch.no_grad():
        expected = model(x)
    wrong = []

    def work() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(5) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_import_is_cheap_and_pulls_in_no_triton() -> None:
    code = """
import sys, time, torch
had = "triton" in sys.modules
start = time.perf_counter()
import fastres
took = time.perf_counter() - start
assert had or "triton" not in sys.modules
assert "torchvision" not in sys.modules
print(took)
"""
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(r.stdout) for r in runs) < 0.3
