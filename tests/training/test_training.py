"""Losing nothing, and several ranks: real runs of tiny models as processes of their own."""

import fcntl
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import types

import pytest
import safetensors.torch
import torch
import torch.utils.checkpoint
from conftest import tiny_files, tiny_model, write_lines
from training_runs import (
    chats,
    feedback,
    launch,
    log,
    same_run,
    signal_at,
    update_error,
    weights,
)

import model
import train_sft
from core import distributed
from core.checkpoint import Checkpoint
from core.conversations import sft_conversations
from core.distributed import Ranks, overlapped_reduction, rank_micro_batches, split_by_tokens
from core.outputs import claim_folder, discard_checkpoint, read_manifest
from core.records import read_records
from core.tokenizer import Tokenizer
from model import Qwen2
from training import logps as training_logps
from training import reference
from training import run as training_run
from training import setup as training_setup
from training.examples import encode_chats
from training.logps import example_logps, shared_prefix_logps
from training.memory import count_parameters, memory_needed
from training.setup import open_checkpoint, plan_steps, shuffled_order

COMMON = ("--batch-size", 4, "--lr", 1e-3, "--max-len", 64, "--warmup", 0)


@pytest.fixture
def sft_data(tmp_path):
    return write_lines(tmp_path / "sft.jsonl", chats(13))


@pytest.fixture
def kto_data(tmp_path):
    return write_lines(tmp_path / "kto.jsonl", feedback(14))


def command(ckpt, data, out, *more):
    out.parent.mkdir(exist_ok=True)  # KTO keeps its cache beside OUT: another folder, another cache
    return ("--ckpt", ckpt, "--data", data, "--out", out, *COMMON, *more)


def listing(out):
    """Files in OUT.run/ but for its manifest, and half-written files beside OUT."""
    inside = sorted(os.listdir(f"{out}.run")) if os.path.isdir(f"{out}.run") else []
    return [name for name in inside if name != ".written.json"] + [
        name for name in os.listdir(out.parent) if ".tmp" in name
    ]


def finish(script, args, tmp_path):
    """Runs to the end with as many threads as launch() gives: sums of another number of threads differ in the last bit."""
    codes, texts = launch(script, args, tmp_path / "finish")
    assert codes == [0], texts


# ---------------------------------------------------------------------------------------------------------------------
# Killed, stopped, out of space


def signalled(function, lines, number):
    reference.SAVE_CACHE_EVERY = 0  # after each chunk, so that a part of the reference pass is there to be found
    signal_at(function, lines, number)


KILLS = [
    ("reference_logps", 40), ("write_ref_cache", 3), ("start_run", 16), ("hidden", 150), ("atomic_write", 120), ("write_log", 4),
    ("optimizer_step", 12), ("write_safetensors", 80), ("save_run", 12), ("restore", 60), ("prune", 8), ("remove", 6),
    ("write_state", 6), ("write_checkpoint", 24), (None, 6000), (None, 6000), ("finish_run", 3),
]  # fmt: skip


def test_killed_at_any_moment_a_run_resumes_to_the_bit(tiny, kto_data, tmp_path):
    numbers = "--epochs 2 --micro-tokens 100 --save-every 1 --eval-every 3 --keep 1"
    more = (*numbers.split(), "--eval-data", kto_data)
    whole, broken = tmp_path / "a" / "o", tmp_path / "b" / "o"
    finish("train_kto", command(tiny, kto_data, whole, *more), tmp_path)
    rng, killed = random.Random(0), 0
    for function, lines in KILLS:
        prepare = {0: (signalled, function, rng.randint(1, lines), signal.SIGKILL)}
        codes, _ = launch(
            "train_kto", command(tiny, kto_data, broken, *more, "--resume"), tmp_path / "text", prepare=prepare
        )
        assert codes[0] in (-signal.SIGKILL, 0)
        killed += codes[0] != 0
    assert killed > len(KILLS) / 2
    finish("train_kto", command(tiny, kto_data, broken, *more, "--resume"), tmp_path)
    same_run(whole, broken)
    assert listing(broken) == listing(whole)


STOPS = [
    ("reference_logps", 40), ("hidden", 150), ("with_eval", 1), ("with_eval", 1), ("write_safetensors", 60), ("save_run", 6),
    (None, 4000), ("eval_logps", 20), ("finish_run", 3),
]  # fmt: skip


