"""Zero-shot tasks: tokens and sums as one pass a choice gives them, hand-computed statistics, and every bad line."""

import json
import math

import pytest
import torch

from prune2serve.errors import Prune2ServeError
from prune2serve.layers import pruned_in_memory
from prune2serve.loglikelihood import EncodedItem, encode_pair, encode_task, score_items
from prune2serve.models import load_model, load_tokenizer, open_checkpoint
from prune2serve.task_files import Item, Task, read_task, read_tasks
from prune2serve.tasks import ParentTasks, compare_items, paired_interval, right, right_normalised, stability


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(open_checkpoint(str(tiny_model)), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(open_checkpoint(str(tiny_model)))


def naive(model, item):
    """One forward pass a choice over everything, log-softmax over everything."""
    found = []
    for choice in item.choices:
        tokens = (item.context + choice)[-(model.config.max_position_embeddings + 1) :]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
        labels = torch.tensor(tokens[1:])
        chosen = logits.gather(-1, labels[:, None])[-len(choice) :, 0]
        found.append((float(chosen.sum()), bool((logits.argmax(-1) == labels)[-len(choice) :].all())))
    return found


def check_against_naive(model, items):
    for item, score in zip(items, score_items(model, items), strict=True):
        expected = naive(model, item)
        assert score.loglikelihoods == pytest.approx([total for total, _ in expected], rel=1e-5, abs=1e-4)
        assert list(score.greedy) == [greedy for _, greedy in expected]


def random_items(seed=0, count=23, vocabulary=300):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    return [
        EncodedItem(
            tokens(1, 40), tuple(tokens(1, 12) for _ in range(int(torch.randint(1, 6, (), generator=generator))))
        )
        for _ in range(count)
    ]


def test_shared_contexts_and_batches_give_what_one_pass_a_choice_gives(model):
    check_against_naive(model, random_items())


@pytest.mark.parametrize(
    "limit",
    [("BATCH_TOKENS", {"cpu": 1, "other": 1}), ("BATCH_LOGITS", 1), ("BATCH_TOKENS", {"cpu": 10**9, "other": 1})],
)
def test_no_batch_size_changes_a_score(model, monkeypatch, limit):
    monkeypatch.setattr(f"prune2serve.loglikelihood.{limit[0]}", limit[1])
    check_against_naive(model, random_items(1))


def test_the_context_of_an_items_choices_is_computed_once(model, monkeypatch):
    seen = []
    forward = type(model).forward

    def counted(self, input_ids, **kwargs):
        seen.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    score_items(model, [EncodedItem(list(range(100)), ([1, 2], [3, 4], [5, 6], [7, 8]))])
    assert seen == [99, 8]


def test_a_greedy_continuation_is_found(model):
    context = [5, 9, 40, 7]
    written = []
    for _ in range(3):
        with torch.inference_mode():
            written.append(int(model(torch.tensor([context + written])).logits[0, -1].argmax()))
    wrong = [*written[:2], (written[2] + 1) % 300]
    scores = score_items(model, [EncodedItem(context, (written,)), EncodedItem(context, (written, wrong))])
    assert scores[0].greedy == (True,) and scores[1].greedy == (True, False)


def test_what_does_not_fit_the_positions_loses_its_start(model):
    limit = model.config.max_position_embeddings
    long = [token % 300 for token in range(limit + 20)]
    check_against_naive(model, [EncodedItem(long, ([1, 2, 3], [4])), EncodedItem(long[:limit], ([7],))])


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "qwen3", "gemma3_text", "mistral"])
def test_other_families_score_the_same_in_batches(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2},
        "bloom": {"n_layer": 3, "n_head": 2},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "qwen3": {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16},
        "gemma3_text": {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
        "mistral": {"intermediate_size": 64, "num_key_value_heads": 1, "sliding_window": 8},
    }[family]
    config = AutoConfig.for_model(family, **(sizes | more))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    items = random_items(2, 9)
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    for item, score in zip(items, score_items(model, items), strict=True):
        for choice, total in zip(item.choices, score.loglikelihoods, strict=True):
            ids = torch.tensor([(item.context + choice)[-limit:]])
            with torch.inference_mode():
                logits = model(ids).logits[0, :-1].double().log_softmax(-1)
            expected = float(logits.gather(-1, ids[0, 1:, None])[-len(choice) :].sum())
            assert total == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_a_continuation_is_what_it_adds_to_its_context(tokenizer):
    context, continuation = encode_pair(tokenizer, "one, two", " three")
    assert context == tokenizer("one, two")["input_ids"]
    assert context + continuation == tokenizer("one, two three")["input_ids"]


def test_spaces_that_end_a_context_move_to_the_continuation(tokenizer):
    assert encode_pair(tokenizer, "one, two ", "three") == encode_pair(tokenizer, "one, two", " three")


def test_an_empty_context_is_the_start_of_a_sequence(tokenizer):
    context, continuation = encode_pair(tokenizer, "", "three")
    assert context == [tokenizer.bos_token_id] and tokenizer.decode(continuation) == "three"


def test_a_choice_that_adds_no_token_is_named(tokenizer, monkeypatch):
    task = Task("t", "multiple-choice", (Item("one", (" two", "e"), 0, 7),), "t.jsonl")
    monkeypatch.setattr("prune2serve.loglikelihood.encode_text", lambda _, text, special=True: [1] * len(text.split()))
    with pytest.raises(Prune2ServeError, match=r"t.jsonl line 7: 'e' adds no token to its context"):
        encode_task(task, tokenizer)


