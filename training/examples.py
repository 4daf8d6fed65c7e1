"""Encodes conversations as token ids, and packs examples into one row."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.files import InputError
from core.tokenizer import Tokenizer


def pack(examples: list) -> tuple[Tensor, list[int], Tensor, Tensor, Tensor]:
    """Packs examples (ids, supervised) into one row without padding -> (input_ids, lengths, at, targets, owner).

    input_ids: (1, T). lengths: the documents' lengths, which sum to T. The others have one entry for each of the N
    supervised tokens, in the order of the row. at (N,): the position that predicts the token (the one before it).
    targets (N,): the token. owner (N,): the index of its example.
    """
    lengths = [len(ids) for ids, _ in examples]
    ids, learn = (torch.from_numpy(np.concatenate(lists)) for lists in zip(*examples))  # (T,) int64, (T,) bool
    ends = torch.tensor(lengths).cumsum(0)
    learn[ends - torch.tensor(lengths)] = False  # no position predicts the first token of a document
    at = learn.nonzero()[:, 0]  # (N,)
    return ids[None], lengths, at - 1, ids[at], torch.searchsorted(ends, at, right=True)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


@dataclass
class Cuts:
    """Counts examples that were longer than --max-len and lost their last tokens."""

    examples: int = 0
    tokens: int = 0  # tokens lost, all examples together
    ends: int = 0  # cut examples whose last reply lost its <|im_end|>

    def add(self, length: int, reply_end: int, max_len: int) -> None:
        """Counts one example. length: before the cut. reply_end: index of the <|im_end|> of its last reply."""
        if length > max_len:
            self.examples += 1
            self.tokens += length - max_len
            self.ends += reply_end >= max_len

    def lines(self, total: int, max_len: int, what: str = "examples") -> list[str]:
        """Lines for the summary of a run; none if no example was cut. what: the name of the `total` examples."""
        if not self.examples:
            return []
        lost = f"{self.tokens} tokens lost; {self.ends} examples lost their last <|im_end|>"
        return [f"{self.examples} of {total} {what} cut to {max_len} tokens (--max-len): {lost}"]


def encode_chats(records: list, tokenizer: Tokenizer, max_len: int) -> tuple[list, list[str], Cuts]:
    """Encodes records [("file:line", messages)] -> (examples, their "file:line", Cuts).

    Examples (ids, supervised) are cut to max_len tokens. Examples without supervised tokens are dropped. InputError if
    all of them are.
    """
    examples, places, cuts = [], [], Cuts()
    for where, messages in records:
        ids, supervised = tokenizer.chat_ids(messages)
        if any(supervised[1:max_len]):
            examples.append((ids[:max_len], supervised[:max_len]))
            places.append(where)
            last = len(supervised) - 1 - supervised[::-1].index(True)  # the newline after the last reply's <|im_end|>
            cuts.add(len(ids), last - 1, max_len)
    if records and not examples:
        files = dict.fromkeys(where.rpartition(":")[0] for where, _ in records)
        raise InputError(f"{', '.join(files)}: no example has a supervised token within --max-len {max_len}")
    return examples, places, cuts


def held_out_lines(read: int, kept: int, cuts: Cuts, max_len: int) -> list[str]:
    """Lines on the --eval-data for the summary of a run; none if they are used as they are."""
    dropped = [f"{read - kept} held-out examples dropped (nothing to predict within {max_len} tokens)"]
    return dropped * (read > kept) + cuts.lines(kept, max_len, "held-out examples")


def count_supervised(examples: list) -> int:
    """The number of supervised tokens. The first token of an example does not count: nothing predicts it."""
    return sum(sum(supervised[1:]) for _, supervised in examples)
