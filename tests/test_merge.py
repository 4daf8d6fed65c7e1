"""merge.py from files to files: formats, dtypes, shards, memory, records, and bad input."""

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import weakref
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from conftest import ROOT
from merge_families import FILES, TIED, UNTIED, assert_same, load, numpy_ties, run, save
from training_runs import launch

import merge
from core import pages
from core.checkpoint import Checkpoint
from core.files import InputError, cli
from core.outputs import check_inputs
from core.pages import mapped
from merge import METHODS, main
from merging import engine, methods
from merging.engine import in_order
from merging.flags import METHOD_NAMES, SPARSE, format_lines, parse_lines, parse_model, parse_size

# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_pt_in_and_out_equals_directories(family, tmp_path):
    base, *models = (str(family / n) for n in ("base", "a", "b"))
    want = run(tmp_path / "out", "ties", models, "--base", base, "--density", 0.4)
    pts = []
    for path in (base, *models):
        c = Checkpoint(path)
        pts.append(save(tmp_path / (os.path.basename(path) + ".pt"), load(path), c.config, c.files))
    assert_same(run(tmp_path / "out.pt", "ties", pts[1:], "--base", pts[0], "--density", 0.4), want)
    one, other = Checkpoint(str(tmp_path / "out")), Checkpoint(str(tmp_path / "out.pt"))
    assert one.config == other.config and one.fingerprint() == other.fingerprint()
    assert one.files["tokenizer.json"] == other.files["tokenizer.json"] == FILES["tokenizer.json"]
    assert "merge.json" not in one.files | other.files  # not handed on to checkpoints trained from this one
    in_pt = torch.load(tmp_path / "out.pt", weights_only=True)["files"]["merge.json"]
    records = [json.loads(text) for text in ((tmp_path / "out" / "merge.json").read_text(), in_pt)]
    sums = [[m["sha256"] for m in (*r["models"], r["base"])] for r in records]
    assert sums[0] == sums[1] == [Checkpoint(p).fingerprint() for p in (*models, base)]
    assert records[0]["method"] == "ties" and records[0]["normalize"] is True
    assert [m["density"] for m in records[0]["models"]] == [0.4, 0.4] and "gamma" not in records[0]


def test_half_precision_is_read_in_fp32_and_rounded_once(tmp_path):
    x, y = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))
    a, b = save(tmp_path / "a", {"x": x.bfloat16()}), save(tmp_path / "b", {"x": y.half()})
    mean = (x.bfloat16().float() + y.half().float()) / 2
    assert torch.equal(run(tmp_path / "out", "linear", [a, b])["x"], mean)
    assert torch.equal(run(tmp_path / "bf16", "linear", [a, b], "--dtype", "bfloat16")["x"], mean.bfloat16())
    assert Checkpoint(str(tmp_path / "bf16")).config["torch_dtype"] == "bfloat16"
    out = run(tmp_path / "f16", "slerp", [a, a], "--dtype", "float16")["x"]
    assert out.dtype == torch.float16


