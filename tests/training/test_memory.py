import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.config import parse_config
from tools.memory import SHAPES, raw_config
from training.logps import example_logps
from training.memory import count_parameters, memory_needed
from training.setup import recompute

SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Attention on a CPU keeps more where the threads cannot share the key-value heads evenly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(lengths):
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 500, (n,), generator=g).tolist(), [True] * n) for n in lengths]


def model(item, **changes):
    m = tiny_model(**SHAPE, **changes)
    m.compute_dtype = {4: torch.float32, 2: torch.bfloat16}[item]
    return m


def test_parameters_are_those_of_the_published_models():
    counts = {name: count_parameters(parse_config(raw_config(*s)))[-1] for name, s in SHAPES.items()}
    assert counts == {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "7B": 7_615_616_512}
    m = tiny_model(tie_word_embeddings=False)
    assert count_parameters(m.config)[-1] == sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize("item", [4, 2])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [(300,), (20, 130, 50, 40)])
def test_activations_are_what_torch_keeps(item, compiled, lengths, monkeypatch):
    m, kept = model(item), {}
    if compiled:  # what the compiler's partitioner keeps, without its C++
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend="aot_eager_decomp_partition", **more))
        torch._dynamo.reset()
        m.compile()
    weights = {p.untyped_storage().data_ptr() for p in m.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logps = example_logps(m, examples(lengths))
    assert logps.requires_grad
    need = memory_needed(m.config, sum(lengths), False, item, compiled=compiled, fp32_attention=max(lengths) <= 256)
    assert sum(kept.values()) == pytest.approx(need["activations"], rel=0.03)


class Held(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there: now, and at most."""

    def __init__(self, there_before):
        super().__init__()
        self.known, self.now, self.peak = weakref.WeakSet(t.untyped_storage() for t in there_before), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_sparse and t.untyped_storage() not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage.nbytes())
        return out

    def release(self, size):
        self.now -= size


@pytest.mark.parametrize("item", [4, 2])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"vocab_size": 4096}, {"vocab_size": 10000}])
def test_the_peak_of_a_step_is_what_is_counted(item, again, changes):
    m = model(item, **changes)
    for block in m.model["layers"] if again else []:
        recompute(block)
    optimizer = torch.optim.AdamW(m.parameters(), fused=True)
    state = 4 * sum(p.numel() for p in m.parameters())  # the weights
    with Held(m.parameters()) as held:
        for _ in range(
            2
        ):  # the gradients of the first stand beside the activations of the second, and so do the moments
            example_logps(m, examples((50, 30, 80))).sum().backward()
            optimizer.step()
    need = memory_needed(m.config, 160, again, item, fp32_attention=True)
    assert 0.9 < (held.peak + state) / (sum(need.values()) - need["gaps"]) < 1.03


RESIDENT = """
import torch
from model import Qwen2
from tools.memory import raw_config
from training.logps import example_logps
from training.memory import memory_needed
from training.setup import spend_spare_memory, spent_memory

def resident(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))

def train(shape, steps, tokens):
    model = Qwen2(raw_config(*shape)).init_weights()
    model.compute_dtype = torch.float32
    spend_spare_memory(model, 2**30)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(steps):
        for k in range(3):
            lengths = [tokens // 4 - 7 * k - step, tokens // 2 - 11 * k, tokens // 4]
            example_logps(model, [([5] * n, [True] * n) for n in lengths]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model

torch.set_num_threads(1)
train((32, 64, 1, 2, 1, 500, True), 1, 60)  # loads the libraries' kernels
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # VmHWM starts again
model = train((320, 1024, 8, 5, 1, 16000, True), 2, 300)
need = sum(memory_needed(model.config, 300, False, 4).values()) + spent_memory(model, 300)
print((resident("VmHWM") - before) / need)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_a_process_grows_by_the_estimate():
    command = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    assert 0.88 < float(done.stdout) < 1.12


def test_gaps_are_counted_on_a_cpu_alone():
    c = parse_config(raw_config(*SHAPES["7B"]))
    on_cpu, on_gpu = (memory_needed(c, 1024, False, 4, device_type=device) for device in ("cpu", "cuda"))
    assert on_gpu["gaps"] == 0 and on_cpu["gaps"] == pytest.approx(0.1 * (sum(on_cpu.values()) - on_cpu["gaps"]))


def test_sharding_and_checkpointing_need_less():
    c = parse_config(raw_config(*SHAPES["7B"]))
    whole, eighth = (sum(memory_needed(c, 16384, False, 2, shards).values()) for shards in (1, 8))
    assert eighth < whole / 2 and memory_needed(c, 16384, False, 2, 8)["state"] * 8 == pytest.approx(16 * 7_615_616_512)
    assert memory_needed(c, 16384, True, 2)["activations"] < memory_needed(c, 16384, False, 2)["activations"] / 10


def test_the_table(run, tiny):
    code, text, _ = run("tools.memory")
    assert code == 0 and text.count("\n| ") == 9 and "Computed, not measured" in text
    table = text[text.index("| model") : text.index("\n\nComputed")]
    assert f"\n{table}\n" in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    code, text, _ = run("tools.memory", "--ckpt", tiny)
    assert code == 0 and text.count("\n| ") == 3
