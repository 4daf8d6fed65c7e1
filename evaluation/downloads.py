"""Finds the benchmarks' files in --data-dir, or downloads them from their original sites and checks their SHA-256."""

import csv
import glob
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from typing import IO

from huggingface_hub import hf_hub_download

from core.files import InputError, atomic_write, check_regular
from core.outputs import atomic_folder, remove_leftovers

LETTERS = "ABCD"
FOUR_SHOTS_SHA256 = "25974f0a5d980c8e6b432422e959cb3293b6d715a99a90d1a4c8ab1ae207c54f"  # of the rendered examples


def open_url(url: str, method: str = "GET", **headers: str) -> IO[bytes]:
    """The open reply to a request. OSError if HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise OSError("HF_HUB_OFFLINE is set")
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=30)


def save_checked(
    path: str, data: bytes, sha256: str | None, convert: Callable[[bytes], bytes] = lambda data: data
) -> None:
    """Checks the SHA-256 of a download, converts it and writes it. The file appears whole or not at all."""
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the file's SHA-256 is not the expected one")
    data = convert(data)
    with atomic_write(path, "wb") as f:
        f.write(data)


def from_url(path: str, url: str, *check: object) -> None:
    """Downloads a file. check: the further arguments of save_checked."""
    with open_url(url) as reply:
        save_checked(path, reply.read(), *check)


class RemoteFile(io.RawIOBase):
    """A file on a server, read in parts. zipfile needs only the end of an archive and one member of it."""

    def __init__(self, url: str):
        self.url, self.at = url, 0
        with open_url(url, "HEAD") as reply:
            self.size = int(reply.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        with open_url(self.url, Range=f"bytes={self.at}-{end - 1}") as reply:
            if reply.status != 206:
                raise ValueError("the server does not send parts of a file")
            part = reply.read()
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


def from_zip(path: str, url: str, member: str, sha256: str) -> None:
    """Downloads one member of a zip archive on a server, without the rest."""
    with zipfile.ZipFile(io.BufferedReader(RemoteFile(url), 1 << 20)) as archive:
        save_checked(path, archive.read(member), sha256)


def from_archive(path: str, repo: str, name: str, sha256: str) -> None:
    """Extracts a split's folder of CSV files (the last part of `path`) from an archive in a Hugging Face data set.

    sha256: of the rows (see csv_digest), so that it does not depend on how the archive was packed.
    """
    archive = hf_hub_download(repo, name, repo_type="dataset")
    # files stay inside the folder; Python 3.10.11 and older cannot check this for tar
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") and tarfile.is_tarfile(archive) else {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(archive, folder, **safe)
        found = glob.glob(os.path.join(folder, "**", os.path.basename(path)), recursive=True)
        split = next(f for f in sorted(found) if "__MACOSX" not in f)
        if csv_digest(split) != sha256:
            raise ValueError("the rows' SHA-256 is not the expected one")
        files = {os.path.basename(file): file for file in glob.glob(os.path.join(glob.escape(split), "*.csv"))}
        remove_leftovers(os.path.dirname(path), os.path.basename(path))
        with atomic_folder(path, files) as new:
            for file, source in files.items():
                shutil.copyfile(source, os.path.join(new, file))


def csv_digest(folder: str) -> str:
    """SHA-256 of the names and rows of a folder's CSV files."""
    h = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(folder, "*.csv"))):
        with open(path, encoding="utf-8-sig", newline="") as f:
            h.update(json.dumps([os.path.basename(path), list(csv.reader(f))]).encode())
    return h.hexdigest()


def render_shots(shots: list[dict]) -> str:
    """GSM8K's worked examples as the beginning of a prompt."""
    return "".join(f"Question: {s['question']}\nLet's think step by step\n{s['answer']}\n\n" for s in shots)


def four_shots(data: bytes) -> bytes:
    """The first four examples of chain-of-thought-hub's prompt file, as JSON Lines."""
    blocks = [block.partition("\nLet's think step by step\n") for block in data.decode().split("\n\n")[:4]]
    shots = [{"question": q.removeprefix("Question: "), "answer": a.strip()} for q, _, a in blocks]
    if hashlib.sha256(render_shots(shots).encode()).hexdigest() != FOUR_SHOTS_SHA256:
        raise ValueError("its first four examples are not the protocol's")
    return "".join(json.dumps(shot) + "\n" for shot in shots).encode()


def github(path: str, sha256: str | None, *convert: Callable) -> tuple:
    """An entry of ORIGINS for a file on GitHub."""
    return (from_url, f"https://raw.githubusercontent.com/{path}", sha256, *convert)


def arc(member: str, sha256: str) -> tuple:
    """An entry of ORIGINS for a file of ARC. Its archive has 680 MB, nearly all of it an unrelated corpus."""
    url = "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip"
    return from_zip, url, f"ARC-V1-Feb2018-2/{member}", sha256


