"""Checks that every variant with a training run must pass."""

import pytest
from conftest import tiny_files, tiny_model, write_lines
from training_runs import chats, feedback, launch, log, same_run, update_error, weights

import train_kto
import train_sft
from core.distributed import STOP
from training import preferences

COMMON = ("--batch-size", 4, "--lr", 1e-3, "--max-len", 64, "--warmup", 0, "--max-steps", 4)


def arguments(ckpt, data, out, *more):
    return [str(word) for word in ("--ckpt", ckpt, "--data", data, "--out", out, *COMMON, *more)]


def check_runs(run, monkeypatch, name, ckpt, data, tmp_path, *more, before=()):
    """Trains; trains in other micro-batches; stops after two steps and resumes; diverges. -> OUT of the first.

    before: words of the command before the flags.
    """
    whole, cut, stopped = (tmp_path / "runs" / part / "o" for part in ("whole", "cut", "stopped"))
    for out, micro_tokens in (whole, 2000), (cut, 1):
        code, _, err = run(name, *before, *arguments(ckpt, data, out, "--micro-tokens", micro_tokens, *more))
        assert code == 0, err
    assert [s["loss"] for s in log(whole)] == pytest.approx([s["loss"] for s in log(cut)], rel=1e-4)
    assert update_error(weights(whole), weights(cut), weights(ckpt)) < 0.01
    again = [*before, *arguments(ckpt, data, stopped, "--micro-tokens", 2000, *more)]
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        code, _, err = run(name, *again)
    assert code == 0 and "stopped after step 2" in err, err
    code, _, err = run(name, *again, "--resume")
    assert code == 0, err
    same_run(whole, stopped)
    check_divergence(run, name, *again)
    return whole


def check_divergence(run, name, *args):
    """A run with far too large a learning rate skips its steps, then ends in one line as train_sft.py does."""
    code, _, err = run(name, *args, "--lr", 1e30, "--clip", 0, "--max-skips", 2)
    assert code == 2 and "error: 2 steps in a row" in err and "Traceback" not in err, err


def check_resume_refuses(run, monkeypatch, refused, name, flag, word, tiny, tmp_path):
    """A run is stopped after two steps. With another model at the path of `flag` it is not resumed: it differs in `word`."""
    data, other = write_lines(tmp_path / "d.jsonl", chats(13)), str(tmp_path / "other")
    args = arguments(tiny, data, tmp_path / "o", flag, other)
    tiny_model(seed=1).save(other, tiny_files())
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        code, _, err = run(name, *args)
    assert code == 0 and "stopped after step 2" in err, err
    tiny_model(seed=2).save(other, tiny_files())
    refused(["state.json", f"differs in {word};"], name, *args, "--resume")


def stop_in_step(monkeypatch, last):
    """As if SIGTERM came in step `last`, from 0."""
    for script in (train_sft, train_kto, preferences):

        def seed_step(run, step, plain=script.seed_step):
            plain(run, step)
            STOP["asked"] = STOP["asked"] or step == last

        monkeypatch.setattr(script, "seed_step", seed_step)


def check_shard(name, ckpt, data, tmp_path, whole, *more):
    """Two ranks with --shard give the run `whole`."""
    out = tmp_path / "runs" / "shard" / "o"
    codes, texts = launch(name, arguments(ckpt, data, out, "--shard", *more), tmp_path / "text", 2)
    assert codes == [0, 0], texts
    assert [s["loss"] for s in log(out)] == pytest.approx([s["loss"] for s in log(whole)], rel=1e-3)
    assert update_error(weights(out), weights(whole), weights(ckpt)) < 0.02


def pairs(n):
    """n preference pairs."""
    rows = feedback(2 * n)
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in zip(rows[::2], rows[1::2])
    ]
