"""SFT with token weights, from the data or by TL-Training's rule for tool calls (arXiv 2412.15495).

    python -m variants.token_weights --ckpt base --data calls.jsonl --out weighted

All flags of train_sft.py work. Each record of --data also has "token_weights", a number >= 0 for each supervised token
(a reply's tokens, its <|im_end|> and the newline), or "tool_names", the available tools. Then only the last reply is
trained. It must be name(arguments), and the paper's rule raises the weights of the tokens that decide which tool is
called. The paper also leaves out failed calls: give their messages "weight": 0.
"""

import argparse
import hashlib
import os
import re

import torch
from torch import Tensor

import train_sft
from core.conversations import sft_conversations
from core.devices import to_device
from core.distributed import run_distributed
from core.files import InputError, cli, shown
from core.records import Fields, is_number
from core.tokenizer import Tokenizer
from model import Qwen2
from training.logps import supervised_logps
from training.setup import Setup


def weighted_loss(logps: Tensor, weights: Tensor, total: float) -> Tensor:
    """The loss of a micro-batch, a scalar in nats; the micro-batches' losses add up to the step's.

        L = sum_t -w_t log p_t / sum_t w_t        over the step; the paper averages over an example

    logps, weights: (N,) of the supervised tokens of the micro-batch. total: the sum of the weights of the whole step.
    """
    return -(weights * logps).sum() / total


def key_tokens(name: list[int], others: list[list[int]]) -> set[int]:
    """The positions of the tokens that decide which tool is called. name, others: token ids of the tools' names.

    They are the first token and, for every other tool whose name begins with the same L >= 1 tokens, token L (from 0).
    """
    return {0, *(len(os.path.commonprefix([name, other])) for other in others)}


def rule_weights(n: int, key: set[int], closing: set[int]) -> list[float]:
    """The weights of a call of n tokens: w = clip(n_other / n_key, 1, 9) on key tokens, 1 on the others.

    n_other leaves out the key tokens and those that close an argument.
    """
    w = min(max((n - len(key | closing)) / len(key), 1.0), 9.0)
    return [w if k in key else 1.0 for k in range(n)]


def closing_tokens(texts: list[str]) -> set[int]:
    """The positions of the tokens that are quotes or brackets after a value. The authors' exact rule is not known."""
    before = ["".join(texts[:k]).rstrip()[-1:] for k in range(len(texts))]
    closes = lambda text: re.fullmatch(r"""["'\])}]+[,;]?\s*""", text)
    return {k for k, text in enumerate(texts) if closes(text) and before[k] not in tuple("([{,:=")}


def call_weights(reply: str, names: list[str], tokenizer: Tokenizer, where: str) -> list[float]:
    """rule_weights of a reply that calls one of the tools of these names."""
    name, bracket, _ = reply.partition("(")
    if not bracket or name not in names:
        raise InputError(f"{where}: the last reply {shown(reply)} does not call one of tool_names as name(arguments)")
    ids, others = tokenizer.completion_ids(reply), [tokenizer.encode(other) for other in {*names} - {name}]
    key = key_tokens(tokenizer.encode(name), others)
    return rule_weights(len(ids), key, closing_tokens([tokenizer.decode([token]) for token in ids]))


def read_weights(record: Fields, where: str, last_turn_only: bool) -> list[list[dict]]:
    """sft_conversations for one conversation. Its first message also holds the token_weights or tool_names."""
    weights, names = record.first("token_weights"), record.first("tool_names")
    if (weights is None) == (names is None):
        raise InputError(f"{where}: needs token_weights or tool_names, and not both")
    if names is None and not (isinstance(weights, list) and all(is_number(w) and w >= 0 for w in weights)):
        raise InputError(f"{where}: token_weights is {shown(weights)}; it must be a list of numbers of at least 0")
    if weights is None and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise InputError(f"{where}: tool_names is {shown(names)}; it must be a list of texts")
    conversations = sft_conversations(record, where, last_turn_only or weights is None)
    if len(conversations) != 1:
        raise InputError(f"{where}: has {len(conversations)} conversations; give each a record and weights of its own")
    conversations[0][0] |= {"token_weights": weights, "tool_names": names}
    return conversations


def example_weights(setup: Setup) -> list[list[float]]:
    """For each example the weights of its supervised tokens within --max-len."""
    conversations, found = dict(setup.records), []
    for where, (_, supervised) in zip(setup.places, setup.examples):
        messages = conversations[where]
        weights, n = messages[0]["token_weights"], sum(setup.tokenizer.chat_ids(messages)[1])
        if weights is None:
            reply = [message["content"] for message in messages if message["role"] == "assistant"][-1]
            weights = call_weights(reply, messages[0]["tool_names"], setup.tokenizer, where)
        if len(weights) != n:
            counts = f"{len(weights)} token_weights for {n} supervised tokens"
            raise InputError(f"{where}: {counts}; count each reply's tokens, its <|im_end|> and the newline")
        found.append(weights[: sum(supervised)])
        if not any(found[-1]):
            raise InputError(f"{where}: no token within --max-len has a weight above 0; remove the record")
    setup.args.weights_sha256 = hashlib.sha256(repr(found).encode()).hexdigest()  # for --resume
    return found


def micro_loss(model: Qwen2, batch: train_sft.StepBatch, micro: list[int]) -> Tensor:
    """The loss of a micro-batch. batch.prepared: example_weights."""
    weights = [batch.prepared[i] for i in batch.indices]  # of the whole step
    logps, _ = supervised_logps(model, [batch.examples[i] for i in micro])  # (N,)
    w = torch.tensor([float(w) for i in micro for w in weights[i]])  # (N,)
    return weighted_loss(logps, to_device(w, model.device), sum(map(sum, weights)))


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="weighted.pt", method="SFT with token weights (arXiv 2412.15495)")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags)
    train_sft.main(args, parse=read_weights, prepare=example_weights, loss=micro_loss)


if __name__ == "__main__":
    cli(run_distributed(main))
