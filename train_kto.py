"""KTO, alignment from desirable and undesirable completions (arXiv 2402.01306), on plain PyTorch.

    python train_kto.py --ckpt sft.pt --data kto.jsonl --out sft-kto.pt
    torchrun --nproc-per-node 8 train_kto.py ...                                          # the same step on 8 ranks
    torchrun --nproc-per-node 8 train_kto.py ... --shard                                  # of a model too large for one

Data: {"prompt", "completion", "label"} lines. The reference is the model before training unless --ref names another;
its log-probabilities are computed once, before the first step, and kept in a file that later runs share.
"""

import functools
import math
import os
import time

import torch
from tqdm import tqdm

from core.attention import to_device
from core.checkpoint import Checkpoint
from core.conversations import kto_examples
from core.distributed import is_sharded, run_distributed
from core.files import InputError, cli, code_hash
from core.flags import Parser, number
from core.records import read_records
from core.tokenizer import Tokenizer, vocabulary
from training.logps import example_logps, sequence_logps
from training.pairing import epoch_order
from training.reference import reference_logps
from training.run import end_step, eval_logps, finish_run, run_identity, start_run, stop_run
from training.setup import (
    add_training_flags,
    checkpoint_activations,
    load_model,
    open_checkpoint,
    plan_steps,
    schedule_advice,
    setup_ranks,
)
from training.step import lr_at, micro_batches, optimizer_step, record_skip

# ---------------------------------------------------------------------------------------------------------------------
# The maths


def kto_loss(policy_logps, ref_logps, kl, desirable, beta, desirable_weight, undesirable_weight):
    """KTO's loss per example and its implicit reward (arXiv 2402.01306, Eq. 7 and 8).

    policy_logps, ref_logps: (n,) log-probabilities of the completions, summed over their tokens, in nats.
    kl: the reference point z0 >= 0 in nats; no gradient flows into it. desirable: (n,) bool. -> (losses (n,), rewards (n,)).

        r = policy_logps - ref_logps        loss = w_D (1 - sigmoid(beta (r - z0)))  desirable
        reward = beta r                            w_U (1 - sigmoid(beta (z0 - r)))  undesirable

    It is called for one micro-batch after the other, with any part of the step's examples: a loss may depend on its own example
    and on kl alone, or it depends on --micro-tokens and the ranks. What needs the whole step belongs where kl is computed.
    """
    r, kl = policy_logps - ref_logps, torch.as_tensor(kl).detach()
    gain = torch.where(desirable, r - kl, kl - r)
    weight = torch.full_like(r, undesirable_weight).masked_fill(desirable, desirable_weight)
    return weight * (1 - torch.sigmoid(beta * gain)), beta * r.detach()


def kl_estimate(policy_logps, ref_logps):
    """z0: the mean log-ratio over the step's mismatched pairs, clamped at 0 after the mean. (n,), (n,) -> scalar; 0 of none."""
    return ((policy_logps - ref_logps).sum() / max(1, len(ref_logps))).clamp(min=0)


def kl_pairs(step):
    """A step's pairs (prompt of i, completion of j): each takes its predecessor's completion, the first the last's."""
    return [(i, step[k - 1]) for k, i in enumerate(step)]


def all_pairs(step):
    """A step's matched pairs, then its mismatched ones."""
    return [(i, i) for i in step] + kl_pairs(step)


def balanced_weight(n_desirable, n_undesirable, undesirable_weight):
    """The w_D that makes w_D n_D = w_U n_U, the lower end of the range [1, 4/3] that Eq. 8 recommends for their ratio."""
    return undesirable_weight * n_undesirable / n_desirable if n_desirable and n_undesirable else 1.0


def weight_advice(n_desirable, n_undesirable, w_d, w_u):
    """What Eq. 8 says against these weights: a list of warnings."""
    if not n_desirable or not n_undesirable:
        return [f"all {n_desirable + n_undesirable} labels are {str(n_desirable > 0).lower()}: nothing to tell apart"]
    if not w_d or not w_u:  # by intent: one label is left out
        return []
    if 1 - 1e-9 <= w_d * n_desirable / (w_u * n_undesirable) <= 4 / 3 + 1e-9:
        return []
    low, high = balanced_weight(n_desirable, n_undesirable, w_u), w_d * n_desirable / n_undesirable
    return [
        f"{n_desirable} desirable and {n_undesirable} undesirable examples: recommended --desirable-weight {low:.3g} to "
        f"{low * 4 / 3:.3g} (auto takes {low:.3g}), or else --undesirable-weight {high * 3 / 4:.3g} to {high:.3g}"
    ]


def count_prompt_clashes(steps, prompts):
    """How many mismatched pairs of the steps share their prompt."""
    return sum(prompts[i] == prompts[j] for step in steps for i, j in kl_pairs(step))


# ---------------------------------------------------------------------------------------------------------------------