def test_sigterm_saves_and_ends_well(tiny, kto_data, tmp_path):
    more = ("--epochs", 2, "--micro-tokens", 100, "--save-every", 2, "--eval-data", kto_data, "--eval-every", 1)
    whole, stopped = tmp_path / "a" / "o.pt", tmp_path / "b" / "o.pt"
    finish("train_kto", command(tiny, kto_data, whole, *more), tmp_path)
    rng = random.Random(1)
    for function, lines in STOPS:
        prepare = {0: (signalled, function, rng.randint(1, lines), signal.SIGTERM)}
        codes, (text,) = launch(
            "train_kto", command(tiny, kto_data, stopped, *more, "--resume"), tmp_path / "text", prepare=prepare
        )
        assert codes == [0], text
        if lines == 1:  # before the evaluation's first line: it is abandoned, and again when it is made up for
            state = json.loads((tmp_path / "b" / "o.pt.run" / "state.json").read_text())
            assert state["pending"]["step"] == len(log(stopped)) + 1
        if not stopped.exists():
            assert "stopped " in text
            assert not [name for name in listing(stopped) if ".tmp" in name]
    finish("train_kto", command(tiny, kto_data, stopped, *more, "--resume"), tmp_path)
    same_run(whole, stopped)


def sigterm_in_evaluation(n):
    """SIGTERM in the first micro-batch of the n-th evaluation of SFT."""
    evaluations, sequence_logps = itertools.count(1), training_logps.sequence_logps
    name = "example_logps" if "--shard" in sys.argv else "shared_prefix_logps"

    def evaluation(*args, **options):
        if next(evaluations) == n:
            setattr(training_logps, name, functools.partial(signalled_logps, getattr(training_logps, name)))
        return sequence_logps(*args, **options)

    def signalled_logps(real, *args):
        print("micro-batch of the evaluation that is stopped")
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    training_run.sequence_logps = evaluation


@pytest.mark.parametrize("n, more", [(1, ()), (2, ()), (2, ("--shard",))])
def test_sigterm_abandons_an_evaluation_and_resuming_makes_up_for_it(tiny, sft_data, tmp_path, n, more):
    numbers = "--epochs 1 --micro-tokens 60 --eval-every 2 --save-every 1"
    settings = (*numbers.split(), "--eval-data", sft_data, "--resume", *more)
    whole, stopped = tmp_path / "a" / "o", tmp_path / "b" / "o"
    assert launch("train_sft", command(tiny, sft_data, whole, *settings), tmp_path / "text", n)[0] == [0] * n
    assert [s["step"] for s in log(whole) if "eval_loss" in s] == [2, 4]
    # the first evaluation; it again, when it is made up for; the next one; the last one, when it is made up for
    for evaluation, step in (1, 2), (1, 2), (2, 4), (1, 4):
        prepare = {n - 1: (sigterm_in_evaluation, evaluation)}
        codes, texts = launch("train_sft", command(tiny, sft_data, stopped, *settings), tmp_path / "text", n, prepare)
        assert codes == [0] * n and f"stopped after step {step} of 4" in texts[0], texts
        assert texts[n - 1].count("micro-batch of the evaluation that is stopped") == 1
        assert [s["step"] for s in log(stopped)] == list(range(1, step)) and not stopped.exists()
    assert launch("train_sft", command(tiny, sft_data, stopped, *settings), tmp_path / "text", n)[0] == [0] * n
    same_run(whole, stopped)
    assert listing(whole) == listing(stopped)


def full_disk(step, largest):
    """From the save of that step on no file may have more than so many bytes."""
    real = training_run.save_run

    def save_run(run, s):
        if s == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        real(run, s)

    training_run.save_run = save_run


@pytest.mark.parametrize("out, largest", [("o", 10_000), ("o.pt", 10_000), ("o.pt", 100_000), ("o", 200_000)])
def test_a_full_disk_leaves_the_save_before(tiny, sft_data, tmp_path, out, largest):
    assert os.path.getsize(f"{tiny}/model.safetensors") < 200_000  # so that the last case fails in the moments
    arguments = command(tiny, sft_data, tmp_path / "b" / out, "--save-every", 1, "--epochs", 1)
    codes, (text,) = launch("train_sft", arguments, tmp_path / "text", prepare={0: (full_disk, 3, largest)})
    errors = [line for line in text.splitlines() if "error" in line]
    assert codes == [2] and len(errors) == 1 and "Traceback" not in text, text
    assert "cannot be written" in errors[0] and "the save of step 2 is whole" in errors[0]
    assert not [name for name in listing(tmp_path / "b" / out) if ".tmp" in name]
    finish("train_sft", (*arguments, "--resume"), tmp_path)
    finish("train_sft", command(tiny, sft_data, tmp_path / "a" / out, "--epochs", 1), tmp_path)
    same_run(tmp_path / "a" / out, tmp_path / "b" / out)


