"""Checks a chat template by rendering it: a template whose output is ChatML is accepted, any other is refused.

A template is untrusted code. It runs in jinja2's sandbox, in a separate process with limits on time and memory.
"""

import functools
import json
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

from core.files import ROOT, InputError

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_TEMPLATE = 2**18  # characters; Qwen3.5's template has 8,000
MAX_RENDERED = 2**20  # characters of one rendered conversation
CPU_SECONDS, WALL_SECONDS, MEMORY = 5, 60, 2**30  # limits of that process; memory in bytes

# Qwen2's template (also Qwen1.5's and SmolLM2's), with DEFAULT in place of its default system prompt
CHATML_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = "<|im_start|>", "<|im_end|>\n"


def chatml(messages: list[dict], generation_prompt: bool = False) -> str:
    """A conversation as ChatML text."""
    text = "".join(f"{START}{message['role']}\n{message['content']}{END}" for message in messages)
    return text + f"{START}assistant\n" * generation_prompt


def _turns(*texts: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Conversations as in training (they end with a reply) and in generation (they end with a question)
PROBES = [
    _turns("Q"),
    _turns("Q", "A"),
    _turns("Q", "A", "Q2", "A2", "Q3", "A3"),
    _turns("Q", "A", "Q2"),
    _turns("Q", "A", system="S"),
    _turns("Q", system="S"),
    _turns("Q", "A", "Q2", "A2", "Q3", system="S"),
    _turns("", "", "", "", system=""),
    _turns("  Q \n", " A\n\n", "\n\nQ2\t", "\n\n A2 ", system="\n S \n"),
    _turns("<b>&amp; 'Q' \"\\n\"", "{{ A }} {% raw %}", system="{# S #} \\"),
    _turns("法国的首都是?", "巴黎。", "Ünïcödé 😀", "é e\u0301", system="你是"),
    _turns("Q", "<think>\nhm\n</think>\n\nA", "Q2", "<think>\n\n</think>\n\nA2"),
    _turns("Q", "<think>hm</think>A", "<tool_response>x</tool_response>", "<tool_call>{}</tool_call>"),
    _turns("Q /no_think", "A", "Q2 /think", "A2", system="S /no_think"),
]


def default_system(template: str, where: str, special_tokens: dict[str, str] | None = None) -> str | None:
    """The system prompt that a template adds to a conversation without one; None if it adds none.

    special_tokens: {"bos_token": text, ...}, variables that the template may use. where: the file, for errors.
    InputError if the template fails, or if its output for any probe is not ChatML.
    """
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"{where}: a chat template of {len(template):,} characters; at most {MAX_TEMPLATE:,} are read")
    rendered = render_probes(template, json.dumps(special_tokens or {}, sort_keys=True))
    if isinstance(rendered, str):
        raise InputError(f"{where}: the chat template fails: {rendered}")
    *texts, a_year_later = rendered
    if texts[0] != a_year_later:
        raise InputError(f"{where}: the chat template prints today's date, so its tokens change from day to day")
    header, default = f"{START}system\n", None
    if texts[0].startswith(header) and START not in (first := texts[0][len(header) :].partition(END)[0]):
        default = first
    for messages, text in zip(PROBES, texts):
        if default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": default}, *messages]
        expected = chatml(messages, generation_prompt=messages[-1]["role"] == "user")
        if text != expected:
            at = len(os.path.commonprefix([text, expected]))
            start = max(0, at - 20)
            raise InputError(
                f"{where}: the chat template is not ChatML: it renders {text[start : at + 40]!r} where ChatML has "
                f"{expected[start : at + 40]!r}; only ChatML models are supported"
            )
    return default


@functools.lru_cache(maxsize=16)
def render_probes(template: str, special_tokens: str) -> list[str] | str:
    """The template's output for each of PROBES, then for PROBES[0] a year later. If it fails: the reason, as a text.

    special_tokens: JSON. Runs `main` below in a separate process.
    """
    job = json.dumps({"template": template, "special_tokens": json.loads(special_tokens), "cpu_seconds": CPU_SECONDS})
    environment = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)]), "PYTHONUTF8": "1"}  # no secrets
    command = [sys.executable, "-m", "core.chat_template"]
    try:
        done = subprocess.run(
            command, input=job.encode(), capture_output=True, cwd=ROOT, env=environment, timeout=WALL_SECONDS
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"it runs for more than {WALL_SECONDS} seconds"
    except OSError as e:
        return f"no process can be started for it: {e.strerror}"
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:150]
        limits = f"it runs for more than {CPU_SECONDS} seconds or takes more than {MEMORY >> 20} MiB"
        return f"{limits} (exit {done.returncode}) {last}".strip()


# ---------------------------------------------------------------------------------------------------------------------
# Inside the separate process


def sandbox() -> "Environment":
    """jinja2's sandbox, with the settings, filters and functions of transformers' chat templates."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's tokens and renders as its body."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        raise jinja2.TemplateError(f"jinja2 {jinja2.__version__} has holes in its sandbox; pip install -U jinja2")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def limit_process(cpu_seconds: int) -> None:
    """Limits the CPU time and memory of this process. The system kills it if it exceeds them."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Reads a job of `render_probes` from stdin and prints its result as JSON."""
    import datetime

    job = json.load(sys.stdin)
    limit_process(job["cpu_seconds"])
    today = datetime.datetime(2025, 1, 31)
    try:
        environment = sandbox()
        environment.globals["strftime_now"] = lambda form: today.strftime(form)
        template = environment.from_string(job["template"])

        def text(messages):
            is_prompt = messages[-1]["role"] == "user"
            settings = {"tools": None, "documents": None, "add_generation_prompt": is_prompt, **job["special_tokens"]}
            text = template.render(messages=messages, **settings)
            if len(text) > MAX_RENDERED:
                raise ValueError(f"it renders more than {MAX_RENDERED:,} characters")
            return text

        result = [text(messages) for messages in PROBES]
        today = datetime.datetime(2026, 2, 1)
        result.append(text(PROBES[0]))
    except BaseException as e:  # whatever the template raises
        result = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