def test_shards(family, tmp_path):
    models = [str(family / "a"), str(family / "b")]
    want = run(tmp_path / "one", "linear", models)
    assert_same(run(tmp_path / "out", "linear", models, "--shard-size", "30KB"), want)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == 4 * sum(x.numel() for x in want.values())
    for shard in shards:
        held = [n for n, where in index["weight_map"].items() if where == shard]
        assert 4 * sum(want[n].numel() for n in held) <= 30000 or len(held) == 1
    one, other = Checkpoint(str(tmp_path / "one")), Checkpoint(str(tmp_path / "out"))
    assert one.fingerprint() == other.fingerprint() and one.files == other.files
    assert (tmp_path / "out" / "merge.json").exists()
    assert_same(
        run(tmp_path / "again", "linear", [str(tmp_path / "out"), models[0]], "--no-normalize"),
        run(tmp_path / "again2", "linear", [str(tmp_path / "one"), models[0]], "--no-normalize"),
    )
    run(tmp_path / "out", "linear", models, "--shard-size", "1GB")  # one file does; the old shards are gone
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_models_that_lack_a_tensor_of_their_config_are_refused(family, tmp_path):
    """Both lack it, as after a download of some shards; the result could not be loaded."""
    whole = load(family / "a")
    for i, (tensors, config, words) in enumerate([
        ({n: x for n, x in whole.items() if ".0." not in n}, UNTIED, "missing model.layers.0.input_layernorm"),
        (whole, UNTIED | {"num_hidden_layers": 1}, "unknown model.layers.1.input_layernorm"),
        (whole, UNTIED | {"vocab_size": 98}, r"embed_tokens.weight is \(97, 32\), the config says \(98, 32\)"),
    ]):  # fmt: skip
        paths = [save(tmp_path / f"{i}-{name}", tensors, config) for name in "ab"]
        with pytest.raises(InputError, match=f"{i}-a: tensors do not fit the config: .*{words}"):
            run(tmp_path / "out", "linear", paths)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_fails_leaves_what_was_there(faulty, tmp_path):
    x = torch.zeros(2, 2)
    good = {"x": x, "y": x}
    a, b = save(tmp_path / "a", good), save(tmp_path / "b", {"x": x, "y": x / 0})
    run(tmp_path / "out", "linear", [a])
    with pytest.raises(InputError, match="b: y holds NaN or infinity"):
        run(tmp_path / "out", "linear", [a, b], "--shard-size", "16")
    assert_same(load(tmp_path / "out"), good)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


def test_replies_of_a_merge_end_where_those_of_a_model_do(tmp_path):
    """A base model names <|endoftext|> only; without <|im_end|> transformers would not end a merged chat model's reply."""
    added = [{"id": 0, "content": "<|endoftext|>"}, {"id": 2, "content": "<|im_end|>"}]
    paths = {}
    for name, end in {"base": 0, "other": 0, "chat": [2, 0], "none": None}.items():
        files = {"tokenizer.json": json.dumps({"added_tokens": added}), "tokenizer_config.json": "{}"}
        files["generation_config.json"] = json.dumps({"eos_token_id": end, "top_k": 20})
        paths[name] = save(tmp_path / name, {"x": torch.eye(2)}, TIED, files)
    for base, models, end in (
        ("base", ["other", "chat"], [2, 0]),
        ("base", ["other"], 0),
        ("chat", ["other"], [2, 0]),
        ("none", ["chat"], [2]),
    ):
        run(tmp_path / "out", "ties", [paths[name] for name in models], "--base", paths[base])
        files = Checkpoint(str(tmp_path / "out")).files
        assert json.loads(files["generation_config.json"]) == {"eos_token_id": end, "top_k": 20}
        told = {"eos_token": "<|im_end|>"} if base != "chat" and "chat" in models else {}
        assert json.loads(files["tokenizer_config.json"]) == told


def test_rows_that_differ(tmp_path, capsys):
    draw = lambda rows, seed: torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    name = "model.embed_tokens.weight"
    base = save(tmp_path / "base", {name: draw(5, 0)}, {**TIED, "vocab_size": 5})
    short = save(tmp_path / "short", {name: draw(4, 1).bfloat16()}, {**TIED, "vocab_size": 4})
    long = save(tmp_path / "long", {name: draw(7, 2)}, {**TIED, "vocab_size": 7})
    with pytest.raises(InputError, match=r"is \(4, 3\), but \(5, 3\) in .*--resize gives all of them 5 rows"):
        run(tmp_path / "out", "linear", [short, long], "--base", base)
    for method in ("linear", "task_arithmetic", "dare_linear"):
        scale = 0.5 if method == "linear" else 1
        out = run(
            tmp_path / "out",
            method,
            [f"{short}:{scale}", f"{long}:{scale}"],
            "--base",
            base,
            "--resize",
            *(["--no-normalize"] if method == "linear" else []),
        )[name]
        x, y, z = draw(5, 0), torch.cat([draw(4, 1).bfloat16().float(), draw(5, 0)[4:]]), draw(7, 2)[:5]
        torch.testing.assert_close(out, (y + z) / 2 if method == "linear" else y + z - x)
        assert Checkpoint(str(tmp_path / "out")).config["vocab_size"] == 5
        sums = [m["sha256"] for m in json.loads((tmp_path / "out" / "merge.json").read_text())["models"]]
        assert sums == [
            Checkpoint(p).fingerprint() for p in (short, long)
        ]  # of the stored tensors, not of the resized ones
    assert "has 4 rows; the result has 5" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ties", "linear", "slerp", "dare_linear", "breadcrumbs", "della"])
