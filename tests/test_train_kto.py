import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from training_runs import chats, feedback, flags, launch, log, perturbed, torchrun, update_error, weights

import train_kto
from core.tokenizer import Tokenizer
from train_kto import kl_estimate, kl_pairs, kto_loss
from training import flags as training_flags
from training import reference
from training.feedback import balanced_weight, weight_advice
from training.flags import default_out
from training.pairing import count_prompt_clashes, order_without_prompt_clashes
from training.setup import plan_steps


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "kto.jsonl", feedback(14))


@pytest.fixture(scope="module")
def worse(tiny, tmp_path_factory):
    return perturbed(tiny, 0.05, str(tmp_path_factory.mktemp("ref") / "worse"))


def test_loss_by_hand():
    policy, ref = torch.tensor([-10.0, -10.0]), torch.tensor([-12.0, -12.0])
    losses, rewards = kto_loss(policy, ref, torch.tensor(1.0), torch.tensor([True, False]), 0.5, 2.0, 3.0)
    # r = 2, z0 = 1: 2 (1 - sigmoid(0.5)) and 3 (1 - sigmoid(-0.5)); reward 0.5 * 2
    assert losses.tolist() == pytest.approx([2 * 0.3775406688, 3 * 0.6224593312])
    assert rewards.tolist() == [1.0, 1.0]
    kl = torch.tensor(1.0, requires_grad=True)
    losses, _ = kto_loss(policy.requires_grad_(), ref, kl, torch.tensor([True, False]), 0.5, 2.0, 3.0)
    losses.sum().backward()
    assert kl.grad is None and policy.grad is not None


def test_loss_in_fp64_to_the_last_digits():
    g = torch.Generator().manual_seed(0)
    policy, ref = (20 * torch.randn(50, generator=g, dtype=torch.float64) for _ in range(2))
    desirable = torch.rand(50, generator=g) < 0.5
    losses, rewards = kto_loss(policy, ref, torch.tensor(0.7, dtype=torch.float64), desirable, 0.1, 4 / 3, 0.9)
    for p, r, d, loss, reward in zip(
        policy.tolist(), ref.tolist(), desirable.tolist(), losses.tolist(), rewards.tolist()
    ):
        gain = (p - r - 0.7) if d else (0.7 - (p - r))
        assert loss == pytest.approx((4 / 3 if d else 0.9) * (1 - 1 / (1 + math.exp(-0.1 * gain))), rel=1e-12)
        assert reward == pytest.approx(0.1 * (p - r), rel=1e-12)


def test_loss_gradients_and_what_has_none():
    policy = torch.tensor([-3.0, -4.0], requires_grad=True)
    kl = torch.tensor(0.5)
    losses, rewards = kto_loss(policy, torch.tensor([-5.0, -2.0]), kl, torch.tensor([True, False]), 0.1, 1.0, 1.0)
    losses.sum().backward()
    s = torch.sigmoid(torch.tensor([0.1 * 1.5, 0.1 * 2.5]))
    assert policy.grad.tolist() == pytest.approx((torch.tensor([-0.1, 0.1]) * s * (1 - s)).tolist())
    assert not rewards.requires_grad


def test_kl_is_clamped_after_the_mean():
    zero = torch.zeros(2)
    assert kl_estimate(torch.tensor([3.0, -1.0]), zero).item() == 1.0
    assert kl_estimate(torch.tensor([1.0, -3.0]), zero).item() == 0.0
    assert kl_estimate(zero[:0], zero[:0]).item() == 0.0  # of a loss that knows no z0 and asks for no pairs


def test_pairs_and_weights():
    assert kl_pairs([7, 3, 5]) == [(7, 5), (3, 7), (5, 3)]
    assert balanced_weight(10, 30, 1.0) == 3.0 and balanced_weight(30, 10, 0.9) == pytest.approx(0.3)
    assert weight_advice(10, 30, 3.0, 1.0) == weight_advice(10, 30, 4.0, 1.0) == []
    assert "3 to 4" in weight_advice(10, 30, 1.0, 1.0)[0] and "0.25 to 0.333" in weight_advice(10, 30, 1.0, 1.0)[0]
    assert "all 5 labels are true" in weight_advice(5, 0, 1.0, 1.0)[0]


def clashes(steps, prompts):
    return count_prompt_clashes((pair for step in steps for pair in kl_pairs(step)), prompts)


