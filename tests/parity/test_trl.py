"""SFT and KTO against TRL 1.16: losses, gradient norms, logged values and weights of the first steps."""

import os

import pytest
import torch
import trl
from conftest import real, write_lines
from datasets import Dataset
from training_runs import chats, feedback, flags, log, perturbed, several_turns, update_error, weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from core.checkpoint import Checkpoint
from core.conversations import kto_examples
from core.records import read_records
from core.tokenizer import Tokenizer
from model import Qwen2
from training.logps import sequence_logps


def trl_log(kind, model_dir, records, out, **settings):
    """Trains with TRL, one batch of 4 a step, in the records' order. -> its log, one dict a step."""
    tok = PreTrainedTokenizerFast.from_pretrained(model_dir)
    ref = settings.pop("ref", None)
    defaults = dict(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_length=64,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        max_grad_norm=1.0,
        weight_decay=0.0,
        disable_tqdm=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
    )
    settings = defaults | settings
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if kind == "sft":
        records = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in records]
        trainer = trl.SFTTrainer(
            model=model, args=trl.SFTConfig(**settings), train_dataset=Dataset.from_list(records), processing_class=tok
        )
    else:
        trainer = trl.KTOTrainer(
            model=model,
            ref_model=AutoModelForCausalLM.from_pretrained(ref or model_dir, dtype=torch.float32),
            args=trl.KTOConfig(**settings),
            train_dataset=Dataset.from_list(records),
            processing_class=tok,
        )
    trainer.train()
    trainer.model.save_pretrained(out)
    return [s for s in trainer.state.log_history if "loss" in s]


@pytest.fixture(scope="module")
def worse(tiny, tmp_path_factory):
    return perturbed(tiny, 0.05, str(tmp_path_factory.mktemp("ref") / "worse"))


def compare_sft(model_dir, lr, tmp_path, run):
    records = chats(16)
    data = write_lines(tmp_path / "sft.jsonl", records)
    theirs = trl_log("sft", model_dir, records, tmp_path / "trl", max_steps=4, learning_rate=lr)
    more = ("--max-steps", 4, "--schedule", "constant", "--no-shuffle", "--lr", lr)
    assert run("train_sft", *flags(model_dir, data, tmp_path / "ours", *more))[0] == 0
    ours = log(tmp_path / "ours")
    assert len(theirs) == len(ours) == 4
    for a, b in zip(theirs, ours):
        for key in ("loss", "grad_norm"):
            assert float(a[key]) == pytest.approx(b[key], rel=2e-5)
    base = weights(model_dir)
    assert update_error(weights(tmp_path / "trl"), weights(tmp_path / "ours"), base) < 1e-3


@pytest.mark.usefixtures("kernels")
def test_four_steps_of_sft(tiny, tmp_path, run):
    compare_sft(tiny, 1e-3, tmp_path, run)


def test_sft_on_prompts_of_several_turns(tiny, tmp_path, run):
    """The completion alone is learnt, so messages with --last-turn-only or with a weight of 0 make the same run."""
    records = several_turns(8)
    theirs = trl_log("sft", tiny, records, tmp_path / "trl", max_steps=2)
    unlearnt = [[m | {"weight": int(i == 3)} if i % 2 else m for i, m in enumerate(r["messages"])] for r in records]
    for name, rows, more in [
        ("pairs", [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in records], ()),
        ("last", records, ("--last-turn-only",)),
        ("weights", [{"messages": messages} for messages in unlearnt], ()),
    ]:
        data, more = write_lines(tmp_path / f"{name}.jsonl", rows), (*more, "--schedule", "constant", "--no-shuffle")
        assert run("train_sft", *flags(tiny, data, tmp_path / name, *more, "--max-steps", 2))[0] == 0
        for a, b in zip(theirs, log(tmp_path / name), strict=True):
            assert float(a["loss"]) == pytest.approx(b["loss"], rel=2e-5)


# a schedule with warmup, weight decay, clipping, and a short last batch in each of two epochs
SETTINGS = dict(warmup_steps=2, lr_scheduler_type="cosine", weight_decay=0.3, max_grad_norm=0.5, num_train_epochs=2)
FLAGS = ("--schedule", "cosine", "--warmup", 2, "--weight-decay", 0.3, "--clip", 0.5, "--epochs", 2, "--no-shuffle")


def test_sft_with_other_settings_and_examples_that_are_cut(tiny, tmp_path, run):
    records = chats(14, seed=5)
    data = write_lines(tmp_path / "sft.jsonl", records)
    theirs = trl_log("sft", tiny, records, tmp_path / "trl", max_length=40, **SETTINGS)
    code, text, _ = run("train_sft", *flags(tiny, data, tmp_path / "ours", *FLAGS, "--max-len", 40))
    assert code == 0 and "examples cut to 40 tokens" in text
    for a, b in zip(theirs, log(tmp_path / "ours"), strict=True):
        for key, same in (("loss", "loss"), ("grad_norm", "grad_norm"), ("learning_rate", "lr")):
            assert float(a[key]) == pytest.approx(b[same], rel=2e-5)
    assert update_error(weights(tmp_path / "trl"), weights(tmp_path / "ours"), weights(tiny)) < 1e-3


