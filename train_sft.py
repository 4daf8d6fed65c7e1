"""Supervised fine-tuning on plain PyTorch.

    python train_sft.py --ckpt Qwen/Qwen2-0.5B-Instruct --data sft.jsonl --out sft.pt
    torchrun --nproc-per-node 8 train_sft.py ...                                          # the same step on 8 ranks
"""

import argparse
import time

import torch
from tqdm import tqdm

import loop
from chat import read_records, sft_messages
from model import InputError, cli

# ---------------------------------------------------------------------------------------------------------------------
# The maths


def sft_loss(logps, n_supervised):
    """Cross-entropy per supervised token of the whole step.

    logps: (n,) log-probabilities of examples, each summed over its supervised tokens; any part of the step's examples.
    n_supervised: the supervised tokens of the step, over all micro-batches and ranks. The losses of the parts add up to
    the loss of the step, so the result does not depend on how the step was cut (a mean of the parts' means would).
    """
    return -logps.sum() / n_supervised


# ---------------------------------------------------------------------------------------------------------------------


def encode(records, tokenizer, max_len):
    """[(where, messages)] -> (examples cut to max_len tokens, the number dropped as nothing supervised was left)."""
    examples = []
    for _, messages in records:
        ids, supervised = tokenizer.chat_ids(messages)
        if any(supervised[1:max_len]):
            examples.append((ids[:max_len], supervised[:max_len]))
    return examples, len(records) - len(examples)


def count(examples):
    """Supervised tokens that are predicted; the first token of a sequence has nothing before it."""
    return sum(sum(supervised[1:]) for _, supervised in examples)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    loop.add_flags(p, epochs=3, batch_size=1000, lr=1e-6)  # the paper's
    a = p.parse_args()
    rank, world, device = loop.setup(a.device)

    records = read_records(a.data, sft_messages)
    eval_records = read_records(a.eval_data, sft_messages) if a.eval_data else []
    model, tokenizer, ckpt = loop.load_model(a.ckpt, device, a.dtype)
    examples, dropped = encode(records, tokenizer, a.max_len)
    eval_examples, _ = encode(eval_records, tokenizer, a.max_len)
    if not examples:
        raise InputError(f"{', '.join(a.data)}: no example has a supervised token within --max-len {a.max_len}")
    if a.eval_data and not eval_examples:
        raise InputError(f"{', '.join(a.eval_data)}: no example has a supervised token within --max-len {a.max_len}")
    steps = loop.plan(
        len(examples), a.batch_size, a.epochs, a.max_steps, order=None if a.no_shuffle else loop.shuffled(len(examples), a.seed)
    )
    if rank == 0:
        for text in loop.schedule_advice(a, steps):
            print(f"warning: {text}")

    optimizer = loop.make_optimizer(model, a)
    identity = loop.run_identity(a, examples, ckpt.fingerprint())
    done = loop.start_run(a, model, optimizer, identity, rank)
    started = time.time()
    bar = tqdm(total=len(steps), initial=done, desc="sft", unit="step", disable=True if rank else None)
    for step in range(done, len(steps)):
        t0 = time.time()
        batch = [examples[i] for i in steps[step]]
        n_supervised = count(batch)
        lengths = [len(ids) for ids, _ in batch]

        loss = torch.zeros((), device=device)
        for micro in loop.my_share(lengths, a.micro_tokens, rank, world):
            logps = loop.example_logps(model, [batch[i] for i in micro])  # (len(micro),)
            part = sft_loss(logps, n_supervised)
            part.backward()
            loss += part.detach()
        lr = loop.lr_at(step, len(steps), a.lr, a.warmup, a.schedule)
        grad_norm = loop.optimizer_step(model, optimizer, lr, a.clip)

        record = {"step": step + 1, "loss": loop.sum_over_ranks(loss).item(), "lr": lr, "grad_norm": grad_norm}
        record |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / (time.time() - t0)}
        last = step + 1 == len(steps)
        if eval_examples and (last or a.eval_every and (step + 1) % a.eval_every == 0):
            logps = loop.sequence_logps(model, eval_examples, a.micro_tokens, rank, world)
            record["eval_loss"] = sft_loss(logps, count(eval_examples)).item()
        if rank == 0:
            loop.write_log(a, record)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            bar.update()
            if a.save_every and (step + 1) % a.save_every == 0 and not last:
                loop.save_state(a, model, optimizer, ckpt.files, identity, step + 1)
    bar.close()
    facts = [f"{len(examples)} examples, {dropped} dropped: nothing supervised within {a.max_len} tokens"]
    loop.finish_run(a, model, ckpt.files, started, len(steps), facts, rank)


if __name__ == "__main__":
    cli(main)
