"""The sides that tools.speed compares: our scripts and other libraries, one function each, run in separate processes.

A side gets the parsed arguments and a scratch folder. It returns its measurements: "step_s" (seconds without loading
and saving) and, depending on the mode, losses, texts and the time of each step.
"""

import json
import os
import resource
import subprocess
import sys
import time
from argparse import Namespace

import torch

from core.conversations import kto_examples, sft_conversations
from core.devices import DTYPES
from core.records import read_records
from core.tokenizer import Tokenizer
from model import Qwen2

# ---------------------------------------------------------------------------------------------------------------------
# Training


def training_command(args: Namespace, out: str, checkout: str | None = None) -> list[str]:
    """Our training script's command line. checkout: the root of another copy of this repository."""
    script = f"train_{args.mode}.py"
    settings = {
        "ckpt": args.ckpt[0],
        "data": args.data,
        "out": out,
        "max-steps": args.steps,
        "batch-size": args.batch_size,
        "max-len": args.max_len,
        "lr": "1e-6",
        "schedule": "constant",
        "warmup": 0,
        "dtype": args.dtype,
        "device": args.device,
        "save-every": 0,
        "micro-tokens": args.micro_tokens,
    }
    command = [os.path.join(checkout, script) if checkout else script, "--no-shuffle"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)] if value is not None else []
    return command + (["--compile", args.compile] if args.compile else [])


def read_log(out: str) -> dict:
    with open(f"{out}.run/log.jsonl", encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    times = [r["tokens"] / r["tokens_per_second"] for r in log]
    return {"step_s": sum(times), "step_times": times, "losses": [r["loss"] for r in log]}


def ours_train(args: Namespace, folder: str) -> dict:
    script, out = __import__(f"train_{args.mode}"), os.path.join(folder, "out")
    sys.argv = training_command(args, out)
    script.main()
    return read_log(out)


def checkout_train(args: Namespace, folder: str) -> dict:
    """The same script of another checkout (--vs DIR), such as an earlier commit."""
    out, checkout = os.path.join(folder, "out"), args.side.split("-", 1)[1]
    subprocess.run([sys.executable, *training_command(args, out, checkout)], check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return read_log(out) | {"peak_gb": peak}


def trl_train(args: Namespace, folder: str) -> dict:
    """TRL's trainer on the same examples in the same order, reference precomputed, no activation checkpointing."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.ckpt[0])
    model = AutoModelForCausalLM.from_pretrained(args.ckpt[0], dtype=torch.float32)
    settings = dict(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.peer_batch,
        gradient_accumulation_steps=args.batch_size // args.peer_batch,
        max_length=args.max_len,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        bf16=args.dtype == "bf16",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        max_grad_norm=1.0,
        weight_decay=0.0,
        disable_tqdm=True,
    )
    if args.mode == "kto":
        examples = [e for _, e in read_records([args.data], kto_examples)]
        answer = lambda text: [{"role": "assistant", "content": text}]
        rows = [{"prompt": p, "completion": answer(c), "label": label} for p, c, label in examples]
        config = KTOConfig(precompute_ref_log_probs=True, **settings)
        trainer_class = KTOTrainer
    else:
        examples = [m for _, m in read_records([args.data], sft_conversations)]
        rows = [{"prompt": m[:-1], "completion": m[-1:]} for m in examples]
        free = args.side == "trl-padding-free"
        if free:  # this mode does not cut examples, so use short ones
            settings["max_length"] = None
        config = SFTConfig(padding_free=free, train_sampling_strategy="sequential", **settings)
        trainer_class = SFTTrainer
    data = Dataset.from_list(rows)
    trainer = trainer_class(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    started = time.time()
    trainer.train()
    step_s = time.time() - started
    trainer.model.save_pretrained(os.path.join(folder, "out"))  # because ours saves too
    return {"step_s": step_s, "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h]}


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def read_prompts(args: Namespace) -> list:
    with open(args.data, encoding="utf-8") as f:
        return [json.loads(line)["prompt"] for line in f][: args.limit]


def ours_generate(args: Namespace, folder: str) -> dict:
    from generate import generate_steps

    model = Qwen2.from_pretrained(args.ckpt[0], DTYPES[args.dtype], args.device)
    tokenizer, prompts = Tokenizer(args.ckpt[0]), read_prompts(args)
    started, made, texts = time.time(), 0, [""] * len(prompts)
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    for i, tokens, finish in generate_steps(model, tokenizer, prompts, **settings):
        if finish:
            made += len(tokens)
            texts[i] = tokenizer.decode(tokens)
    return {"step_s": time.time() - started, "made": made, "texts": texts}


def transformers_generate(args: Namespace, folder: str) -> dict:
    """model.generate on one left-padded batch of prompts of similar length; or one at a time on eight prompts.

    Only the time per token is compared. One batch is enough, because transformers shares no work between prompts.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(args.ckpt[0], dtype=DTYPES[args.dtype]).to(args.device)
    tokenizer, batch = Tokenizer(args.ckpt[0]), int(args.side.rsplit("-")[-1])
    prompts = read_prompts(args)
    ids = [tokenizer.prompt_ids(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))[: max(8, batch)]
    stops = sorted(tokenizer.stop_ids)
    settings = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": stops, "pad_token_id": 0}
    config = GenerationConfig(max_new_tokens=args.max_new_tokens, **settings)
    started, made, texts = time.time(), 0, [None] * len(prompts)
    for part in (order[k : k + batch] for k in range(0, len(order), batch)):
        width = max(len(ids[i]) for i in part)
        padded = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in part], device=args.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in part], device=args.device)
        out = model.generate(padded, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, tokens in zip(part, out):
            end = next((k for k, t in enumerate(tokens) if t in stops), len(tokens))
            made += end
            texts[i] = tokenizer.decode(tokens[:end])
    return {"step_s": time.time() - started, "made": made, "texts": texts}


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def ours_merge(args: Namespace, folder: str) -> dict:
    import merge

    sys.argv = ["merge.py", "--method", args.method, "--models", *args.ckpt, "--out", os.path.join(folder, "out")]
    sys.argv += ["--base", args.base] if args.base else []
    sys.argv += ["--density", "0.2"] if args.method in ("ties", "dare_ties") else []
    sys.argv += ["--dtype", "bfloat16", "--shard-size", "5GB"] if args.dtype == "bf16" else []
    started = time.time()
    merge.main()
    return {"step_s": time.time() - started}


def mergekit_merge(args: Namespace, folder: str) -> dict:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    density = {"density": 0.2} if args.method in ("ties", "dare_ties") else {}
    models = [{"model": os.path.abspath(c), "parameters": {"weight": 1.0, **density}} for c in args.ckpt]
    config = {"merge_method": args.method, "dtype": "float32", "models": models}
    config |= {"base_model": os.path.abspath(args.base)} if args.base else {}
    config |= {"out_dtype": "bfloat16"} if args.dtype == "bf16" else {}
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.dump(config)))
    options = MergeOptions(lazy_unpickle=True, quiet=True, copy_tokenizer=True)
    started = time.time()
    run_merge(config, os.path.join(folder, "out"), options)
    return {"step_s": time.time() - started}


SIDES = {
    ("sft", "ours"): ours_train,
    ("kto", "ours"): ours_train,
    ("sft", "trl"): trl_train,
    ("kto", "trl"): trl_train,
    ("sft", "checkout"): checkout_train,
    ("kto", "checkout"): checkout_train,
    ("generate", "ours"): ours_generate,
    ("generate", "transformers"): transformers_generate,
    ("merge", "ours"): ours_merge,
    ("merge", "mergekit"): mergekit_merge,
}
