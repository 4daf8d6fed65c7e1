import hashlib
import os
import re
import sys

import pytest
import torch
from conftest import tiny_config, tiny_files

from core import pages
from core.checkpoint import Checkpoint, write_checkpoint
from core.config import parse_config
from core.pages import mapped, page_chunks, release, start_writing


def big_checkpoint(path, **more):
    """One tensor of some hundred pages, stored as float32 at `path`. -> the tensor"""
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(3))
    specs = {n: (tuple(t.shape), t.dtype) for n, t in {"x": x, **more}.items()}
    write_checkpoint(str(path), tiny_config(), tiny_files(), specs, {"x": x, **more}.items())
    return x


def test_a_fingerprint_is_made_of_the_digests_of_its_parts(tmp_path, monkeypatch):
    more = {"half": torch.ones(3, 2).bfloat16(), "many": torch.tensor([True, False]), "one": torch.tensor(2.0)}
    tensors = {"x": big_checkpoint(tmp_path / "dir", **more), **more}
    big_checkpoint(tmp_path / "file.pt", **more)
    c = Checkpoint(tmp_path / "dir")
    digests = {
        n: hashlib.sha256(t.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in tensors.items()
    }
    text = repr(parse_config(c.config)) + "".join(
        f"{n} {tensors[n].dtype} {tuple(tensors[n].shape)} {digests[n]}" for n in ("half", "many", "one", "x")
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text += f"{name} {tiny_files().get(name)}"
    assert c.fingerprint() == c.fingerprint(digests) == hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(pages, "WINDOW", 5000)  # given back piece by piece, in memory that is not aligned to pages
    assert c.fingerprint() == Checkpoint(tmp_path / "file.pt").fingerprint() == c.fingerprint(digests)
    assert torch.equal(c.tensor("x"), tensors["x"])  # and read again


def test_only_memory_of_mapped_files_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "WINDOW", 5000)
    x = big_checkpoint(tmp_path / "dir")
    big_checkpoint(tmp_path / "file.pt")
    for path in ("dir", "file.pt"):
        t = Checkpoint(tmp_path / path).tensor("x")
        found = [len(mapped(some)) for some in ([t], [x, t[7:], t[:99]])]  # the last is too small to matter
        assert found == [1, 1] or path == "dir" and found == [0, 0] or not os.path.exists("/proc/self/maps")
        made = [torch.cat([t, t]), t.clone(), t[::2], t[:1].expand(2**18), x]
        assert mapped(made) == []
        for m in made:
            want = m.clone()
            for _ in page_chunks(len(m), mapped([m]), 1000):
                release(m)
            assert torch.equal(m, want)
        release(t)
        for s in page_chunks(len(t), mapped([t]), 1000):
            assert torch.equal(t[s], x[s])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not tell what is in memory")
def test_what_lies_behind_is_not_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "WINDOW", 2**16)
    x = torch.ones(2**23)
    write_checkpoint(str(tmp_path / "c"), tiny_config(), {}, {"x": ((2**23,), x.dtype)}, [("x", x)])
    t = Checkpoint(tmp_path / "c").tensor("x")

    def resident():  # bytes of the file that are in this process's memory
        with open("/proc/self/smaps") as f:
            maps = f.read().split(str(tmp_path / "c" / "model.safetensors"))[1:]
        return sum(1024 * int(re.search(r"^Rss: +(\d+) kB", m, re.MULTILINE)[1]) for m in maps)

    assert t.sum() == len(t)
    if resident() < t.nbytes:
        pytest.skip("not read by mapping")
    held = mapped([t])
    release(t)
    most = max((t[s].sum(), resident())[1] for s in page_chunks(len(t), held, 2**20))
    assert most < 2**24 < t.nbytes and resident() < 2**22


def test_what_is_written_so_far_is_on_its_way_to_the_disk(tmp_path):
    with open(tmp_path / "x", "wb") as f:
        f.write(b"123")
        start_writing(f)
        assert os.path.getsize(tmp_path / "x") == 3 * (sys.platform == "linux")
        f.write(b"45")
    assert (tmp_path / "x").read_bytes() == b"12345"
