"""Extensions: main's parameters, modules of one's own on several ranks, dropout, and a frozen reference model."""

import functools
import json
import signal

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from torch import nn
from training_runs import chats, feedback, launch, log, same_run, signal_at, update_error, weights

import train_kto
import train_sft
from core.layers import Linear
from model import Qwen2
from train_sft import sft_loss
from training import setup as training_setup
from training.examples import count_supervised
from training.logps import example_logps, sequence_logps, supervised_logps
from training.reference import open_reference
from training.setup import load_frozen, recompute

COMMON = ("--batch-size", 4, "--lr", 1e-3, "--max-len", 64, "--warmup", 0)


@pytest.fixture
def sft_data(tmp_path):
    return write_lines(tmp_path / "sft.jsonl", chats(13))


def command(ckpt, data, out, *more):
    return [str(word) for word in ("--ckpt", ckpt, "--data", data, "--out", out, *COMMON, *more)]


# ---------------------------------------------------------------------------------------------------------------------
# A random LoRA


class LoRA(nn.Module):
    def __init__(self, linear, r=4):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / r)
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T


def linears(model):
    for block in model.model["layers"]:
        for part in (block.self_attn, block.mlp):
            yield from ((part, name, linear) for name, linear in list(part.named_children()))


def add_lora(setup):
    if setup.ranks.rank:
        torch.randn(7)  # this rank's generator is elsewhere, as that of a user's own code may be
    setup.model.requires_grad_(False)
    for part, name, linear in linears(setup.model):
        setattr(part, name, LoRA(linear))


@torch.no_grad()
def fold_lora(model):
    for part, name, lora in linears(model):
        lora.linear.weight += lora.B @ lora.A
        setattr(part, name, lora.linear)


def with_lora():
    for script in (train_sft, train_kto):
        script.main = functools.partial(script.main, prepare=add_lora, before_save=fold_lora)


