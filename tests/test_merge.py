"""merge.py against mergekit 0.1.5, against TIES written out in numpy, by hand, by algebra, and on bad input."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import fusion
import merge
from checkpoint import Checkpoint, InputError, cli, write_checkpoint
from model import Qwen2

TIED = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": True,
    "use_sliding_window": False, "torch_dtype": "float32",
}  # fmt: skip
UNTIED = {**TIED, "tie_word_embeddings": False}
FILES = {"tokenizer.json": '{"of": "base"}', "generation_config.json": "{}"}


def save(path, tensors, config=TIED, files=FILES):
    """A checkpoint of any tensors: merging asks for no model."""
    tensors = {name: torch.as_tensor(x) for name, x in tensors.items()}
    specs = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    write_checkpoint(str(path), config, files, specs, tensors.items())
    return str(path)


def load(path):
    c = Checkpoint(str(path))
    return {name: c.tensor(name) for name in c.names}


def run(out, method, models, *options):
    merge.main(["--method", method, "--models", *models, "--out", str(out), *map(str, options)])
    return load(out)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Directories base, a, b, c of one architecture; the models differ from the base by large continuous noise."""
    folder = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(1)
    base = Qwen2(UNTIED).init_weights(generator)
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name in ("base", "a", "b", "c"):
        noise = 0.0 if name == "base" else 0.02
        save(folder / name, {n: x + noise * torch.randn(x.shape, generator=generator) for n, x in start.items()},
             base.raw_config)  # fmt: skip
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# mergekit


def run_mergekit(out, method, models, weights, base=None, per_model=None, **parameters):
    """models: absolute paths. per_model: further parameters of each. -> {name: tensor}"""
    mergekit_merge, mergekit_config = pytest.importorskip("mergekit.merge"), pytest.importorskip("mergekit.config")
    config = {"merge_method": method, "dtype": "float32", "parameters": parameters, "models": []}
    for model, weight in zip(models, weights):
        own = {} if weight is None else {"weight": weight}
        config["models"].append({"model": str(model), "parameters": own | (per_model or [{}] * 9)[len(config["models"])]})
    if base:
        config["base_model"] = str(base)
    options = mergekit_merge.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    mergekit_merge.run_merge(mergekit_config.MergeConfiguration.model_validate(config), str(out), options)
    return load(out)


def assert_same(ours, theirs, **tolerance):
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.05, 0.95), (1.0, 2.0, 0.3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_equals_mergekit(family, tmp_path, weights, normalize):
    names = ["a", "b", "c"][: len(weights)]
    theirs = run_mergekit(tmp_path / "theirs", "linear", [family / n for n in names], weights, normalize=normalize)
    flag = [] if normalize else ["--no-normalize"]
    assert_same(run(tmp_path / "ours", "linear", [f"{family / n}:{w}" for n, w in zip(names, weights)], *flag), theirs)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_equals_mergekit(family, tmp_path, t):
    models = [str(family / "a"), str(family / "b")]
    for start in models:
        theirs = run_mergekit(tmp_path / "theirs", "slerp", models, (None, None), start, t=t)
        ours = run(tmp_path / "ours", "slerp", models, "--t", t, "--base", start)
        assert_same(ours, theirs, rtol=1e-6, atol=1e-8)
    by_weight = run(tmp_path / "weights", "slerp", [f"{models[0]}:{1 - t}", f"{models[1]}:{t}"])
    assert_same(run(tmp_path / "ours", "slerp", models, "--t", t), by_weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.5, -0.2, 1.5)])
