"""What the tests share: a tiny random checkpoint with a tokenizer of its own, and a way to run a script's main()."""

import importlib
import json
import os
import sys
from pathlib import Path

if not os.environ.get(
    "TEST_GPU"
):  # the tests are a CPU's, and so are the scripts' defaults in them; TEST_GPU=1 pytest -k gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

os.fsync = lambda fd: None  # for power cuts, which no test makes; each takes milliseconds

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from core import layers  # noqa: E402
from core.chat_template import CHATML_DEFAULT_SYSTEM  # noqa: E402
from core.tokenizer import Tokenizer  # noqa: E402
from model import Qwen2  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
# no time limit: the machine may be slow
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
QWEN2_TEMPLATE = CHATML_DEFAULT_SYSTEM.replace("DEFAULT", "You are a helpful assistant.")
TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "system user assistant You are a helpful assistant. Hello, how are you? 2 + 2 = 4, 12 x 12 = 144.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "春天来了，花儿开了。法国的首都是巴黎。",
]


def tiny_config(**changes):
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "use_sliding_window": False,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return config | changes


def tiny_model(seed=0, **changes):
    """A random model whose biases and norms are random too, so that a forgotten one shows."""
    m = Qwen2(tiny_config(**changes)).init_weights(torch.Generator().manual_seed(seed))
    g = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn(p.shape, generator=g)
    return m


def tiny_files(template=QWEN2_TEMPLATE):
    """The side files of a tiny checkpoint: a byte-level BPE tokenizer of at most 512 tokens, and the template."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(TEXT, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    return {
        "tokenizer.json": tok.to_str(),
        "tokenizer_config.json": json.dumps(settings),
        "generation_config.json": json.dumps({"eos_token_id": [2, 0], "pad_token_id": 0, "bos_token_id": 0}),
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny random checkpoint."""
    out = str(tmp_path_factory.mktemp("tiny") / "model")
    tiny_model().save(out, tiny_files())
    return out


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A tiny checkpoint whose head is not tied: a tied random model says its last token again and again."""
    out = str(tmp_path_factory.mktemp("lively") / "model")
    tiny_model(tie_word_embeddings=False, initializer_range=0.3).save(out, tiny_files())
    return out


@pytest.fixture(scope="module")
def loaded(lively):
    """The model and the tokenizer of that checkpoint."""
    return Qwen2.from_pretrained(lively), Tokenizer(lively)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder of checkpoints base, a, b and c of one architecture."""
    from merge_families import make_family

    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(params=["fused", "plain"])
def kernels(request, monkeypatch):
    """Runs a test twice: with the fused operations, and as under KERNELS=plain."""
    monkeypatch.setattr(layers, "KERNELS", request.param)
    return request.param


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train_sft", "--ckpt", ...) -> (exit code, stdout, stderr) of the script, in this process."""

    def call(script, *args):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        code = 0
        try:
            module.cli(module.main)
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(run):
    """refused(words, script, *args): the script ends with one clear line that holds the words, and exit code 2."""

    def call(words, script, *args):
        code, _, err = run(script, *args)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
        for word in [words] if isinstance(words, str) else words:
            assert word in lines[0], lines[0]

    return call


def write_lines(path, records):
    """Records -> a JSON Lines file; its path as a text."""
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def user(text):
    """The messages of a prompt of one turn."""
    return [{"role": "user", "content": text}]


def relative(a, b):
    """The largest difference of two tensors over the largest value of the second."""
    return ((a - b).abs().max() / b.abs().max()).item()


PROMPTS = [user(t[:n]) for t in TEXT for n in (3, 11, 29)]
real = pytest.mark.skipif("REAL_CKPT" not in os.environ, reason="REAL_CKPT names no directory of a real checkpoint")
