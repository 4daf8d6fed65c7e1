"""The model, generation, the schedule and the demo's base against transformers."""

import os
import re

import merge_families
import pytest
import torch
import transformers
from conftest import PROMPTS, ROOT, real, relative, tiny_files, tiny_model, user, write_lines

from core.records import read_jsonl
from core.sampling import penalise
from core.tokenizer import Tokenizer
from generate import generate
from model import Qwen2
from training.step import lr_at


def oracle(model, tmp_path):
    """transformers' model from the directory that ours writes."""
    model.save(str(tmp_path / "ckpt"), tiny_files())
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ckpt", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return hf


CONFIGS = {
    "gqa 4/2": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "gqa 6/2, untied, theta 1e6": {
        "num_attention_heads": 6,
        "hidden_size": 48,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
    },
    "own head_dim": {"head_dim": 16},
    "odd sizes": {"vocab_size": 509, "intermediate_size": 67, "num_hidden_layers": 3, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures("kernels")
def test_logits_and_gradients_equal_transformers(changes, tmp_path):
    model = tiny_model(**changes)
    hf = oracle(model, tmp_path)
    ids = torch.randint(0, model.config.vocab_size, (3, 37), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(ids), hf(ids).logits
    assert ours.shape == (3, 37, model.config.vocab_size)
    assert relative(ours, theirs) < 1e-5
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    expected = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        assert relative(p.grad, expected[name].grad) < 1e-4, name


def test_a_llama_is_stored_as_qwen2(tmp_path, monkeypatch):
    """The Python block of docs/data-formats.md."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "rope_theta": 1e5, "tie_word_embeddings": True}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    llama.save_pretrained("SmolLM2-135M-Instruct")
    page = (ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    exec(block, {})
    ids = torch.arange(80).view(2, 40)
    assert relative(Qwen2.from_pretrained("smollm2-135m")(ids), llama(ids).logits) < 1e-5


@real
def test_logits_of_a_real_checkpoint_equal_transformers():
    path = os.environ["REAL_CKPT"]
    model = Qwen2.from_pretrained(path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, 40000, (2, 123), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(model(ids), hf(ids).logits) < 1e-5


def by_transformers(path, tokenizer, prompts, n, penalty=1.0):
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    replies = []
    for p in prompts:
        ids = torch.tensor([tokenizer.prompt_ids(p)])
        settings = transformers.GenerationConfig(
            max_new_tokens=n,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=sorted(tokenizer.stop_ids),
            pad_token_id=0,
        )
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, ids.shape[1] :]
        replies.append(tokenizer.decode(out.tolist()))
    return replies


@pytest.mark.usefixtures("kernels")
def test_greedy_equals_transformers(lively, loaded):
    model, tok = loaded
    replies = generate(model, tok, PROMPTS, max_new_tokens=20)
    assert replies == by_transformers(lively, tok, PROMPTS, 20)
    assert len(set(replies)) > 6  # the random model does not say one thing only


@pytest.mark.usefixtures("kernels")
def test_repetition_penalty_in_a_reply_equals_transformers(lively, loaded):
    model, tok = loaded
    plain, penalised = (generate(model, tok, PROMPTS, max_new_tokens=12, repetition_penalty=p) for p in (1.0, 1.1))
    assert plain == generate(model, tok, PROMPTS, max_new_tokens=12) != penalised
    assert penalised == by_transformers(lively, tok, PROMPTS, 12, penalty=1.1)


QUESTIONS = """What is the capital of France? 写一首关于春天的短诗。 Name three animals. 2+2? 用一句话解释什么是重力。 How do I boil an egg?
Translate "good morning" into French. 水的化学式是什么？ List two prime numbers. 中国的首都在哪里？ Why is the sky blue? 请把"谢谢"译成英语。 What comes after Monday?
推荐一本小说。 Write a haiku about the sea. 一年有几个月？"""


@real
def test_greedy_of_a_real_checkpoint_equals_transformers():
    """Token by token at batch 1 and 64, English and Chinese, of different lengths."""
    path = os.environ["REAL_CKPT"]
    model, tok = Qwen2.from_pretrained(path), Tokenizer(path)
    prompts = [user(text) for text in re.split("(?<=[.?。？]) |\n", QUESTIONS)]
    assert len(prompts) == 16
    want = by_transformers(path, tok, prompts, 16)
    assert generate(model, tok, prompts * 4, max_new_tokens=16, batch_size=64) == want * 4
    assert generate(model, tok, prompts, max_new_tokens=16, batch_size=1) == want
    assert generate(model, tok, prompts, max_new_tokens=16, steps_per_sync=8) == want


def test_repetition_penalty_is_that_of_transformers():
    logits, texts = torch.randn(3, 50), [[1, 4, 4, 9], [0], list(range(50))]
    seen = torch.tensor([ids + ids[:1] * (50 - len(ids)) for ids in texts])
    for got, row, ids in zip(penalise(logits.clone(), seen, 1.3), logits, texts):
        assert torch.equal(
            got, transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), row[None].clone())[0]
        )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_equal_transformers(schedule):
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=17)
    for step in range(17):
        assert lr_at(step, 17, 0.5, 3, schedule) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_base_is_small_and_equals_transformers():
    base = str(ROOT / "demo/base")
    assert sum(os.path.getsize(os.path.join(base, name)) for name in os.listdir(base)) <= 10 * 2**20
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours, tokenizer = Qwen2.from_pretrained(base), Tokenizer(base)
    auto = transformers.AutoTokenizer.from_pretrained(base)
    for _, row in list(read_jsonl(ROOT / "demo/heldout.jsonl"))[::25]:
        messages = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.prompt_ids(messages)
        rendered = auto.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert auto(rendered)["input_ids"] == ids and tokenizer.decode(tokenizer.encode(row["prompt"])) == row["prompt"]
        with torch.no_grad():
            a, b = ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert tokenizer.default_system == "You are a helpful assistant."
    assert tokenizer.stop_ids == {auto.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}


@pytest.mark.parametrize("more", [(), ("--shard-size", "30KB")], ids=["one file", "shards"])
def test_a_merged_directory_equals_transformers(family, tmp_path, capsys, more):
    models = [f"{family / 'a'}:0.05", f"{family / 'b'}:0.95"]
    want = merge_families.run(tmp_path / "out", "linear", models, *more)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3 or not more
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed and "python eval.py --ckpt" in printed and "linear" in printed
    ids = torch.arange(7)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(Qwen2.from_pretrained(tmp_path / "out")(ids), theirs(ids).logits)
    assert torch.equal(theirs.lm_head.weight, want["lm_head.weight"])


def test_a_trained_directory_equals_transformers(tiny, tmp_path, run):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    assert run("train_sft", "--ckpt", tiny, "--data", data, "--out", tmp_path / "out", "--max-steps", 1)[0] == 0
    ids = torch.arange(7)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(Qwen2.from_pretrained(tmp_path / "out")(ids), theirs(ids).logits)
