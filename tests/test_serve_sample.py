"""The real sample, served: the same greedy tokens as transformers for real prompts, alone and in a full batch."""

import concurrent.futures
import json
from pathlib import Path

import pytest
import torch
from serve_fixtures import sample_model, serve_cache  # noqa: F401

pytest.importorskip("onnxruntime")
openai = pytest.importorskip("openai")

from prune2serve.serve.engine import served  # noqa: E402

DATA = Path(__file__).parents[1] / ".." / "shared" / "data" / "serving"
NUM_PROMPTS, NUM_TOKENS = 50, 16

pytestmark = pytest.mark.sample


def real_prompts():
    if not DATA.is_dir():
        pytest.skip(f"no prompts at {DATA}")
    rows = [json.loads(line) for line in (DATA / "vicuna_question.jsonl").read_text().splitlines()]
    texts = [row["turns"][0] for row in rows][:NUM_PROMPTS]
    assert len(texts) == NUM_PROMPTS
    return texts


def test_greedy_tokens_of_50_real_prompts_are_transformers_alone_and_in_a_full_batch(sample_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = real_prompts()
    tokenizer = AutoTokenizer.from_pretrained(sample_model)
    model = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    del model

    def ask(prompt):
        answer = client.completions.create(model="sample", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0)
        return answer.choices[0].text

    flags = [str(sample_model), "--engine", "onnxruntime", "--device", "cpu", "--served-model-name", "sample"]
    flags += ["--max-num-seqs", "16", "--max-model-len", "512"]
    with (
        served(flags, log_file=tmp_path / "log") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with concurrent.futures.ThreadPoolExecutor(NUM_PROMPTS) as pool:
            assert list(pool.map(ask, prompts)) == expected
        alone = [ask(prompt) for prompt in prompts[::5]]
        assert alone == expected[::5]