@pytest.mark.parametrize(
    ("method", "options", "parameters"),
    [
        ("task_arithmetic", [], {}),
        ("task_arithmetic", ["--normalize", "--lambda", "0.8"], {"normalize": True, "lambda": 0.8}),
        ("ties", [], {}),
        ("ties", ["--density", "0.2", "--lambda", "1.5"], {"density": 0.2, "lambda": 1.5}),
        ("ties", ["--density", "0.53", "--no-normalize", "--trim", "tensor"], {"density": 0.53, "normalize": False}),
        ("ties", ["--density", "0.0001"], {"density": 0.0001}),
    ],
)
def test_delta_methods_equal_mergekit(family, tmp_path, method, options, parameters, weights):
    paths = [family / n for n in ("a", "b", "c")[: len(weights)]]
    theirs = run_mergekit(tmp_path / "theirs", method, paths, weights, family / "base", **parameters)
    models = [f"{p}:{w}" for p, w in zip(paths, weights)]
    assert_same(run(tmp_path / "ours", method, models, "--base", family / "base", *options), theirs)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -0.2, 1.5)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare_linear", {}),
        ("dare_ties", {"normalize": True}),
        ("dare_linear", {"rescale": False}),
        ("della", {"epsilon": 0.2}),
        ("della_linear", {"lambda": 0.7}),
        ("breadcrumbs", {"gamma": 0.1}),
        ("breadcrumbs", {"rescale": True}),
        ("breadcrumbs_ties", {"normalize": True}),
        ("ties", {"rescale": True}),
    ],
)
def test_sparse_methods_equal_mergekit_given_the_same_masks(family, tmp_path, monkeypatch, method, options, weights):
    """Each model has its own density; the random numbers are those of merge.mask_generator."""
    pytest.importorskip("mergekit.sparsify")
    paths, densities = [family / n for n in ("a", "b", "c")[: len(weights)]], [0.4, 0.6, 0.25][: len(weights)]
    base, names = load(family / "base"), {}
    for i, p in enumerate(paths):
        names |= {(x - base[name]).numpy().tobytes(): (name, i) for name, x in load(p).items()}
    draws = []
    sparsify = mergekit_sparsify(monkeypatch, lambda delta: draws.append(names[delta.numpy().tobytes()]))
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=merge.mask_generator(7, *draws[-1])) < p).float()
    )
    own = [{"weight": w, "density": d} for w, d in zip(weights, densities)]
    per_model = [o | {k: v for k, v in options.items() if k in ("epsilon", "gamma")} for o in own]
    shared = {k: v for k, v in options.items() if k not in ("epsilon", "gamma")}
    theirs = run_mergekit(tmp_path / "theirs", method, paths, weights, family / "base", per_model, **shared)
    assert draws and sparsify
    models = [f"{p}:{w}" for p, w in zip(paths, weights)]
    flags = ["--density", *densities, "--seed", 7]
    for key, value in options.items():
        if key == "rescale":
            flags += ["--rescale", "l1" if value else "none"]
        else:
            flags += ["--normalize"] if key == "normalize" else [f"--{key}", value]
    ours = run(tmp_path / "ours", method, models, "--base", family / "base", *flags)
    # theirs sums the L1 norms in fp32: one spacing of fp32 at the size of the rescaled deltas (up to 0.5) may differ
    assert_same(ours, theirs, rtol=0, atol=6e-8)
    assert any((ours[n] != base[n]).any() for n in ours)


