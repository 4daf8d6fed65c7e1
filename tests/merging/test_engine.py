"""Whole merges: against TIES, DARE and DELLA written out, by hand and by algebra."""

import json

import numpy as np
import pytest
import torch
from merge_families import assert_same, load, numpy_ties, run, save

from core.files import InputError
from merging import engine, methods
from merging.engine import mask_generator
from merging.flags import DELLA, ELECTS, NEEDS_BASE, RANDOM, SPARSE

# ---------------------------------------------------------------------------------------------------------------------
# DARE and DELLA as in their papers


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_as_its_paper_has_it(family, tmp_path, method):
    base, a = load(family / "base"), load(family / "a")
    flags = ["--base", family / "base", "--density", 0.3, "--seed", 2, "--rescale", "density"]
    for name, x in run(tmp_path / "out", method, [str(family / "a")], *flags).items():
        kept = torch.rand(x.numel(), generator=mask_generator(2, name, 0)).view(x.shape) < 0.3
        torch.testing.assert_close(x, base[name] + (a[name] - base[name]) * kept / 0.3)


@pytest.mark.parametrize("method", DELLA)
def test_della_as_its_paper_has_it(family, tmp_path, method):
    """Each element that stays is divided by its own probability to stay (arXiv 2406.11617, section 3)."""
    base, a = load(family / "base"), load(family / "a")
    flags = ["--base", family / "base", "--density", 0.4, "--epsilon", 0.2, "--seed", 2, "--rescale", "density"]
    scaled = 0
    for name, x in run(tmp_path / "out", method, [str(family / "a")], *flags).items():
        delta = a[name] - base[name]
        rank = delta.view(-1, delta.shape[-1]).abs().argsort(1).argsort(1).view(delta.shape)
        p = 0.2 + 0.4 * rank / max(1, delta.shape[-1] - 1)
        kept = torch.rand(x.numel(), generator=mask_generator(2, name, 0)).view(x.shape) < p
        torch.testing.assert_close(x, base[name] + delta * kept / p, rtol=1e-5, atol=1e-7)
        scaled += int(kept.sum())
    assert 0.3 < scaled / sum(x.numel() for x in a.values()) < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic in float64


def trimmed_ties(keep, deltas, weights):
    """TIES' merge of trimmed deltas in numpy."""
    d = np.stack(deltas) * keep * np.array(weights)[:, None]
    agree = np.sign(d) == np.where(d.sum(0) >= 0, 1, -1)
    share = (agree * np.array(weights)[:, None]).sum(0)
    return (d * agree).sum(0) / np.where(share == 0, 1, share)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float64_is_rounded_once(tmp_path, dtype):
    """Every element is the exact one, rounded: numpy in float64 from the stored numbers."""
    rng = np.random.default_rng(4)
    base = rng.normal(size=3000).astype(np.float32)
    models = [base + rng.normal(0, s, 3000).astype(np.float32) for s in (0.01, 0.02, 0.3)]
    weights, density = (
        [0.31830989, 0.15915494, 0.70710678],
        0.4,
    )  # with 0.3, 0.1, 0.7 many are halfway between two float32
    paths = [f"{save(tmp_path / str(i), {'x': m})}:{w}" for i, (m, w) in enumerate(zip(models, weights))]
    b, *d = (np.float64(x) for x in (base, *models))
    sizes = [np.abs(x - b) for x in d]
    keep = np.stack([s >= np.sort(s)[-int(density * 3000)] for s in sizes])
    odds = [torch.rand(3000, generator=mask_generator(0, "x", i)).numpy() < density for i in range(3)]
    deltas = [x - b for x in d]
    l1 = [s.sum() / s[k].sum() for s, k in zip(sizes, odds)]
    sums = lambda factors: b + sum(w * x * f for w, x, f in zip(weights, deltas, factors))
    trimmed = sizes[0] >= np.sort(sizes[0])[::-1][int(3000 * density)]
    want = {
        "linear": sum(w * x for w, x in zip(weights, d)) / sum(weights),
        "task_arithmetic --lambda 0.7": b + 0.7 * (sums([1, 1, 1]) - b),
        f"ties --density {density}": b + trimmed_ties(keep, deltas, weights),
        f"dare_linear --rescale density --density {density}": sums([k / density for k in odds]),
        f"dare_linear --density {density}": sums([k * f for k, f in zip(odds, l1)]),
        f"ties --trim global --density {density}": b + trimmed_ties(trimmed[None], deltas[:1], weights[:1]),
    }
    differs = 0
    for command, y in want.items():
        method, *flags = command.split()
        flags += ["--dtype", dtype] + (["--base", str(tmp_path / "base")] if method != "linear" else [])
        save(tmp_path / "base", {"x": base})
        used = paths[:1] if "global" in flags else paths
        ours = run(tmp_path / "out", method, used, *flags, "--arithmetic", "float64")["x"]
        assert torch.equal(ours, methods.rounded(torch.from_numpy(y), ours.dtype)), command
        default = run(tmp_path / "out", method, used, *flags)["x"]
        torch.testing.assert_close(default, ours, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5)
        differs += int((default != ours).sum())
    assert differs or dtype == "bfloat16"  # float32 does round on the way
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["arithmetic"] == "float32"


