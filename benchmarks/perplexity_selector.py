"""The `perplexity` selector against the naive loop it reproduces, back to back on the bundled sample.

    python benchmarks/perplexity_selector.py [--model sample] [--num-remove 8] [--windows 4] [--window 64]

The naive loop does what the published script (SLEB, arXiv 2402.09025) does: for every step and every candidate a
fresh forward pass of the whole remaining model over every window, one at a time, with the cross-entropy over full
float32 logits. Both run in the same process, dtype and number of threads; a step of one is followed by the same step
of the other, so that a machine with other work slows both alike. Prints the seconds, their ratio, and whether the
choices and perplexities agree; processor seconds are the fairer figure where other work shares the cores. Preparing
the search (the parent's states and logits) counts as ours.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import transformers

from prune2serve.calibration import text_windows
from prune2serve.devices import DTYPES, resolve_device, resolve_dtype
from prune2serve.layer_sets import LayerSetSearch
from prune2serve.layers import decoder_layers, pruned_in_memory
from prune2serve.methods.perplexity import cheapest_removal
from prune2serve.models import load_model, load_tokenizer, open_checkpoint
from prune2serve.records import CalibrationSet

TEXT = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "wikitext2" / "train_1mb.raw"


def naive_nll(model: transformers.PreTrainedModel, windows: CalibrationSet, kept: list[int]) -> float:
    """Summed NLL of the whole model with the layers `kept`."""
    total = 0.0
    with torch.inference_mode(), pruned_in_memory(model, kept):
        for input_ids in windows.input_ids.split(1):
            logits = model(input_ids.to(model.device)).logits[:, :-1].float().contiguous()
            labels = input_ids[:, 1:].to(model.device)
            total += float(torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))) * (
                labels.numel()
            )
    return total


def naive_step(
    model: transformers.PreTrainedModel, windows: CalibrationSet, kept: list[int], candidates: list[int]
) -> tuple[int, float]:
    trials = {layer: naive_nll(model, windows, [other for other in kept if other != layer]) for layer in candidates}
    return min(trials.items(), key=lambda item: item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--num-remove", type=int, default=8)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    options = parser.parse_args()
    parent = open_checkpoint(options.model)
    device = resolve_device("auto")
    model = load_model(parent, dtype=resolve_dtype(options.dtype, device), device=device)
    windows = text_windows(options.text, load_tokenizer(parent), options.windows, options.window)
    print(
        f"{options.model} in {model.dtype} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {options.windows} windows of {options.window} tokens"
    )
    compare(model, windows, options.num_remove)


def compare(model: transformers.PreTrainedModel, windows: CalibrationSet, num_remove: int) -> None:
    """Run both, a step at a time, and print what they chose and how long they took."""
    naive_nll(model, windows, [0])  # the first pass of a process is slow, whoever runs it
    ours, naive = Seconds(), Seconds()
    with ours:
        search = LayerSetSearch(model, windows)
    kept = list(range(len(decoder_layers(model))))
    agree = True
    for step in range(1, num_remove + 1):
        candidates = kept[1:-1]
        with ours:
            search.rebase(kept)
            chosen, nll = cheapest_removal(search, kept, candidates)
        with naive:
            expected, naive_total = naive_step(model, windows, kept, candidates)
        agree &= chosen == expected
        perplexities = [math.exp(total / search.num_tokens) for total in (nll, naive_total)]
        print(
            f"step {step}: ours removes {chosen} ({perplexities[0]:.4f}), naive {expected} ({perplexities[1]:.4f}); so "
            f"far {naive.processor:.1f} and {ours.processor:.1f} processor seconds",
            flush=True,
        )
        kept.remove(expected)
    print(f"wall clock: naive {naive.wall:.1f} s, ours {ours.wall:.1f} s, {naive.wall / ours.wall:.2f} x")
    ratio = naive.processor / ours.processor
    print(f"processor:  naive {naive.processor:.1f} s, ours {ours.processor:.1f} s, {ratio:.2f} x")
    print(f"choices {'agree' if agree else 'DIFFER'}")


class Seconds:
    """Wall and processor time spent inside its blocks."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.monotonic() - self._start[0]
        self.processor += time.process_time() - self._start[1]


if __name__ == "__main__":
    main()