def mergekit_sparsify(monkeypatch, seen):
    """Has mergekit call seen(delta) before it sparsifies a delta."""
    import mergekit.merge_methods.generalized_task_arithmetic as theirs

    original = theirs.sparsify
    monkeypatch.setattr(theirs, "sparsify", lambda delta, **more: (seen(delta), original(delta, **more))[1])
    return original


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_as_its_paper_has_it(family, tmp_path, method):
    base, a = load(family / "base"), load(family / "a")
    flags = ["--base", family / "base", "--density", 0.3, "--seed", 2, "--rescale", "density"]
    for name, x in run(tmp_path / "out", method, [str(family / "a")], *flags).items():
        kept = torch.rand(x.numel(), generator=merge.mask_generator(2, name, 0)).view(x.shape) < 0.3
        torch.testing.assert_close(x, base[name] + (a[name] - base[name]) * kept / 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# TIES, written out


def numpy_ties(base, models, weights, density, lam, trim, sign):
    """Algorithm 1 of arXiv 2306.01708 on whole models, as flat vectors. base, models: {name: array}."""
    names = sorted(base)
    d = np.stack([np.concatenate([m[n].ravel() - base[n].ravel() for n in names]) for m in models])
    ends = np.cumsum([base[n].size for n in names])
    for part in np.split(np.arange(d.shape[1]), ends[:-1] if trim == "tensor" else []):
        for row in d:
            size = np.abs(row[part])
            if trim == "global" and int(size.size * density) < size.size:
                row[part[size < np.sort(size)[size.size - int(size.size * density) - 1]]] = 0
            elif trim == "tensor":
                row[part[np.argsort(-size, kind="stable")[max(1, int(density * size.size)) :]]] = 0
    d *= np.array(weights)[:, None]
    s = np.sign((d if sign == "sum" else np.sign(d)).sum(0))
    s[s == 0] = 1 if trim == "tensor" or s.sum() > 0 else -1
    agree = np.sign(d) == s
    share = (np.array(weights)[:, None] * agree).sum(0)
    merged = lam * (d * agree).sum(0) / np.where(share == 0, 1, share)
    return {n: base[n] + x.reshape(base[n].shape) for n, x in zip(names, np.split(merged, ends[:-1]))}


@pytest.mark.parametrize("sign", ["sum", "count"])
@pytest.mark.parametrize("trim", ["tensor", "global"])
@pytest.mark.parametrize("seed", range(6))
def test_ties_equals_its_definition(tmp_path, monkeypatch, trim, sign, seed):
    """Small whole numbers, so that equal magnitudes at the threshold and votes that cancel are everywhere."""
    monkeypatch.setattr(fusion, "CHUNK", 16)  # and more than one chunk a tensor
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (9, 7), "b.bias": (5,), "c.weight": (3, 4, 2), "d.bias": (1,)}
    draw = lambda scale: {n: rng.integers(-scale, scale + 1, s).astype(np.float32) for n, s in shapes.items()}
    base, models = draw(9), [draw(4) for _ in range(2 + seed % 2)]
    models = [{n: base[n] + x for n, x in m.items()} for m in models]
    density, lam = [0.2, 0.5, 0.03, 1.0, 0.7, 0.33][seed], [1.0, 0.5][seed % 2]
    weights = [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]][seed // 2 % 2][: len(models)]
    paths = [f"{save(tmp_path / str(i), m)}:{w}" for i, (m, w) in enumerate(zip(models, weights))]
    ours = run(tmp_path / "out", "ties", paths, "--base", save(tmp_path / "base", base), "--density", density,
               "--lambda", lam, "--trim", trim, "--sign", sign)  # fmt: skip
    want = numpy_ties(base, models, weights, density, lam, trim, sign)
    for n in shapes:
        np.testing.assert_allclose(ours[n].numpy(), want[n], rtol=1e-6, atol=0)


def test_trims_differ_and_cancelled_votes_follow_the_majority(tmp_path):
    base = save(tmp_path / "base", {"x": torch.zeros(4), "y": torch.zeros(4)})
    a = save(tmp_path / "a", {"x": torch.tensor([8.0, -7, 6, 5]), "y": torch.tensor([4.0, -3, 2, 1])})
    b = save(tmp_path / "b", {"x": torch.tensor([-8.0, -7, -1, 0]), "y": torch.tensor([-2.0, -1, 0, 0])})
    flags = ["--base", base, "--density", 0.5, "--trim"]
    # tensor: a keeps 8 -7 | 4 -3, b keeps -8 -7 | -2 -1; votes 0 - | + -, and zero counts as +
    out = run(tmp_path / "tensor", "ties", [a, b], *flags, "tensor")
    assert out["x"].tolist() == [8, -7, 0, 0] and out["y"].tolist() == [4, -2, 0, 0]
    # global: int(8 * 0.5) + 1 = 5 of 8 stay, and equals of the fifth. a: 8 -7 6 5 | 4; b: -8 -7 -1 | -2 -1.
    # votes 0 - + + | + -: three plus, two minus, so the first element, where they cancel, takes the plus
    out = run(tmp_path / "global", "ties", [a, b], *flags, "global")
    assert out["x"].tolist() == [8, -7, 6, 5] and out["y"].tolist() == [4, -1, 0, 0]
    # the same upside down: the majority is minus
    c, d = (save(tmp_path / f"-{m[-1]}", {n: -x for n, x in load(m).items()}) for m in (a, b))
    out = run(tmp_path / "minus", "ties", [c, d], *flags, "global")
    assert out["x"].tolist() == [-8, 7, -6, -5] and out["y"].tolist() == [-4, 1, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Slerp, dare, algebra


@pytest.mark.parametrize("method", merge.RANDOM)
def test_random_methods_are_determined_by_the_seed(family, tmp_path, method):
    models, base = [str(family / "a"), str(family / "b")], family / "base"
    once = lambda seed, threads=1: run(
        tmp_path / "out", method, models, "--base", base, "--density", 0.5, "--seed", seed, "--threads", threads
    )
    first = once(3)
    torch.rand(5)  # whatever else draws random numbers
    assert_same(once(3, threads=4), first)
    assert any(not torch.equal(x, first[n]) for n, x in once(4).items())


def test_algebra(family, tmp_path):
    a, b, c, base = (str(family / n) for n in ("a", "b", "c", "base"))
    A, out, on = load(a), tmp_path / "out", ["--base", base]
    assert_same(run(out, "linear", [a, a]), A)
    assert_same(run(out, "linear", [f"{a}:1", f"{b}:0"]), A)
    assert_same(run(out, "slerp", [a, a], "--t", 0.37), A, rtol=1e-6, atol=0)
    assert_same(run(out, "linear", [f"{a}:2", f"{b}:6"]), run(tmp_path / "o2", "linear", [f"{a}:1", f"{b}:3"]))
    for method in merge.NEEDS_BASE[:-1]:
        assert_same(run(out, method, [f"{a}:0", f"{b}:0"], *on, "--no-normalize"), load(base))
        ta = run(tmp_path / "ta", "task_arithmetic", [f"{a}:0.7"], *on, "--lambda", 0.9)
        flags = [*on, "--lambda", 0.9, "--no-normalize"]
        if method in merge.SPARSE:  # density 1; one model's own sign is elected, so nothing is lost
            flags += ["--density", 1, "--rescale", "none"]
        assert_same(run(out, method, [f"{a}:0.7"], *flags), ta)
        if method not in merge.ELECTS:  # weight w is lambda w
            flags = [*on] + ["--density", 0.5] * (method in merge.SPARSE)
            half = run(tmp_path / "half", method, [f"{a}:0.5", f"{b}:0.25"], *flags)
            assert_same(run(out, method, [f"{a}:1", f"{b}:0.5"], *flags, "--lambda", 0.5), half, rtol=1e-6, atol=1e-8)
    assert_same(run(out, "expo", [f"{a}:1.3"], *on), run(tmp_path / "ta", "task_arithmetic", [f"{a}:1.3"], *on))
    for trim in ("tensor", "global"):
        flags = [*on, "--density", 0.3, "--trim", trim]
        turned = run(tmp_path / "o2", "ties", [c, a, b], *flags)
        assert_same(run(out, "ties", [a, b, c], *flags), turned, rtol=1e-5, atol=1e-8)
        assert_same(run(out, "ties", [a, a], *flags), run(tmp_path / "o2", "ties", [a], *flags), rtol=1e-6, atol=1e-8)


def test_the_base_among_the_models_is_left_out(family, tmp_path, capsys):
    a, base = str(family / "a"), str(family / "base")
    want = run(tmp_path / "o1", "task_arithmetic", [a], "--base", base, "--normalize")
    assert_same(run(tmp_path / "o2", "task_arithmetic", [base + "/", a], "--base", base, "--normalize"), want)
    assert "left out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Groups of tensors, depth


def test_weights_for_groups_of_tensors(family, tmp_path):
    a, b, base = load(family / "a"), load(family / "b"), load(family / "base")
    models = [f"{family / 'a'}:0.3", str(family / "base"), f"{family / 'b'}:0.6"]
    groups = "--weights-for layers.[0-5].mlp.* 1 7 0 --weights-for *norm.weight 0 7 1 --weights-for 1.mlp.* .5 7 .5"
    out = run(tmp_path / "out", "task_arithmetic", models, "--base", family / "base", *groups.split())
    for name, x in out.items():
        w = (0.3, 0.6)
        w = (1, 0) if name.startswith("model.layers.0.mlp.") else w
        w = (0.5, 0.5) if name.startswith("model.layers.1.mlp.") else w  # the last that matches
        w = (0, 1) if name.endswith("norm.weight") else w
        torch.testing.assert_close(x, base[name] + w[0] * (a[name] - base[name]) + w[1] * (b[name] - base[name]))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["weights_for"][0] == ["layers.[0-5].mlp.*", [1, 0]]  # the base's own is gone, as the base is
    out = run(tmp_path / "out", "slerp", [str(family / "a"), str(family / "b")], "--weights-for", "lm_head.weight", 0, 1)
    torch.testing.assert_close(out["lm_head.weight"], b["lm_head.weight"])
    want = torch.stack([x["model.norm.weight"] for x in (a, b)]).mean(0)
    torch.testing.assert_close(out["model.norm.weight"], want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "expo"])
def test_lines_on_top_of_a_method(family, tmp_path, method):
    models = [f"{family / 'a'}:1.2"] + [str(family / "b")] * (method != "expo")
    flags = ["--base", family / "base"] + ["--density", 0.5] * (method != "expo")
    plain, base = run(tmp_path / "plain", method, models, *flags), load(family / "base")
    assert_same(run(tmp_path / "out", method, models, *flags, "--lines", "1:0"), plain)
    for text, first, last in (("0.25:0.5", 0.25, 0.75), ("0.25", 0.25, 1.0)):
        for name, x in run(tmp_path / "out", method, models, *flags, "--lines", text).items():
            scale = last if ".layers.1." in name else first
            torch.testing.assert_close(x, base[name] + scale * (plain[name] - base[name]), rtol=1e-5, atol=1e-7)


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
    assert "merge.json" not in one.files | other.files  # it tells of these weights, not of what is trained from them
    in_pt = torch.load(tmp_path / "out.pt", weights_only=True)["files"]["merge.json"]
    records = [json.loads(text) for text in ((tmp_path / "out" / "merge.json").read_text(), in_pt)]
    sums = [[m["sha256"] for m in (*r["models"], r["base"])] for r in records]
    assert sums[0] == sums[1] == [Checkpoint(p).fingerprint() for p in (*models, base)]
    assert records[0]["method"] == "ties" and records[0]["normalize"] is True
    assert [m["density"] for m in records[0]["models"]] == [0.4, 0.4] and "gamma" not in records[0]


def test_the_result_is_a_model(family, tmp_path, capsys):
    run(tmp_path / "out", "linear", [f"{family / 'a'}:0.05", f"{family / 'b'}:0.95"])
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed and "python eval.py --ckpt" in printed and "linear" in printed
    ids = torch.arange(7)[None]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(Qwen2.from_pretrained(tmp_path / "out")(ids), theirs(ids).logits)


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
    assert_same(run(tmp_path / "again", "linear", [str(tmp_path / "out"), models[0]], "--no-normalize"),
                run(tmp_path / "again2", "linear", [str(tmp_path / "one"), models[0]], "--no-normalize"))  # fmt: skip
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, want["lm_head.weight"])
    run(tmp_path / "out", "linear", models, "--shard-size", "1GB")  # one file does; the old shards are gone
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_shard_that_fails_leaves_what_was_there(faulty, tmp_path):
    x = torch.zeros(2, 2)
    good = {"x": x, "y": x}
    a, b = save(tmp_path / "a", good), save(tmp_path / "b", {"x": x, "y": x / 0})
    run(tmp_path / "out", "linear", [a])
    with pytest.raises(InputError, match="y: not finite"):
        run(tmp_path / "out", "linear", [a, b], "--shard-size", "16")
    assert_same(load(tmp_path / "out"), good)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


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
        out = run(tmp_path / "out", method, [f"{short}:{scale}", f"{long}:{scale}"], "--base", base, "--resize",
                  *(["--no-normalize"] if method == "linear" else []))[name]  # fmt: skip
        x, y, z = draw(5, 0), torch.cat([draw(4, 1).bfloat16().float(), draw(5, 0)[4:]]), draw(7, 2)[:5]
        torch.testing.assert_close(out, (y + z) / 2 if method == "linear" else y + z - x)
        assert Checkpoint(str(tmp_path / "out")).config["vocab_size"] == 5
    assert "has 4 rows; the result has 5" in capsys.readouterr().err


