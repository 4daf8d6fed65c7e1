"""The run folder OUT.run."""

import shutil

from training.saves import LOCKS, release_lock, take_lock


def test_a_run_ends_although_its_folder_was_removed(tmp_path):
    out = str(tmp_path / "out")
    others = dict(LOCKS)
    take_lock(out)
    shutil.rmtree(tmp_path / "out.run")
    release_lock(out)
    assert LOCKS == others