@real
def test_sft_of_a_real_checkpoint(tmp_path, run):
    compare_sft(os.environ["REAL_CKPT"], 1e-5, tmp_path, run)


def compare_kto(model_dir, ref, lr, tmp_path, run, records=None):
    records = records or feedback(16, seed=3)
    data = write_lines(tmp_path / "kto.jsonl", records)
    theirs = trl_log("kto", model_dir, records, tmp_path / "trl", max_steps=4, ref=ref, beta=0.1, learning_rate=lr)
    more = ("--ref", ref, "--max-steps", 4, "--schedule", "constant", "--no-shuffle", "--lr", lr)
    assert run("train_kto", *flags(model_dir, data, tmp_path / "ours", *more))[0] == 0
    ours = log(tmp_path / "ours")
    assert len(theirs) == len(ours) == 4
    assert max(s["kl"] for s in ours) > 0.01  # the estimate is at work
    for a, b in zip(theirs, ours):
        for key in (
            "loss",
            "kl",
            "grad_norm",
            *(f"{x}/{y}" for x in ("rewards", "logps") for y in ("chosen", "rejected")),
            "rewards/margins",
        ):
            if key not in a:  # a batch of one label
                assert b[key] is None, key
            else:
                assert float(a[key]) == pytest.approx(b[key], rel=1e-4, abs=2e-5), key
    base = weights(model_dir)
    assert update_error(weights(tmp_path / "trl"), weights(tmp_path / "ours"), base) < 1e-3


@pytest.mark.usefixtures("kernels")
def test_four_steps_of_kto(tiny, worse, tmp_path, run):
    compare_kto(tiny, worse, 1e-3, tmp_path, run)


def test_kto_with_other_settings_and_examples_that_are_cut_or_dropped(tiny, worse, tmp_path, run):
    records, weighted = feedback(14, seed=3), dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    data = write_lines(tmp_path / "kto.jsonl", records)
    theirs = trl_log("kto", tiny, records, tmp_path / "trl", max_length=36, ref=worse, **weighted, **SETTINGS)
    ours = ("--ref", worse, "--beta", 0.3, "--desirable-weight", 1.5, "--undesirable-weight", 0.7, "--max-len", 36)
    code, text, _ = run("train_kto", *flags(tiny, data, tmp_path / "ours", *FLAGS, *ours))
    assert code == 0 and "examples cut to 36 tokens" in text and "4 dropped (the prompt fills 36 tokens)" in text
    for a, b in zip(theirs, log(tmp_path / "ours"), strict=True):
        for key in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected"):
            assert float(a[key]) == pytest.approx(b[key], rel=1e-4, abs=2e-5), key
    assert update_error(weights(tmp_path / "trl"), weights(tmp_path / "ours"), weights(tiny)) < 1e-3


@pytest.mark.parametrize("shape", ["prompt, chosen, rejected", "whole conversations"])
def test_kto_on_preferences(shape, tiny, worse, tmp_path, run):
    labelled = feedback(16, seed=3)
    pairs = [
        {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
        for good, bad in zip(labelled[::2], labelled[1::2])
    ]
    if shape == "whole conversations":
        start = [{"role": "system", "content": "Be brief."}]
        pairs = [{key: start + r["prompt"] + r[key] for key in ("chosen", "rejected")} for r in pairs]
    compare_kto(tiny, worse, 1e-3, tmp_path, run, pairs)


def mismatched_logp(path):
    """The sum of the log-probabilities of feedback's completions, each after the prompt of another one."""
    model, tokenizer, records = Qwen2.from_pretrained(path), Tokenizer(Checkpoint(path)), feedback(16, seed=3)
    pairs = zip(records, records[2:] + records[:2])
    examples = [tokenizer.chat_ids(a["prompt"] + b["completion"]) for a, b in pairs]
    return sequence_logps(model, examples, 1000).sum().item()


@real
def test_kto_of_a_real_checkpoint(tmp_path, run):
    """The likelier model is the policy: otherwise the estimate of the KL would be negative, and clamped to 0."""
    paths = os.environ["REAL_CKPT"], perturbed(os.environ["REAL_CKPT"], 0.03, str(tmp_path / "other"))
    ref, policy = sorted(paths, key=mismatched_logp)
    compare_kto(policy, ref, 1e-5, tmp_path, run)


def test_pairs_come_in_the_order_of_trl(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(1003)]
    expected = trl.unpair_preference_dataset(Dataset.from_list(rows))
    found = [example for _, example in read_records([write_lines(tmp_path / "d.jsonl", rows)], kto_examples)]
    assert [(prompt[0]["content"], *rest) for prompt, *rest in found] == [
        (r["prompt"], r["completion"], r["label"]) for r in expected
    ]
