"""Our zero-shot scores against lm-evaluation-harness's own, item by item, on one model directory and task files.

    python -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install -c constraints.txt 'lm-eval[hf]==0.4.13'
    python benchmarks/lm_eval_agreement.py --model DIR --lm-eval /tmp/lm-eval/bin/lm_eval --limit 50 FILE.jsonl ...

The harness reads the same lines through task YAMLs written here, loads the directory with `--model hf`, and logs
every item's log-likelihoods. Both run in float32 on the CPU. Exit 1 when an accuracy differs or a log-likelihood
is further apart than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from prune2serve.loglikelihood import encode_task, score_items
from prune2serve.models import load_model, load_tokenizer, open_checkpoint
from prune2serve.task_files import Task, read_tasks
from prune2serve.tasks import right, right_normalised, written

TOLERANCE = 1e-2
"""Nats per item: float32 sums over tens of tokens in another order, of values in the hundreds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--model", required=True, help="directory, hub id or `sample`")
    parser.add_argument("--lm-eval", default="lm_eval", help="the harness's command, in any environment")
    parser.add_argument("--limit", type=int, help="first items of each file")
    parser.add_argument("--batch-size", type=int, default=8, help="the harness's batch size")
    arguments = parser.parse_args()
    tasks = read_tasks(arguments.tasks, arguments.limit)
    checkpoint = open_checkpoint(arguments.model)
    with tempfile.TemporaryDirectory() as work:
        start = time.monotonic()
        theirs = harness(Path(work), checkpoint.path, tasks, arguments.lm_eval, arguments.batch_size)
        harness_seconds = time.monotonic() - start
    start = time.monotonic()
    rows = compare(checkpoint, tasks, theirs)
    print(f"lm-evaluation-harness {harness_seconds:.0f} s with loading, prune2serve {time.monotonic() - start:.0f} s")
    print(
        f"{'task':<14}{'metric':<10}{'items':>6}{'harness':>9}{'ours':>9}{'items that differ':>19}{'largest nats':>14}"
    )
    for row in rows:
        print("{task:<14}{metric:<10}{items:>6}{harness:>9.4f}{ours:>9.4f}{differ:>19}{nats:>14.2g}".format(**row))
    return int(any(row["differ"] or row["nats"] > TOLERANCE for row in rows))


def harness(
    work: Path, model: Path, tasks: tuple[Task, ...], command: str, batch_size: int
) -> dict[str, list[dict[str, Any]]]:
    """Run the harness on the same items; return its logged samples by task, in the items' order."""
    names = {f"same_{task.name}": task for task in tasks}
    for name, task in names.items():
        write_task(work / "tasks", name, task)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [
            command, "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu",
            "--tasks", ",".join(names), "--include_path", str(work / "tasks"), "--batch_size", str(batch_size),
            "--log_samples", "--output_path", str(work / "out"),
        ],
        check=True, env=environment, stdout=sys.stderr,
    )  # fmt: skip
    samples = {}
    for name, task in names.items():
        (file,) = (work / "out").rglob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task.name] = sorted(lines, key=lambda sample: sample["doc_id"])
    return samples


def write_task(directory: Path, name: str, task: Task) -> None:
    """One YAML and its items: nothing is added between a text and its continuation."""
    directory.mkdir(exist_ok=True)
    data = directory / f"{name}.jsonl"
    docs = [{"text": i.context, "choices": list(i.choices), "target": i.choices[0], "gold": i.gold} for i in task.items]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    several = task.kind == "multiple-choice"
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice" if several else "loglikelihood",
        "doc_to_text": "text",
        "doc_to_target": "gold" if several else "target",
        "target_delimiter": "",
        "metric_list": [{"metric": metric} for metric in (("acc", "acc_norm") if several else ("acc",))],
    } | ({"doc_to_choice": "choices"} if several else {})
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def compare(checkpoint: Any, tasks: tuple[Task, ...], theirs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    import torch

    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, dtype=torch.float32)
    rows = []
    for task in tasks:
        scores = score_items(model, encode_task(task, tokenizer), task.name)
        samples = theirs[task.name]
        nats = max(
            abs(float(response[0]) - ours)
            for sample, score in zip(samples, scores, strict=True)
            for response, ours in zip(sample["filtered_resps"], score.loglikelihoods, strict=True)
        )
        rules = {"acc": right, "acc_norm": right_normalised} if task.kind == "multiple-choice" else {"acc": written}
        for metric, rule in rules.items():
            ours = [float(rule(task, i, score)) for i, score in enumerate(scores)]
            harness_says = [float(sample[metric]) for sample in samples]
            rows.append({
                "task": task.name, "metric": metric, "items": len(ours), "nats": nats,
                "harness": sum(harness_says) / len(ours), "ours": sum(ours) / len(ours),
                "differ": sum(a != b for a, b in zip(ours, harness_says, strict=True)),
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