@pytest.mark.parametrize("suffix", ["", ".pt"])
def test_memory_that_is_no_files_is_kept(tmp_path, monkeypatch, method, suffix):
    """Pages of mapped files are dropped during the merge. Rows joined for --resize are in ordinary memory and must stay."""
    name, rng, given_back = "model.embed_tokens.weight", np.random.default_rng(5), []
    embed = {
        n: rng.normal(size=(rows, 64)).astype(np.float32) for n, rows in (("base", 500), ("short", 300), ("long", 700))
    }
    paths = {n: save(tmp_path / (n + suffix), {name: x}, {**TIED, "vocab_size": len(x)}) for n, x in embed.items()}
    flags = ["--resize", "--base", paths["base"]] + ["--density", 0.4] * (method not in ("linear", "slerp"))
    monkeypatch.setattr(methods, "CHUNK", 1024)
    plain = run(tmp_path / "plain", method, [paths["short"], paths["long"]], *flags)[
        name
    ]  # one window: pages are dropped at the end
    for file in (pages, engine):
        monkeypatch.setattr(file, "WINDOW", 2048)
    monkeypatch.setattr(pages, "drop_pages", lambda t, drop=pages.drop_pages: (given_back.append(t), drop(t)))
    out = run(tmp_path / "out", method, [paths["short"], paths["long"]], *flags)[name]
    in_file = mapped([Checkpoint(paths["base"]).tensor(name)])  # depends on the system and on safetensors
    assert torch.equal(out, plain) and (len(given_back) > 10) == bool(in_file)
    if method == "ties":
        b = embed["base"]
        models = [{name: np.concatenate([embed[n], b[len(embed[n]) :]])[:500]} for n in ("short", "long")]
        want = numpy_ties({name: b}, models, [1.0, 1.0], 0.4, 1.0, "tensor", "sum")
        np.testing.assert_allclose(out.numpy(), want[name], rtol=1e-5, atol=1e-6)


def test_inputs_are_read_once(family, tmp_path, monkeypatch):
    """The fingerprints in merge.json are computed from the bytes as they are merged, with any number of threads."""
    models = [str(family / n) for n in ("a", "b")]
    sums = [Checkpoint(m).fingerprint() for m in models]
    monkeypatch.setattr(Checkpoint, "digest", lambda *_: pytest.fail("read a second time"))
    monkeypatch.setattr(methods, "CHUNK", 100)
    for out in ("out", "out.pt"):
        main(["--method", "linear", "--models", *models, "--out", str(tmp_path / out), "--threads", "3"])
    in_pt = torch.load(tmp_path / "out.pt", weights_only=True)["files"]["merge.json"]
    for text in (in_pt, (tmp_path / "out" / "merge.json").read_text()):
        assert [m["sha256"] for m in json.loads(text)["models"]] == sums


def test_a_result_is_freed_before_the_next_one_is_computed(tmp_path, monkeypatch):
    x = torch.ones(4, 3)
    a = save(tmp_path / "a", {n: x for n in "uvwxyz"})  # tensors of one size: one at a time is computed
    results = []

    def merge_tensor(*more, original=engine.merge_tensor, **settings):
        assert not [r for r in results if r() is not None]
        found = original(*more, **settings)
        results.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(engine, "merge_tensor", merge_tensor)
    run(tmp_path / "out", "linear", [a, a], "--threads", 3)
    assert len(results) == 6