def clash_free_order_exists(prompts, sizes):
    n = len(prompts)
    for order in itertools.permutations(range(n)):
        steps = plan_steps(n, sizes[0], 1, None, smallest=2, order=lambda *_: list(order))
        if not clashes(steps, prompts):
            return True
    return False


def test_an_order_without_clashes_is_found_whenever_one_exists():
    rng = random.Random(0)
    seen = set()
    for _ in range(150):
        n, batch_size = rng.randint(2, 7), rng.randint(2, 4)
        prompts = [rng.choice("abcd"[: rng.randint(1, 4)]) for _ in range(n)]
        found = {}

        def order(epoch, sizes):
            found["sizes"] = sizes
            return order_without_prompt_clashes(prompts, sizes, rng)

        steps = plan_steps(n, batch_size, 1, None, smallest=2, order=order)
        assert sorted(sum(steps, [])) == list(range(n))
        exists = clash_free_order_exists(prompts, found["sizes"])
        assert (clashes(steps, prompts) == 0) == exists, (prompts, found["sizes"])
        seen.add(exists)
    assert seen == {True, False}


def test_large_data_of_pairs_and_of_few_prompts_separates():
    rng = random.Random(1)
    for prompts in (
        [i // 2 for i in range(1000)],
        [i % 2 for i in range(64)],
        [i % 3 for i in range(63)],
        [0] * 16 + list(range(1, 17)),
    ):
        order = []
        plan_steps(
            len(prompts),
            8,
            1,
            None,
            smallest=2,
            order=lambda e, sizes: order.append(order_without_prompt_clashes(prompts, sizes, rng)) or order[0],
        )
        steps = [order[0][i : i + 8] for i in range(0, len(prompts), 8)]
        assert sorted(order[0]) == list(range(len(prompts))) and order[0] != sorted(order[0])
        assert clashes(steps, prompts) == 0


def test_an_order_knows_batches_of_any_sizes():
    rng = random.Random(2)
    for _ in range(50):
        sizes = [rng.randint(2, 9) for _ in range(rng.randint(1, 30))]
        prompts = [i // 2 for i in range(sum(sizes))] if len(sizes) > 1 else list(range(sizes[0]))
        order = order_without_prompt_clashes(prompts, sizes, rng)
        steps = [order[sum(sizes[:b]) : sum(sizes[: b + 1])] for b in range(len(sizes))]
        assert sorted(order) == list(range(len(prompts))) and [len(step) for step in steps] == sizes
        assert clashes(steps, prompts) == 0


def test_any_cut_and_any_number_of_ranks_give_the_same_step(tiny, worse, data, tmp_path, run):
    base, ref = weights(tiny), ("--ref", worse)
    assert run("train_kto", *flags(tiny, data, tmp_path / "one", *ref))[0] == 0
    assert run("train_kto", *flags(tiny, data, tmp_path / "cut", *ref, "--micro-tokens", 1))[0] == 0
    for n in (2, 4):
        arguments = flags(tiny, data, tmp_path / f"{n} ranks", *ref, "--ref-cache", tmp_path / f"{n} other")
        codes, texts = launch("train_kto", arguments, tmp_path / "text", ranks=n)
        assert codes == [0] * n, texts
    for other in ("cut", "2 ranks", "4 ranks"):
        assert update_error(weights(tmp_path / "one"), weights(tmp_path / other), base) < 0.01
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / other), strict=True):
            for key in ("loss", "kl", "grad_norm", "rewards/chosen", "logps/rejected"):
                assert (a[key] is None) == (b[key] is None)
                assert a[key] is None or a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_the_reference_is_computed_once_and_never_for_another(tiny, worse, data, tmp_path, run, monkeypatch):
    def run_and_count(out, *more):
        code, text, _ = run("train_kto", *flags(tiny, data, tmp_path / out, *more))
        assert code == 0
        line = next(line for line in text.splitlines() if "reference log-probabilities" in line)
        return [int(word) for word in line.replace(";", "").split() if word.isdigit()][-2:]

    first, total = run_and_count("a")
    assert 28 < first <= total  # 14 matched and the mismatched ones of two epochs; equal sequences are one
    assert run_and_count("b", "--lr", 1e-5)[0] == 0
    more, all_ = run_and_count("c", "--epochs", 3)
    assert 0 < more <= all_ - total  # the third epoch's mismatched pairs
    assert run_and_count("d", "--ref", worse)[0] == first
    assert run_and_count("e", "--dtype", "bf16")[0] == first
    assert run_and_count("f", "--ref", worse)[0] == 0
    monkeypatch.setattr(reference, "code_hash", lambda *_: "an edited forward pass")
    assert run_and_count("g")[0] == first
    shorter, all_short = run_and_count("g", "--max-len", 40)
    assert 0 < shorter < all_short  # other ids where something was cut, the same elsewhere


