"""Outputs appear whole or not at all, and what killed processes left is swept away."""

import os
import subprocess

import pytest

from prune2serve.errors import Prune2ServeError
from prune2serve.staging import staged_directory, write_text


def test_it_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with staged_directory(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_the_old_one_stands(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(ZeroDivisionError), staged_directory(target, force=True) as staging:
        (staging / "new").write_text("y")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "x"


def test_force_replaces_and_never_mixes(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with staged_directory(target, force=True) as staging:
        (staging / "new").write_text("y")
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(Prune2ServeError, match="out exists: choose another --output"), staged_directory(target):
        pass


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, living = tmp_path / f".out.partial-{ended.pid}", tmp_path / f".out.partial-{os.getppid()}"
    dead.mkdir()
    living.mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    assert not dead.exists() and living.exists()


def test_text_is_written_by_rename(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_text(file, "one")
    write_text(file, "two")
    assert file.read_text() == "two" and len(list(file.parent.iterdir())) == 1