# ---------------------------------------------------------------------------------------------------------------------
# TIES, written out


@pytest.mark.parametrize("sign", ["sum", "count"])
@pytest.mark.parametrize("trim", ["tensor", "global"])
@pytest.mark.parametrize("seed", range(6))
def test_ties_equals_its_definition(tmp_path, monkeypatch, trim, sign, seed):
    """Small whole numbers, so that equal magnitudes at the threshold and votes that cancel are everywhere."""
    monkeypatch.setattr(methods, "CHUNK", 16)  # and more than one chunk a tensor
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (9, 7), "b.bias": (5,), "c.weight": (3, 4, 2), "d.bias": (1,)}
    draw = lambda scale: {n: rng.integers(-scale, scale + 1, s).astype(np.float32) for n, s in shapes.items()}
    base, models = draw(9), [draw(4) for _ in range(2 + seed % 2)]
    models = [{n: base[n] + x for n, x in m.items()} for m in models]
    density, lam = [0.2, 0.5, 0.03, 1.0, 0.7, 0.33][seed], [1.0, 0.5][seed % 2]
    weights = [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]][seed // 2 % 2][: len(models)]
    paths = [f"{save(tmp_path / str(i), m)}:{w}" for i, (m, w) in enumerate(zip(models, weights))]
    ours = run(
        tmp_path / "out",
        "ties",
        paths,
        "--base",
        save(tmp_path / "base", base),
        "--density",
        density,
        "--lambda",
        lam,
        "--trim",
        trim,
        "--sign",
        sign,
    )
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


@pytest.mark.parametrize("models", ["a", "abc"])
def test_a_global_trim_reads_each_tensor_four_times(family, tmp_path, monkeypatch, models):
    """For the sample, the thresholds, the majority sign and the merge, however many models there are."""
    read, original = [], engine.read_tensor
    monkeypatch.setattr(engine, "read_tensor", lambda plan, name: (read.append(name), original(plan, name))[1])
    flags = ["--base", family / "base", "--density", 0.3, "--trim", "global"]
    out = run(tmp_path / "out", "ties", [str(family / name) for name in models], *flags)
    assert sorted(read) == sorted([*out] * 4)


# ---------------------------------------------------------------------------------------------------------------------
# Slerp, dare, algebra


@pytest.mark.parametrize("method", RANDOM)
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
    turned = run(tmp_path / "o2", "linear", [f"{b}:0.3", f"{c}:0.5", f"{a}:0.2"])
    assert_same(run(out, "linear", [f"{a}:0.2", f"{b}:0.3", f"{c}:0.5"]), turned, rtol=1e-5, atol=1e-8)
    for method in NEEDS_BASE[:-1]:
        assert_same(run(out, method, [f"{a}:0", f"{b}:0"], *on, "--no-normalize"), load(base))
        ta = run(tmp_path / "ta", "task_arithmetic", [f"{a}:0.7"], *on, "--lambda", 0.9)
        flags = [*on, "--lambda", 0.9, "--no-normalize"]
        if method in SPARSE:  # density 1; one model's own sign is elected, so nothing is lost
            flags += ["--density", 1, "--rescale", "none"]
        assert_same(run(out, method, [f"{a}:0.7"], *flags), ta)
        if method not in ELECTS:  # weight w is lambda w
            flags = [*on] + ["--density", 0.5] * (method in SPARSE)
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
    out = run(
        tmp_path / "out", "slerp", [str(family / "a"), str(family / "b")], "--weights-for", "lm_head.weight", 0, 1
    )
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


@pytest.mark.parametrize(("flags", "alpha"), [("ties", 10 / 8 / 2), ("task_arithmetic --lambda 3", 0.5)])
def test_lines_alpha_for_several_models_by_hand(tmp_path, flags, alpha):
    """Deltas (3, -1, 0, 2) and (-1, -1, 2, 2) sum to 10 in the L1 norm; their TIES mean (3, -1, 2, 2) to 8; n = 2."""
    shapes = {"model.layers.0.x": 2, "model.layers.1.x": 1, "model.norm.weight": 1}

    def put(name, values):
        return save(tmp_path / name, dict(zip(shapes, torch.tensor(values).split(list(shapes.values())))))

    base, a, b = put("base", [0.0, 0, 0, 0]), put("a", [3.0, -1, 0, 2]), put("b", [-1.0, -1, 2, 2])
    method, *more = flags.split()
    merged = torch.tensor([3.0, -1, 2, 2]) if method == "ties" else 3 * torch.tensor([2.0, -2, 2, 4])
    for text, last in (("auto", 1.0), ("auto:0.25", alpha + 0.25)):
        out = run(tmp_path / "out", method, [a, b], "--base", base, *more, "--lines", text)
        scale = torch.tensor([alpha, alpha, last, alpha])  # block 1 of 2, block 2, outside the blocks
        torch.testing.assert_close(torch.cat([out[name] for name in shapes]), merged * scale)
        record = json.loads((tmp_path / "out" / "merge.json").read_text())
        assert record["lines"] == pytest.approx([alpha, last - alpha])
    with pytest.raises(InputError, match="--lines auto: needs several models"):
        run(tmp_path / "one", method, [a], "--base", base, "--lines", "auto")