def test_tokenizers_that_differ(tmp_path, capsys):
    spec = {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "added_tokens": [{"id": 2, "content": "<e>"}]}
    again = {"version": "2", **spec, "model": {**spec["model"], "merges": [["a", "b"]]}}  # another way to write it
    other = {**spec, "added_tokens": [{"id": 2, "content": "<f>"}]}
    put = lambda name, content: save(tmp_path / name, {"x": torch.ones(2, 2)}, files={"tokenizer.json": content})
    a, b, c, d = put("a", json.dumps(spec)), put("b", json.dumps(again)), put("c", json.dumps(other)), put("d", "{")
    run(tmp_path / "out", "linear", [a, b])
    assert "note" not in capsys.readouterr().err
    with pytest.raises(InputError, match="c: its tokenizer has other tokens.*--allow-tokenizer-mismatch"):
        run(tmp_path / "out", "linear", [a, c])
    run(tmp_path / "out", "linear", [a, c], "--allow-tokenizer-mismatch")
    assert "other tokens" in capsys.readouterr().err
    assert json.loads(Checkpoint(str(tmp_path / "out")).files["tokenizer.json"]) == spec
    with pytest.raises(InputError, match="d/tokenizer.json: corrupt"):
        run(tmp_path / "out", "linear", [a, d])