def test_saves_that_are_kept(tiny, sft_data, tmp_path, run, monkeypatch):
    losses = iter([5.0, 3.0, 1.0, 4.0, 2.0, 6.0, 1.5, 7.0])  # after each step; the best after the third
    monkeypatch.setattr(training_run, "due", lambda step, total, every: step == total or every and step % every == 0)
    real = training_run.end_step
    monkeypatch.setattr(train_sft, "end_step", lambda run, record: real(run, record | {"eval_loss": next(losses)}))
    out = tmp_path / "a" / "o.pt"
    more = ("--epochs", 2, "--save-every", 2, "--eval-every", 1, "--eval-data", sft_data)
    _, text, _ = run("train_sft", *command(tiny, sft_data, out, *more))
    assert listing(out) == ["args.json", "log.jsonl", "state.json", "step-3.pt", "step-4.pt", "step-6.pt"]
    assert "lowest eval_loss, before the last step: 1," in text and "step-3.pt" in text
    assert weights(out.parent / "o.pt.run" / "step-3.pt").keys() == weights(out).keys()


def test_what_args_and_log_say_and_a_finished_run(tiny, sft_data, tmp_path, run, refused):
    out = tmp_path / "a" / "o"
    arguments = command(tiny, sft_data, out, "--epochs", 1, "--seed", 5)
    assert run("train_sft", *arguments)[0] == 0
    args = json.loads((tmp_path / "a" / "o.run" / "args.json").read_text())
    assert args["seed"] == 5 and args["command"][1:] == [str(a) for a in arguments] and args["resumed"] == []
    assert args["the model"] == Checkpoint(tiny).fingerprint() and len(args["the data"]) == 64 and args["ranks"] == 1
    before = weights(out)
    code, text, _ = run("train_sft", *arguments, "--resume")
    assert (
        code == 0 and "already finished after 4 steps" in text and len(log(out)) == 4 and "code has changed" not in text
    )
    state = tmp_path / "a" / "o.run" / "state.json"
    state.write_text(state.read_text().replace(args["the code"], "that of yesterday"))
    code, text, _ = run("train_sft", *arguments, "--resume")
    assert code == 0 and "warning: the code has changed since step 4 was saved" in text
    refused("differs in seed", "train_sft", *arguments, "--seed", 6, "--resume")
    os.remove(tmp_path / "a" / "o.run" / "log.jsonl")
    refused("log.jsonl: missing", "train_sft", *arguments, "--resume")
    assert all(torch.equal(before[n], t) for n, t in weights(out).items())


def interrupted(function, lines, times):
    signal_at(function, lines, signal.SIGINT)
    if times == 2:  # the second one in the save that the first one asked for
        real = training_run.save_run
        training_run.save_run = lambda *args: (os.kill(os.getpid(), signal.SIGINT), real(*args))


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tiny, kto_data, tmp_path):
    more = ("--epochs", 2, "--micro-tokens", 100, "--save-every", 0)
    whole, stopped = tmp_path / "a" / "o.pt", tmp_path / "b" / "o.pt"
    finish("train_kto", command(tiny, kto_data, whole, *more), tmp_path)
    arguments = command(tiny, kto_data, stopped, *more, "--resume")
    for function, times, code, words in (
        ("reference_logps", 1, 130, ""),
        ("lr_at", 2, 130, "Ctrl-C again ends at once"),
        ("lr_at", 1, 130, "stopped after step 1 of 8"),
    ):
        codes, (text,) = launch(
            "train_kto", arguments, tmp_path / "text", prepare={0: (interrupted, function, 10, times)}
        )
        assert codes == [code] and words in text and "Traceback" not in text, text
        assert not [name for name in listing(stopped) if ".tmp" in name]
    assert "lock" not in listing(stopped)
    finish("train_kto", arguments, tmp_path)
    same_run(whole, stopped)


def test_a_new_run_says_that_it_replaces_an_unfinished_one(tiny, sft_data, tmp_path, run):
    arguments = command(tiny, sft_data, tmp_path / "o", "--epochs", 1, "--micro-tokens", 60, "--save-every", 1)
    prepare = {0: (signalled, "optimizer_step", 30, signal.SIGTERM)}
    assert launch("train_sft", arguments, tmp_path / "text", prepare=prepare)[0] == [0]
    step = json.loads((tmp_path / "o.run" / "state.json").read_text())["step"]
    code, _, err = run("train_sft", *arguments)
    assert code == 0 and f"replaces the unfinished run that was saved there after step {step}\n" in err
    code, _, err = run("train_sft", *arguments)  # over a finished one
    assert code == 0 and "replaces" not in err


