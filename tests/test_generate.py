import os

import pytest
import torch
import transformers
from conftest import TEXT, real, tiny_files, tiny_model

from chat import Tokenizer
from generate import common_prefix, generate, generate_iter, sample
from model import InputError, Qwen2


def user(text):
    return [{"role": "user", "content": text}]


PROMPTS = [user(t[:n]) for t in TEXT for n in (3, 11, 29)]


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A tiny checkpoint whose head is not tied: a tied random model says its last token again and again."""
    out = str(tmp_path_factory.mktemp("lively") / "model")
    tiny_model(tie_word_embeddings=False, initializer_range=0.3).save(out, tiny_files())
    return out


@pytest.fixture(scope="module")
def loaded(lively):
    return Qwen2.from_pretrained(lively), Tokenizer(lively)


def by_transformers(path, tokenizer, prompts, n):
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    replies = []
    for p in prompts:
        ids = torch.tensor([tokenizer.prompt_ids(p)])
        settings = transformers.GenerationConfig(
            max_new_tokens=n, do_sample=False, eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=0
        )
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, ids.shape[1] :]
        replies.append(tokenizer.decode(out.tolist()))
    return replies


def test_greedy_equals_transformers(lively, loaded):
    m, tok = loaded
    replies = generate(m, tok, PROMPTS, max_new_tokens=20)
    assert replies == by_transformers(lively, tok, PROMPTS, 20)
    assert len(set(replies)) > 6  # the random model does not say one thing only


def test_a_reply_depends_on_no_neighbour(loaded):
    m, tok = loaded
    for settings in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}):
        settings |= {"max_new_tokens": 12}
        whole = generate(m, tok, PROMPTS, **settings)
        for batch_size in (1, 3, 64):
            assert generate(m, tok, PROMPTS, batch_size=batch_size, **settings) == whole
        pieces = [(i, text) for i, text, _ in generate_iter(m, tok, PROMPTS, prefill_tokens=40, **settings)]
        assert sorted(pieces) == list(enumerate(whole))
    first = generate(m, tok, PROMPTS[:1], temperature=1.0, seed=3, max_new_tokens=12)  # row 0 keeps its random numbers
    assert first == generate(m, tok, PROMPTS, temperature=1.0, seed=3, max_new_tokens=12)[:1]
    assert generate(m, tok, PROMPTS, temperature=1.0, seed=4, max_new_tokens=12)[:1] != first


def test_finish_reasons_and_limits(loaded):
    m, tok = loaded
    assert generate(m, tok, []) == []
    reasons = {reason for _, _, reason in generate_iter(m, tok, PROMPTS, max_new_tokens=2)}
    assert reasons == {"length"}
    stop = Tokenizer.__new__(Tokenizer)
    stop.__dict__ = tok.__dict__ | {"stop_ids": set(range(512))}
    assert sorted(generate_iter(m, stop, PROMPTS[:2], max_new_tokens=2)) == [(0, "", "stop"), (1, "", "stop")]
    with pytest.raises(InputError, match="1024"):
        generate(m, tok, PROMPTS, max_new_tokens=1020)


def test_common_prefix_leaves_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 1
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 5], [2, 5]]) == 0
    assert common_prefix([[1, 2, 9, 9], [1, 2, 3, 4, 5], [1, 2, 3, 9]]) == 2


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log().repeat(10000, 1)
    uniform = (torch.arange(10000) + 0.5) / 10000
    frequencies = sample(logits, uniform).bincount(minlength=4) / 10000
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.5, 0.05, 0.35]), atol=2e-4, rtol=0)
    assert sample(logits, uniform, temperature=0.0).unique().tolist() == [1]
    assert sample(logits, uniform, top_k=1).unique().tolist() == [1]
    nucleus = sample(logits, uniform, top_p=0.6).bincount(minlength=4) / 10000  # 0.5 alone does not reach 0.6
    torch.testing.assert_close(nucleus, torch.tensor([0, 0.5 / 0.85, 0, 0.35 / 0.85]), atol=2e-4, rtol=0)
    cold = sample(logits, uniform, temperature=0.5).bincount(minlength=4) / 10000
    squares = torch.tensor([0.1, 0.5, 0.05, 0.35]) ** 2
    torch.testing.assert_close(cold, squares / squares.sum(), atol=2e-4, rtol=0)


def test_command_line(tiny, run):
    code, out, _ = run("generate", "--ckpt", tiny, "--prompt", "Hello", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("> Hello\n")


def test_untied_and_bf16(tmp_path, loaded):
    m = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
    assert len(generate(m, loaded[1], PROMPTS[:3], max_new_tokens=4)) == 3


@real
def test_real_checkpoint_equals_transformers():
    path = os.environ["REAL_CKPT"]
    m, tok = Qwen2.from_pretrained(path), Tokenizer(path)
    prompts = [user("What is the capital of France?"), user("写一首关于春天的短诗。"), user("Name three animals."), user("2+2?")]
    assert generate(m, tok, prompts, max_new_tokens=24) == by_transformers(path, tok, prompts, 24)
