import itertools
import json
import os
import shutil
import signal
import sys
import weakref

import pytest
import torch
from checkpoint_files import IDS, save_weights, weights
from conftest import tiny_config, tiny_files, tiny_model
from training_runs import fork, trap

from core import outputs
from core.checkpoint import Checkpoint, all_finite, write_checkpoint
from core.files import InputError
from core.flags import check_out
from core.outputs import MANIFEST
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


def test_a_tied_head_that_equals_the_embedding_is_dropped(tmp_path):
    m = tiny_model()
    tensors = {n: p.detach() for n, p in m.named_parameters()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_weights(tmp_path / "same", tensors, tiny_config())
    ids = torch.randint(0, 512, (1, 9))
    assert torch.equal(Qwen2.from_pretrained(tmp_path / "same")(ids), m(ids))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "same").names


@pytest.mark.parametrize("dtype, tied", [(torch.float32, True), (torch.float8_e4m3fn, False), (torch.int8, False)])
def test_a_tied_head_of_another_dtype_is_compared_by_value(tmp_path, dtype, tied):
    tensors = {n: p.detach().bfloat16() for n, p in tiny_model().named_parameters()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(dtype)
    save_weights(tmp_path / "c", tensors, tiny_config())
    ckpt = Checkpoint(tmp_path / "c")
    assert ckpt.config["tie_word_embeddings"] is tied and ("lm_head.weight" in ckpt.names) is not tied


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
        ("tokenizer_config.json", '{"eos_token": "\\ud83d"}', "tokenizer_config.json: eos_token holds half of a"),
        ("generation_config.json", "{oops", "generation_config.json"),
        ("generation_config.json", b"\xff\xfe", "generation_config.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', 'generation_config.json: eos_token_id is "x"'),
        ("added_tokens.json", '{"<x>": {"id": 5}}', "added_tokens.json: is not an object of tokens and their ids"),
        ("config.json", "[]", "config.json: holds a JSON list"),
        ("config.json", json.dumps(tiny_config() | {"num_attention_heads": 0}), "num_attention_heads is 0"),
        ("model.safetensors.index.json", "[]", "model.safetensors.index.json"),
        ("model.safetensors.index.json", "{}", "model.safetensors.index.json: has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 5}}', "model.safetensors.index.json: has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "index.json: its weight_map is empty"),
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


@pytest.mark.parametrize(
    "t",
    [
        torch.ones(1).expand(2**40),
        torch.ones(64)[::2],
        torch.ones(32).to_sparse(),
        torch.ones(32, device="meta"),
        torch.ones(32)._neg_view(),
    ],
    ids=["expanded", "strided", "sparse", "meta", "negative"],
)
def test_a_pt_file_of_views_is_refused(tmp_path, t):
    """A file of some bytes may claim a tensor of terabytes."""
    torch.save({"config": {}, "files": {}, "weights": {"a": t}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt: .* the weights are whole tensors"):
        Checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("code, shape", [("C64", [8]), ("U16", [32]), ("F4", [128]), ("F8_E8M0", [64])])
def test_dtypes_without_arithmetic_are_refused(tmp_path, code, shape):
    head = json.dumps({"a": {"dtype": code, "shape": shape, "data_offsets": [0, 64]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(64))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(InputError, match="a is stored as torch.*, which is not supported"):
        Checkpoint(tmp_path).dtype("a")


def test_finiteness_of_all_dtypes():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert all_finite(torch.ones(3).to(dtype)) and not all_finite(torch.tensor([1.0, torch.nan]).to(dtype))


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
    assert asked["repo"] == "Qwen/Tiny" and {"*.safetensors", "README.md"} <= set(asked["patterns"])
    assert not {"*", "*.bin"} & set(asked["patterns"])


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
    extra = ((n, torch.ones(5)) for n in "ab")
    with pytest.raises(ValueError, match="b is not in specs"):
        write_checkpoint(str(tmp_path / "w"), tiny_config(), {}, {"a": ((5,), torch.float32)}, extra)
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints as other programs write them


def test_an_untied_model_without_embedding_is_refused(tmp_path):
    tensors = weights(tiny_model(tie_word_embeddings=False))
    del tensors["model.embed_tokens.weight"]
    save_weights(tmp_path / "c", tensors, tiny_config(tie_word_embeddings=False))
    with pytest.raises(InputError, match="missing model.embed_tokens.weight"):
        Qwen2.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json", "model.safetensors"])
def test_a_broken_link_is_no_missing_file(tiny, tmp_path, name):
    """As in a hub's cache whose blob was deleted."""
    shutil.copytree(tiny, tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "x.safetensors")
    (tmp_path / "c" / name).unlink(missing_ok=True)
    (tmp_path / "c" / name).symlink_to("gone")
    with pytest.raises(InputError, match=f"c/{name}: (cannot be read|missing or corrupt)"):
        Checkpoint(tmp_path / "c")


def test_a_name_that_is_not_utf8_is_refused(tiny, tmp_path):
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff")
    shutil.copytree(tiny, bad)
    Qwen2.from_pretrained(tiny).save(f"{tmp_path}/x.pt", {})
    os.rename(f"{tmp_path}/x.pt", f"{bad}.pt")
    for name in (bad, f"{bad}.pt"):
        with pytest.raises(InputError, match="the name is not UTF-8; rename it"):
            Checkpoint(name)
        with pytest.raises(InputError, match="the name is not UTF-8; rename it"):
            check_out(f"{name}-2")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/config.json").write_text("{}")
    (tmp_path / "index/model.safetensors.index.json").write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    with pytest.raises(InputError, match="the name is not UTF-8; rename it"):
        Checkpoint(tmp_path / "index")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "", ".", "x.bin", "x\0.safetensors"]
)
def test_a_shard_lies_beside_its_index(tmp_path, name):
    save_weights(tmp_path, {"x": torch.ones(1)}, file="x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="a shard is a .safetensors file beside the index"):
        Checkpoint(tmp_path)


def test_links_of_the_hub_cache_are_followed(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "blobs")
    (tmp_path / "snapshots").mkdir()
    for name in os.listdir(tmp_path / "blobs"):
        os.symlink(f"../blobs/{name}", tmp_path / "snapshots" / name)
    assert Checkpoint(tmp_path / "snapshots").fingerprint() == Checkpoint(tiny).fingerprint()


def test_shards_that_do_not_fit_the_index(tmp_path):
    for name in "ab":
        save_weights(tmp_path, {"x": torch.ones(1), name: torch.ones(1)}, file=f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for listed, words in (
        ({"x": "a.safetensors", "b": "b.safetensors"}, "two files hold the tensor x, one of them b.safetensors"),
        ({"x": "a.safetensors", "b": "a.safetensors"}, "lists b in a.safetensors, which lacks it"),
    ):
        index.write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(InputError, match=words):
            Checkpoint(tmp_path)


def test_weights_in_other_formats_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(InputError, match="no [*].safetensors file, only pytorch_model.bin; convert"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("beside", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_an_adapter_is_refused_whatever_is_beside_it(beside, tiny, tmp_path):
    """transformers ignores these files and loads the adapter on its base model."""
    for name in beside:
        shutil.copy(os.path.join(tiny, name), tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        Checkpoint(tmp_path)


def test_more_layers_than_tensors_are_refused_before_a_module_is_made(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=10**6)))
    monkeypatch.setattr("model.Block", None)
    with pytest.raises(InputError, match="num_hidden_layers is 1000000, but the weights hold 26 tensors"):
        Qwen2.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "c.pt"])
def test_pipes_do_not_block(tiny, tmp_path, name):
    path = tmp_path / "c"
    if name != "c.pt":
        shutil.copytree(tiny, path)
        os.remove(path / name)
        os.mkfifo(path / name)
    else:
        os.mkfifo(path := tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe, device or socket"):
        Checkpoint(path)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint may replace


def save_tiny(out, seed=0, **more):
    state = weights(tiny_model(seed))
    specs = {n: (tuple(t.shape), t.dtype) for n, t in state.items()}
    write_checkpoint(str(out), tiny_config(), tiny_files(), specs, state.items(), **more)


def listing(folder):
    return sorted(n for n in os.listdir(folder) if n not in (MANIFEST, "config.json", *tiny_files()))


@pytest.mark.parametrize("can_swap", [True, False])
def test_own_files_are_replaced_and_foreign_ones_stay(tmp_path, monkeypatch, can_swap):
    if not can_swap:
        monkeypatch.setattr(outputs, "swap_folders", lambda a, b: False)
    out = tmp_path / "out"
    save_tiny(out, shard_size=50_000)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    (out / "notes.txt").write_text("mine")
    outputs.claim_folder(str(out), "eval.py", ["results.json"])
    (out / "results.json").write_text("{}")
    os.chmod(out, 0o750)
    save_tiny(out, seed=3)
    assert listing(out) == [".git", "model.safetensors", "notes.txt", "results.json"] and os.listdir(tmp_path) == [
        "out"
    ]
    assert (out / ".git" / "HEAD").read_text() == "ref" and (out / "notes.txt").read_text() == "mine"
    assert torch.equal(Qwen2.from_pretrained(out)(IDS), tiny_model(3)(IDS)) and out.stat().st_mode & 0o777 == 0o750
    outputs.check_folder(str(out), "eval.py", ["results.json"])


def test_a_folder_that_is_not_ours_is_refused(tiny, tmp_path):
    copy = tmp_path / "downloaded"
    shutil.copytree(tiny, copy)
    os.remove(copy / MANIFEST)
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"name": "shop"}')
    save_tiny(own := tmp_path / "own")
    (own / "vocab.json").write_text("{}")
    for out, words in (
        (copy, "is no checkpoint that"),
        (project, "is no checkpoint that"),
        (own, "vocab.json: was not"),
    ):
        before = {n: (out / n).read_bytes() for n in os.listdir(out)}
        with pytest.raises(InputError, match=words):
            save_tiny(out, seed=1)
        assert before == {n: (out / n).read_bytes() for n in os.listdir(out)}
    assert sorted(os.listdir(tmp_path)) == ["downloaded", "own", "project"]


def test_a_pt_file_that_is_not_ours_is_refused(tmp_path):
    torch.save({"weights": {}}, tmp_path / "mine.pt")
    with pytest.raises(InputError, match="mine.pt: exists and is no checkpoint of this project"):
        check_out(str(tmp_path / "mine.pt"))
    save_tiny(tmp_path / "own.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("own.pt", "empty.pt", "new.pt"):
        check_out(str(tmp_path / name))


@pytest.mark.parametrize("out", [".", "..", "x/..", "./", "/", "{cwd}", "{parent}"])
def test_out_is_not_the_current_folder(tmp_path, monkeypatch, out):
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="is the current folder or contains it"):
        check_out(out.format(cwd=tmp_path / "here", parent=tmp_path))


def test_a_model_card_is_written_but_never_over_the_users(tmp_path):
    out = tmp_path / "out"
    save_tiny(out, card=lambda: "# one")
    assert (out / "README.md").read_text() == "# one"
    save_tiny(out, card="# two")
    assert (out / "README.md").read_text() == "# two"
    save_tiny(out)
    assert not (out / "README.md").exists(), "the card of another checkpoint does not stay"
    (out / "README.md").write_text("mine")
    save_tiny(out, card="# three")
    assert (out / "README.md").read_text() == "mine"
    os.remove(out / "README.md")
    save_tiny(out, card="# four")
    (out / "README.md").write_text("# four, edited")
    save_tiny(out, card="# five")
    assert (out / "README.md").read_text() == "# four, edited" and os.listdir(tmp_path) == ["out"]


def write_until_killed(out, where):
    """Writes a checkpoint and kills its own process before the function of core/outputs.py, or between the tensors."""

    def stop(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def tensors():
        yield "a", torch.ones(3)
        if where == "tensors":
            stop()
        yield "b", torch.ones(3)

    if where != "tensors":
        setattr(outputs, where, stop)
    specs = {"a": ((3,), torch.float32), "b": ((3,), torch.float32)}
    write_checkpoint(out, tiny_config(), tiny_files(), specs, tensors())


@pytest.mark.parametrize("out", ["out", "out.pt"])
@pytest.mark.parametrize("where", ["write_manifest", "tensors", "replace_folder", "move_foreign", "remove_written"])
def test_a_killed_writer_leaves_a_whole_checkpoint_and_the_next_one_clears_up(tmp_path, out, where):
    if out == "out.pt" and where != "tensors":
        pytest.skip("a file is replaced by one rename")
    save_tiny(tmp_path / out)
    before, foreign = Checkpoint(tmp_path / out).names, tmp_path / "out" / "notes.txt"
    if out == "out":
        foreign.write_text("mine")
    process = fork.Process(target=write_until_killed, args=(str(tmp_path / out), where))
    process.start()
    process.join(1000)
    assert process.exitcode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    replaced = where in ("move_foreign", "remove_written")
    assert Checkpoint(tmp_path / out).names == (["a", "b"] if replaced else before)
    save_tiny(tmp_path / out, seed=1)
    assert os.listdir(tmp_path) == [out] and torch.equal(Qwen2.from_pretrained(tmp_path / out)(IDS), tiny_model(1)(IDS))
    assert out == "out.pt" or foreign.read_text() == "mine"


@pytest.mark.parametrize("out", ["out", "out.pt"])
def test_an_interrupt_at_any_line_leaves_a_whole_checkpoint(tmp_path, out):
    """Ctrl-C before every 13th line that runs. The next save clears up what an interrupted clean-up left."""

    def save(value):
        tensors = [("a", torch.full((2,), value))]
        write_checkpoint(str(tmp_path / out), tiny_config(), {}, {"a": ((2,), torch.float32)}, tensors)

    def interrupt():
        raise KeyboardInterrupt

    save(0.0)
    for n in itertools.count(1, 13):
        before = Checkpoint(tmp_path / out).tensor("a").tolist()
        trap(None, n, interrupt)
        try:
            save(float(n))
            break
        except KeyboardInterrupt:
            assert Checkpoint(tmp_path / out).tensor("a").tolist() in (before, [n, n])
        finally:
            sys.settrace(None)
    assert n > 50 and os.listdir(tmp_path) == [out] and Checkpoint(tmp_path / out).tensor("a").tolist() == [n, n]