def test_saves_of_the_user_are_never_removed(tiny, sft_data, tmp_path, run, refused):
    """Files in OUT.run/ with the names of saves, that no run wrote there."""
    out = tmp_path / "o.pt"
    arguments = command(tiny, sft_data, out, "--epochs", 1, "--save-every", 1, "--keep", 1)
    for name in ("step-1.pt", "step-7", "optimizer-3.safetensors"):
        os.makedirs(f"{out}.run")
        os.makedirs(f"{out}.run/{name}") if name == "step-7" else write_lines(f"{out}.run/{name}", ["mine"])
        refused([f"{name}: was not written by training"], "train_sft", *arguments)
        assert os.listdir(f"{out}.run") == [name]
        shutil.rmtree(f"{out}.run")
    assert run("train_sft", *arguments)[0] == 0 and len(listing(out)) == 4  # one of them is the newest save
    saves = {name for name in read_manifest(f"{out}.run")["files"] if name.startswith(("step", "optimizer"))}
    assert len(saves) == 1 and saves < {*listing(out)}
    assert run("train_sft", *arguments)[0] == 0  # its own saves are no obstacle
    write_lines(f"{out}.run/step-0.pt", ["mine"])
    refused(["step-0.pt: was not written by training"], "train_sft", *arguments)


def test_a_damaged_save_is_one_line(tiny, sft_data, tmp_path, run, refused):
    out = tmp_path / "o"
    arguments = command(tiny, sft_data, out, "--epochs", 1, "--save-every", 1, "--resume")
    state, moments = tmp_path / "o.run/state.json", tmp_path / "o.run/optimizer-3.safetensors"
    assert run("train_sft", *arguments)[0] == 0
    whole = json.loads(state.read_text())
    for damage in ({"step": "1"}, {"identity": 5}, {"finished": None}, {"pending": []}):
        state.write_text(json.dumps(whole | damage))
        refused(["state.json: is not the state of a run"], "train_sft", *arguments)
    state.write_text(json.dumps(whole)[:99])
    refused(["state.json: is not the state of a run; drop --resume"], "train_sft", *arguments)
    state.write_text(json.dumps(whole | {"step": 3, "finished": False}))
    claim_folder(f"{out}.run", "training", ["optimizer-3.safetensors"])
    for key, size in (("exp_avg/x", 1), ("exp_avg", 1), ("exp_avg/model.norm.weight", 5), ("buffer/x", 1)):
        safetensors.torch.save_file({key: torch.ones(size)}, moments)
        refused([f"optimizer-3.safetensors: {key} does not fit"], "train_sft", *arguments)
    moments.write_bytes(b"junk")
    refused(["optimizer-3.safetensors: missing or corrupt"], "train_sft", *arguments)
    discard_checkpoint(f"{out}.run/step-3")
    refused(["o.run/step-3: missing; drop --resume to start again"], "train_sft", *arguments)


