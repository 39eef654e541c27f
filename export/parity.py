"""Is the exported graph the same model? Its logits and greedy tokens against stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve.errors import MissingExtraError, Prune2ServeError
from prune2serve.export.onnx_graph import RECORD, SERVING_GRAPH

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort
    import torch
    from transformers import PreTrainedModel

TEXT = (
    "The lighthouse keeper wrote down the weather every evening: wind from the north-west, 12 knots, "
    "rain before "
    "midnight. In 1874 the lamp burned 340 litres of oil a month, and the ships that passed it carried coal, "
    "timber and letters. Question: what did the keeper write down? Answer:"
)
NUM_GREEDY = 64
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
"""Largest difference of a logit, as a share of the reference logits' range. int4 is reported, not judged."""


def check_parity(directory: Path, onnx_directory: Path) -> dict[str, Any]:
    """Compare an export with the checkpoint it came from, in float32, on a fixed English text.

    Returns:
        `max_logit_difference` and `logit_range` (absolute), `top1_agreement` over the text's positions,
        `greedy_equal`: leading tokens, of `greedy_tokens`, that both models continue the text with;
        `gap_at_difference`: the reference's lead of its own token over the other one's where they part;
        `tolerance` (share of the range, None where nothing is judged) and `passed`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    import torch

    from prune2serve.models import load_model, load_tokenizer, open_checkpoint

    precision = str(json.loads((onnx_directory / RECORD).read_text())["precision"])
    checkpoint = open_checkpoint(str(directory))
    session = _open(onnx_directory)
    model = load_model(checkpoint, dtype=torch.float32)
    ids = _text_ids(load_tokenizer(checkpoint), model)
    with torch.inference_mode():
        reference = model(torch.tensor([ids])).logits[0].float().numpy()
    ours = _Sequence(session).logits(ids, every=True)
    difference = float(abs(ours - reference).max())
    value_range = float(reference.max() - reference.min())
    equal, gap = _compare_greedy(model, session, ids)
    tolerance = TOLERANCE.get(precision)
    passed = None
    if tolerance is not None:
        close = difference <= tolerance * value_range
        # Where the reference itself is undecided within the tolerance, either token is right.
        same = equal == NUM_GREEDY or (gap is not None and gap <= tolerance * value_range)
        passed = close and (same or precision != "fp32")
    return {
        "precision": precision,
        "num_positions": len(ids),
        "max_logit_difference": difference,
        "logit_range": value_range,
        "top1_agreement": float((ours.argmax(-1) == reference.argmax(-1)).mean()),
        "greedy_tokens": NUM_GREEDY,
        "greedy_equal": equal,
        "gap_at_difference": gap,
        "tolerance": tolerance,
        "passed": passed,
    }


def require_parity(result: dict[str, Any]) -> None:
    """Raise when a judged export is not the same model."""
    if result["passed"] is False:
        raise Prune2ServeError(
            "the ONNX export differs from the checkpoint: largest logit difference "
            f"{result['max_logit_difference']:.4g} "
            f"(allowed {result['tolerance'] * result['logit_range']:.4g}), {result['greedy_equal']} of "
            f"{result['greedy_tokens']} greedy tokens equal: do not deploy it; please report the architecture"
        )


def _text_ids(tokenizer: Any, model: PreTrainedModel) -> list[int]:
    room = int(getattr(model.config, "max_position_embeddings", 0) or 4096) - NUM_GREEDY
    ids = [int(i) for i in tokenizer(TEXT)["input_ids"]]
    return ids[: max(room, 1)]


def _open(onnx_directory: Path) -> ort.InferenceSession:
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingExtraError("checking an ONNX export", "onnxruntime", "onnx") from None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    device = json.loads((onnx_directory / RECORD).read_text())["device"]
    providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    return ort.InferenceSession(str(onnx_directory / SERVING_GRAPH), options, providers=providers)


class _Sequence:
    """One sequence through the plain session, its KV cache handed back and forth as arrays."""

    def __init__(self, session: ort.InferenceSession) -> None:
        import numpy as np

        self._session = session
        self._length = 0
        self._past: dict[str, np.ndarray] = {}
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        for wanted in session.get_inputs():
            if wanted.name.startswith("past_key_values."):
                if wanted.type not in types:
                    raise Prune2ServeError(f"parity of an export with a {wanted.type} KV cache cannot be checked here")
                shape = [1, wanted.shape[1], 0, self._head_size()]
                self._past[wanted.name] = np.zeros(shape, dtype=types[wanted.type])

    def _head_size(self) -> int:
        # The graph's shapes leave it symbolic; the builder's own config beside the graph holds it.
        config = json.loads((Path(self._session._model_path).parent / "genai_config.json").read_text())
        return int(config["model"]["decoder"]["head_size"])

    def logits(self, ids: list[int], *, every: bool = False) -> np.ndarray:
        """Append `ids` to the sequence; return logits [len(ids), vocab] or, without `every`, [1, vocab]."""
        import numpy as np

        start, self._length = self._length, self._length + len(ids)
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, self._length), dtype=np.int64),
            "logits_indices": np.arange(len(ids)) if every else np.array([len(ids) - 1]),
            "position_ids": np.arange(start, self._length)[None],
        }
        known = {wanted.name for wanted in self._session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in known}
        names = [output.name for output in self._session.get_outputs()]
        results = dict(zip(names, self._session.run(None, feeds | self._past), strict=True))
        self._past = {
            name.replace("present.", "past_key_values."): value
            for name, value in results.items()
            if name.startswith("present.")
        }
        logits: np.ndarray = results["logits"][0].astype(np.float32)
        return logits


def _compare_greedy(
    model: PreTrainedModel, session: ort.InferenceSession, prompt: list[int]
) -> tuple[int, float | None]:
    """Continue the prompt with both; return the number of equal leading tokens and the gap where they
    part."""
    import torch

    sequence = _Sequence(session)
    logits = sequence.logits(prompt)[-1]
    step: torch.Tensor = torch.tensor([prompt])
    cache = None
    for count in range(NUM_GREEDY):
        with torch.inference_mode():
            output = model(step, past_key_values=cache, use_cache=True)
        reference = output.logits[0, -1].float()
        cache, expected, found = output.past_key_values, int(reference.argmax()), int(logits.argmax())
        if found != expected:
            return count, float(reference[expected] - reference[found])
        step = torch.tensor([[expected]])
        logits = sequence.logits([expected])[-1]
    return NUM_GREEDY, None
