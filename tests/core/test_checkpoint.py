import json
import os
import shutil
import weakref

import pytest
import torch
import transformers
from conftest import tiny_config, tiny_files, tiny_model

from core.checkpoint import Checkpoint, write_checkpoint
from core.files import InputError
from core.tokenizer import Tokenizer
from model import Qwen2


def test_round_trips_are_exact(tmp_path):
    m = tiny_model(tie_word_embeddings=False)
    ids = torch.randint(0, 512, (1, 9))
    for out in (str(tmp_path / "dir"), str(tmp_path / "file.pt")):
        m.save(out, tiny_files())
        again = Qwen2.from_pretrained(out)
        assert torch.equal(again(ids), m(ids))
        assert Checkpoint(out).files == tiny_files()
    assert Checkpoint(tmp_path / "dir").fingerprint() == Checkpoint(tmp_path / "file.pt").fingerprint()
    m.save(str(tmp_path / "half.pt"), tiny_files(), dtype=torch.bfloat16)
    half = Checkpoint(tmp_path / "half.pt")
    assert half.dtype("model.norm.weight") == torch.bfloat16 and half.config["torch_dtype"] == "bfloat16"
    assert half.fingerprint() != Checkpoint(tmp_path / "dir").fingerprint()


def test_directory_loads_in_transformers_with_tokenizer_and_generation_config(tiny):
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(tiny)
    messages = [{"role": "user", "content": "Hello"}]
    assert "You are a helpful assistant." in tok.apply_chat_template(messages, tokenize=False)
    assert transformers.GenerationConfig.from_pretrained(tiny).eos_token_id == [2, 0]


def test_reads_what_transformers_writes_sharded(tiny, tmp_path):
    hf = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ids = torch.randint(0, 512, (1, 9))
    ours, theirs = Qwen2.from_pretrained(tmp_path / "shards")(ids), hf(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_tied_head_that_is_stored_is_accepted_if_it_is_the_embedding(tmp_path):
    m = tiny_model()
    state = {n: p.detach() for n, p in m.named_parameters()}
    for scale, name in ((1, "same"), (2, "other")):
        tensors = state | {"lm_head.weight": state["model.embed_tokens.weight"] * scale}
        specs = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
        write_checkpoint(str(tmp_path / name), tiny_config(), tiny_files(), specs, tensors.items())
    ids = torch.randint(0, 512, (1, 9))
    assert torch.equal(Qwen2.from_pretrained(tmp_path / "same")(ids), m(ids))
    with pytest.raises(InputError, match="lm_head.weight differs"):
        Checkpoint(tmp_path / "other")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    m = tiny_model()
    tensors = {n: p.detach() for n, p in m.named_parameters()}
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
    tensors["model.layers.7.extra"] = torch.zeros(1)
    specs = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    write_checkpoint(str(tmp_path / "bad.pt"), tiny_config(), tiny_files(), specs, tensors.items())
    with pytest.raises(InputError) as e:
        Qwen2.from_pretrained(tmp_path / "bad.pt")
    for word in ("missing model.norm.weight", "unknown model.layers.7.extra", "up_proj.weight is (3, 32)", "(64, 32)"):
        assert word in str(e.value)


def test_truncated_safetensors_and_missing_shards(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors: missing or corrupt"):
        Checkpoint(tmp_path / "cut")
    file.unlink()  # beside an index it would count, and the index would not
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "gone.safetensors"}})
    )
    with pytest.raises(InputError, match="gone.safetensors"):
        Checkpoint(tmp_path / "cut")
    os.remove(tmp_path / "cut" / "config.json")
    with pytest.raises(InputError, match="config.json"):
        Checkpoint(tmp_path / "cut")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("tokenizer_config.json", "{oops", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: holds a JSON list"),
        ("generation_config.json", "{oops", "generation_config.json"),
        ("generation_config.json", b"\xff\xfe", "generation_config.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x'"),
        ("config.json", "[]", "config.json: holds a JSON list"),
        ("config.json", json.dumps(tiny_config() | {"num_attention_heads": 0}), "num_attention_heads is 0"),
        ("model.safetensors.index.json", "[]", "model.safetensors.index.json"),
        ("model.safetensors.index.json", "{}", "model.safetensors.index.json: has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 5}}', "model.safetensors.index.json: has no weight_map"),
    ],
)
def test_corrupt_files_are_named(tiny, tmp_path, name, text, words):
    shutil.copytree(tiny, tmp_path / "c")
    if "index" in name:  # which counts only without this file
        os.remove(tmp_path / "c" / "model.safetensors")
    (tmp_path / "c" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        ckpt = Checkpoint(tmp_path / "c")
        Tokenizer(ckpt)
        Qwen2.from_pretrained(ckpt)


def test_a_pt_file_of_other_things_is_refused(tmp_path):
    for i, content in enumerate(
        ({"config": "text", "files": {}, "weights": {}}, {"config": {}, "files": {}, "weights": {"a": 1}})
    ):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(InputError, match=f"{i}.pt: a .pt checkpoint of this project has the keys"):
            Checkpoint(tmp_path / f"{i}.pt")


class Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_pickle_payload_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Payload(), "files": {}, "weights": {}}, "evil.pt")
    with pytest.raises(InputError, match="evil.pt"):
        Checkpoint("evil.pt")
    assert not os.path.exists("pwned")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(InputError, match=name):
            Checkpoint(tmp_path / name)