def test_what_is_no_float_is_copied(tmp_path):
    x, n = torch.ones(2, 2), torch.tensor([3, 4])
    a, b = save(tmp_path / "a", {"x": x, "n": n}), save(tmp_path / "b", {"x": x, "n": n})
    out = run(tmp_path / "out", "linear", [a, b], "--dtype", "bfloat16")
    assert out["n"].tolist() == [3, 4] and out["n"].dtype == torch.int64 and out["x"].dtype == torch.bfloat16
    c = save(tmp_path / "c", {"x": x, "n": n + 1})
    with pytest.raises(InputError, match="n: torch.int64 and not the same"):
        run(tmp_path / "out", "linear", [a, c])


def test_in_order_bounds_what_is_in_memory():
    sizes, held, most = {f"{i}": n for i, n in enumerate([3, 10, 1, 1, 1, 9, 2, 2, 10, 4])}, [], []

    def work(name):
        held.append(sizes[name])  # taken out again when the result is taken
        most.append(sum(held))
        return name * 2

    for name, result in merge.in_order(work, sizes, 3):
        assert result == name * 2
        held.remove(sizes[name])
    assert held == [] and len(most) == len(sizes) and max(most) <= 15
    with pytest.raises(ZeroDivisionError):
        list(merge.in_order(lambda name: 1 / 0, sizes, 2))


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
    assert merge.parse_model("Qwen/Qwen2-0.5B-Instruct") == ("Qwen/Qwen2-0.5B-Instruct", None)
    assert merge.parse_model("Qwen/Qwen2-0.5B-Instruct:0.05") == ("Qwen/Qwen2-0.5B-Instruct", 0.05)
    assert merge.parse_model("runs/sft.pt:-1e-1") == ("runs/sft.pt", -0.1)
    monkeypatch.chdir(tmp_path)
    os.mkdir("step:100")
    assert merge.parse_model("step:100") == ("step:100", None)
    assert merge.parse_model("step:100:2") == ("step:100", 2.0)


