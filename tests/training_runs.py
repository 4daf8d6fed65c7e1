"""What the tests of both training scripts share: data, weights of a run, two ranks."""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, tiny_files

from core.chat_template import default_system
from core.checkpoint import Checkpoint
from core.tokenizer import special_token_texts
from model import Qwen2

WORDS = "The capital of France is Paris . What 2 + 2 = 4 hello world def add return lazy dog fox jumps".split()


def sentence(g, low, high):
    n = int(torch.randint(low, high, (), generator=g))
    return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (n,), generator=g))


def chats(n, seed=0):
    """n records {"messages"} of one turn."""
    g = torch.Generator().manual_seed(seed)
    turn = [("user", 2, 12), ("assistant", 1, 20)]
    return [{"messages": [{"role": r, "content": sentence(g, lo, hi)} for r, lo, hi in turn]} for _ in range(n)]


def feedback(n, seed=0):
    """n records {"prompt", "completion", "label"} as message lists, two to a prompt, labels alternating."""
    g = torch.Generator().manual_seed(seed)
    prompts = [sentence(g, 2, 12) for _ in range((n + 1) // 2)]
    return [
        {
            "prompt": [{"role": "user", "content": prompts[i // 2]}],
            "completion": [{"role": "assistant", "content": sentence(g, 1, 20)}],
            "label": i % 2 == 0,
        }
        for i in range(n)
    ]


def weights(source):
    c = Checkpoint(source)
    return {name: c.tensor(name).clone() for name in c.names}


def update_error(a, b, base):
    """||(a - base) - (b - base)|| / ||a - base|| over all tensors."""
    difference = sum(((a[n] - b[n]).double() ** 2).sum() for n in base)
    moved = sum(((a[n] - base[n]).double() ** 2).sum() for n in base)
    assert moved > 0
    return (difference / moved).sqrt().item()


def log(out):
    return [json.loads(line) for line in Path(f"{out}.run/log.jsonl").read_text().splitlines()]


# A template is rendered in a process of its own. Its result is kept: that of the tiny checkpoint is there before the forks.
of_tiny = json.loads(tiny_files()["tokenizer_config.json"])
default_system(of_tiny["chat_template"], "", special_token_texts(of_tiny, ""))

# A process of its own for each rank, forked from a server that has everything imported: it starts in a moment.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["training_runs", "train_sft", "train_kto", "torch.distributed.fsdp", "torch._dynamo"])


def trap(function, n, deed):
    """Calls deed() before line n (from 1) that this process runs in the function of that name; None: in any of ours."""
    left = [n]

    def each_line(frame, event, _):
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                deed()
        return each_line

    def each_call(frame, *_):  # other functions run at full speed
        code = frame.f_code
        return each_line if function in (None, code.co_name) and is_ours(code.co_filename) else None

    sys.settrace(each_call)


@functools.cache
def is_ours(path):
    return os.path.dirname(path) in OURS


def body(script, args, environment, store, output, prepare):
    os.environ.update(environment)
    with open(output, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the tests are a background job, which ignores it
    sys.argv = [f"{script}.py", *map(str, args)]
    if store:  # meets the other ranks at a file: a port that is free now may be taken in a moment
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    module = importlib.import_module(script)
    if prepare:
        prepare[0](*prepare[1:])
    module.cli(getattr(module, "run_distributed", lambda main: main)(module.main))


def signal_at(function, n, number):
    trap(function, n, lambda: os.kill(os.getpid(), number))


launches = itertools.count()
OURS = {str(ROOT), *(str(ROOT / room) for room in ("core", "training"))}


def start(script, args, output, ranks=1, prepare=None):
    """Starts `ranks` processes of a script. prepare: {rank: (function, arguments...)} to call there first. -> processes"""
    found, store = [], f"{output}.store{next(launches)}" if ranks > 1 else None
    for rank in range(ranks):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        what = (script, args, environment, store, f"{output}.{rank}", (prepare or {}).get(rank))
        found.append(fork.Process(target=body, args=what, daemon=True))
        found[-1].start()
    return found


def launch(script, args, output, ranks=1, prepare=None):
    """start(), to the end. -> (exit codes, what each rank printed)."""
    processes = start(script, args, output, ranks, prepare)
    for p in processes:
        p.join(1000)
        assert p.exitcode is not None, "hangs"
    return [p.exitcode for p in processes], [Path(f"{output}.{rank}").read_text() for rank in range(ranks)]


def torchrun(ranks, script, *args):
    """Runs a script, such as eval.py, or a module, such as variants.s3ft. -> what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=environment, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same_run(a, b):
    """The two runs have the same weights and the same log, to the bit."""
    w, v = weights(a), weights(b)
    assert w.keys() == v.keys() and all(torch.equal(w[n], v[n]) for n in w)
    logs = [[{k: r[k] for k in r if k != "tokens_per_second"} for r in log(out)] for out in (a, b)]
    assert logs[0] == logs[1]


def flags(tiny, data, out, *more):
    settings = ("--batch-size", 4, "--lr", 1e-3, "--max-len", 64, "--warmup", 0, "--epochs", 2)
    return ("--ckpt", tiny, "--data", data, "--out", out, *settings, *more)


def several_turns(n):
    """n records {"messages"} of two exchanges."""
    return [{"messages": a["messages"] + b["messages"]} for a, b in zip(chats(n), chats(n, seed=1))]


def perturbed(source, scale, out):
    """A reference that is not the policy, so that rewards and KL are not all zero at the first step."""
    ckpt, g = Checkpoint(source), torch.Generator().manual_seed(7)
    m = Qwen2.from_pretrained(ckpt)
    with torch.no_grad():
        for p in m.parameters():
            p += scale * p.std() * torch.randn(p.shape, generator=g)
    m.save(out, ckpt.files)
    return out
