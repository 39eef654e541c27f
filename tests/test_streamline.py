"""LLM-Streamline: the right window, a layer that really learns, its own class, and nothing worse than the start."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from prune2serve import replacement_training
from prune2serve.activations import score_layers
from prune2serve.calibration import Calibration
from prune2serve.errors import Prune2ServeError, UnsupportedArchitectureError
from prune2serve.layers import plan_in_memory
from prune2serve.methods import select
from prune2serve.methods.base import Selection, SelectorOptions
from prune2serve.models import open_checkpoint
from prune2serve.records import CalibrationSet
from prune2serve.replacement_training import divergence, state_error, train_replacement, trainable_copy
from prune2serve.surgery import write_pruned

NUM_LAYERS = 7
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": 60,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).eval()


@pytest.fixture
def windows() -> CalibrationSet:
    ids = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, 15:] = 0
    return CalibrationSet(ids, mask, "test", 0, "0")


def ask(model, windows, work, num_remove=2, candidates=range(1, NUM_LAYERS - 1), **options) -> Selection:
    return Selection(
        score_layers(model, windows),
        num_remove,
        tuple(candidates),
        0,
        search=lambda: pytest.fail("no layer set is asked for"),
        model=lambda: model,
        calibration=lambda: Calibration(windows, windows, windows),
        work=work / "new",
        options=SelectorOptions(**({"replacement_steps": 24} | options)),
    )


def silence(layer: torch.nn.Module) -> None:
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(projection.weight)


def test_the_loss_is_the_formula(model, windows) -> None:
    layers, run = model.model.layers, range(2, 5)
    layer = trainable_copy(layers[2], "layer")
    ids, mask = windows.input_ids[-1:], windows.attention_mask[-1:]
    real = ids[:, :15]
    with torch.inference_mode():
        states = model(real, output_hidden_states=True, use_cache=False).hidden_states
        positions = torch.arange(15)[None]
        rope = model.model.rotary_emb(states[2], positions)
        predicted = layers[2](states[2], position_embeddings=rope, attention_mask=None)
        expected = ((predicted - states[5]).square().mean(-1) / states[5].square().mean(-1)).mean()
    with torch.no_grad():
        measured = float(state_error(model, layer, run)((ids, mask)))
    assert measured == pytest.approx(float(expected), rel=1e-4)


def test_the_end_to_end_loss_is_the_divergence(model, windows) -> None:
    layer = trainable_copy(model.model.layers[2], "layer")
    ids, mask = windows.input_ids[-1:], windows.attention_mask[-1:]
    real = ids[:, :15]
    with torch.no_grad():
        p = model(real).logits[0, :-1].log_softmax(-1)
        measured = float(divergence(model, layer, range(2, 5))((ids, mask)))
        model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in (0, 1, 2, 5, 6)])
        q = model(real, use_cache=False).logits[0, :-1].log_softmax(-1)
    assert measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("replacement", ["layer", "mlp"])
@pytest.mark.parametrize("loss", ["mse", "llm-loss"])
def test_training_improves_on_the_held_out_windows_and_leaves_the_parent_alone(
    model, monkeypatch, loss, replacement
) -> None:
    ids = torch.randint(0, 60, (16, 48), generator=torch.Generator().manual_seed(0))
    windows = CalibrationSet(ids, torch.ones_like(ids), "test", 0, "0")
    monkeypatch.setattr(replacement_training, "LEARNING_RATE", 5e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    options = SelectorOptions(replacement=replacement, replacement_loss=loss, replacement_steps=48)
    trained = train_replacement(model, range(2, 5), windows, options)
    assert trained.loss < 0.9 * trained.loss_before and trained.best_step > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.self_attn.layer_idx == index for index, layer in enumerate(model.model.layers))
    silent = trained.weights["self_attn.o_proj.weight"].abs().max() == 0
    assert bool(silent) == (replacement == "mlp")


def test_the_same_seed_trains_the_same_layer(model, windows) -> None:
    options = SelectorOptions(replacement_steps=5)
    first, again, other = (train_replacement(model, range(2, 4), windows, options, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert first.loss == again.loss and first.loss != other.loss


def test_padding_teaches_nothing(model, windows) -> None:
    options = SelectorOptions(replacement_steps=6)
    changed = windows.input_ids.clone()
    changed[-1, 15:] = 7
    other = CalibrationSet(changed, windows.attention_mask, "test", 0, "1")
    first, second = (train_replacement(model, range(2, 4), text, options) for text in (windows, other))
    assert first.loss == pytest.approx(second.loss, rel=1e-5)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_divergence_keeps_the_best_weights(model, windows, monkeypatch, rate) -> None:
    monkeypatch.setattr(replacement_training, "LEARNING_RATE", rate)
    trained = train_replacement(model, range(2, 5), windows, SelectorOptions(replacement_steps=12))
    assert trained.best_step == 0 and trained.loss == trained.loss_before
    original = model.model.layers[2].state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in trained.weights.items())


def test_no_steps_is_the_copy(model, windows) -> None:
    trained = train_replacement(model, range(2, 5), windows, SelectorOptions(replacement_steps=0))
    assert trained.best_step == 0 and trained.loss == trained.loss_before


@pytest.mark.parametrize("start", [1, 3, 4])
def test_the_run_that_does_nothing_is_found_and_costs_nothing(model, windows, tmp_path, start) -> None:
    for layer in (start, start + 1):
        silence(model.model.layers[layer])
    plan = select("streamline", ask(model, windows, tmp_path, num_remove=1))
    assert plan.removed == (start + 1,) and plan.replacements[0].layer == start
    assert plan.settings["cosine"] == pytest.approx(1.0) and plan.settings["held_out_loss"]["after"] < 1e-6
    with torch.inference_mode():
        expected = model(windows.input_ids).logits
        with plan_in_memory(model, plan):
            torch.testing.assert_close(model(windows.input_ids).logits, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_written_checkpoint_is_the_trained_model(model, windows, tmp_path, kind) -> None:
    dtype = getattr(torch, kind)
    model.save_pretrained(tmp_path / "parent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=dtype).eval()
    plan = select("streamline", ask(model, windows, tmp_path))
    file = tmp_path / "new" / "streamline.safetensors"
    weights = load_file(file)
    assert weights.keys() == dict(model.model.layers[2].named_parameters()).keys()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert list((tmp_path / "new").iterdir()) == [file]
    (tmp_path / "out").mkdir()
    write_pruned(open_checkpoint(str(tmp_path / "parent")), plan, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with torch.inference_mode(), plan_in_memory(model, plan):
        assert torch.equal(written(windows.input_ids).logits, model(windows.input_ids).logits)


def test_sliding_and_full_attention_layers_get_their_own_mask(windows) -> None:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, layer_types=kinds, sliding_window=4)).eval()
    ids, mask = windows.input_ids[:1], windows.attention_mask[:1]
    with torch.no_grad():
        for start in (2, 3):
            layer = trainable_copy(gemma.model.layers[start], "layer")
            assert float(state_error(gemma, layer, range(start, start + 1))((ids, mask))) < 1e-10


def test_a_window_must_fit_between_protected_layers(model, windows, tmp_path) -> None:
    with pytest.raises(Prune2ServeError, match="no 6 neighbouring layers may be removed together"):
        select("streamline", ask(model, windows, tmp_path, num_remove=5))


def test_an_unknown_attention_is_refused_for_mlp() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="Linear has no attention output projection of a known name"):
        trainable_copy(torch.nn.Linear(2, 2), "mlp")


def test_options_are_checked() -> None:
    with pytest.raises(Prune2ServeError, match="--replacement-loss is 'l2': choose among mse, llm-loss"):
        SelectorOptions(replacement_loss="l2")
    with pytest.raises(Prune2ServeError, match="--replacement-steps is -1: give 0 or more"):
        SelectorOptions(replacement_steps=-1)
