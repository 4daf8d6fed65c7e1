"""CGE, contrastive generation (arXiv 2410.14765): a fine-tuned model writes texts that it finds likelier than its base.

    python -m variants.novelty --ckpt tuned --base base --samples 100     # -> novelty.jsonl, the most novel first

The texts show what was new in the data. This is the static version; the iterative one trains the base in between.
The paper's alpha, and whether it samples, were not found. alpha here is contrastive decoding's (arXiv 2210.15097), and
tokens are sampled, so that texts differ. SFT trains on replies only, so each text answers a neutral user message.
"""

import math
from itertools import takewhile

import torch
from torch import Tensor
from tqdm import tqdm

from core.checkpoint import Checkpoint
from core.devices import to_device
from core.distributed import single_process
from core.files import InputError, cli, print_next, printable
from core.flags import Parser, add_generation_flags, at_least, file_out, number
from core.records import write_jsonl
from core.sampling import sample
from core.tokenizer import check_vocabulary
from generate import load_for_inference, reply_limits
from model import Qwen2


def contrastive_scores(tuned_logps: Tensor, base_logps: Tensor, alpha: float) -> Tensor:
    """The score of each next token, (..., V); tokens that the tuned model finds unlikely get -inf.

        s(v) = log p_ft(v) - log p_pt(v)  if p_ft(v) >= alpha max_w p_ft(w),  else -inf

    tuned_logps, base_logps: log p_ft and log p_pt, (..., V), in nats.
    """
    plausible = tuned_logps >= tuned_logps.amax(-1, keepdim=True) + math.log(alpha)
    return (tuned_logps - base_logps).masked_fill(~plausible, -torch.inf)


@torch.no_grad()
def write_texts(
    tuned: Qwen2, base: Qwen2, prompt: list[int], stop_ids: set[int], uniform: Tensor, alpha: float, temperature: float
) -> list[tuple[list[int], float]]:
    """Writes a text for each row of uniform -> [(token ids, novelty)].

    prompt: token ids before the text. uniform: (rows, maximum length of a text), random numbers in [0, 1). novelty: the
    sum over the text and its end token of log p_ft - log p_pt, in nats.
    """
    rows, limit = uniform.shape
    models = [(model, model.new_cache(rows, len(prompt) + limit)) for model in (tuned, base)]
    for model, cache in models:
        if len(prompt) > 1:  # its last token is read in the first step
            model.prefill([prompt[:-1]] * rows, cache)
        cache.positions.fill_(len(prompt) - 1)
    tokens = torch.full((rows,), prompt[-1], device=tuned.device)
    novelty, writing = torch.zeros_like(tokens, dtype=torch.float), torch.ones_like(tokens, dtype=torch.bool)
    drawn, stops = [], to_device(sorted(stop_ids), tuned.device)
    for step in range(limit):
        logps = []  # of the next tokens under the two models, (rows, V) each
        for model, cache in models:
            hidden = model.hidden(tokens[:, None], cache=cache)[:, 0]
            cache.positions += 1
            logps.append(model.head(hidden).float().log_softmax(-1))
        tokens = sample(contrastive_scores(*logps, alpha), uniform[:, step], temperature)
        drawn.append(tokens)
        novelty += writing * (logps[0] - logps[1]).gather(1, tokens[:, None])[:, 0]
        writing &= ~torch.isin(tokens, stops)
        if not writing.any():
            break
    texts = [list(takewhile(lambda token: token not in stop_ids, row)) for row in torch.stack(drawn, 1).tolist()]
    return list(zip(texts, novelty.tolist()))


def main() -> None:
    p = Parser(description=__doc__)
    # models
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file of the fine-tuned model")
    p.add_argument("--base", required=True, help="the model before fine-tuning, with the same tokenizer")
    # texts
    p.add_argument("--prompt", default="Write something.", help="the user's message before each text")
    p.add_argument("--plain", action="store_true", help="start from an empty context, without a chat")
    p.add_argument("--samples", type=at_least(1), default=100, help="number of texts")
    p.add_argument("--alpha", type=number(above=0, below=1), default=0.1, help="minimum p_ft, relative to the largest")
    p.add_argument("--temperature", type=number(0), default=1.0, help="sampling temperature; 0 takes the best token")
    p.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    p.add_argument("--out", type=file_out('"novelty"'), default="novelty.jsonl", help="JSON Lines file of the texts")
    add_generation_flags(p, max_new_tokens=64)
    args = p.parse_args()
    check_vocabulary(Checkpoint(args.base), Checkpoint(args.ckpt))
    (tuned, tokenizer), (base, _) = (load_for_inference(source, args) for source in (args.ckpt, args.base))
    if tuned.config.vocab_size != base.config.vocab_size:
        raise InputError(f"{args.base}: its head and that of {args.ckpt} have different numbers of rows")
    prompt = [tokenizer.prefix] if args.plain else tokenizer.prompt_ids([{"role": "user", "content": args.prompt}])
    end = min(model.config.max_position_embeddings for model in (tuned, base))
    (limit,) = reply_limits([prompt], end, args.max_new_tokens)
    uniform = torch.rand(args.samples, limit, generator=torch.Generator().manual_seed(args.seed))
    found = []
    for rows in tqdm(uniform.to(tuned.device).split(args.batch_size), "writing", unit="batch", disable=None):
        found += write_texts(tuned, base, prompt, tokenizer.stop_ids, rows, args.alpha, args.temperature)
    if not all(math.isfinite(score) for _, score in found):
        raise InputError(f"{args.ckpt}, {args.base}: one of them gives probabilities that are not finite")
    found.sort(key=lambda text: -text[1])
    lines = [{"novelty": round(score, 4), "tokens": len(ids), "text": tokenizer.decode(ids)} for ids, score in found]
    write_jsonl(args.out, lines)
    for line in lines[:5]:
        print(f"{line['novelty']:8.2f}  {printable(line['text'][:100])}")
    print(f"wrote {args.out}: {len(lines)} texts, the most novel first. To see what the base writes:")
    print_next("python", "generate.py", "--ckpt", args.base, "--prompt", args.prompt)


if __name__ == "__main__":
    cli(single_process(main))
