"""GOT-D (arXiv 2405.02774): selects the records that reduce the optimal-transport distance to a target set most.

    python -m variants.got --ckpt base --candidates pool/*.jsonl --targets task.jsonl --keep 1000 --out got
    python train_sft.py --ckpt base --data got/sft.jsonl --out got-ckpt     # then train on the task

The candidates should resemble the data that the model was trained on before. A target may be a prompt without a reply.
The paper embeds texts with a DistilBERT fine-tuned on the targets. Here an embedding is the mean of --ckpt's last
hidden states. Their scale differs, so --eps is relative to the mean cost; the authors' eps is 0.1. The paper's first
step, which drops domains far from the targets, is left out.
"""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from core.conversations import dialogues
from core.distributed import single_process
from core.files import InputError, cli, print_next
from core.flags import Parser, add_device_flags, at_least, number, out_path
from core.outputs import claimed_folder
from core.records import expand, read_objects, write_jsonl
from generate import load_for_inference
from model import Qwen2
from training.logps import hidden_states

TILE = 8192  # columns of the cost in one operation


def sinkhorn(cost: Tensor, eps: float, iterations: int = 10_000, tol: float = 1e-6) -> tuple[Tensor, Tensor, float]:
    """The dual potentials of entropic optimal transport between uniform masses -> (f (M,), g (N,), error).

        f_i = -eps log mean_j exp((g_j - C_ij) / eps)        g_j = -eps log mean_i exp((f_i - C_ij) / eps)

    cost: C (M, N), of moving mass between target i and candidate j. eps: in units of the cost. The distance is
    mean f + mean g. Its gradient with respect to the mass of candidate j is g_j, up to a constant, so the smallest g
    are best. error: mean relative error of the targets' masses. Iterations stop when it is below tol.
    """
    M, N = cost.shape
    f, g, tiles = cost.new_zeros(M), cost.new_zeros(N), cost.split(TILE, dim=1)
    for _ in range(iterations):
        parts = [((part - tile) / eps).logsumexp(1) for part, tile in zip(g.split(TILE), tiles)]
        old, f = f, -eps * (torch.stack(parts).logsumexp(0) - math.log(N))
        error = (((old - f) / eps).exp() - 1).abs().mean().item()
        if error < tol:
            break
        g = torch.cat([-eps * (((f[:, None] - tile) / eps).logsumexp(0) - math.log(M)) for tile in tiles])
    return f, g, error


def squared_distances(targets: Tensor, candidates: Tensor) -> Tensor:
    """C_ij = |e(t_i) - e(c_j)|^2, (M, N) in fp64. targets: (M, C), candidates: (N, C)."""
    return torch.cdist(targets.double(), candidates.double()).square()


@torch.no_grad()
def embed_texts(model: Qwen2, texts: list[list[int]], micro_tokens: int) -> Tensor:
    """The mean of the last hidden states over each text's token ids, (len(texts), C) in fp32 on the CPU."""
    out = torch.zeros(len(texts), model.config.hidden_size, device=model.device)
    states = hidden_states(model, texts, micro_tokens)
    for i, hidden in tqdm(states, "embedding", len(texts), unit="text", disable=None):  # (T_i, C)
        out[i] = hidden.mean(0)
    return out.cpu()


def read_texts(paths: list[str], max_chars: int) -> list[tuple[str, dict, str]]:
    """-> ("file:line", the unchanged record, its messages as one text of at most max_chars) of each record."""
    found = []
    for path in expand(paths):
        for line, record in read_objects(path):
            texts = [m["content"] for d in dialogues(record, f"{path}:{line}") for m in d.messages()]
            found.append((f"{path}:{line}", record, "\n".join(texts)[:max_chars]))
    if not found:
        raise InputError(f"{', '.join(paths)}: no records")
    return found


def main() -> None:
    p = Parser(description=__doc__)
    # data
    p.add_argument("--candidates", nargs="+", required=True, metavar="F", help="SFT records to choose from")
    p.add_argument("--targets", nargs="+", required=True, metavar="F", help="records of the task, a few hundred")
    p.add_argument("--keep", type=at_least(1), required=True, help="number of candidates to keep")
    p.add_argument("--out", type=out_path, default="got", help="folder for sft.jsonl, best first, and scores.jsonl")
    p.add_argument("--max-chars", type=at_least(1), default=1000, help="maximum characters of a text; the rest is cut")
    # method
    p.add_argument("--eps", type=number(above=0), default=0.05, help="entropic regularisation, relative to mean cost")
    # model
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file of the model that embeds the texts")
    p.add_argument("--micro-tokens", type=at_least(1), default=8192, help="maximum tokens of one forward")
    add_device_flags(p, "dtype of weights and computation")
    args = p.parse_args()
    with claimed_folder(args.out, "variants.got", ("sft.jsonl", "scores.jsonl")):
        candidates, targets = read_texts(args.candidates, args.max_chars), read_texts(args.targets, args.max_chars)
        if args.keep >= len(candidates):
            raise InputError(f"--keep {args.keep}: there are {len(candidates)} candidates; keep fewer")
        model, tokenizer = load_for_inference(args.ckpt, args)
        end = model.config.max_position_embeddings
        ids = [tokenizer.encode(text)[:end] or [tokenizer.prefix] for *_, text in targets + candidates]
        embedded = embed_texts(model, ids, args.micro_tokens)
        cost = squared_distances(embedded[: len(targets)], embedded[len(targets) :])
        if not 1e-9 <= (eps := args.eps * cost.mean().item()) < math.inf:
            raise InputError(f"{args.ckpt}: embeds all candidates and targets as one point, or not as finite numbers")
        f, g, error = sinkhorn(cost, eps)
        if error > 0.01:
            print(f"warning: the potentials did not converge (error {error:.1%}); a larger --eps converges sooner")
        best = g.argsort(stable=True)[: args.keep].tolist()
        before, after = f.mean() + g.mean(), sum(part.mean() for part in sinkhorn(cost[:, best], eps)[:2])
        print(f"distance to the targets: {before:.4g} of all candidates, {after:.4g} of the kept ones")
        kept, scores = set(best), (g - g.mean()).tolist()
        rows = ({"record": candidates[i][0], "score": scores[i], "kept": i in kept} for i in range(len(scores)))
        write_jsonl(f"{args.out}/scores.jsonl", rows)
        write_jsonl(f"{args.out}/sft.jsonl", (candidates[i][1] for i in best))
        print(f"wrote {args.out}/sft.jsonl ({len(best):,} of {len(scores):,} records) and scores.jsonl")
        print_next("python", "train_sft.py", "--ckpt", args.ckpt, "--data", f"{args.out}/sft.jsonl")


if __name__ == "__main__":
    cli(single_process(main))
