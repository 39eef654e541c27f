"""Layers removed in memory: same computation, working cache, everything back in place afterwards."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from prune2serve.errors import Prune2ServeError, UnsupportedArchitectureError
from prune2serve.layers import apply_plan_in_memory, decoder_layers, pruned_in_memory, spliced
from prune2serve.records import Merge, PruningPlan

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 6,
    "vocab_size": 40,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 3
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, layer_types=kinds, sliding_window=4)).eval()


def state(model: torch.nn.Module) -> tuple[object, ...]:
    layers = decoder_layers(model)
    return (
        id(layers),
        [id(layer) for layer in layers],
        [layer.self_attn.layer_idx for layer in layers],
        repr(model.config),
        [id(parameter) for parameter in model.parameters()],
    )


def test_finds_the_layers(llama, gemma) -> None:
    assert decoder_layers(llama) is llama.model.layers
    assert decoder_layers(gemma) is gemma.model.layers


def test_all_layers_kept_gives_the_same_logits(gemma) -> None:
    expected = gemma(IDS).logits
    with pruned_in_memory(gemma, range(6)):
        assert torch.equal(gemma(IDS).logits, expected)


def test_everything_is_put_back(gemma) -> None:
    before, expected = state(gemma), gemma(IDS).logits
    with pruned_in_memory(gemma, [1, 2, 5]):
        assert gemma.config.num_hidden_layers == 3
        assert gemma.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
        assert [layer.self_attn.layer_idx for layer in decoder_layers(gemma)] == [0, 1, 2]
    assert state(gemma) == before and torch.equal(gemma(IDS).logits, expected)


def test_everything_is_put_back_after_an_exception(gemma) -> None:
    before = state(gemma)
    with pytest.raises(ZeroDivisionError), pruned_in_memory(gemma, [0, 3]):
        _ = 1 / 0
    assert state(gemma) == before
    with pytest.raises(Prune2ServeError), pruned_in_memory(gemma, [3, 0]):
        pass
    assert state(gemma) == before


def test_nested_blocks(llama) -> None:
    with pruned_in_memory(llama, [0, 2, 3, 5]):
        with pruned_in_memory(llama, [1, 3]):
            inner = llama(IDS).logits
        assert len(decoder_layers(llama)) == 4
    with pruned_in_memory(llama, [2, 5]):
        assert torch.equal(llama(IDS).logits, inner)


def test_no_weight_is_copied(llama) -> None:
    before = {id(parameter) for parameter in llama.parameters()}
    with pruned_in_memory(llama, [0, 4]):
        assert {id(parameter) for parameter in llama.parameters()} < before


def test_cached_generation(gemma) -> None:
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with pruned_in_memory(gemma, [1, 2, 4]):
        cached = gemma.generate(IDS, **settings)
        assert torch.equal(cached, gemma.generate(IDS, **settings, use_cache=False))
    assert not torch.equal(cached, gemma.generate(IDS, **settings))


@pytest.mark.parametrize("kept", [[], [2, 1], [1, 1], [-1, 2], [0, 6]])
def test_kept_must_be_an_ascending_selection(llama, kept: list[int]) -> None:
    with (
        pytest.raises(Prune2ServeError, match=r"kept layers|all 6 layers would be removed"),
        pruned_in_memory(llama, kept),
    ):
        pass


def test_spliced_takes_any_module(llama) -> None:
    """A stand-in that returns the known output of the first three layers skips them."""
    known = []
    hook = decoder_layers(llama)[2].register_forward_hook(lambda module, args, output: known.append(output))
    expected = llama(IDS, use_cache=False).logits
    hook.remove()

    class Inject(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            return known[0] if isinstance(known[0], torch.Tensor) else known[0][0]

    layers = decoder_layers(llama)
    with spliced(llama, [Inject(), *layers[3:]], [2, 3, 4, 5]):
        assert torch.equal(llama(IDS, use_cache=False).logits, expected)


def test_apply_plan_is_for_good(llama) -> None:
    with pruned_in_memory(llama, [0, 1, 5]):
        expected = llama(IDS).logits
    assert apply_plan_in_memory(llama, PruningPlan(6, (2, 3, 4), "hand")) is llama
    assert len(llama.model.layers) == llama.config.num_hidden_layers == 3
    assert torch.equal(llama(IDS).logits, expected)


def test_apply_plan_of_another_model(llama) -> None:
    with pytest.raises(Prune2ServeError, match=r"the plan is for a model of 8 layers, this one has 6"):
        apply_plan_in_memory(llama, PruningPlan(8, (2,), "hand"))


def test_merged_layer_is_a_copy(llama) -> None:
    before = llama.model.layers[1].mlp.up_proj.weight.clone()
    top = llama.model.layers[2].mlp.up_proj.weight.clone()
    original = llama.model.layers[1]
    apply_plan_in_memory(llama, PruningPlan(6, (2,), "merge", merges=(Merge(1, 2, "telescoped"),)))
    assert torch.equal(original.mlp.up_proj.weight, before)
    assert torch.equal(llama.model.layers[1].mlp.up_proj.weight, top)


def test_an_encoder_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(**sizes, vocab_size=20, is_decoder=True))
    with pytest.raises(UnsupportedArchitectureError, match=r"bert is an encoder-only model"):
        decoder_layers(model)