def test_a_stopped_reference_pass_says_what_is_kept(tiny, data, tmp_path, run, monkeypatch):
    calls, logps = [], reference.sequence_logps

    def stop_at_the_fourth(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logps(*args)

    monkeypatch.setattr(reference, "sequence_logps", stop_at_the_fourth)
    code, _, err = run("train_kto", *flags(tiny, data, tmp_path / "o", "--micro-tokens", 1))  # a chunk per sequence
    assert code == 130 and not (tmp_path / "o").exists()
    cache = tmp_path / "ref-cache.safetensors"
    assert f"reference log-probabilities are kept in {cache}; the same command continues" in err
    assert re.search(r"^stopped: 3 of \d+ reference", err, re.M) and len(reference.read_ref_cache(str(cache))) == 3


def no_pairs():
    train_kto.kl_pairs = lambda step: []


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_a_loss_without_z0_needs_no_pairs(tiny, data, tmp_path, more):
    """Half of the reference pass is left, and z0 is 0."""
    reached = ("--max-steps", 2, "--lr", 1e-3, "--eval-data", data, *more)
    ranks = 2 if more else 1
    codes, (text, *_) = launch(
        "train_kto",
        flags(tiny, data, tmp_path / "o", *reached),
        tmp_path / "t",
        ranks,
        dict.fromkeys(range(ranks), (no_pairs,)),
    )
    assert codes == [0] * ranks, text
    first, last = log(tmp_path / "o")
    assert first["kl"] == last["kl"] == 0 and first["loss"] == pytest.approx(0.5) and last["eval_loss"] > 0
    assert "of 8 reference log-probabilities computed" in text  # two steps of four examples


def test_cached_values_are_the_references(tiny, worse, data, tmp_path, run):
    assert run("train_kto", *flags(tiny, data, tmp_path / "a", "--ref", worse))[0] == 0
    assert run("train_kto", *flags(tiny, data, tmp_path / "b", "--ref", worse))[0] == 0  # all from the cache
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_rewards_move_apart(tiny, data, tmp_path, run):
    held_out = write_lines(tmp_path / "held.jsonl", feedback(4, seed=5))
    more = ("--epochs", 8, "--lr", 3e-3, "--eval-data", held_out, "--desirable-weight", "auto")
    code, out, _ = run("train_kto", *flags(tiny, data, tmp_path / "o.pt", *more))
    assert code == 0 and "14 examples, 7 of them desirable" in out
    steps = log(tmp_path / "o.pt")
    assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4) and steps[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert steps[-1]["rewards/margins"] > 0.5 > steps[0]["rewards/margins"]
    assert {"eval_loss", "eval_kl", "eval_rewards/margins"} <= set(steps[-1])
    wanted = "step loss lr grad_norm tokens tokens_per_second kl rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected"
    assert list(steps[0]) == wanted.split()


def test_in_bf16_rewards_and_kl_start_at_zero(tiny, data, tmp_path, run):
    """The policy is the reference before the first step, although only its matched pairs have gradients."""
    more = ("--dtype", "bf16", "--max-steps", 1, "--batch-size", 14, "--eval-data", data)
    assert run("train_kto", *flags(tiny, data, tmp_path / "o", *more, "--lr", 0))[0] == 0
    (step,) = log(tmp_path / "o")
    for key in ("kl", "rewards/chosen", "rewards/rejected", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected"):
        assert abs(step[key]) < 1e-4, key


def test_all_labels_alike_train_with_a_warning(tiny, tmp_path, run):
    data = write_lines(tmp_path / "d.jsonl", [r | {"label": True} for r in feedback(6)])
    code, out, _ = run("train_kto", *flags(tiny, data, tmp_path / "o", "--desirable-weight", "auto"))
    assert code == 0 and "warning: all 6 labels are true" in out
    assert log(tmp_path / "o")[0]["rewards/rejected"] is None and log(tmp_path / "o")[0]["rewards/margins"] is None


def test_prompts_that_fill_max_len_are_dropped_and_counted(tiny, tmp_path, run, refused):
    long = {"prompt": "The quick brown fox " * 30, "completion": "x", "label": True}
    data = write_lines(tmp_path / "d.jsonl", [*feedback(5), long])
    code, out, _ = run("train_kto", *flags(tiny, data, tmp_path / "o"))
    assert code == 0 and "5 examples, 3 of them desirable, 1 dropped" in out
    refused("--max-len 64", "train_kto", *flags(tiny, write_lines(tmp_path / "l.jsonl", [long] * 3), tmp_path / "p"))


def test_warnings_of_shared_prompts_and_weights(tiny, data, tmp_path, run):
    out = run("train_kto", *flags(tiny, data, tmp_path / "o", "--no-shuffle"))[1]
    assert "KL pairs share their prompt" in out and "recommended" not in out
    skewed = write_lines(tmp_path / "s.jsonl", feedback(8)[:7] + [feedback(9)[8]])
    assert "recommended --desirable-weight 0.6" in run("train_kto", *flags(tiny, skewed, tmp_path / "p"))[1]


def test_bad_input(tiny, data, tmp_path, refused):
    refused("a KL pair takes two", "train_kto", *flags(tiny, data, tmp_path / "o", "--batch-size", 1))
    one = write_lines(tmp_path / "one.jsonl", feedback(1))
    refused("a KL pair takes two", "train_kto", *flags(tiny, one, tmp_path / "o"))
    text_label = write_lines(tmp_path / "t.jsonl", [*feedback(3), feedback(1)[0] | {"label": "yes"}])
    refused(["t.jsonl:4:", 'label is "yes"'], "train_kto", *flags(tiny, text_label, tmp_path / "o"))
    refused("is a folder; give a file", "train_kto", *flags(tiny, data, tmp_path / "o", "--ref-cache", tmp_path))
    refused(
        "would overwrite the checkpoint of --ref",
        "train_kto",
        *flags(tiny, data, tmp_path / "two", "--ref", tmp_path / "two"),
    )
    for own in ("o", "o/cache", "o.run/log.jsonl"):
        cache = ("--ref-cache", tmp_path / own)
        refused("or inside it, where the run writes", "train_kto", *flags(tiny, data, tmp_path / "o", *cache))
    under_a_file = tmp_path / "one.jsonl" / "cache"
    refused(
        [f"{under_a_file}: nothing can be written", "--ref-cache"],
        "train_kto",
        *flags(tiny, data, tmp_path / "o", "--ref-cache", under_a_file),
    )
    (tmp_path / "broken").write_text("not a cache")
    refused(
        ["broken", "give another --ref-cache, or remove it"],
        "train_kto",
        *flags(tiny, data, tmp_path / "o", "--ref-cache", tmp_path / "broken"),
    )
    refused("no such checkpoint", "train_kto", *flags(tiny, data, tmp_path / "o", "--ref", "/no/where"))
    files = tiny_files()
    files["tokenizer.json"] = files["tokenizer.json"].replace("<|endoftext|>", "<|end|>")
    tiny_model().save(str(tmp_path / "other"), files)
    refused(
        "its tokenizer differs from that of",
        "train_kto",
        *flags(tiny, data, tmp_path / "o", "--ref", tmp_path / "other"),
    )
    assert not os.path.exists(tmp_path / "o") and not os.path.exists(tmp_path / "o.run")


def test_a_weight_of_zero_leaves_a_label_out(tiny, data, tmp_path, run):
    """The mean stays over all of the step, so the losses of either label alone add up to that of both."""
    losses = {}
    for name, more in {
        "both": (),
        "desirable": ("--undesirable-weight", 0),
        "undesirable": ("--desirable-weight", 0),
    }.items():
        code, out, _ = run("train_kto", *flags(tiny, data, tmp_path / name, "--max-steps", 1, *more))
        assert code == 0 and "recommended" not in out
        losses[name] = log(tmp_path / name)[0]["loss"]
    assert losses["desirable"] + losses["undesirable"] == pytest.approx(losses["both"], rel=1e-6)
    assert 0 < losses["desirable"] < losses["both"]


def test_held_out_pairs_of_one_prompt_are_not_each_others_mismatch(tiny, tmp_path, run):
    data = write_lines(tmp_path / "d.jsonl", feedback(12))
    held_out = write_lines(tmp_path / "e.jsonl", feedback(12, seed=1))  # two of each prompt, side by side
    words = "KL pairs share"
    assert words not in run("train_kto", *flags(tiny, data, tmp_path / "o", "--eval-data", held_out))[1]
    assert (
        f"e.jsonl: 6 {words}"
        in run("train_kto", *flags(tiny, data, tmp_path / "p", "--eval-data", held_out, "--no-shuffle"))[1]
    )


def test_completions_that_are_cut_are_counted(tiny, tmp_path, run):
    long = {"prompt": "a", "completion": "b c " * 40, "label": True}
    data = write_lines(tmp_path / "d.jsonl", [*feedback(4), long, long | {"label": False}])
    _, text, _ = run("train_kto", *flags(tiny, data, tmp_path / "o"))
    tok = Tokenizer(tiny)
    n = len(tok.prompt_ids([{"role": "user", "content": "a"}])) + len(tok.completion_ids("b c " * 40)) - 64
    assert (
        f"2 of 6 examples cut to 64 tokens (--max-len): {2 * n} tokens lost; 2 examples lost their last <|im_end|>"
        in text
    )
    few = write_lines(tmp_path / "few.jsonl", feedback(4))
    _, text, _ = run("train_kto", *flags(tiny, few, tmp_path / "p", "--eval-data", data))
    assert f"2 of 6 held-out examples cut to 64 tokens (--max-len): {2 * n} tokens lost" in text


def test_the_missions_line(tiny, tmp_path, monkeypatch, run, refused):
    """python train_sft.py, then torchrun train_kto.py --ckpt sft.pt: each finds what the one before wrote."""
    monkeypatch.chdir(tmp_path)
    refused(["data/sft.jsonl: no such file", "python make_data.py"], "train_sft")
    (tmp_path / "data").mkdir()
    write_lines("data/sft.jsonl", chats(8))
    refused(["data/kto.jsonl: no such file", "python make_data.py"], "train_kto")
    write_lines("data/kto.jsonl", feedback(8))
    refused(["sft.pt: no such file", "python train_sft.py"], "train_kto")
    refused(["sft.pt: no such file", "python train_sft.py"], "train_kto", "--ckpt", "sft.pt")
    patched = functools.partial(defaults, training_flags.add_training_flags, tiny)
    monkeypatch.setattr(training_flags, "add_training_flags", patched)
    code, text, _ = run("train_sft")
    assert code == 0 and "wrote sft.pt" in text and "next: python train_kto.py --ckpt sft.pt\n" in text
    text = torchrun(2, "train_kto.py", "--ckpt", "sft.pt")
    assert "wrote sft-kto.pt" in text
    assert "next: python eval.py --ckpt sft.pt sft-kto.pt --tasks gsm8k\n" in text
    args = json.loads((tmp_path / "sft-kto.pt.run" / "args.json").read_text())
    assert args["beta"] == 0.1 and args["batch_size"] == 64 and args["data"] == ["data/kto.jsonl"]
    assert update_error(weights("sft-kto.pt"), weights("sft.pt"), weights(tiny)) >= 0


def defaults(real, ckpt, parser, hub_id, *more, **others):
    assert hub_id == "Qwen/Qwen2-0.5B-Instruct"
    real(parser, ckpt, *more, **others)


def test_out_is_named_after_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft.v2").mkdir(parents=True)
    for ckpt, out in (
        ("sft.pt", "sft-kto.pt"), ("runs/a.b.pt", "runs/a.b-kto.pt"), ("runs/sft.v2", "runs/sft.v2-kto"), ("runs/", "runs-kto"),
        ("Qwen/Qwen2-0.5B-Instruct", "Qwen2-0.5B-Instruct-kto"), (".", f"{tmp_path}-kto"), ("runs/..", f"{tmp_path}-kto"),
    ):  # fmt: skip
        assert default_out(ckpt) == out


def test_the_next_line_can_be_pasted(tiny, data, tmp_path, run):
    out, ckpt = str(tmp_path / "my out"), str(tmp_path / "the $base")
    shutil.copytree(tiny, ckpt)
    for script, others in ("train_kto", 0), ("train_sft", 1):
        records = write_lines(tmp_path / "s.jsonl", chats(4)) if others else data
        text = run(script, *flags(ckpt, records, f"{out} {script}", "--max-steps", 1))[1]
        found = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("next: ")]
        assert found[-1] == ["python", "eval.py", "--ckpt", ckpt, f"{out} {script}", "--tasks", "gsm8k"]
        assert found[:-1] == [["python", "train_kto.py", "--ckpt", f"{out} {script}"]] * others
