"""merge.py against mergekit 0.1.5, against TIES written out in numpy, by hand, by algebra, and on bad input."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import merge
from model import Checkpoint, InputError, Qwen2, cli, write_checkpoint

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


@pytest.fixture(scope="module", params=["tied", "untied"])
def family(request, tmp_path_factory):
    """Directories base, a, b, c of one architecture; the models differ from the base by large continuous noise."""
    folder = tmp_path_factory.mktemp(request.param)
    generator = torch.Generator().manual_seed(1)
    base = Qwen2(TIED if request.param == "tied" else UNTIED).init_weights(generator)
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name in ("base", "a", "b", "c"):
        noise = 0.0 if name == "base" else 0.02
        save(folder / name, {n: x + noise * torch.randn(x.shape, generator=generator) for n, x in start.items()},
             base.raw_config)  # fmt: skip
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# mergekit


def run_mergekit(out, method, models, weights, base=None, per_model=None, **parameters):
    """models: absolute paths. -> {name: tensor}"""
    mergekit_merge, mergekit_config = pytest.importorskip("mergekit.merge"), pytest.importorskip("mergekit.config")
    config = {"merge_method": method, "dtype": "float32", "parameters": parameters, "models": []}
    for model, weight in zip(models, weights):
        own = {} if weight is None else {"weight": weight, **(per_model or {})}
        config["models"].append({"model": str(model), "parameters": own})
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
@pytest.mark.parametrize("normalize", [None, True])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_equals_mergekit_given_the_same_masks(family, tmp_path, monkeypatch, method, normalize, weights):
    sparsify = pytest.importorskip("mergekit.sparsify")
    paths = [family / n for n in ("a", "b", "c")[: len(weights)]]
    base, masks = load(family / "base"), {}
    for i, p in enumerate(paths):
        for name, x in load(p).items():
            mask = torch.rand(x.shape, generator=merge.mask_generator(7, name, i)) < 0.4
            masks[(x - base[name]).numpy().tobytes()] = mask.float()

    def same_mask(tensor, density, rescale_norm):
        return sparsify.rescaled_masked_tensor(tensor, masks[tensor.numpy().tobytes()], rescale_norm)

    monkeypatch.setattr(sparsify, "bernoulli", same_mask)
    more = {} if normalize is None else {"normalize": normalize}
    theirs = run_mergekit(tmp_path / "theirs", method, paths, weights, family / "base", {"density": 0.4}, **more)
    models = [f"{p}:{w}" for p, w in zip(paths, weights)]
    flags = ["--density", 0.4, "--seed", 7] + ["--normalize"] * bool(normalize)
    ours = run(tmp_path / "ours", method, models, "--base", family / "base", *flags)
    # theirs sums the L1 norms in fp32: one spacing of fp32 at the size of the rescaled deltas (up to 0.5) may differ
    assert_same(ours, theirs, rtol=0, atol=6e-8)
    assert any((ours[n] != base[n]).any() for n in ours)


def test_sign_by_count_equals_mergekit(family):
    method = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    name = "model.layers.0.mlp.up_proj.weight"
    base, *models = (load(family / n)[name] for n in ("base", "a", "b", "c"))
    deltas = torch.stack([(m - base).flatten() for m in models])
    weights = torch.tensor([0.5, 1.0, 2.0])
    weighted = deltas * weights[:, None]
    agree = method.get_mask(weighted, "count")
    theirs = (weighted * agree).sum(0) / (weights[:, None] * agree).sum(0).clamp(min=1e-9)
    assert torch.equal(merge.ties(deltas, weights, "count"), theirs)
    assert not torch.equal(merge.ties(deltas, weights, "sum"), theirs)


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
    monkeypatch.setattr(merge, "CHUNK", 16)  # and more than one chunk a tensor
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


def test_ties_by_hand():
    deltas = torch.tensor([[3.0, 1.0, 0.0, -2.0], [-1.0, 1.0, 0.0, -4.0], [2.0, -3.0, 5.0, 0.0]])
    one = torch.ones(3)
    assert merge.elect_sign(deltas).tolist() == [1, -1, 1, -1]
    assert merge.elect_sign(deltas, "count").tolist() == [1, 1, 1, -1]
    opposite = torch.tensor([[2.0], [-2.0]])
    assert merge.elect_sign(opposite).tolist() == [1] and merge.elect_sign(opposite, "sum", -1).tolist() == [-1]
    assert merge.ties(deltas, one).tolist() == [2.5, -3, 5, -3]
    assert merge.ties(deltas, one, "count").tolist() == [2.5, 1, 5, -3]
    assert merge.ties(deltas, one, normalize=False).tolist() == [5, -3, 5, -6]
    weights = torch.tensor([1.0, 6.0, 1.0])  # votes 3 - 6 + 2, 1 + 6 - 3, 5, -2 - 24
    assert torch.allclose(merge.ties(deltas, weights), torch.tensor([-1, 1, 5, -26 / 7]))
    # those that agree have weights 1 - 1 = 0: divided by 1, as in mergekit
    assert merge.ties(torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1.0, -1.0, 1.0])).tolist() == [2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_kth_largest_is_the_sorted_one(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    want = x.abs().sort(descending=True).values[k - 1].item()
    assert merge.kth_largest(lambda: [x[:cut], x[cut:]], k) == want


def test_trim_keeps_an_exact_number_and_the_first_of_equals():
    x = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.5, -2.0]])
    assert merge.trim_tensor(x, 0.5).tolist() == [[0, -2, 2], [2, 0, 0]]
    assert merge.trim_tensor(x, 0.01).tolist() == [[0, -2, 0], [0, 0, 0]]  # never nothing
    assert merge.trim_tensor(torch.zeros(5), 0.4).tolist() == [0] * 5
    assert merge.trim_tensor(x, 1.0) is x


# ---------------------------------------------------------------------------------------------------------------------
# Slerp, dare, algebra


def test_slerp_by_hand():
    x, y = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 2, 0])
    r = 2 * math.sqrt(0.5)
    torch.testing.assert_close(merge.slerp(x, y, 0.5), torch.tensor([r, r, 0]))
    torch.testing.assert_close(merge.slerp(x, y, 1 / 3), torch.tensor([math.sqrt(3), 1, 0]))
    torch.testing.assert_close(merge.slerp(x, torch.zeros(3), 0.5), x * math.sqrt(0.5))  # zeros: at right angles


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-6, 1e-3, 0.03, 0.0317, 0.1, math.pi - 1e-4, math.pi])
def test_slerp_stays_finite_and_true_at_any_angle(angle):
    t = 0.3
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    out = merge.slerp(x, y, t)
    if angle > 3:  # opposite: the arc is not defined, the straight line is
        torch.testing.assert_close(out, 0.7 * x + 0.3 * y)
    else:  # the straight line misses the arc by at most angle^2 / 8
        arc = torch.tensor([math.cos(t * angle), math.sin(t * angle)])
        torch.testing.assert_close(out, arc, rtol=0, atol=1.3e-4 if math.cos(angle) > 0.9995 else 1e-6)
        assert torch.equal(out, x * 0.7 + y * 0.3) == (math.cos(angle) > 0.9995)
    torch.testing.assert_close(merge.slerp(x, y, 0.0), x)
    torch.testing.assert_close(merge.slerp(x, y, 1.0), y)


def test_dare_keeps_its_share_and_the_l1_norm():
    delta = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    masks = []
    for name, i in (("x", 0), ("x", 1), ("y", 0)):
        out = merge.dare(delta, 0.3, merge.mask_generator(5, name, i))
        masks.append(out != 0)
        assert abs(masks[-1].float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / delta.numel())
        torch.testing.assert_close(out.abs().sum(), delta.abs().sum())
        kept = delta[masks[-1]]
        torch.testing.assert_close(out[masks[-1]], kept * (delta.abs().sum() / kept.abs().sum()))
    for i, j in ((0, 1), (0, 2)):  # independent masks: both keep 0.09
        assert abs((masks[i] & masks[j]).float().mean() - 0.09) < 0.01
    assert merge.dare(torch.zeros(4), 0.5, torch.Generator()).tolist() == [0] * 4


def test_dare_is_determined_by_the_seed(family, tmp_path):
    models, base = [str(family / "a"), str(family / "b")], family / "base"

    def once(seed, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run(tmp_path / "out", "dare_ties", models, "--base", base, "--density", 0.5, "--seed", seed)
        finally:
            torch.set_num_threads(before)

    first = once(3)
    torch.rand(5)  # whatever else draws random numbers
    assert_same(once(3, threads=2), first)
    assert any(not torch.equal(x, first[n]) for n, x in once(4).items())


def test_algebra(family, tmp_path):
    a, b, c, base = (str(family / n) for n in ("a", "b", "c", "base"))
    A, out, on = load(a), tmp_path / "out", ["--base", base]
    assert_same(run(out, "linear", [a, a]), A)
    assert_same(run(out, "linear", [f"{a}:1", f"{b}:0"]), A)
    assert_same(run(out, "slerp", [a, a], "--t", 0.37), A, rtol=1e-6, atol=0)
    assert_same(run(out, "linear", [f"{a}:2", f"{b}:6"]), run(tmp_path / "o2", "linear", [f"{a}:1", f"{b}:3"]))
    for method in merge.NEEDS_BASE:
        assert_same(run(out, method, [f"{a}:0", f"{b}:0"], *on, "--no-normalize"), load(base))
        if method.endswith("ties"):  # one model: its own sign is elected, so nothing is lost
            one = run(tmp_path / "ta", "task_arithmetic", [f"{a}:0.7"], *on, "--lambda", 0.9)
            assert_same(run(out, method, [f"{a}:0.7"], *on, "--lambda", 0.9, "--no-normalize"), one)
        else:  # weight w is lambda w
            half = run(tmp_path / "half", method, [f"{a}:0.5", f"{b}:0.25"], *on, "--density", 0.5)
            full = run(out, method, [f"{a}:1", f"{b}:0.5"], *on, "--lambda", 0.5, "--density", 0.5)
            assert_same(full, half, rtol=1e-6, atol=1e-8)
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
    assert records[0]["method"] == "ties" and records[0]["density"] == 0.4 and records[0]["normalize"] is True


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