def test_a_second_run_in_one_out_is_refused(tiny, sft_data, tmp_path, run, refused, monkeypatch):
    out = tmp_path / "a" / "o"
    arguments = command(tiny, sft_data, out, "--epochs", 1)
    os.makedirs(f"{out}.run")
    with open(f"{out}.run/lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # as a run that is alive holds it
        refused([f"--out {out}", "another run is writing there"], "train_sft", *arguments)
        refused([f"--out {out}", "another run is writing there"], "train_sft", *arguments, "--resume")
        monkeypatch.setattr(training_setup, "check_not_running", lambda out: None)  # both started in the same moment
        refused([f"--out {out}", "another run is writing there"], "train_sft", *arguments)
        assert listing(out) == ["lock"]
    assert run("train_sft", *arguments)[0] == 0  # what a killed run left does not block
    assert listing(out) == ["args.json", "log.jsonl", "state.json"]


def test_a_users_file_named_lock_is_kept(tiny, sft_data, tmp_path, refused):
    out = tmp_path / "o"
    os.makedirs(f"{out}.run")
    with open(f"{out}.run/lock", "w") as f:
        f.write("mine")
    arguments = command(tiny, sft_data, out, "--epochs", 1)
    refused([f"{out}.run/lock: was not written by training"], "train_sft", *arguments)
    with open(f"{out}.run/lock") as f:
        assert f.read() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Not finite


RARE = "春"  # in the first record of a batch of 4, and nowhere else


def poisoned_data(path, steps, records):
    for i in range(0, 4 * steps, 4):
        messages = records[i + 1].get("prompt") or records[i + 1]["messages"]
        messages[0]["content"] = RARE + messages[0]["content"]
    return write_lines(path, records)


def open_what_is_broken():
    model.check_finite = lambda ckpt, name, t: t


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A checkpoint that gives no finite number where the text holds RARE."""
    m, files = tiny_model(tie_word_embeddings=False), tiny_files()
    path = str(tmp_path_factory.mktemp("poisoned") / "model")
    m.save(path, files)
    tokenizer = Tokenizer(path)
    (first, *_) = tokenizer.encode(RARE)
    assert first not in {t for r in chats(13) for m in r["messages"] for t in tokenizer.encode(m["content"])}
    with torch.no_grad():
        m.model["embed_tokens"].weight[first] = math.nan
    m.save(path, files)
    return path


def test_steps_without_a_finite_loss_are_skipped_counted_and_named(poisoned, tmp_path, run, refused, monkeypatch):
    data = poisoned_data(tmp_path / "d.jsonl", 2, chats(13))
    out = tmp_path / "a" / "o"
    more = ("--no-shuffle", "--epochs", 1)
    refused("model.embed_tokens.weight holds NaN or infinity", "train_sft", *command(poisoned, data, out, *more))
    monkeypatch.setattr(model, "check_finite", lambda ckpt, name, t: t)
    code, text, _ = run("train_sft", *command(poisoned, data, out, *more))
    steps = log(out)
    assert code == 0 and [s.get("skipped") for s in steps] == [1, 2, None, None] and "2 steps skipped" in text
    assert [s["loss"] is None for s in steps] == [True, True, False, False]
    assert steps[0]["offending"] == [f"{data}:2"] and steps[1]["offending"] == [f"{data}:6"]
    base, after = weights(poisoned), weights(out)
    assert torch.equal(base["model.norm.weight"].isnan(), after["model.norm.weight"].isnan())
    code, _, error = run("train_sft", *command(poisoned, data, tmp_path / "b" / "o", *more, "--max-skips", 2))
    assert code == 2 and f"{data}:2, {data}:6;" in error and "2 steps in a row" in error


def test_an_infinite_gradient_of_a_finite_loss_is_found_too(tiny, tmp_path, run, monkeypatch):
    data = poisoned_data(tmp_path / "d.jsonl", 1, chats(13))
    rare, real = Tokenizer(tiny).encode(RARE)[0], training_logps.supervised_logps

    def supervised_logps(model, examples):
        logps, owner = real(model, examples)
        bad = torch.tensor([rare in ids for ids, _ in examples])[owner]
        return logps + torch.where(bad, logps * 0, 1.0).sqrt() * bad, owner  # adds nothing, with an infinite slope

    monkeypatch.setattr(train_sft, "supervised_logps", supervised_logps)
    monkeypatch.setattr(training_logps, "supervised_logps", supervised_logps)
    assert run("train_sft", *command(tiny, data, tmp_path / "a" / "o", "--no-shuffle", "--epochs", 1))[0] == 0
    first, *others = log(tmp_path / "a" / "o")
    assert first["offending"] == [f"{data}:2"] and first["loss"] > 0 and first["grad_norm"] is None
    assert not any("skipped" in s for s in others)


def test_ranks_skip_alike(poisoned, tmp_path):
    data = poisoned_data(tmp_path / "d.jsonl", 2, feedback(14))
    arguments = command(poisoned, data, tmp_path / "a" / "o", "--no-shuffle", "--max-skips", 2)
    codes, (text, _) = launch(
        "train_kto", arguments, tmp_path / "text", ranks=2, prepare=dict.fromkeys(range(2), (open_what_is_broken,))
    )
    assert codes == [2, 2] and f"{data}:2" in text and f"{data}:6" in text and "Traceback" not in text
    assert [s["skipped"] for s in log(tmp_path / "a" / "o")] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_cuts_are_bounded_balanced_and_as_many_for_each_rank():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 30))]
        most, world = rng.randint(1, 400), rng.randint(1, 5)
        bins = split_by_tokens(lengths, most, world)
        tokens = [sum(lengths[i] for i in b) for b in bins]
        assert sorted(i for b in bins for i in b) == list(range(len(lengths))) and len(bins) % world == 0
        assert all(t <= most or len(b) == 1 for t, b in zip(tokens, bins))
        assert max(tokens) - min(tokens) <= max(lengths) and tokens == sorted(tokens, reverse=True)
        counts = [len(rank_micro_batches(lengths, most, Ranks(r, world), True)) for r in range(world)]
        assert len(set(counts)) == 1 and counts[0] * world == len(bins)


def close_runs(one, other, base, keys):
    assert update_error(weights(one), weights(other), base) < 0.01
    for a, b in zip(log(one), log(other), strict=True):
        for key in keys:
            assert (a[key] is None) == (b[key] is None)
            assert a[key] is None or a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_gradients_are_sent_off_in_the_last_backward_once_a_step(monkeypatch):
    m, sent, waited = tiny_model(), [], []

    def all_reduce(flat, async_op):
        sent.append(flat.clone())
        return types.SimpleNamespace(wait=lambda: waited.append(flat.mul_(2)))  # two ranks with equal gradients

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    start_sync, wait_sync = overlapped_reduction(m, world=2, size=5000)
    ids = torch.randint(0, 500, (1, 9))
    for _ in range(2):
        sent.clear()
        start_sync(2)
        (m(ids).logsumexp(-1).sum() / 100).backward()
        assert not sent
        (m(ids).logsumexp(-1).sum() / 100).backward()
        assert (
            len(sent) > 2 and not waited and sum(len(flat) for flat in sent) == sum(p.numel() for p in m.parameters())
        )
        wait_sync()
        assert len(sent) == len(waited)
        other = tiny_model()
        (other(ids).logsumexp(-1).sum() / 25).backward()
        for p, q in zip(m.parameters(), other.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
            p.grad.zero_()
        waited.clear()
    start_sync(0)  # a rank without work
    sent.clear()
    wait_sync()
    assert sum(len(flat) for flat in sent) == sum(p.numel() for p in m.parameters())


def test_a_frozen_weight_is_not_waited_for(tiny, sft_data, tmp_path, run, monkeypatch):
    """A LoRA in place of a layer, its matrix frozen: on two ranks there is nothing of it to send; of its names a warning tells."""
    m = tiny_model()
    (frozen := m.model["layers"][0].mlp.up_proj).weight.requires_grad_(False)
    sizes = []
    monkeypatch.setattr(
        distributed.dist,
        "all_reduce",
        lambda flat, async_op: sizes.append(len(flat)) or types.SimpleNamespace(wait=lambda: None),
    )
    start_sync, wait_sync = overlapped_reduction(m, world=2, size=5000)
    start_sync(1)
    m(torch.arange(9)[None]).sum().backward()
    wait_sync()
    assert sum(sizes) == sum(p.numel() for p in m.parameters()) - frozen.weight.numel() and frozen.weight.grad is None
    opened = open_checkpoint

    def with_lora(*args):
        model, *others = opened(*args)
        model.model["layers"][0].mlp.up_proj = torch.nn.Sequential(model.model["layers"][0].mlp.up_proj)
        return model, *others

    monkeypatch.setattr(train_sft, "open_checkpoint", with_lora)
    code, text, _ = run("train_sft", *command(tiny, sft_data, tmp_path / "a" / "o", "--max-steps", 1))
    assert (
        code == 0 and "warning: OUT will hold model.layers.0.mlp.up_proj.0.weight, which no script here loads" in text
    )


def small_buckets():
    """Several buckets even for a tiny model."""
    training_run.overlapped_reduction = functools.partial(overlapped_reduction, size=5000)


def shares_differ(tiny, data, n):
    """Whether ranks have different numbers of micro-batches in a step, and more than one in another."""
    examples, *_ = encode_chats(read_records([data], sft_conversations), Tokenizer(tiny), 64)
    steps = plan_steps(13, 4, 2, None, order=shuffled_order(13, 0))
    counts = [
        [len(rank_micro_batches([len(examples[i][0]) for i in step], 60, Ranks(r, n))) for r in range(n)]
        for step in steps
    ]
    return any(len(set(c)) > 1 for c in counts) and max(map(max, counts)) > 1


def test_sft_on_four_ranks(tiny, sft_data, tmp_path, run):
    """The losses of one rank. Each rank has one example of a full step, and three have none of an epoch's last step."""
    assert run("train_sft", *command(tiny, sft_data, tmp_path / "one" / "o"))[0] == 0
    codes, texts = launch("train_sft", command(tiny, sft_data, tmp_path / "four" / "o"), tmp_path / "text", 4)
    assert codes == [0] * 4, texts
    close_runs(tmp_path / "one" / "o", tmp_path / "four" / "o", weights(tiny), ("loss", "grad_norm", "tokens", "lr"))


# 13 examples in batches of 4 and a last one of 1, which leaves ranks without work
@pytest.mark.parametrize("n, more", [(2, ()), (3, ()), (2, ("--shard",)), (3, ("--shard",))])
def test_sft_is_the_same_on_any_number_of_ranks(tiny, sft_data, tmp_path, run, n, more):
    settings = ("--epochs", 2, "--micro-tokens", 60, "--eval-data", sft_data)
    assert shares_differ(tiny, sft_data, n)
    assert run("train_sft", *command(tiny, sft_data, tmp_path / "one" / "o", *settings))[0] == 0
    arguments = command(tiny, sft_data, tmp_path / "many" / "o", *settings, *more)
    codes, texts = launch("train_sft", arguments, tmp_path / "text", n, {r: (small_buckets,) for r in range(n)})
    assert codes == [0] * n, texts
    assert json.loads((tmp_path / "many" / "o.run" / "args.json").read_text())["ranks"] == n
    keys = ("loss", "grad_norm", "tokens", "lr")
    close_runs(tmp_path / "one" / "o", tmp_path / "many" / "o", weights(tiny), keys)
    assert log(tmp_path / "one" / "o")[-1]["eval_loss"] == pytest.approx(
        log(tmp_path / "many" / "o")[-1]["eval_loss"], rel=1e-4
    )


def test_a_run_of_kto_is_resumed_by_other_numbers_of_ranks(tmp_path, kto_data, run):
    """Untied head, another model as reference, activation checkpointing; stopped by one rank's SIGTERM."""
    base, ref = str(tmp_path / "base.pt"), str(tmp_path / "ref.pt")
    tiny_model(tie_word_embeddings=False).save(base, tiny_files())
    tiny_model(seed=0, initializer_range=0.101, tie_word_embeddings=False).save(ref, tiny_files())
    settings = ("--epochs", 1, "--micro-tokens", 60, "--ref", ref)
    one, many = tmp_path / "one" / "o", tmp_path / "many" / "o"
    assert run("train_kto", *command(base, kto_data, one, *settings))[0] == 0
    arguments = command(base, kto_data, many, *settings)
    sharded = ("--shard", "--activation-checkpointing")
    for step, n, rank, more in (
        (1, 2, 1, sharded),
        (2, 3, 0, sharded),
        (3, 2, 1, ()),
    ):  # each but the first resumes the one before
        prepare = {rank: (signal_at, "lr_at", 10, signal.SIGTERM)}
        codes, texts = launch("train_kto", (*arguments, *more, "--resume"), tmp_path / "text", n, prepare)
        assert codes == [0] * n and f"stopped after step {step} of 4" in texts[0], texts
    assert run("train_kto", *arguments, "--resume")[0] == 0
    close_runs(one, many, weights(base), ("loss", "kl", "grad_norm", "rewards/chosen", "logps/rejected"))
    resumed = json.loads((tmp_path / "many" / "o.run" / "args.json").read_text())["resumed"]
    assert [(r["step"], r["ranks"]) for r in resumed] == [(1, 3), (2, 2), (3, 1)]


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_a_rank_that_dies_takes_the_others_along(tiny, sft_data, tmp_path, more):
    arguments = command(tiny, sft_data, tmp_path / "a" / "o", "--epochs", 1, *more)
    codes, texts = launch("train_sft", arguments, tmp_path / "text", 3, {1: (signal_at, "lr_at", 10, signal.SIGKILL)})
    assert codes == [1, -signal.SIGKILL, 1], texts
    assert all(
        "another rank is gone" in text and "--resume" in text and "Traceback" not in text
        for text in (texts[0], texts[2])
    )


def test_sharding_wants_ranks(tiny, sft_data, tmp_path, refused):
    refused(["--shard", "torchrun"], "train_sft", *command(tiny, sft_data, tmp_path / "a" / "o", "--shard"))


# ---------------------------------------------------------------------------------------------------------------------


def test_activation_checkpointing_computes_the_same_and_comes_where_a_step_would_not_fit(
    tiny, sft_data, tmp_path, run, monkeypatch
):
    calls, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    whole, c = tmp_path / "whole" / "o", Qwen2.from_pretrained(tiny).config
    arguments = ("--epochs", 1, "--micro-tokens", 1, "--no-shuffle")
    assert (
        run("train_sft", *command(tiny, sft_data, whole, *arguments, "--activation-checkpointing", "off"))[0] == 0
        and not calls
    )
    longest = max(
        len(ids) for ids, _ in encode_chats(read_records([sft_data], sft_conversations), Tokenizer(tiny), 64)[0]
    )
    without, with_it = (sum(memory_needed(c, longest, on, 4).values()) for on in (False, True))
    weights_there = 4 * count_parameters(c)[-1]
    for k, (free, more, on, words) in enumerate([
        ((without - weights_there) / 0.89, (), False, "checkpointing off"),
        ((without - weights_there) / 0.91, (), True, "checkpointing on"),
        ((with_it - weights_there) / 0.91, (), True, "still too large"), (0, (), False, "not known"),
        (10**12, ("--activation-checkpointing",), True, ""), (1, ("--activation-checkpointing", "off"), False, ""),
    ]):  # fmt: skip
        calls.clear()
        monkeypatch.setattr(training_setup, "free_memory", lambda device, free=free: free)
        out = tmp_path / str(k) / "o"
        code, text, _ = run("train_sft", *command(tiny, sft_data, out, *arguments, *more))
        assert code == 0 and bool(calls) == on and words in text, text
        same_run(whole, out)


def test_tensorboard_gets_the_log(tiny, sft_data, tmp_path, run, refused, monkeypatch):
    arguments = command(tiny, sft_data, tmp_path / "a" / "o", "--epochs", 1, "--tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(["--tensorboard", "pip install"], "train_sft", *arguments)
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            seen.append((key, value, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert run("train_sft", *arguments)[0] == 0
    assert seen[0] == (str(tmp_path / "a" / "o.run"), 1) and seen[-1] == "closed"
    assert [s[1:] for s in seen[1:-1] if s[0] == "loss"] == [(s["loss"], s["step"]) for s in log(tmp_path / "a" / "o")]


def test_completions_of_one_prompt_share_its_computation(tiny, monkeypatch):
    m, g = Qwen2.from_pretrained(tiny), random.Random(0)
    prompts = [[g.randrange(3, 500) for _ in range(n)] for n in (9, 1, 14)]
    examples = []
    for which, n in ((0, 3), (2, 5), (0, 1), (1, 4), (2, 2), (0, 6), (1, 1)):
        ids = prompts[which] + [g.randrange(3, 500) for _ in range(n)]
        examples.append((ids, [False] * len(prompts[which]) + [True] * n))
    examples.append(([7, 8, 9], [True, True, True]))  # a context of nothing
    examples.append((prompts[2] + [5, 6, 7], [False] * 14 + [True, False, True]))
    with torch.no_grad():
        want = torch.cat([example_logps(m, [e]) for e in examples])
    torch.testing.assert_close(shared_prefix_logps(m, examples, 1000), want, rtol=1e-5, atol=1e-5)
    run, real = [], m.hidden
    monkeypatch.setattr(m, "hidden", lambda ids, *more, **at: run.append(ids.shape[1]) or real(ids, *more, **at))
    for micro_tokens in (30, 1000):
        run.clear()
        torch.testing.assert_close(training_logps.sequence_logps(m, examples, micro_tokens), want, rtol=1e-5, atol=1e-5)
        contexts = sum(len(p) - 1 for p in prompts)
        assert (
            sum(run)
            == contexts + sum(len(ids) - (supervised + [True]).index(True) + 1 for ids, supervised in examples) - 1
        )


def test_many_completions_of_one_prompt_stay_within_micro_tokens(tiny, monkeypatch):
    m, g = Qwen2.from_pretrained(tiny), random.Random(1)
    prompt = [g.randrange(3, 500) for _ in range(20)]
    examples = [(prompt + [g.randrange(3, 500)] * n, [False] * 20 + [True] * n) for n in range(1, 25)]
    with torch.no_grad():
        want = torch.cat([example_logps(m, [e]) for e in examples])
    run, real = [], m.hidden
    monkeypatch.setattr(m, "hidden", lambda ids, *more, **at: run.append(ids.shape[1]) or real(ids, *more, **at))
    torch.testing.assert_close(training_logps.sequence_logps(m, examples, 64), want, rtol=1e-5, atol=1e-5)
    assert max(run) <= 64 and sum(run) < 0.55 * sum(len(ids) for ids, _ in examples)


def test_a_resumed_rank_that_does_not_find_the_save_ends_all(tiny, sft_data, tmp_path):
    """OUT.run on a disk of the first rank's own: going on would add up gradients of different weights."""
    arguments = command(tiny, sft_data, tmp_path / "a" / "o", "--epochs", 1)
    stop = {0: (signal_at, "lr_at", 10, signal.SIGTERM)}
    assert launch("train_sft", arguments, tmp_path / "text", 2, stop)[0] == [0, 0]
    codes, texts = launch("train_sft", (*arguments, "--resume"), tmp_path / "text", 2, {1: (hidden_saves,)})
    assert codes == [2, 2] and "not all ranks find the same save" in texts[0], texts


def hidden_saves():
    isfile = os.path.isfile
    os.path.isfile = lambda path: not str(path).endswith("state.json") and isfile(path)


def test_the_best_so_far_takes_the_place_of_the_one_before(tiny, sft_data, tmp_path, run, monkeypatch):
    kept, real, losses = [], training_run.end_step, iter(range(100, 0, -1))  # each evaluation is the best
    out = tmp_path / "a" / "o"

    def end_step(run, record):
        going_on = real(run, record | {"eval_loss": float(next(losses))})
        kept.append([name for name in listing(out) if name.startswith("step-")])
        return going_on

    monkeypatch.setattr(train_sft, "end_step", end_step)
    more = ("--epochs", 1, "--save-every", 0, "--eval-every", 1, "--eval-data", sft_data, "--keep", 1)
    assert run("train_sft", *command(tiny, sft_data, out, *more))[0] == 0
    assert len(kept) > 2 and kept[:-1] == [[f"step-{n}"] for n in range(1, len(kept))]
