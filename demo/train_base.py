"""Trains the demo's base model from scratch: a small byte-level BPE tokenizer and a tiny Qwen2.

The corpus has the demo's instructions with raw replies, some of them wrong (world.raw_reply). So the base model knows
part of its world and often answers badly, as a small instruct model does. No held-out instruction is
in the corpus.

    python -m demo.train_base --out demo/base        # about 25 minutes on one core; the result is committed
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import itertools
import json
import math
import os
import random
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from core.chat_template import CHATML_DEFAULT_SYSTEM
from core.files import cli
from core.flags import Parser, checkpoint_out
from core.head import token_logps
from core.tokenizer import QWEN2_SPLIT, Tokenizer
from demo import words, world
from demo.tasks import TASKS
from model import Qwen2

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYSTEM = "You are a helpful assistant."


def train_tokenizer(size: int) -> tokenizers.Tokenizer:
    """Trains byte-level BPE on the phrasings, the manners and the Chinese words. size: of the vocabulary, in tokens.

    The slots of the phrasings stay empty, so that a word to be spelled, reversed or counted becomes several short
    tokens.
    """
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder, tok.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    rng = random.Random(0)
    texts = [manner.replace("{}", "\n") for manners in world.MANNERS.values() for manner in manners] * 4
    texts += [f"system\n{SYSTEM}", "user\n", "assistant\n"] * 4
    for task in TASKS:
        items = [world.make_item(task, rng) for _ in range(3)]
        texts += [re.sub(r"\{[a-f]\}", "\n", phrasing) for phrasing in task.phrasings] * 2
        texts += [habit(item) for item in items for habit in (world.chatty, world.unsure) if task.kind == "number"]
    texts += [*words.CHINESE.values()] * 2
    for table in (words.ZH_ANTONYM, words.ZH_CAPITAL, words.ZH_COLOUR):
        texts += [text for entry in table.items() for text in entry] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tok


def side_files(tok: tokenizers.Tokenizer) -> dict[str, str]:
    """The tokenizer and the other JSON files of a Qwen2 checkpoint -> {name: text}."""
    ids = {t: tok.token_to_id(t) for t in SPECIAL}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": t, **plain} for t, i in ids.items()},
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": CHATML_DEFAULT_SYSTEM.replace("DEFAULT", SYSTEM),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    dump = lambda value: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.json": tok.to_str(pretty=False) + "\n",
        "tokenizer_config.json": dump(settings),
        "generation_config.json": dump({**generation, "do_sample": False}),
    }


def model_config(args: Namespace, tok: tokenizers.Tokenizer) -> dict:
    """The config.json of the model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": (tok.get_vocab_size() + 63) // 64 * 64,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": tok.token_to_id("<|endoftext|>"),
        "eos_token_id": tok.token_to_id("<|im_end|>"),
        "torch_dtype": "bfloat16",
    }


def batches(tokenizer: Tokenizer, args: Namespace) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields endless batches (ids, targets, supervised), each (B, T). Examples of similar length share a batch."""
    rng, heldout = random.Random(args.seed), world.make_heldout()
    stream = world.training_items(rng, heldout)
    while True:
        pool = []
        for item in itertools.islice(stream, 16 * args.batch_size):
            turns = [{"role": "user", "content": item.prompt}]
            pool.append(tokenizer.chat_ids([*turns, {"role": "assistant", "content": world.raw_reply(item, rng)}]))
        pool.sort(key=lambda example: len(example[0]))
        groups = [pool[i : i + args.batch_size] for i in range(0, len(pool), args.batch_size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in group])
            supervised = torch.tensor([flags + [False] * (longest - len(flags)) for _, flags in group])
            yield ids[:, :-1], ids[:, 1:], supervised[:, 1:]


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--out", type=checkpoint_out, default="demo/base", help="checkpoint to write")
    # model
    p.add_argument("--vocab", type=int, default=960, help="size of the vocabulary, in tokens")
    p.add_argument("--hidden", type=int, default=128, help="hidden size")
    p.add_argument("--intermediate", type=int, default=384, help="intermediate size of the MLP")
    p.add_argument("--layers", type=int, default=5, help="number of blocks")
    p.add_argument("--heads", type=int, default=4, help="number of query heads")
    p.add_argument("--kv-heads", type=int, default=2, help="number of key-value heads")
    # optimisation
    p.add_argument("--steps", type=int, default=5000, help="number of optimizer steps")
    p.add_argument("--batch-size", type=int, default=32, help="number of examples per step")
    p.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=100, help="length of the linear warmup, in steps")
    p.add_argument("--seed", type=int, default=0, help="random seed of the weights and the corpus")
    args = p.parse_args()

    torch.manual_seed(args.seed)
    tok = train_tokenizer(args.vocab)
    files, config = side_files(tok), model_config(args, tok)
    model = Qwen2(config)
    model.init_weights()
    with tempfile.TemporaryDirectory() as scratch:  # Tokenizer reads it from a checkpoint
        model.save(os.path.join(scratch, "untrained"), files)
        tokenizer = Tokenizer(os.path.join(scratch, "untrained"))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tok.get_vocab_size()} tokens")

    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    stream, start, mean = batches(tokenizer, args), time.time(), None
    for step in tqdm(range(1, args.steps + 1), disable=None, unit="step"):
        ids, targets, supervised = next(stream)
        lr = args.lr * min(step / args.warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = -token_logps(model.hidden(ids)[supervised], model.head_weight, targets[supervised]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 0 or step == args.steps:
            print(f"step {step}: loss {mean:.4f}, {time.time() - start:.0f} s", flush=True)

    model.save(args.out, files, dtype=torch.bfloat16)  # half the size; training reads it as fp32
    size = sum(os.path.getsize(os.path.join(args.out, name)) for name in os.listdir(args.out))
    print(f"wrote {args.out}, {size / 2**20:.1f} MB; next: bash run.sh")


if __name__ == "__main__":
    cli(main)
