"""The model card of a written checkpoint: README.md with the YAML front matter that the Hugging Face hub reads."""

import json
import os
import re
from collections.abc import Iterable, Sequence

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(source: str) -> str | None:
    """The source if it is a hub id such as Qwen/Qwen2-0.5B-Instruct; None for a local path."""
    return source if HUB_ID.fullmatch(source) and not os.path.exists(source) else None


def dataset_id(source: str) -> str | None:
    """OWNER/NAME of hf://datasets/OWNER/NAME/FILE; None for a local file."""
    found = re.match(r"hf://datasets/([^/]+/[^/]+)", source)
    return found[1] if found else None


def readme_license(folder: str) -> str | None:
    """The license in the front matter of a folder's README.md, None if there is none."""
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):  # a pipe would block
        return None
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(10_000)
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license: *[\"']?([^\s\"']+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def base_license(source: str) -> str | None:
    """The license of a base, a local path or a hub id. A hub id's is read from the snapshot that was downloaded."""
    if not hub_id(source):
        return readme_license(source)
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(source, "README.md")
    except ValueError:  # no valid id, such as a local folder with -- in its name that has been removed since
        return None
    return readme_license(os.path.dirname(path)) if isinstance(path, str) else None


def front_matter(fields: dict[str, str | list[str] | None]) -> str:
    """The fields as YAML. Texts are quoted as JSON strings, which are valid YAML. Empty fields are left out."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, list) and value:
            lines += [f"{name}:", *(f"- {json.dumps(x, ensure_ascii=False)}" for x in value)]
        elif isinstance(value, str):
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(["---", *lines, "---"])


def table_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table, without a newline. A | inside a cell, such as that of a file name, is escaped."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


def settings_table(rows: dict[str, object]) -> str:
    """A Markdown table of two columns without a header."""
    return "\n".join(["| | |", "|---|---|", *map(table_row, rows.items())])


def model_card(
    name: str,
    done: str,
    bases: list[str],
    relation: str,
    settings: dict[str, object],
    datasets: Sequence[str] = (),
    figures: dict[str, object] | None = None,
    versions: dict[str, str] | None = None,
) -> str:
    """The text of a checkpoint's README.md.

    done: one sentence on how the checkpoint was made. bases: the models it was made from, as given on the command line;
    hub ids among them go into the front matter. relation: "finetune" or "merge". datasets: the training files.
    figures: the last log line, or the fingerprints.
    """
    licenses = {license for source in bases if (license := base_license(source))}
    head = front_matter(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": licenses.pop() if len(licenses) == 1 else None,
            "base_model": [x for source in bases if (x := hub_id(source))],
            "base_model_relation": relation if any(map(hub_id, bases)) else None,
            "datasets": list(dict.fromkeys(x for source in datasets if (x := dataset_id(source)))),
            "tags": ["qwen2", "post-training", relation],
        }
    )
    parts = [head, f"# {name}", done, f"Made from: {', '.join(f'`{source}`' for source in bases)}."]
    if datasets:
        parts.append(f"Data: {', '.join(f'`{source}`' for source in datasets)}.")
    parts += ["## Settings", settings_table(settings)]
    if figures:
        parts += ["## Figures", settings_table(figures)]
    if versions:
        parts += ["## Versions", settings_table(versions)]
    # AutoTokenizer would change a tokenizer that is not Qwen2's
    model, tokenizer = "AutoModelForCausalLM", "PreTrainedTokenizerFast"
    code = f'model = {model}.from_pretrained("PATH")\ntokenizer = {tokenizer}.from_pretrained("PATH")'
    load = f"```python\nfrom transformers import {model}, {tokenizer}\n\n{code}\n```"
    return "\n\n".join([*parts, "## How to load it", load]) + "\n"
