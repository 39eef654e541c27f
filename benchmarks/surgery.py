"""Time and peak memory of writing a pruned checkpoint, against cp of the same bytes and mergekit's passthrough.

    python benchmarks/surgery.py [--gigabytes 8] [--work DIR] [--mergekit-python /path/to/venv/bin/python] [--rounds 3]

Makes a random bfloat16 llama checkpoint of that size in shards, removes a quarter of its layers, and prints for each
tool the wall time of its process until the bytes are on the disk (median of the rounds, interleaved, the parent's files
dropped from the page cache before each run) and its peak resident memory. Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_LAYERS = 32
REMOVED = tuple(range(20, 28))
SURGERY = """
import sys, time
from pathlib import Path
from prune2serve.models import open_checkpoint
from prune2serve.records import PruningPlan
from prune2serve.surgery import write_pruned
target = Path(sys.argv[2]); target.mkdir()
removed = tuple(map(int, sys.argv[4].split(",")))
from transformers import CONFIG_MAPPING; CONFIG_MAPPING["llama"]
start = time.monotonic()
write_pruned(open_checkpoint(sys.argv[1]), PruningPlan(int(sys.argv[3]), removed, "benchmark"), target)
print(time.monotonic() - start)
"""


def make_parent(directory: Path, gigabytes: float) -> None:
    """Write a llama of NUM_LAYERS layers, four layers a shard."""
    import torch
    from safetensors.torch import save_file

    vocabulary, hidden = 32_000, 2048
    layer_bytes = (gigabytes * 1e9 - 2 * 2 * vocabulary * hidden) / NUM_LAYERS
    inner = int((layer_bytes / 2 - 2.5 * hidden * hidden) / (3 * hidden)) // 64 * 64
    kv = hidden // 4
    directory.mkdir(parents=True)
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": NUM_LAYERS},
        **{"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 16, "num_key_value_heads": 4},
        **{"vocab_size": vocabulary, "torch_dtype": "bfloat16", "tie_word_embeddings": False},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text("{}")
    shapes = {
        **{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)},
        **{"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)},
        **{"mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)},
    }
    shards = [
        {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(first, first + 4)
            for name, shape in shapes.items()
        }
        for first in range(0, NUM_LAYERS, 4)
    ]
    outer = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shards.append(outer | {"model.norm.weight": (hidden,)})
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass(frozen=True)
class Run:
    """One run of one tool."""

    seconds: float
    """Until the bytes are on the disk."""
    peak_mib: float
    printed: str


def run(command: Sequence[str], target: Path, sources: Path) -> Run:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    forget(sources)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    printed, errors = process.stdout.read().decode(), process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{errors[-3000:]}")
    os.sync()
    return Run(time.monotonic() - start, usage.ru_maxrss / 1024, printed)


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache, so that every tool reads them from the disk."""
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mergekit_command(python: str, parent: Path, target: Path, work: Path) -> list[str]:
    slices = [(0, REMOVED[0]), (REMOVED[-1] + 1, NUM_LAYERS)]
    config = work / "mergekit.yml"
    lines = [f'  - sources: [{{model: "{parent}", layer_range: [{low}, {high}]}}]' for low, high in slices]
    config.write_text("slices:\n" + "\n".join(lines) + "\nmerge_method: passthrough\ndtype: bfloat16\n")
    script = "from mergekit.scripts.run_yaml import main; main()"
    flags = ["--no-copy-tokenizer", "--lazy-unpickle"]
    return [python, "-c", script, str(config), str(target), *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "prune2serve-surgery-benchmark")
    parser.add_argument("--mergekit-python", help="a Python that has mergekit installed")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_parent(Path(options.make[0]), float(options.make[1]))
        return
    work, target = options.work, options.work / "out"
    if shutil.disk_usage(work.parent).free < options.gigabytes * 4e9:
        raise SystemExit(f"{work.parent} has too little space: {options.gigabytes * 4} GB are needed")
    shutil.rmtree(work, ignore_errors=True)
    try:
        parent, kept = work / "parent", work / "kept"
        # In a process of its own: a child's peak memory starts at what its parent had at the fork.
        subprocess.run([sys.executable, __file__, "--make", str(parent), str(options.gigabytes)], check=True)
        surgery = [sys.executable, "-c", SURGERY]
        plan = [str(NUM_LAYERS), ",".join(map(str, REMOVED))]
        run([*surgery, str(parent), str(kept), *plan], kept, parent)  # the bytes that cp copies are those that are kept
        commands = {
            "cp of the same bytes": ["cp", "-r", str(kept), str(target)],
            "prune2serve": [*surgery, str(parent), str(target), *plan],
        }
        if options.mergekit_python:
            commands["mergekit passthrough"] = mergekit_command(options.mergekit_python, parent, target, work)
        figures: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                figures[name].append(run(command, target, kept if name.startswith("cp") else parent))
        report(figures, sum(file.stat().st_size for file in kept.iterdir()))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def report(figures: dict[str, list[Run]], size: int) -> None:
    print(f"{size / 1e9:.2f} GB written, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    base = statistics.median(run.seconds for run in figures["cp of the same bytes"])
    for name, runs in figures.items():
        seconds = statistics.median(run.seconds for run in runs)
        spread = f"{min(run.seconds for run in runs):.1f} to {max(run.seconds for run in runs):.1f}"
        peak = max(run.peak_mib for run in runs)
        print(f"{name:22} {seconds:6.1f} s ({spread}), {seconds / base:5.2f} x cp, peak {peak:7.0f} MiB")
        if name == "prune2serve":
            alone = statistics.median(float(run.printed) for run in runs)
            print(f"{'  write_pruned alone':22} {alone:6.1f} s, the rest is importing torch and syncing")


if __name__ == "__main__":
    main()