@pytest.mark.parametrize("script", ["train_sft", "train_kto"])
def test_a_random_lora_is_the_same_on_two_ranks(tiny, tmp_path, script):
    data = write_lines(tmp_path / "d.jsonl", chats(13) if script == "train_sft" else feedback(14))
    for out, n in ("one", 1), ("two", 2):
        arguments = command(tiny, data, tmp_path / out / "o", "--epochs", 3, "--micro-tokens", 60)
        codes, texts = launch(script, arguments, tmp_path / "text", n, {r: (with_lora,) for r in range(n)})
        assert codes == [0] * n, texts
        assert "OUT will hold" not in texts[0]
    base, one, two = weights(tiny), weights(tmp_path / "one" / "o"), weights(tmp_path / "two" / "o")
    assert one.keys() == two.keys() == base.keys()
    assert update_error(one, two, base) < 0.01
    for a, b in zip(log(tmp_path / "one" / "o"), log(tmp_path / "two" / "o"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], one[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_module_of_ones_own_is_refused_in_a_sharded_model(tiny, sft_data, tmp_path):
    """Its gradients would not be summed over the ranks."""
    arguments = command(tiny, sft_data, tmp_path / "o", "--max-steps", 1, "--shard")
    codes, texts = launch("train_sft", arguments, tmp_path / "text", 2, {r: (with_lora,) for r in range(2)})
    assert codes == [2, 2] and "error: --shard: model.layers.0.self_attn.q_proj.A is not sharded" in texts[0], texts
    assert not (tmp_path / "o.run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


class DropoutLinear(Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def add_dropout(setup):
    for block in setup.model.model["layers"]:
        block.mlp.down_proj.__class__ = DropoutLinear
    setup.model.register_buffer("calls", torch.zeros(()))


def leave_one_out(model, batch):
    """Depends on a buffer that counts the steps, and on Python's and torch's generators."""
    model.calls += 1
    n = len(batch.indices)
    left_out = int(model.calls) + int(torch.randint(0, 100, ()))
    return [i for i in range(n) if i != left_out % n] or [0]


def with_dropout():
    train_sft.main = functools.partial(train_sft.main, prepare=add_dropout, choose=leave_one_out)


def killed_with_dropout(*where):
    with_dropout()
    signal_at(*where, signal.SIGKILL)


@pytest.mark.parametrize("again", [(), ("--activation-checkpointing",)])
def test_a_killed_run_with_dropout_resumes_to_the_bit(tiny, sft_data, tmp_path, again):
    more = ("--epochs", 2, "--micro-tokens", 60, "--save-every", 1, "--eval-data", sft_data, "--eval-every", 3)
    whole, broken = tmp_path / "a" / "o", tmp_path / "b" / "o"
    run = lambda out, deed: launch(
        "train_sft", command(tiny, sft_data, out, *more, "--resume", *again), tmp_path / "text", prepare={0: deed}
    )
    codes, texts = run(whole, (with_dropout,))
    assert codes == [0], texts
    for where in ("micro_batches", 20), ("optimizer_step", 30), ("prune", 9):
        assert run(broken, (killed_with_dropout, *where))[0] == [-signal.SIGKILL]
        assert not (tmp_path / "b" / "o").exists()
    assert run(broken, (with_dropout,))[0] == [0]
    same_run(whole, broken)
    plain = tmp_path / "c" / "o"
    codes, _ = launch("train_sft", command(tiny, sft_data, plain, *more), tmp_path / "text")
    assert codes == [0] and log(plain)[-1]["loss"] != log(whole)[-1]["loss"]  # it did drop


def test_activation_checkpointing_repeats_the_dropout(tiny):
    examples = [([5, 6, 7, 8, 9, 10], [True] * 6), ([11, 12, 13], [True] * 3)]
    gradients = []
    for again in (False, True):
        model = Qwen2.from_pretrained(tiny)
        for block in model.model["layers"]:
            block.mlp.down_proj.__class__ = DropoutLinear
            if again:
                recompute(block)
        torch.manual_seed(3)
        example_logps(model, examples).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_what_is_computed_without_gradients_has_no_dropout(tiny):
    model = Qwen2.from_pretrained(tiny)
    examples = [([5, 6, 7, 8], [False, False, True, True])]
    want = sequence_logps(model, examples, 100)
    for block in model.model["layers"]:
        block.mlp.down_proj.__class__ = DropoutLinear
    assert torch.equal(sequence_logps(model, examples, 100), want) and model.training


def test_a_run_with_other_modules_does_not_resume(tiny, sft_data, tmp_path, refused):
    arguments = command(tiny, sft_data, tmp_path / "o", "--epochs", 2)
    prepare = {0: (lora_stopped,)}
    codes, (text,) = launch("train_sft", arguments, tmp_path / "text", prepare=prepare)
    assert codes == [0] and "stopped after step 1" in text
    refused(["step-1: has", "unlike the model that is to resume"], "train_sft", *arguments, "--resume")


def lora_stopped():
    with_lora()
    signal_at("lr_at", 10, signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------------------
# main's parameters


def test_a_loss_of_ones_own(tiny, sft_data, tmp_path):
    """Weighted by each token's own probability; sees its micro-batch in the order of the documents."""
    seen = []

    def loss(model, batch, micro):
        examples = [batch.examples[i] for i in micro]
        logps, owner = supervised_logps(model, examples)
        wanted = [n for n, (_, supervised) in enumerate(examples) for s in supervised[1:] if s]
        assert owner.tolist() == wanted and batch.n_supervised == count_supervised(batch.examples)
        seen.append((batch.step, [batch.indices[i] for i in micro]))
        return -(logps.detach().exp() * logps).sum() / batch.n_supervised

    logs = {}
    for out, micro_tokens in ("a", 1000), ("b", 1):
        args = train_sft.parse_args(
            command(tiny, sft_data, tmp_path / out, "--max-steps", 2, "--micro-tokens", micro_tokens)
        )
        train_sft.main(args, loss=loss)
        logs[out] = log(tmp_path / out)
    assert [s["loss"] for s in logs["a"]] == pytest.approx([s["loss"] for s in logs["b"]], rel=1e-5)
    assert update_error(weights(tmp_path / "a"), weights(tmp_path / "b"), weights(tiny)) < 0.01
    steps = [sorted(i for step, some in seen[:2] if step == s for i in some) for s in (0, 1)]
    assert steps == [sorted(i for step, some in seen[2:] if step == s for i in some) for s in (0, 1)]
    train_sft.main(train_sft.parse_args(command(tiny, sft_data, tmp_path / "c", "--max-steps", 1)))
    assert log(tmp_path / "c")[0]["loss"] != pytest.approx(logs["a"][0]["loss"], rel=0.1)


def test_inputs_may_differ_from_targets(tiny):
    model, examples = Qwen2.from_pretrained(tiny), [([5, 6, 7, 8], [False, True, True, True]), ([9, 4], [False, True])]
    want, owner = supervised_logps(model, examples)
    same, _ = supervised_logps(model, examples, [ids for ids, _ in examples])
    assert torch.equal(want, same)
    changed, same_owner = supervised_logps(model, examples, [[5, 300, 7, 8], [9, 4]])
    assert torch.equal(owner, same_owner)
    direct = model(torch.tensor([[5, 300, 7]]))[0].log_softmax(-1)
    assert changed[:3].tolist() == pytest.approx(
        [direct[t, token].item() for t, token in enumerate((6, 7, 8))], rel=1e-4
    )
    assert changed[3] == want[3]


def test_frozen_parameters_stay_and_a_flag_of_ones_own_counts(tiny, sft_data, tmp_path):
    def add_flags(parser):
        parser.description = "One half is frozen."
        parser.add_argument("--half", type=int, default=0, help="the half")
        parser.set_defaults(lr=1e-2)

    def prepare(setup):
        assert len(setup.examples) == len(setup.places) == 13 and setup.places[0].endswith("sft.jsonl:1")
        assert setup.steps[0] and setup.tokenizer.im_end == 2 and setup.args.half == 1
        for i, p in enumerate(setup.model.parameters()):
            p.requires_grad_(i % 2 == setup.args.half)

    argv = [
        word
        for word in command(tiny, sft_data, tmp_path / "o", "--epochs", 1, "--half", 1)
        if word not in ("--lr", "0.001")
    ]
    args = train_sft.parse_args(argv, add_flags)
    assert args.lr == 1e-2
    train_sft.main(args, prepare=prepare)
    base, after = weights(tiny), weights(tmp_path / "o")
    names = [name for name, _ in Qwen2.from_pretrained(tiny).named_parameters()]
    assert [torch.equal(base[name], after[name]) for name in names] == [i % 2 == 0 for i in range(len(names))]
    assert json.loads((tmp_path / "o.run" / "args.json").read_text())["half"] == 1


def test_chosen_examples_are_the_step(tiny, sft_data, tmp_path):
    chosen = []

    def choose(model, batch):
        assert model.training and len(batch.examples) in (4, 1)
        some = sorted(range(len(batch.indices)), key=lambda i: len(batch.examples[i][0]))[:2]
        chosen.append([batch.examples[i] for i in some])
        return some

    args = train_sft.parse_args(command(tiny, sft_data, tmp_path / "o", "--epochs", 1))
    train_sft.main(args, choose=choose)
    assert [s["tokens"] for s in log(tmp_path / "o")] == [sum(len(ids) for ids, _ in some) for some in chosen]
    logps, _ = supervised_logps(Qwen2.from_pretrained(tiny), chosen[0])
    assert log(tmp_path / "o")[0]["loss"] == pytest.approx(sft_loss(logps, len(logps)).item(), rel=1e-5)


def test_a_kto_loss_of_ones_own(tiny, tmp_path):
    """A loss that ignores z0 and is linear in the reward."""

    def loss(policy_logps, ref_logps, kl, desirable, beta, desirable_weight, undesirable_weight):
        rewards = beta * (policy_logps - ref_logps)
        return torch.where(desirable, -rewards, rewards) + 7, rewards.detach()

    data = write_lines(tmp_path / "d.jsonl", feedback(14))
    train_kto.main(train_kto.parse_args(command(tiny, data, tmp_path / "o", "--epochs", 4)), loss=loss)
    steps = log(tmp_path / "o")
    assert steps[0]["loss"] == pytest.approx(7, abs=1e-4) and steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]


# ---------------------------------------------------------------------------------------------------------------------
# The reference model


def test_a_frozen_reference_is_never_the_policy(tiny, tmp_path):
    """The pass before the first step may use the untrained policy. A loss that asks for the model gets a copy that stays."""
    kept = {}

    def prepare(setup):
        reference = open_reference(setup, setup.ckpt.fingerprint())
        assert reference.load() is setup.model  # not trained yet
        kept["reference"], kept["policy"] = load_frozen(setup.ckpt, setup.args, setup.ranks), setup.model

    data = write_lines(tmp_path / "d.jsonl", feedback(14))
    train_kto.main(train_kto.parse_args(command(tiny, data, tmp_path / "o", "--epochs", 1)), prepare=prepare)
    frozen, base, after = dict(kept["reference"].named_parameters()), weights(tiny), weights(tmp_path / "o")
    assert kept["reference"] is not kept["policy"]
    assert all(torch.equal(frozen[n], base[n]) and not frozen[n].requires_grad and frozen[n].grad is None for n in base)
    assert not any(torch.equal(after[n], base[n]) for n in base if "norm" not in n and base[n].ndim > 1)
    other = str(tmp_path / "other")
    tiny_model(seed=1).save(other, tiny_files())
    args = train_kto.parse_args(command(tiny, data, tmp_path / "p", "--epochs", 1, "--ref", other))

    def prepare_other(setup):
        loaded = open_reference(setup, setup.ckpt.fingerprint()).load()
        assert loaded is not setup.model and not any(p.requires_grad for p in loaded.parameters())

    train_kto.main(args, prepare=prepare_other)


def test_a_scalar_parameter_is_trained(tiny, sft_data, tmp_path):
    """Without weight decay, as vectors: AdamW's first step moves it by --lr."""
    seen = []

    def prepare(setup):
        setup.model.scale = nn.Parameter(torch.tensor(1.0))

    def loss(model, batch, micro):
        logps, _ = supervised_logps(model, [batch.examples[i] for i in micro])
        return -model.scale * logps.sum() / batch.n_supervised

    more = ("--max-steps", 1, "--weight-decay", 0.5, "--schedule", "constant", "--save-every", 1)
    args = train_sft.parse_args(command(tiny, sft_data, tmp_path / "o", *more))
    train_sft.main(args, prepare=prepare, loss=loss, before_save=lambda model: seen.append(model.scale.item()))
    assert seen == pytest.approx([1 - 1e-3], rel=1e-6)  # the loss is above 0, so its gradient is too


def test_seeds_are_those_of_the_flag(tiny, sft_data, tmp_path):
    """Random values drawn in prepare follow from --seed alone."""
    drawn = []
    for out, seed in ("a", 1), ("b", 1), ("c", 2):
        args = train_sft.parse_args(command(tiny, sft_data, tmp_path / out, "--max-steps", 1, "--seed", seed))
        torch.randn(len(drawn) + 1)  # earlier use of the generator does not matter
        train_sft.main(args, prepare=lambda setup: drawn.append(torch.randn(4)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_compile_auto_is_for_long_runs(tiny, tmp_path, run, monkeypatch):
    """A run of the tiny model is too short; where the bound is 0 it is long enough, and says so."""
    data = write_lines(tmp_path / "sft.jsonl", chats(4))
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compiled.append(f) or real(f, backend="eager", **more))
    monkeypatch.setenv("CXX", "c++")
    losses = []
    for k, (bound, flags, line) in enumerate(
        [(1e14, (), False), (0, (), True), (0, ("--compile", "off"), False), (1e14, ("--compile", "on"), False)]
    ):
        monkeypatch.setattr(training_setup, "COMPILE_PAYS", bound)
        compiled.clear()
        more = ("--max-steps", 2, "--warmup", 0, "--device", "cpu", *flags)
        code, text, err = run("train_sft", "--ckpt", tiny, "--data", data, "--out", tmp_path / str(k), *more)
        assert code == 0 and ("compile: on" in text) == line, err
        assert bool(compiled) == (line or flags == ("--compile", "on"))
        losses.append([r["loss"] for r in log(tmp_path / str(k))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[3] == pytest.approx(losses[0], rel=1e-5)