SAFETY = "thu-coai/SafetyBench/960833692a1ec82b191ff3e902daca7993c35cc1/opensource_data"
FASTCHAT = "lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data"
MMLU, CMMLU = ("cais/mmlu", "data.tar"), ("haonan-li/cmmlu", "cmmlu_v1_0_1.zip")
CEVAL = ("ceval/ceval-exam", "ceval-exam.zip")
# {file or folder: (download function, its arguments), or advice if it cannot be downloaded}
ORIGINS = {
    "gsm8k/test.jsonl": github(
        "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    "gsm8k/paper_4shot.jsonl": github(
        "FranxYao/chain-of-thought-hub/main/gsm8k/lib_prompt/prompt_hardest.txt", None, four_shots
    ),
    "humaneval/HumanEval.jsonl.gz": github(
        "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    "mbpp/mbpp.jsonl": github(
        "google-research/google-research/master/mbpp/mbpp.jsonl",
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    ),
    "ifeval/input_data.jsonl": github(
        "google-research/google-research/master/instruction_following_eval/data/input_data.jsonl",
        "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
    ),
    "safetybench/test_zh_subset.json": github(
        f"{SAFETY}/test_zh_subset.json", "8760b0621df0fa81b99f7e49961853f1ff8b5ac0e4f1f96dad20a587c33aea4f"
    ),
    "safetybench/test_answers_zh_subset.json": github(
        f"{SAFETY}/test_answers_zh_subset.json", "41c3e40330a7a96375de54b46df4839f6a46e8c9f6be974a2d31b35b8012af6c"
    ),
    "truthfulqa/TruthfulQA.csv": github(  # the 817 questions that the harness asks; later versions have fewer
        "sylinrl/TruthfulQA/013686a06be7a7bde5bf8223943e106c7250123c/TruthfulQA.csv",
        "8d7dd15f033196140f032d97d30f037da7a7b1192c3f36f9937c1850925335a2",
    ),
    "hellaswag/hellaswag_val.jsonl": github(
        "rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "arc/ARC-Easy-Test.jsonl": arc(
        "ARC-Easy/ARC-Easy-Test.jsonl", "ce32a0774b4beb1977d2c6b16dda5dd2b24fdc9c7f506882c452678676bd09be"
    ),
    "arc/ARC-Challenge-Test.jsonl": arc(
        "ARC-Challenge/ARC-Challenge-Test.jsonl", "9fa8ffb3e3a1f88cb302d53dd95aae81e39209ad9bcf974376b319d8fd35717c"
    ),
    "mt_bench/question.jsonl": github(
        f"{FASTCHAT}/mt_bench/question.jsonl", "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"
    ),
    "mt_bench/vicuna_bench_question.jsonl": github(
        f"{FASTCHAT}/vicuna_bench/question.jsonl", "c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5"
    ),
    "alignbench/data_v1.1_release.jsonl": github(
        "THUDM/AlignBench/5b79d4a84e566db26e755c719935c62a0e1b0527/data/data_v1.1_release.jsonl",
        "6ad5cdb2d552d2557aca18d0dcabaf19ff59fd18bef98eef880296c0478bbd11",
    ),
    "mmlu/dev": (from_archive, *MMLU, "09f2ee249586ba2079587107b1d69edb433f70d84b4d81084cc9391bf9959381"),
    "mmlu/test": (from_archive, *MMLU, "576a47c310f39cec7b41ae743af815e4eb411481e2556eab8b2695bbe0cd86ac"),
    "cmmlu/dev": (from_archive, *CMMLU, "37a1a94235c3429e35cf2dff1ffe68d78cdce25e618e75a7bd522ad42b2261b1"),
    "cmmlu/test": (from_archive, *CMMLU, "3d3754e52e8149acd078a7fa6a3062187226d9568a5596392929ad2eda3c66c5"),
    "ceval/dev": (from_archive, *CEVAL, "a2a117c8de980dbb67e680ecf7d492b01a06bb14c23f3bdea83c517db489741f"),
    "ceval/val": (from_archive, *CEVAL, "0fa0abf440a3c8e1b6f726844369c39b277c2e66471afe3cb88646a98b7f2845"),
    "perplexity": "make it a folder of your own texts, each a file *.txt in UTF-8",
    "demo/heldout.jsonl": "it is part of this repository (--data-dir .)",
}


def find_data_file(data_dir: str, name: str) -> str:
    """The path of a benchmark's file or folder, downloaded if it is missing. With or without .gz."""
    path = os.path.join(data_dir, name)
    other = path.removesuffix(".gz") if path.endswith(".gz") else f"{path}.gz"
    if os.path.exists(path):
        check_regular(path)
        return path
    if os.path.isfile(other):
        return other
    origin = ORIGINS.get(name, "")
    if isinstance(origin, str):
        todo = f"{origin}, or " if origin else ""
        raise InputError(f"{path}: missing; {todo}give the folder that holds {name} as --data-dir")
    download, *arguments = origin
    try:
        download(path, *arguments)
    except Exception as e:  # network, hub, archive or disk
        reason = (str(e).splitlines() or [""])[0] or type(e).__name__
        places = {from_url: "{0}", from_zip: "{1} in {0}", from_archive: "{1} of huggingface.co/datasets/{0}"}
        place = places[download].format(*arguments)
        place += " (its first four examples as JSON Lines of question and answer)" if four_shots in arguments else ""
        raise InputError(
            f"{path}: missing, and the download failed ({reason}); fetch it from {place}, or give another --data-dir"
        ) from None
    return path