def test_unknown_sources(monkeypatch):
    import huggingface_hub

    def unreachable(repo, allow_patterns):
        raise OSError("the network is down\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="no such checkpoint"):
        Checkpoint("/nowhere/at/all")
    with pytest.raises(InputError, match="nobody/nothing: .*the network is down$"):
        Checkpoint("nobody/nothing")


def test_a_hub_id_fetches_only_the_files_it_needs(tiny, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return tiny

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(Qwen2.from_pretrained("Qwen/Tiny").head_weight, Qwen2.from_pretrained(tiny).head_weight)
    assert asked["repo"] == "Qwen/Tiny" and "*.safetensors" in asked["patterns"]
    assert not {"*", "*.bin", "README.md"} & set(asked["patterns"])


def test_writing_is_all_or_nothing(tmp_path):
    m = tiny_model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="is no checkpoint"):
        m.save(str(tmp_path / "mine"), {})
    m.save(str(tmp_path / "out"), {})
    before = Checkpoint(tmp_path / "out").fingerprint()

    def breaks_off():
        for i, (n, p) in enumerate(m.named_parameters()):
            if i == 3:
                raise KeyboardInterrupt
            yield n, p.detach() * 2

    specs = {n: (tuple(p.shape), p.dtype) for n, p in m.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(str(tmp_path / "out"), tiny_config(), {}, specs, breaks_off())
    assert Checkpoint(tmp_path / "out").fingerprint() == before
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


@pytest.mark.parametrize("out", ["dir", "file.pt"])
def test_a_text_may_be_given_by_a_function_once_the_tensors_are_written(tmp_path, out):
    order = []
    tensors = ((n, order.append(n) or torch.ones(2)) for n in ("a", "b"))
    specs = {n: ((2,), torch.float32) for n in ("a", "b")}
    write_checkpoint(str(tmp_path / out), tiny_config(), {"merges.txt": lambda: " ".join(order)}, specs, tensors)
    assert Checkpoint(tmp_path / out).files == {"merges.txt": "a b"}

    def fails():
        raise InputError("no text")

    tensors = ((n, torch.zeros(2)) for n in ("a", "b"))
    with pytest.raises(InputError, match="no text"):
        write_checkpoint(str(tmp_path / out), tiny_config(), {"merges.txt": fails}, specs, tensors)
    assert Checkpoint(tmp_path / out).tensor("b").tolist() == [1, 1] and os.listdir(tmp_path) == [out]


def test_a_tensor_is_let_go_before_the_next_is_taken(tmp_path):
    held = []

    def tensors():
        for n in "abc":
            assert not [t for t in held if t() is not None]
            x = torch.ones(5)
            held.append(weakref.ref(x))
            yield n, x
            del x

    write_checkpoint(str(tmp_path / "out"), tiny_config(), {}, {n: ((5,), torch.float32) for n in "abc"}, tensors())
    assert len(held) == 3
    for wrong in ([("a", torch.ones(5))], [("a", torch.ones(5)), ("c", torch.ones(5))]):
        with pytest.raises(ValueError, match="expected b"):
            write_checkpoint(
                str(tmp_path / "w"), tiny_config(), {}, {n: ((5,), torch.float32) for n in "ab"}, iter(wrong)
            )
    assert os.listdir(tmp_path) == ["out"]
