import dataclasses
import sys
import types

import pytest
import torch
from conftest import PROMPTS, TEXT, tiny_model, user

import generate as generate_module
from core.files import InputError
from core.layers import Linear
from core.onednn import has_onednn_kernels, onednn_weights
from core.prefixes import prefix_lengths
from core.tokenizer import Tokenizer
from generate import Settings, decoding_step, generate, generate_iter, generate_steps, new_batch, stream
from model import Qwen2


def test_extreme_settings_are_no_overflow(loaded):
    settings = {"max_new_tokens": 2, "temperature": 1.0, "seed": 10**30, "cache_gb": 1e308, "batch_size": 10**400}
    assert generate(*loaded, PROMPTS[:2], **settings) == generate(*loaded, PROMPTS[:2], **settings)
    assert Settings(seed=7).row_seed(3) == 7_000_024 and 0 <= Settings(seed=-1).row_seed(0) < 2**63


@pytest.mark.usefixtures("kernels")
def test_a_reply_depends_on_no_neighbour(loaded):
    model, tok = loaded
    for settings in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}):
        settings |= {"max_new_tokens": 12}
        whole = generate(model, tok, PROMPTS, **settings)
        for batch_size in (1, 3, 64):
            assert generate(model, tok, PROMPTS, batch_size=batch_size, **settings) == whole
        pieces = [(i, text) for i, text, _ in generate_iter(model, tok, PROMPTS, prefill_tokens=40, **settings)]
        assert sorted(pieces) == list(enumerate(whole))
    first = generate(
        model, tok, PROMPTS[:1], temperature=1.0, seed=3, max_new_tokens=12
    )  # row 0 keeps its random numbers
    assert first == generate(model, tok, PROMPTS, temperature=1.0, seed=3, max_new_tokens=12)[:1]
    assert generate(model, tok, PROMPTS, temperature=1.0, seed=4, max_new_tokens=12)[:1] != first


def test_finish_reasons_and_limits(loaded):
    model, tok = loaded
    assert generate(model, tok, []) == []
    reasons = {reason for _, _, reason in generate_iter(model, tok, PROMPTS, max_new_tokens=2)}
    assert reasons == {"length"}
    stop = Tokenizer.__new__(Tokenizer)
    stop.__dict__ = tok.__dict__ | {"stop_ids": set(range(512))}
    assert sorted(generate_iter(model, stop, PROMPTS[:2], max_new_tokens=2)) == [(0, "", "stop"), (1, "", "stop")]


def test_a_reply_ends_with_the_models_positions(lively):
    """Each row has the room that its own prompt leaves, whatever --max-new-tokens says; a prompt that leaves none is refused."""
    model, tok = Qwen2.from_pretrained(lively), Tokenizer(lively)
    sizes = [len(tok.prompt_ids(p)) for p in PROMPTS]
    model.config = dataclasses.replace(model.config, max_position_embeddings=max(sizes) + 3)
    never = Tokenizer.__new__(Tokenizer)
    never.__dict__ = tok.__dict__ | {"stop_ids": set()}
    ends = {
        i: (len(tokens), finish)
        for i, tokens, finish in generate_steps(model, never, PROMPTS, max_new_tokens=40)
        if finish
    }
    assert ends == {i: (min(40, max(sizes) + 3 - n), "length") for i, n in enumerate(sizes)}
    model.config = dataclasses.replace(model.config, max_position_embeddings=max(sizes))
    with pytest.raises(
        InputError, match=f"prompt {sizes.index(max(sizes))} takes {max(sizes)} tokens; the model ends at {max(sizes)}"
    ):
        generate(model, tok, PROMPTS)


def test_what_generate_refuses(loaded):
    with pytest.raises(InputError, match="prompt 0: expected a text or a list"):
        generate(*loaded, PROMPTS[0])  # one conversation where a list of them is expected
    with pytest.raises(InputError, match="prompt 1: expected"):
        generate(*loaded, [PROMPTS[0], []])
    for settings in {"max_new_tokens": 0}, {"temperature": -1.0}:
        with pytest.raises(InputError, match="at least"):
            generate(*loaded, PROMPTS, **settings)
    assert generate(*loaded, ["Hello"], 4) == generate(*loaded, [user("Hello")], 4)


