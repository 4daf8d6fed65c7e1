"""The environment of ranks."""

import pytest

from core.distributed import check_environment
from core.files import InputError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "found, words",
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "1"}, None),  # as some clusters set them for every job
        (dict.fromkeys(NAMES, "1"), None),
        ({"RANK": "1"}, "has RANK but no WORLD_SIZE; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but no RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "has RANK, WORLD_SIZE but no MASTER_ADDR"),
    ],
)
def test_some_of_torchruns_variables_are_refused(found, words, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    if words is None:
        check_environment()
    else:
        with pytest.raises(InputError, match=f"the environment {words}"):
            check_environment()