def test_tokenizers_that_differ(tmp_path, capsys):
    spec = {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "added_tokens": [{"id": 2, "content": "<e>"}]}
    again = {"version": "2", **spec, "model": {**spec["model"], "merges": [["a", "b"]]}}  # another way to write it
    other = {**spec, "added_tokens": [{"id": 2, "content": "<f>"}]}
    put = lambda name, content: save(tmp_path / name, {"x": torch.ones(2, 2)}, files={"tokenizer.json": content})
    a, b, c, d = put("a", json.dumps(spec)), put("b", json.dumps(again)), put("c", json.dumps(other)), put("d", "{")
    run(tmp_path / "out", "linear", [a, b])
    assert "note" not in capsys.readouterr().err
    with pytest.raises(InputError, match="c: its tokens differ.*--allow-tokenizer-mismatch"):
        run(tmp_path / "out", "linear", [a, c])
    run(tmp_path / "out", "linear", [a, c], "--allow-tokenizer-mismatch")
    assert "its tokens differ" in capsys.readouterr().err
    assert json.loads(Checkpoint(str(tmp_path / "out")).files["tokenizer.json"]) == spec
    with pytest.raises(InputError, match="d/tokenizer.json: corrupt"):
        run(tmp_path / "out", "linear", [a, d])


def test_integers_are_copied(tmp_path):
    x, n = torch.ones(2, 2), torch.tensor([3, 4])
    a, b = save(tmp_path / "a", {"x": x, "n": n}), save(tmp_path / "b", {"x": x, "n": n})
    out = run(tmp_path / "out", "linear", [a, b], "--dtype", "bfloat16")
    assert out["n"].tolist() == [3, 4] and out["n"].dtype == torch.int64 and out["x"].dtype == torch.bfloat16
    c = save(tmp_path / "c", {"x": x, "n": n + 1})
    with pytest.raises(InputError, match="n: torch.int64, and the inputs differ"):
        run(tmp_path / "out", "linear", [a, c])


def test_in_order_bounds_what_is_in_memory():
    sizes, held, most = {f"{i}": n for i, n in enumerate([3, 10, 1, 1, 1, 9, 2, 2, 10, 4])}, [], []

    def work(name):
        held.append(sizes[name])  # taken out again when the result is taken
        most.append(sum(held))
        return name * 2

    for name, result in in_order(work, sizes, 3):
        assert result == name * 2
        held.remove(sizes[name])
    assert held == [] and len(most) == len(sizes) and max(most) <= 15
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda name: 1 / 0, sizes, 2))


def test_warns_when_the_dtype_loses_the_merge(tmp_path, capsys):
    x = torch.full((1000,), 0.02)
    step = torch.linspace(-1e-6, 1e-6, 1000)  # the bf16 spacing at 0.02 is 1.2e-4
    base, a = save(tmp_path / "base", {"x": x}), save(tmp_path / "a", {"x": x + step})
    run(tmp_path / "out", "task_arithmetic", [a], "--base", base)
    assert "warning" not in capsys.readouterr().err
    run(tmp_path / "out", "task_arithmetic", [a], "--base", base, "--dtype", "bfloat16")
    assert "100.0%" in capsys.readouterr().err
    run(tmp_path / "out", "task_arithmetic", [f"{a}:100000"], "--base", base, "--dtype", "bfloat16")
    assert "warning" not in capsys.readouterr().err


def test_parse_model(tmp_path, monkeypatch):
    assert parse_model("Qwen/Qwen2-0.5B-Instruct") == ("Qwen/Qwen2-0.5B-Instruct", None)
    assert parse_model("Qwen/Qwen2-0.5B-Instruct:0.05") == ("Qwen/Qwen2-0.5B-Instruct", 0.05)
    assert parse_model("runs/sft.pt:-1e-1") == ("runs/sft.pt", -0.1)
    monkeypatch.chdir(tmp_path)
    os.mkdir("step:100")
    assert parse_model("step:100") == ("step:100", None)
    assert parse_model("step:100:2") == ("step:100", 2.0)


def test_parse_sizes_and_lines():
    assert [parse_size(text) for text in ("5GB", "1.5m", "1000", "2 KB")] == [5 * 10**9, 1_500_000, 1000, 2000]
    for text in ("", "0", "0.0001", "1e400", "9" * 400 + "TB", "-5GB"):
        with pytest.raises(ArgumentTypeError):
            parse_size(text)
    lines = {"0.25": (0.25, 0.75), "0.2:0.6": (0.2, 0.6), "auto": (None, None), "auto:0.5": (None, 0.5)}
    for text, parsed in lines.items():
        assert parse_lines(text) == parsed == parse_lines(format_lines(parsed))


