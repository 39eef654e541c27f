"""Faults while a pruned checkpoint is written: a killed process, an unreadable disk, two writers at once."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from prune2serve import progress
from prune2serve.errors import Prune2ServeError
from prune2serve.models import open_checkpoint
from prune2serve.records import Checkpoint, PruningPlan
from prune2serve.staging import staged_directory
from prune2serve.surgery import write_pruned

PLAN = PruningPlan(6, (1, 4), "hand")
KILLS = 30


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("parent")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 6,
        "vocab_size": 64,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(directory, max_shard_size="300KB")
    progress.set_quiet(True)
    return open_checkpoint(str(directory))


def build(parent: Checkpoint, target: Path) -> None:
    with staged_directory(target) as staging:
        write_pruned(parent, PLAN, staging, max_shard_size=100_000)


def contents(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.filterwarnings("ignore")
def test_killed_at_random_moments(parent: Checkpoint, tmp_path: Path) -> None:
    """Either nothing stands under the final name, or the whole model does."""
    start = time.monotonic()
    build(parent, tmp_path / "whole")
    duration = time.monotonic() - start
    expected = contents(tmp_path / "whole")
    draw, killed = random.Random(0), 0
    for number in range(KILLS):
        target = tmp_path / f"out{number}"
        child = os.fork()
        if child == 0:
            build(parent, target)
            os._exit(0)
        time.sleep(draw.uniform(0, duration * 1.2))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if target.exists():
            got = contents(target)
            assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
            assert (target / "config.json").is_file()
        else:
            build(parent, target)  # what a killed run left behind does not stand in the way of the next
            assert contents(target).keys() == expected.keys()
    assert killed >= KILLS // 4


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"is full: free some space or choose another --output$"),
        (errno.EDQUOT, r"is full: free some space or choose another --output$"),
        (errno.EIO, r"cannot write the pruned model to .*: Input/output error$"),
    ],
)
def test_a_failing_disk(
    parent: Checkpoint, tmp_path: Path, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_later(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(number, os.strerror(number))
        return copy(*arguments)

    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", fail_later)
    with pytest.raises(Prune2ServeError, match=message):
        build(parent, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_writers_is_told(parent: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(Prune2ServeError, match=r"exists: choose another --output"), staged_directory(target) as staging:
        write_pruned(parent, PLAN, staging)
        target.mkdir()
        (target / "other").write_text("another build")
    assert (target / "other").read_text() == "another build"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