def encode_feedback(records, tokenizer, max_len):
    """Records -> (rows, where each stands). rows: (prompt ids, completion ids, label), tuples; a prompt that fills max_len
    alone leaves no completion to learn from and drops out, before batches and pairs are formed."""
    rows, places = [], []
    for where, (messages, completion, label) in records:
        prompt = tuple(tokenizer.prompt_ids(messages))
        if len(prompt) < max_len:
            rows.append((prompt, tuple(tokenizer.completion_ids(completion)), label))
            places.append(where)
    if len(rows) < 2:
        files = ", ".join(dict.fromkeys(where.rsplit(":", 1)[0] for where, _ in records))
        raise InputError(
            f"{files}: {len(rows)} examples whose prompt is under --max-len {max_len}; a mismatched pair takes two"
        )
    return rows, places


def pair_sequence(rows, max_len, i, j):
    """The prompt of row i with the completion of row j, cut to max_len tokens: (ids, supervised)."""
    ids, start = [*rows[i][0], *rows[j][1]][:max_len], len(rows[i][0])
    return ids, [False] * start + [True] * (len(ids) - start)


def metrics(losses, rewards, logps, desirable, kl):
    """The log's numbers for a batch: means over the examples of each label, null where there is none."""

    def mean(x, which):
        return x[which].mean().item() if which.any() else None

    out = {"loss": losses.mean().item(), "kl": kl.item()}
    for name, which in (("chosen", desirable), ("rejected", ~desirable)):
        out |= {f"rewards/{name}": mean(rewards, which), f"logps/{name}": mean(logps, which)}
    both = desirable.any() and (~desirable).any()
    out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"] if both else None
    return out


def weight(text):
    """An argparse type: a number or "auto"."""
    return text if text == "auto" else number(0)(text)