@pytest.mark.usefixtures("kernels")
def test_groups_of_prompts_with_prefixes_of_their_own(loaded):
    model, tok = loaded
    shots = "Question: 1 + 1? Answer: 2. " * 8
    prompts = [user(shots + t[:n]) for t in TEXT for n in (3, 11)] + [user(t[:5]) for t in TEXT] * 2
    assert len(set(prefix_lengths([tok.prompt_ids(p) for p in prompts], overhead=8))) > 1
    alone = [generate(model, tok, [p], max_new_tokens=10)[0] for p in prompts]
    for batch_size in (2, 5, 32):
        assert generate(model, tok, prompts, max_new_tokens=10, batch_size=batch_size) == alone
    assert generate(model, tok, prompts, max_new_tokens=10, cache_gb=0.0001) == alone


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tied", [True, False])
def test_onednn_weights_change_nothing_but_speed(dtype, tolerance, tied):
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    if not has_onednn_kernels(model):
        pytest.skip("this processor has no bf16 kernels")
    modules = [x for x in model.modules() if isinstance(x, Linear)] + [model.model["embed_tokens"]] * tied
    assert len(modules) == 2 * 7 + 1
    ids = torch.arange(24).view(1, 24)
    with torch.no_grad():
        plain = model(ids)
        with onednn_weights(model):
            torch.testing.assert_close(model(ids), plain, rtol=tolerance, atol=tolerance)
            for module in modules:  # each is read
                kept, zeros = module.onednn_weight, torch.zeros(module.weight.shape, dtype=dtype)
                module.onednn_weight = torch.ops.mkldnn._reorder_linear_weight(zeros, 64)
                assert not torch.allclose(model(ids), plain, rtol=tolerance, atol=tolerance)
                module.onednn_weight = kept
            with torch.enable_grad():
                assert model(ids).requires_grad
        assert all(module.onednn_weight is None for module in modules)
        assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("missing", ["_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported"])
def test_without_private_operators_of_onednn_replies_are_the_same(loaded, monkeypatch, missing):
    model, tok = loaded
    want = generate(model, tok, PROMPTS, max_new_tokens=8)
    real = torch.ops.mkldnn
    names = {"_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported"} - {missing}
    left = types.SimpleNamespace(**{name: getattr(real, name) for name in names if hasattr(real, name)})
    monkeypatch.setattr(torch.ops, "mkldnn", left)
    assert not has_onednn_kernels(tiny_model().to(torch.bfloat16))
    assert generate(model, tok, PROMPTS, max_new_tokens=8) == want