BAD = [
    ("linear {a} {wide}", r"x is \(3, 2\), but \(2, 2\) in .*a; "),
    ("linear {a} {other}", "has no tensor x"),
    ("linear {a} {untied}", "has no tensor lm_head.weight.*untie"),
    ("linear {a} {theta}", "rope_theta is 5.0"),
    ("linear {a} {integer}", "x is torch.int64"),
    ("ties {a} {b} --base {integer}", "x is torch.int64"),
    ("linear {a} {llama}", 'model_type is "llama"'),
    ("linear {a} {nan}", "nan: x holds NaN or infinity"),
    ("linear {a} {large} --dtype float16", "x: the merged values are not finite in float16"),
    ("linear {a}:1 {b}:-1", "sum to zero"),
    ("ties {a}:0 {b}:0 --base {base}", "sum to zero"),
    ("slerp {a}:1 {b}:-1", "sum to zero"),
    ("linear {a} {missing}", "no such checkpoint"),
    ("linear {a}:much {b}", "not a finite number"),
    ("linear {a}:nan {b}", "not a finite number"),
    ("slerp {a} {b} {b}", "3 given"),
    ("slerp {a} --t 0.5", "1 given"),
    ("slerp {a}:1 {b}:3 --t 0.5", "not both"),
    ("ties {a} {b}", "needs --base"),
    ("ties {base} --base {base}", "only the base is given"),
    ("ties {a} {b} --base {wide}", r"x is \(2, 2\), but \(3, 2\)"),
    ("ties {a} {b} --base {base} --density 0", "--density 0.0"),
    ("ties {a} {b} --base {base} --density 1.5", "--density 1.5"),
    ("ties {a} {b} --base {base} --lambda nan", "--lambda"),
    ("ties {a} {b} --base {base} --density 0.1 0.2 0.3", "3 numbers for 2 models"),
    ("ties {a} {b} --base {base} --lines 0.1:x", "--lines 0.1:x"),
    ("ties {a} {b} --base {base} --rescale density", "use l1"),
    ("ties {a} {b} --base {base} --rescale l1 --trim global", "does not rescale"),
    ("della {a} {b} --base {base} --density 0.1", "--epsilon 0.15"),
    ("breadcrumbs {a} {b} --base {base} --gamma 1", "--gamma: 1 is not below 1"),
    ("expo {a} --base {base}", "weight above 1"),
    ("expo {a}:1.5 {b}:1.5 --base {base}", "give one"),
    ("linear {a} {b} --weights-for x 1", "1 weights for 2 models"),
    ("linear {a} {b} --weights-for x 1 much", "'much' is not a finite number"),
    ("linear {a} {b} --weights-for x 1 -1", "sum to zero"),
    ("linear {a} {b} --weights-for y* 1 2", "matches no tensor of .*a;"),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    x = torch.tensor([[1.0, 2], [3, 4]])
    for name, tensors, config in [
        ("a", {"x": x}, TIED), ("b", {"x": x + 1}, TIED), ("base", {"x": x - 1}, TIED),
        ("wide", {"x": torch.zeros(3, 2)}, TIED), ("other", {"y": x}, TIED),
        ("theta", {"x": x}, {**TIED, "rope_theta": 5}),
        ("untied", {"x": x, "lm_head.weight": x}, UNTIED), ("llama", {"x": x}, {**TIED, "model_type": "llama"}),
        ("integer", {"x": x.long()}, TIED), ("nan", {"x": x / torch.tensor([1.0, math.nan])}, TIED),
        ("large", {"x": x * 1e6}, TIED),
    ]:  # fmt: skip
        save(folder / name, tensors, config)
    return folder


@pytest.mark.parametrize("suffix", ["", ".pt"])
@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input(faulty, tmp_path, capsys, command, message, suffix):
    names = {p.name: str(p) for p in faulty.iterdir()} | {"missing": str(faulty / "missing")}
    method, *rest = command.format(**names).split()
    out = tmp_path / f"deep/out{suffix}"
    with pytest.raises(SystemExit) as stopped:
        cli(lambda: main(["--method", method, "--out", str(out), "--models", *rest]))
    errors = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")
    ]  # NaN is met after the notes
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    with pytest.raises(InputError, match=message):
        raise InputError(errors[0])
    assert not [name for _, folders, files in os.walk(tmp_path) for name in files + folders if name != "deep"]


