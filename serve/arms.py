"""The two arms of a comparison, from a build directory or from two URLs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prune2serve.errors import Prune2ServeError
from prune2serve.paths import MANIFEST_NAME
from prune2serve.progress import say
from prune2serve.records import Manifest
from prune2serve.serve.design import Arm
from prune2serve.serve.endpoint import Endpoint, attach, directory_arguments, start
from prune2serve.serve.ideal import ModelCost, cost_of


@dataclass(frozen=True)
class Arms:
    """How to start each arm and what is known of the models behind it."""

    start: Mapping[Arm, Callable[[], Endpoint]]
    directories: tuple[Path, Path] | None = None
    """(parent, pruned)."""
    costs: tuple[ModelCost, ModelCost] | None = None
    manifest: Manifest | None = None

    def noise_floor(self) -> Arms:
        """Return the A/A experiment: the baseline on both arms, each its own server."""
        begin = self.start["baseline"]
        twice = (self.directories[0], self.directories[0]) if self.directories else None
        return Arms({"baseline": begin, "candidate": begin}, twice, None, self.manifest)


def directory_arms(directory: Path, engine: str, serve_options: Sequence[str]) -> Arms:
    """Serve a build directory and its parent on the same engine with the same options.

    Raises:
        Prune2ServeError: the directory is not a build, so its parent is unknown.
    """
    from prune2serve.models import open_checkpoint

    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise Prune2ServeError(
            f"no {MANIFEST_NAME} in {directory}, so its parent is unknown: run `prune2serve build`, name a "
            "build directory, or compare two running endpoints with --a URL --b URL"
        )
    manifest = Manifest.from_json(path.read_text(), origin=str(path))
    parent = open_checkpoint(manifest.model, revision=manifest.revision).path
    arguments: dict[Arm, list[str]] = {
        "baseline": directory_arguments(directory, engine, True, serve_options),
        "candidate": directory_arguments(directory, engine, False, serve_options),
    }
    return Arms(
        start={
            "baseline": lambda: start(arguments["baseline"], "baseline"),
            "candidate": lambda: start(arguments["candidate"], "candidate"),
        },
        directories=(parent, directory),
        costs=(cost_of(parent), cost_of(directory)),
        manifest=manifest,
    )


def url_arms(
    urls: tuple[str, str], models: tuple[str | None, str | None], key_names: tuple[str | None, str | None]
) -> Arms:
    """Use two endpoints that are running; keys are read from the environment variables named.

    Raises:
        Prune2ServeError: a named variable is not set.
    """
    keys = [_key(name) for name in key_names]
    return Arms(
        start={
            "baseline": lambda: attach(urls[0], keys[0], models[0]),
            "candidate": lambda: attach(urls[1], keys[1], models[1]),
        }
    )


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not os.environ.get(name):
        raise Prune2ServeError(f"the environment variable {name} holds no key: set it, or name another")
    return os.environ[name]


def fits_twice(directories: tuple[Path, Path] | None, engine: str) -> bool:
    """Decide whether both servers may be up at once: URLs always, vLLM on a GPU never, else by free memory.
    Decide whether both servers may be up at once: URLs always, vLLM on a GPU never, else by free memory."""
    if directories is None:
        return True
    if engine == "vllm" and _has_cuda():
        say("vLLM takes most of a GPU's memory: the arms take turns (see --resident)")
        return False
    import psutil

    weights = sum(file.stat().st_size for d in directories for file in d.glob("*.safetensors"))
    # Twice the weights: float32 from 16-bit files; a gigabyte each for the runtime and the KV cache.
    needed, free = 2 * weights + 2 * 2**30, psutil.virtual_memory().available
    if needed > free:
        say(f"{needed / 2**30:.1f} GiB for both servers, {free / 2**30:.1f} GiB free: the arms take turns")
    return needed <= free


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