def test_several_steps_per_sync_change_no_reply(loaded, monkeypatch):
    """As on a GPU but without its graph: fixed tensors, ended rows run on, free rows are filled late."""
    model, tok = loaded
    decode_steps, taken = generate_module.decode_steps, []

    def counted(batch, steps):
        chosen = decode_steps(batch, steps)
        taken.append((batch.cache.width, len(chosen)))
        return chosen

    monkeypatch.setattr(generate_module, "decode_steps", counted)
    prompts = [*PROMPTS, user(TEXT[0] * 5), user(TEXT[1] * 8)]  # these two grow past 256 places
    assert 230 < len(tok.prompt_ids(prompts[-1])) < 256
    whole = generate(model, tok, prompts, max_new_tokens=30)
    string = next(text[8:11] for text in whole if len(text) > 14 and text[8:11] not in text[:10])
    for settings in (
        {},
        {"stop": string},
        {"repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    ):
        settings |= {"max_new_tokens": 30}
        want = sorted(generate_iter(model, tok, prompts, **settings))
        assert settings != {"max_new_tokens": 30} or not taken
        for steps_per_sync, batch_size in ((2, 5), (7, 64), (40, 3)):
            found = generate_iter(model, tok, prompts, steps_per_sync=steps_per_sync, batch_size=batch_size, **settings)
            assert sorted(found) == want, settings
    assert min(taken)[0] == 256 < max(taken)[0] and {count for _, count in taken} >= {2, 7, 29}


def test_a_decoding_step_asks_for_no_value():
    """On tensors that have none: whatever would make the host wait for a GPU fails here."""
    model = tiny_model().to("meta")
    for settings in (
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
        {"repetition_penalty": 1.1},
    ):
        batch = new_batch(model, Settings(**settings), 3, 64)
        batch.cache.width = 32
        with pytest.raises(NotImplementedError):
            batch.last_tokens.tolist()
        with torch.no_grad():
            decoding_step(batch)()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: TEST_GPU=1")
def test_a_gpu_says_the_same(loaded):
    model, tok = loaded
    there = Qwen2(model.raw_config)
    there.load_state_dict(model.state_dict())
    for settings in ({}, {"repetition_penalty": 1.2}):
        want = generate(model, tok, PROMPTS, max_new_tokens=30, **settings)
        for steps_per_sync in (1, None):
            assert (
                generate(
                    there.cuda(),
                    tok,
                    PROMPTS,
                    max_new_tokens=30,
                    batch_size=5,
                    steps_per_sync=steps_per_sync,
                    **settings,
                )
                == want
            )


def test_stop_strings_end_a_reply_before_them(loaded):
    model, tok = loaded
    whole = generate(model, tok, PROMPTS, max_new_tokens=16)
    string = next(text[3:6] for text in whole if len(text) > 9 and text[3:6] not in text[:5])
    cut = list(generate_iter(model, tok, PROMPTS, max_new_tokens=16, stop=string))
    assert {i: text for i, text, _ in cut} == {i: text.split(string)[0] for i, text in enumerate(whole)}
    assert {finish for i, _, finish in cut if string in whole[i]} == {"stop"}


def test_samples_of_one_prompt_by_their_seeds(loaded):
    model, tok = loaded
    three = generate(model, tok, [PROMPTS[0]] * 3, max_new_tokens=12, temperature=1.0, seed=[5, 6, 5])
    assert three[0] == three[2] != three[1]
    assert three[1:2] == generate(model, tok, PROMPTS[:1], max_new_tokens=12, temperature=1.0, seed=[6])


def test_stream_adds_up_to_the_reply(loaded):
    model, tok = loaded
    for p in PROMPTS:
        pieces = list(stream(model, tok, p, max_new_tokens=12))
        assert "".join(pieces) == generate(model, tok, [p], max_new_tokens=12)[0]


def test_command_line(tiny, run):
    code, out, _ = run("generate", "--ckpt", tiny, "--prompt", "Hello", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("> Hello\n")


def test_chat_in_the_terminal(tiny, run, monkeypatch):
    lines = iter(["Hello", "And you?"])  # then the end of the input

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    asked = []

    def fake_stream(model, tokenizer, messages, **settings):
        asked.append([message["content"] for message in messages])
        yield from ("so ", "be it")

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("generate.stream", fake_stream)
    code, out, _ = run("generate", "--ckpt", tiny, "--max-new-tokens", 3)
    assert code == 0 and out.count("so be it\n\n") == 2
    assert asked == [["Hello"], ["Hello", "so be it", "And you?"]]


HOSTILE = "red \x1b[31m, title \x1b]0;x\x07, C1 \x9b2J, back\r\b\x7f, kept:\t\n春天\u3000é\u200d"
ESCAPED = "red \\x1b[31m, title \\x1b]0;x\\x07, C1 \\x9b2J, back\\r\\x08\\x7f, kept:\t\n春天\u3000é\u200d"


@pytest.mark.parametrize("terminal, want", [(True, ESCAPED), (False, HOSTILE)])
def test_a_reply_does_not_control_the_terminal(tiny, run, monkeypatch, terminal, want):
    lines = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr("generate.stream", lambda *_, **__: iter(HOSTILE))  # each character is a piece
    assert run("generate", "--ckpt", tiny)[1] == f"An empty line ends the chat.\n{want}\n\n"
    monkeypatch.setattr("generate.generate", lambda *_, **__: [HOSTILE])
    assert run("generate", "--ckpt", tiny, "--prompt", "Hello")[1] == f"> Hello\n{want}\n\n"


def test_a_chat_without_stdin_is_refused(tiny, refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it where stdin is closed
    refused("give --prompt", "generate", "--ckpt", tiny)


def test_untied_and_bf16(tmp_path, loaded):
    model = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
    assert len(generate(model, loaded[1], PROMPTS[:3], max_new_tokens=4)) == 3