def test_out_is_never_an_input(faulty):
    a, b = str(faulty / "a"), str(faulty / "b")
    before, files = load(a), sorted(os.listdir(a))
    with pytest.raises(InputError, match="one of the inputs"):
        run(a + "/", "linear", [a + ":1", b])
    for inside in (a + "/out", a + "/deep/out.pt"):
        with pytest.raises(InputError, match="is inside the input"):
            run(inside, "linear", [a, b])
    with pytest.raises(InputError, match="has the input .*/a inside"):
        check_inputs(str(faulty), [b.replace("/b", "/missing"), a])
    assert_same(load(a), before)
    assert sorted(os.listdir(a)) == files


def test_the_closing_line_can_be_pasted(faulty, tmp_path, capsys):
    out = tmp_path / "a name; with 'signs'"
    run(out, "linear", [str(faulty / "a"), str(faulty / "b")])
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last.removeprefix("next:"))
    assert words == ["python", "eval.py", "--ckpt", str(out), "--tasks", "gsm8k", "--out", f"{out}.eval"]


def test_every_method_has_its_formulas_and_flags():
    assert {*METHODS} == {*METHOD_NAMES}
    assert all((sparsify is not None) == (name in SPARSE) for name, (sparsify, _) in METHODS.items())


def test_from_the_command_line(faulty, tmp_path):
    def shell(*words):
        command = [sys.executable, os.path.join(ROOT, "merge.py"), "--method", "ties", "--out", str(tmp_path / "out")]
        return subprocess.run(
            [*command, *words], check=False, capture_output=True, text=True, cwd=tmp_path, timeout=1000
        )

    a, b, base = (str(faulty / n) for n in ("a", "b", "base"))
    bad = shell("--models", a, b)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    assert os.listdir(tmp_path) == []
    good = shell("--models", a, b + ":2", "--base", base, "--trim", "global", "--density", "0.5")
    assert good.returncode == 0 and "wrote" in good.stdout
    # deltas are 1 and 2 everywhere, all equal, so all stay: base + (1 + 2 * 2) / 3
    torch.testing.assert_close(load(tmp_path / "out")["x"], load(base)["x"] + 5 / 3)


def sigterm_at_the_fourth_tensor(folder):
    """merge.merge_checkpoints in this process: sends SIGTERM before its fourth tensor."""

    def stopped(*args, real=merge.merge_checkpoints, **more):
        for n, pair in enumerate(real(*args, **more)):
            if n == 3:
                assert len(os.listdir(folder)) == 1, "it writes into a temporary folder"
                os.kill(os.getpid(), signal.SIGTERM)
            yield pair

    merge.merge_checkpoints = stopped


def test_a_running_training_is_not_written_over(family, tmp_path):
    """Its end would replace the merge."""
    models, out = [str(family / "a"), str(family / "b")], tmp_path / "out"
    path = tmp_path / "out.run" / "lock"
    path.parent.mkdir()
    with open(path, "w") as f:
        fcntl.flock(f.fileno(), fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: a training run is writing there"):
            run(out, "linear", models)
        assert not out.exists()
    run(out, "linear", models)  # the lock of a run that was killed


def test_ctrl_c_says_that_nothing_is_written(family, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "linear", (None, stop))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "linear", [str(family / "a"), str(family / "b")])
    assert capsys.readouterr().err.endswith(f"stopped: {tmp_path}/out is not written\n") and not os.listdir(tmp_path)


def test_sigterm_leaves_nothing_half_written(tiny, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    command = ("--method", "linear", "--out", folder / "out", "--models", tiny, tiny)
    prepare = {0: (sigterm_at_the_fourth_tensor, folder)}
    codes, texts = launch("merge", command, tmp_path / "text", prepare=prepare)
    assert codes == [143] and os.listdir(folder) == [], texts
