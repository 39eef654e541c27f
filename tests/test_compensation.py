"""The linear fold: exact where the removed layer was linear, the paper's formula in general, refused where invalid."""

import copy

import pytest
import torch

from prune2serve.compensation import down_projection, fold_plan, removed_runs
from prune2serve.errors import UnsupportedArchitectureError
from prune2serve.layer_sets import LayerSetSearch
from prune2serve.layers import decoder_layers, plan_in_memory
from prune2serve.models import load_model, open_checkpoint
from prune2serve.records import CalibrationSet, Merge, PruningPlan


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(open_checkpoint(str(tiny_model)), dtype=torch.float32)


def windows(model, count=8, length=48, seed=5):
    ids = torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return CalibrationSet(ids, mask, "test", 0, "0")


class LinearInMlp(torch.nn.Module):
    """A layer that adds exactly C'M, M being the MLP output that led to the hidden states it is given."""

    def __init__(self, below, matrix):
        super().__init__()
        self.matrix = matrix
        self.seen = {}
        below.mlp.register_forward_hook(lambda _, __, out: setattr(self, "latest", out))
        below.register_forward_hook(lambda _, __, out: self.seen.__setitem__(out.numpy().tobytes(), self.latest))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.seen[hidden_states.numpy().tobytes()] @ self.matrix


def test_a_layer_that_is_linear_in_m_is_recovered_exactly(model, tmp_path):
    model = copy.deepcopy(model)
    hidden = model.config.hidden_size
    matrix = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(1)) / hidden**0.5
    model.model.layers[4] = LinearInMlp(model.model.layers[3], matrix)
    data = windows(model)
    with torch.inference_mode():
        expected = model(data.input_ids).logits
    plan = fold_plan(model, PruningPlan(8, (4,), "manual"), data, tmp_path, ridge=1e-12)
    with torch.inference_mode(), plan_in_memory(model, plan):
        got = model(data.input_ids).logits
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    with torch.inference_mode(), plan_in_memory(model, PruningPlan(8, (4,), "manual")):
        assert (model(data.input_ids).logits - expected).abs().max() > 0.1 * expected.abs().max()


def test_the_folded_weight_is_the_papers_formula(model, tmp_path):
    """T = (M'M + aI)^-1 M'(h_out - h_in + M) as a -> 0, from states captured here."""
    data = windows(model, count=8)
    seen = {}
    layers = model.model.layers
    handles = [
        layers[2].mlp.register_forward_hook(lambda _, __, out: seen.__setitem__("m", out)),
        layers[2].register_forward_hook(lambda _, __, out: seen.__setitem__("h_in", out)),
        layers[5].register_forward_hook(lambda _, __, out: seen.__setitem__("h_out", out)),
    ]
    with torch.inference_mode():
        model(input_ids=data.input_ids, attention_mask=data.attention_mask)
    for handle in handles:
        handle.remove()
    real = data.attention_mask.bool()
    m, h_in, h_out = (seen[name][real].double() for name in ("m", "h_in", "h_out"))
    t = torch.linalg.solve(m.T @ m, m.T @ (h_out - h_in + m))
    plan = fold_plan(model, PruningPlan(8, (3, 4, 5), "manual"), data, tmp_path, ridge=1e-12)
    from safetensors.torch import load_file

    folded = load_file(plan.replacements[0].path)["mlp.down_proj.weight"].double()
    expected = t.T @ layers[2].mlp.down_proj.weight.double()
    assert (folded - expected).abs().max() < 1e-3 * expected.abs().max()


def test_two_cuts_are_folded_one_on_top_of_the_other(model, tmp_path):
    data, plain = windows(model, count=24), PruningPlan(8, (2, 5, 6), "manual")
    assert removed_runs(plain) == [(1, 2), (4, 6)]
    folded = fold_plan(model, plain, data, tmp_path)
    assert [replacement.layer for replacement in folded.replacements] == [1, 4]
    search = LayerSetSearch(model, data)
    assert search.evaluate_plan(folded).kl < search.evaluate_plan(plain).kl
    assert search.evaluate_plan(plain).kl == pytest.approx(search.evaluate_removed((2, 5, 6)).kl)


def test_runs_without_a_plain_layer_before_them_are_left_alone():
    assert removed_runs(PruningPlan(6, (0, 1), "m")) == []
    assert removed_runs(PruningPlan(6, (2, 3), "m", merges=(Merge(1, 3, "average"),))) == []
    assert removed_runs(PruningPlan(6, (), "m")) == []


def test_conv1d_and_bias_are_folded_too(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=5, n_embd=32, n_head=2, vocab_size=97, n_positions=64)).eval()
    for layer in model.transformer.h:
        torch.nn.init.normal_(layer.mlp.c_proj.bias)
        torch.nn.init.normal_(layer.mlp.c_proj.weight)
    data = windows(model, count=24)
    plain = PruningPlan(5, (2,), "manual")
    folded = fold_plan(model, plain, data, tmp_path)
    search = LayerSetSearch(model, data)
    assert search.evaluate_plan(folded).kl < search.evaluate_plan(plain).kl


def test_it_is_refused_where_a_norm_follows_the_mlp():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        num_hidden_layers=4, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=64,
    )  # fmt: skip
    layer = decoder_layers(Gemma2ForCausalLM(config))[0]
    with pytest.raises(UnsupportedArchitectureError, match="linear-fold is invalid for Gemma2DecoderLayer: post_feedf"):
        down_projection(layer)


def test_it_is_refused_where_the_mlps_output_is_scaled():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, residual_multiplier=0.2,
    )  # fmt: skip
    with pytest.raises(UnsupportedArchitectureError, match="residual_multiplier scales what its MLP adds"):
        down_projection(decoder_layers(GraniteForCausalLM(config))[0])


def test_it_is_refused_for_a_mixture_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    layer = decoder_layers(MixtralForCausalLM(config))[0]
    with pytest.raises(UnsupportedArchitectureError, match="needs a single down projection, which MixtralDecoderLayer"):
        down_projection(layer)