BAD = [
    ("linear {a} {wide}", r"x is \(3, 2\), but \(2, 2\) in .*a; "),
    ("linear {a} {other}", "has no tensor x"),
    ("linear {a} {untied}", "has no tensor lm_head.weight.*untie"),
    ("linear {a} {theta}", "rope_theta is 5.0"),
    ("linear {a} {integer}", "x is torch.int64"),
    ("ties {a} {b} --base {integer}", "x is torch.int64"),
    ("linear {a} {llama}", "model_type is 'llama'"),
    ("linear {a} {nan}", "x: not finite in float32"),
    ("linear {a} {large} --dtype float16", "x: not finite in float16"),
    ("linear {a}:1 {b}:-1", "sum to zero"),
    ("ties {a}:0 {b}:0 --base {base}", "sum to zero"),
    ("slerp {a}:1 {b}:-1", "sum to zero"),
    ("linear {a} {missing}", "no such checkpoint"),
    ("linear {a}:much {b}", "no finite number"),
    ("linear {a}:nan {b}", "no finite number"),
    ("slerp {a} {b} {b}", "3 given"),
    ("slerp {a} --t 0.5", "1 given"),
    ("slerp {a}:1 {b}:3 --t 0.5", "not both"),
    ("ties {a} {b}", "needs --base"),
    ("ties {base} --base {base}", "nothing but the base"),
    ("ties {a} {b} --base {wide}", r"x is \(2, 2\), but \(3, 2\)"),
    ("ties {a} {b} --base {base} --density 0", "--density 0.0"),
    ("ties {a} {b} --base {base} --density 1.5", "--density 1.5"),
    ("ties {a} {b} --base {base} --lambda nan", "--lambda"),
    ("ties {a} {b} --base {base} --density 0.1 0.2 0.3", "3 numbers for 2 models"),
    ("ties {a} {b} --base {base} --lines 0.1:x", "--lines 0.1:x"),
    ("ties {a} {b} --base {base} --rescale density", "use l1"),
    ("ties {a} {b} --base {base} --rescale l1 --trim global", "rescales nothing"),
    ("della {a} {b} --base {base} --density 0.1", "--epsilon 0.15"),
    ("breadcrumbs {a} {b} --base {base} --gamma 1", "--gamma 1.0"),
    ("expo {a} --base {base}", "weight above 1"),
    ("expo {a}:1.5 {b}:1.5 --base {base}", "give one"),
    ("linear {a} {b} --weights-for x 1", "1 weights for 2 models"),
    ("linear {a} {b} --weights-for x 1 much", "'much' is no finite number"),
    ("linear {a} {b} --weights-for x 1 -1", "sum to zero"),
    ("linear {a} {b} --weights-for y* 1 2", "no tensor of .*a has such a name"),
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
        cli(lambda: merge.main(["--method", method, "--out", str(out), "--models", *rest]))
    errors = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")
    ]  # NaN is met after the notes
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    with pytest.raises(InputError, match=message):
        raise InputError(errors[0])
    assert not [name for _, folders, files in os.walk(tmp_path) for name in files + folders if name != "deep"]


def test_out_is_never_an_input(faulty):
    a, b = str(faulty / "a"), str(faulty / "b")
    before = load(a)
    with pytest.raises(InputError, match="one of the inputs"):
        run(a + "/", "linear", [a + ":1", b])
    assert_same(load(a), before)


def test_from_the_command_line(faulty, tmp_path):
    def shell(*words):
        command = [sys.executable, os.path.join(ROOT, "merge.py"), "--method", "ties", "--out", str(tmp_path / "out")]
        return subprocess.run(
            [*command, *words], check=False, capture_output=True, text=True, cwd=tmp_path, timeout=120
        )

    a, b, base = (str(faulty / n) for n in ("a", "b", "base"))
    bad = shell("--models", a, b)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    assert os.listdir(tmp_path) == []
    good = shell("--models", a, b + ":2", "--base", base, "--trim", "global", "--density", "0.5")
    assert good.returncode == 0 and "wrote" in good.stdout
    # deltas are 1 and 2 everywhere, all equal, so all stay: base + (1 + 2 * 2) / 3
    torch.testing.assert_close(load(tmp_path / "out")["x"], load(base)["x"] + 5 / 3)
