"""Makes the demo's base model from nothing: a small byte-level BPE tokenizer, then a tiny Qwen2 trained on the world's
raw corpus, in which only a part of the replies is right (world.raw_reply). The result knows a part of its world and
answers badly, as a small instruct model does. No held-out instruction is in the corpus.

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

import tokenizers
import torch
from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm

from core.chat_template import CHATML_DEFAULT_SYSTEM
from core.files import cli
from core.flags import Parser, checkpoint_out
from core.layers import token_logps
from core.tokenizer import Tokenizer
from demo import words, world
from demo.tasks import TASKS
from model import Qwen2

HERE = os.path.dirname(os.path.abspath(__file__))

# Qwen2's pre-tokenizer: a contraction | letters with one leading sign | a digit | signs | line ends | spaces
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYSTEM = "You are a helpful assistant."


def train_tokenizer(size):
    """Byte-level BPE over the phrasings, the manners and the Chinese words. The slots stay empty, so that English words
    that have to be spelled, reversed or counted fall into few letters each."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder, tok.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    rng = random.Random(0)
    texts = [manner.replace("{}", "\n") for manners in world.MANNERS.values() for manner in manners] * 4
    texts += [f"system\n{SYSTEM}", "user\n", "assistant\n"] * 4
    for task in TASKS:
        items = [world.ask(task, rng) for _ in range(3)]
        texts += [re.sub(r"\{[a-f]\}", "\n", phrasing) for phrasing in task.phrasings] * 2
        texts += [habit(item) for item in items for habit in (world.chatty, world.unsure) if task.kind == "number"]
    for table in (words.CHINESE.values(), *(t.items() for t in (words.ZH_ANTONYM, words.ZH_CAPITAL, words.ZH_COLOUR))):
        texts += [text for entry in table for text in ([entry] if isinstance(entry, str) else entry)] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tok


def side_files(tok):
    """The tokenizer and the small JSON files of a Qwen2 checkpoint -> {name: text}."""
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
    dump = lambda value: json.dumps(value, indent=2, ensure_ascii=False) + "\n"  # noqa: E731
    return {
        "tokenizer.json": tok.to_str(pretty=False) + "\n",
        "tokenizer_config.json": dump(settings),
        "generation_config.json": dump({**generation, "do_sample": False}),
    }


def model_config(args, tok):
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


def batches(tokenizer, args):
    """Batches without end: (ids, targets, learn), each (B, T). Examples of like length share a batch."""
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
            learn = torch.tensor([flags + [False] * (longest - len(flags)) for _, flags in group])
            yield ids[:, :-1], ids[:, 1:], learn[:, 1:]


def main():
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=checkpoint_out, default="demo/base", help="directory of the checkpoint")
    # model
    p.add_argument("--vocab", type=int, default=960, help="tokens of the tokenizer")
    p.add_argument("--hidden", type=int, default=128, help="width")
    p.add_argument("--intermediate", type=int, default=384, help="width of the MLP")
    p.add_argument("--layers", type=int, default=5, help="blocks")
    p.add_argument("--heads", type=int, default=4, help="query heads")
    p.add_argument("--kv-heads", type=int, default=2, help="key-value heads")
    # optimisation
    p.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    p.add_argument("--batch-size", type=int, default=32, help="examples per step")
    p.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=100, help="steps of linear warmup")
    p.add_argument("--seed", type=int, default=0, help="of the weights and of the corpus")
    args = p.parse_args()

    torch.manual_seed(args.seed)
    tok = train_tokenizer(args.vocab)
    files, config = side_files(tok), model_config(args, tok)
    m = Qwen2(config)
    m.init_weights()
    with tempfile.TemporaryDirectory() as scratch:  # chat.Tokenizer reads a checkpoint
        m.save(os.path.join(scratch, "untrained"), files)
        tokenizer = Tokenizer(os.path.join(scratch, "untrained"))
    print(f"{sum(p.numel() for p in m.parameters()):,} parameters, {tok.get_vocab_size()} tokens")

    groups = [
        {"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in m.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    stream, start, mean = batches(tokenizer, args), time.time(), None
    for step in tqdm(range(1, args.steps + 1), disable=None, unit="step"):
        ids, targets, learn = next(stream)
        lr = args.lr * min(step / args.warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = -token_logps(m.hidden(ids)[learn], m.head_weight, targets[learn]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 0 or step == args.steps:
            print(f"step {step}: loss {mean:.4f}, {time.time() - start:.0f} s", flush=True)

    m.save(args.out, files, dtype=torch.bfloat16)  # half the size on disk; what trains on from it reads fp32
    size = sum(os.path.getsize(os.path.join(args.out, name)) for name in os.listdir(args.out))
    print(f"wrote {args.out}, {size / 2**20:.1f} MB; next: bash run.sh")


if __name__ == "__main__":
    cli(main)