def main():
    p = Parser(description=__doc__.split("\n\n")[0])
    add_training_flags(p, epochs=1, batch_size=64, lr=1e-6)  # the paper's KTO settings are not published; TRL's rate
    # KTO
    p.add_argument("--ref", help="reference checkpoint; without it the model before training")
    p.add_argument("--beta", type=number(above=0), default=0.1, help="strength of the pull to the reference, per nat")
    p.add_argument("--desirable-weight", type=weight, default=1.0, help="w_D, or auto: balances the labels")
    p.add_argument("--undesirable-weight", type=number(0), default=1.0, help="w_U")
    p.add_argument(
        "--ref-cache", help="file of reference log-probabilities; without it ref-cache.safetensors beside OUT"
    )
    a = p.parse_args()
    if a.batch_size < 2:
        raise InputError("--batch-size 1: no mismatched pair exists in a batch of one; give at least 2")
    ref_cache = a.ref_cache or os.path.join(os.path.dirname(os.path.abspath(a.out)), "ref-cache.safetensors")
    if os.path.isdir(ref_cache):
        raise InputError(
            f"--ref-cache {ref_cache}: is a directory; give a file, such as {ref_cache}/ref-cache.safetensors"
        )
    rank, world, device = setup_ranks(a)

    # Data, and every step of the run, and with it every mismatched pair. What is held out is one large step
    def prepare(records, files, *sizes):
        rows, places = encode_feedback(records, tokenizer, a.max_len)
        prompts = [prompt for prompt, _, _ in rows]
        steps = plan_steps(len(rows), *sizes, smallest=2, order=None if a.no_shuffle else epoch_order(prompts, a.seed))
        if rank == 0 and (clashes := count_prompt_clashes(steps, prompts)):
            print(
                f"warning: {', '.join(files)}: {clashes} mismatched pairs share their prompt, so they match"
                + "; shuffle" * a.no_shuffle
            )
        return rows, places, steps

    records = read_records(a.data, kto_examples)
    eval_records = read_records(a.eval_data, kto_examples) if a.eval_data else []
    model, tokenizer, ckpt = open_checkpoint(a.ckpt, a, device)
    rows, places, steps = prepare(records, a.data, a.batch_size, a.epochs, a.max_steps)
    n, n_d = len(rows), sum(label for _, _, label in rows)

    # The weights of the two labels, Eq. 8
    w_u = a.undesirable_weight
    w_d = balanced_weight(n_d, n - n_d, w_u) if a.desirable_weight == "auto" else a.desirable_weight
    if rank == 0:
        for text in weight_advice(n_d, n - n_d, w_d, w_u) + schedule_advice(a, steps):
            print(f"warning: {text}")

    # The reference, once and for all epochs
    reference = Checkpoint(a.ref) if a.ref else ckpt
    if a.ref:
        Tokenizer(reference)  # refuses one whose ids the embedding has no rows for
    if a.ref and vocabulary(reference) != vocabulary(ckpt):
        raise InputError(f"--ref {a.ref}: its tokenizer is not that of {a.ckpt}, whose token ids it would be given")
    fingerprint = ckpt.fingerprint()
    ref_fingerprint = reference.fingerprint() if a.ref else fingerprint

    def load_reference():
        return model if ref_fingerprint == fingerprint else load_model(reference, a, device)  # model: not trained yet

    identified_by = f"{ref_fingerprint} {a.dtype} {code_hash()}"
    settings = (ref_cache, identified_by, load_reference, device, a.micro_tokens, rank, world)
    sequence = functools.partial(pair_sequence, rows, a.max_len)  # (i, j) -> (ids, supervised)
    pairs = {pair for step in steps for pair in all_pairs(step)}
    ref, computed = reference_logps(sorted(pairs), sequence, *settings)
    eval_examples = []
    if eval_records:
        eval_rows, _, (eval_step,) = prepare(eval_records, a.eval_data, len(eval_records), 1, None)
        eval_labels = torch.tensor([eval_rows[i][2] for i in eval_step])  # (m,)
        eval_sequence, eval_pairs = functools.partial(pair_sequence, eval_rows, a.max_len), all_pairs(eval_step)
        eval_examples = [eval_sequence(*pair) for pair in eval_pairs]
        known, _ = reference_logps(eval_pairs, eval_sequence, *settings)
        eval_ref = torch.tensor([known[pair] for pair in eval_pairs])  # (2m,): matched, then mismatched

    identity = run_identity(a, rows, fingerprint) | {"the reference": ref_fingerprint}
    matched_lengths = [min(a.max_len, len(prompt) + len(completion)) for prompt, completion, _ in rows]
    checkpoint_activations(model, a, ([matched_lengths[i] for i in step] for step in steps), rank, world)
    run = start_run(a, rank, world, model, ckpt, identity, len(steps))

    def evaluated(record):
        """A step's entry of the log, where that is due with the numbers of the held-out data, all of it as one batch."""
        policy = eval_logps(run, record, eval_examples)
        if policy is None:
            return record
        m, policy = len(eval_labels), policy.cpu()  # (2m,), as eval_ref
        kl = kl_estimate(policy[m:], eval_ref[m:])
        losses, rewards = kto_loss(policy[:m], eval_ref[:m], kl, eval_labels, a.beta, w_d, w_u)
        return record | {f"eval_{k}": v for k, v in metrics(losses, rewards, policy[:m], eval_labels, kl).items()}

    if run.pending:
        end_step(run, evaluated(run.pending))
    bar = tqdm(total=len(steps), initial=run.done, desc="kto", unit="step", disable=True if rank else None)
    for s in range(run.done, len(steps)):
        t0 = time.time()
        step = steps[s]
        labels = torch.tensor([rows[i][2] for i in step])
        desirable = to_device(labels, device)

        # z0, from the mismatched pairs, without gradient
        unmatched = [sequence(*pair) for pair in kl_pairs(step)]
        heed_stop = not is_sharded(model)  # SIGTERM: replicas may leave in mid-step, sharded ranks only together
        policy_kl = sequence_logps(model, unmatched, a.micro_tokens, rank, world, heed_stop)
        kl = kl_estimate(policy_kl, to_device([ref[pair] for pair in kl_pairs(step)], device))

        # The loss, from the matched ones
        matched = [sequence(i, i) for i in step]
        ref_logps = to_device([ref[i, i] for i in step], device)
        # Losses, rewards, logps and z0, which if infinite skips the step (the loss's sigmoid hides it); each rank fills in its own
        seen = torch.zeros(4, len(step), device=device)
        for micro in micro_batches(run, [len(ids) for ids, _ in matched]):
            logps = example_logps(model, [matched[k] for k in micro])  # (len(micro),)
            at = to_device(torch.tensor(micro, dtype=torch.long), device)
            losses, rewards = kto_loss(logps, ref_logps[at], kl, desirable[at], a.beta, w_d, w_u)
            (losses.sum() / len(step)).backward()
            seen[:, at] = torch.stack((losses.detach(), rewards, logps.detach(), kl.expand(len(micro))))
        lr = lr_at(s, len(steps), a.lr, a.warmup, a.schedule)
        verdict, (losses, rewards, logps, z0), grad_norm = optimizer_step(run, lr, seen)
        if verdict == "stop":
            return stop_run(run, s)

        record = {"step": s + 1, "lr": lr, "grad_norm": grad_norm, **metrics(losses, rewards, logps, labels, z0[0])}
        tokens = sum(len(ids) for ids, _ in matched + unmatched)
        record |= {"tokens": tokens, "tokens_per_second": tokens / (time.time() - t0)}
        if verdict == "skip":
            names = [places[i] + f" with the completion of {places[j]}" * (i != j) for i, j in all_pairs(step)]
            known = [k for k, pair in enumerate(all_pairs(step)) if not math.isfinite(ref[pair])]
            record |= record_skip(run, s + 1, matched + unmatched, names, known)
        end_step(run, evaluated(record))
        bar.set_postfix(loss=f"{record['loss']:.4f}", kl=f"{record['kl']:.3f}")
        bar.update()
    bar.close()
    finish_run(run, [
        f"{n} examples, {n_d} of them desirable, {len(records) - n} dropped as their prompt fills {a.max_len} tokens",
        f"weights {w_d:.4g} and {w_u:.4g}; {computed} of {len(pairs)} reference log-probabilities computed, kept in {ref_cache}",
    ])  # fmt: skip


if __name__ == "__main__":
    cli(run_distributed(main))
