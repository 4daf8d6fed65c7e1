"""Conversations as token ids, and packed rows of them."""

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack(examples):
    """Examples -> (input_ids, lengths, at, targets, owner), one row without padding.

    input_ids: (1, T). lengths: the documents' lengths, sum T. For the N supervised tokens: at (N,) is the position
    whose hidden state predicts the token (the one before it), targets (N,) the token, owner (N,) its example's index.
    """
    lengths = [len(ids) for ids, _ in examples]
    ids, learn = (torch.from_numpy(np.concatenate(lists)) for lists in zip(*examples))  # (T,) int64, (T,) bool
    ends = torch.tensor(lengths).cumsum(0)
    learn[ends - torch.tensor(lengths)] = False  # a document's first token: nothing before it predicts it
    at = learn.nonzero()[:, 0]  # (N,)
    return ids[None], lengths, at - 1, ids[at], torch.searchsorted(ends, at, right=True)


# ---------------------------------------------------------------------------------------------------------------------


def encode_chats(records, tokenizer, max_len):
    """[(where, messages)] -> (examples cut to max_len tokens, where each stands). Those with nothing supervised left drop out."""
    examples, places = [], []
    for where, messages in records:
        ids, supervised = tokenizer.chat_ids(messages)
        if any(supervised[1:max_len]):
            examples.append((ids[:max_len], supervised[:max_len]))
            places.append(where)
    return examples, places


def count_supervised(examples):
    """Supervised tokens that are predicted; the first token of a sequence has nothing before it."""
    return sum(sum(supervised[1:]) for _, supervised in examples)