def test_acc_norm_divides_by_characters():
    from prune2serve.loglikelihood import ItemScore

    task = Task("t", "multiple-choice", (Item("q", (" ab", " abcdefgh"), 1, 1),), "t.jsonl")
    score = ItemScore((-3.0, -6.0), (False, False))
    # -3 > -6, but -3 / 3 < -6 / 9.
    assert not right(task, 0, score) and right_normalised(task, 0, score)


def test_accuracies_errors_and_the_paired_interval_by_hand():
    # 10 items: both right 5, lost 3, gained 1, both wrong 1.
    parent = [True] * 8 + [False] * 2
    pruned = [True] * 5 + [False] * 3 + [True, False]
    metric = compare_items(parent, pruned)
    assert (metric.parent, metric.pruned) == (0.8, 0.6)
    assert metric.difference == pytest.approx(-0.2)
    assert metric.parent_standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 9))
    # p = 2/12, q = 4/12: -1/6 ± 1.96 sqrt((1/2 - 1/36) / 12)
    half = 1.959964 * math.sqrt((0.5 - 1 / 36) / 12)
    assert metric.interval == pytest.approx((-1 / 6 - half, -1 / 6 + half), abs=1e-6)


def test_the_interval_is_not_empty_when_nothing_changed():
    low, high = paired_interval(0, 0, 100)
    assert low == -high and 0.01 < high < 0.05


def test_stability_takes_each_items_own_weight():
    # sigma = ln 1, ln 2, ln 5: weights 1/8, 2/8, 5/8. Items 1 and 3 are unchanged: 6/8.
    sigmas = [0.0, math.log(2), math.log(5)]
    found = stability(sigmas, [True, False, True])
    assert found.value == pytest.approx(6 / 8)
    # The published script adds up the first k = 2 weights instead: 3/8.
    published = sum([1 / 8, 2 / 8, 5 / 8][: sum([True, False, True])])
    assert published == 3 / 8 and found.value != pytest.approx(published)
    assert found.effective_items == pytest.approx(1 / (1 / 64 + 4 / 64 + 25 / 64))
    assert found.unchanged == pytest.approx(2 / 3)


def test_stability_does_not_overflow():
    assert stability([1e4, 1e4, 0.0], [True, False, False]).value == pytest.approx(0.5)


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


GOOD = {"query": "q", "choices": [" a", " b"], "gold": 1}
CLOZE = {"context": "one", "continuation": " two"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 3 is not JSON"),
        ("[1]", r"line 3 is list, expected an object"),
        ({"text": "x"}, r"line 3 has the fields 'text': expected `query`, `choices` and `gold`, or `context`"),
        (CLOZE, r"line 3 is a continuation item in a multiple-choice file"),
        (GOOD | {"gold": 2}, r"line 3: `gold` is 2, expected the right choice, 0 to 1"),
        (GOOD | {"gold": True}, r"line 3: `gold` is True"),
        (GOOD | {"gold": "1"}, r"line 3: `gold` is '1'"),
        (GOOD | {"choices": [" a"]}, r"line 3: `choices` must be a list of at least 2 texts"),
        (GOOD | {"choices": [" a", ""]}, r"line 3: `choices` must be"),
        (GOOD | {"query": 3}, r"line 3: `query` is 3, expected a text"),
    ],
)  # fmt: skip
def test_a_bad_line_is_one_error_that_names_it(tmp_path, line, message):
    with pytest.raises(Prune2ServeError, match=message) as caught:
        read_task(write_lines(tmp_path / "t.jsonl", GOOD, "", line))
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(Prune2ServeError, match=r"no task file at .*nothing.jsonl"):
        read_task(tmp_path / "nothing.jsonl")
    with pytest.raises(Prune2ServeError, match="holds 1 items: a task needs at least 2"):
        read_task(write_lines(tmp_path / "one.jsonl", GOOD))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(Prune2ServeError, match="is not UTF-8 text"):
        read_task(tmp_path / "bytes.jsonl")
    task = write_lines(tmp_path / "t.jsonl", GOOD, GOOD)
    with pytest.raises(Prune2ServeError, match="two task files are called 't'"):
        read_tasks([task, task])
    with pytest.raises(Prune2ServeError, match="1 items give no standard error"):
        read_tasks([task], 1)
    with pytest.raises(Prune2ServeError, match="`continuation` is empty"):
        read_task(write_lines(tmp_path / "c.jsonl", CLOZE | {"continuation": ""}))


def test_the_limit_reads_no_further(tmp_path):
    task = read_task(write_lines(tmp_path / "t.jsonl", GOOD, GOOD, "{"), 2)
    assert len(task.items) == 2 and task.items[1].line == 2


def test_both_models_side_by_side(model, tokenizer, tmp_path):
    questions = [{"query": f"one, two, {n}", "choices": [" three", " four", f" {n}"], "gold": n % 3} for n in range(12)]
    clozes = [{"context": f"brown fox {n}", "continuation": " jumps"} for n in range(5)]
    tasks = read_tasks([write_lines(tmp_path / "mc.jsonl", *questions), write_lines(tmp_path / "last.jsonl", *clozes)])
    parent = ParentTasks(model, tokenizer, tasks)
    same = parent.compare(model)
    assert [metric.difference for result in same for metric in result.metrics.values()] == [0.0, 0.0, 0.0]
    assert same[0].stability.value == pytest.approx(1.0) and same[1].stability is None
    assert same[0].chance == pytest.approx(1 / 3) and set(same[1].metrics) == {"acc"}

    kept = [0, 7]
    results = parent.compare(model, lambda: pruned_in_memory(model, kept))
    with pruned_in_memory(model, kept):
        expected = [
            int(torch.tensor([total for total, _ in naive(model, item)]).argmax()) == n % 3
            for n, item in enumerate(encode_task(tasks[0], tokenizer))
        ]
    assert results[0].metrics["acc"].pruned == sum(expected) / 12
