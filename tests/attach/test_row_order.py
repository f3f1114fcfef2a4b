"""A row's mix follows its row through what reorders tokens, or rows are refused by the module's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import alignvec
from alignvec import AlignvecError
from tests.models import random_vector
from tests.tuned import IDS, built, error, with_vector

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
MIXED: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("MixtralConfig", EXPERTS),
    ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ("Llama4TextConfig", {**LLAMA4, "no_rope_layers": [1, 0]}),  # tokens repeated for every expert
    ("GPTNeoXConfig", {}),
    ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # positions of their own
    ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),  # positions that all rows share
    ("CohereConfig", {}),  # a norm of its own
    ("ApertusConfig", {"hidden_act": "xielu"}),  # an activation with parameters
    ("BertConfig", {"is_decoder": True}),
]


@pytest.mark.parametrize(("config", "options"), MIXED, ids=[config for config, _ in MIXED])
@torch.no_grad()
def test_rows_are_those_of_each_alone(config: str, options: dict[str, Any]) -> None:
    model = built(config, **options)
    base, aligned, alignment = with_vector(model)
    alignment.set_rows([{"v": 1}, {"v": 0}])
    truth = torch.stack([aligned(IDS).logits[0], base(IDS).logits[1]])
    assert error(model(IDS).logits, truth) < 1e-5
    four = IDS.repeat_interleave(2, 0)
    assert error(model(four).logits, truth.repeat_interleave(2, 0)) < 1e-5
    alignment.set(v=1)
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5


class TokenSubsets(nn.Module):
    """As models in remote code do: each expert is called with the tokens that chose it."""

    def __init__(self, experts: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = self.gate(flat).argmax(-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero().view(-1)
            if len(own):
                y[own] = expert(flat[own])
        return y.view_as(x)


class PositionFirst(nn.Module):
    """A layer that computes on [tokens, batch, features]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("layer", [TokenSubsets(4, 32), PositionFirst(32)], ids=["token-subsets", "position-first"])
@torch.no_grad()
def test_layers_that_reorder_tokens_run_row_by_row(layer: nn.Module) -> None:
    model = built("LlamaConfig")
    model.model.layers[0].mlp = layer
    base, aligned, alignment = with_vector(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    alignment.set_rows([{"v": 1}, {"v": 0}])
    truth = torch.stack([aligned(IDS).logits[0], base(IDS).logits[1]])
    assert error(model(IDS).logits, truth) < 1e-5
    how = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    wanted = torch.stack([aligned.generate(IDS[:1], **how)[0], base.generate(IDS[1:], **how)[0]])
    assert torch.equal(model.generate(IDS, **how), wanted)
    alignment.set(v=1)
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5
    alignment.detach()
    assert error(model(IDS).logits, base(IDS).logits) == 0
    assert not any("Aligned" in type(module).__name__ for module in model.modules()), kinds


class Positions(nn.Module):
    """A layer whose positions have no dimension for the batch, and are normed and projected before they meet it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table, self.norm, self.project = nn.Embedding(64, size), nn.LayerNorm(size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.project(self.norm(self.table(torch.arange(x.shape[1], device=x.device))))
        return x + positions


@pytest.mark.parametrize("batch", [2, 4, 6])
@pytest.mark.parametrize("tokens", [2, 4, 6, 9])
@torch.no_grad()
def test_what_all_rows_share_differs_by_row(tokens: int, batch: int) -> None:
    """Also where there are as many tokens as sequences."""
    torch.manual_seed(3)
    model = built("LlamaConfig")
    model.model.layers[0].mlp = Positions(32)
    base, aligned, alignment = with_vector(model)
    ids = torch.randint(3, 90, (batch, tokens), generator=torch.Generator().manual_seed(4))
    alignment.set_rows([{"v": 1}, {"v": 0}])
    half = batch // 2
    truth = torch.cat([aligned(ids).logits[:half], base(ids).logits[half:]])
    assert error(model(ids).logits, truth) < 1e-5


@pytest.mark.parametrize("layer", [PositionFirst, Positions])
def test_compiled_rows_of_such_layers_are_right_or_refused(layer: type[nn.Module]) -> None:
    torch.manual_seed(3)
    model = built("LlamaConfig")
    model.model.layers[0].mlp = layer(32)
    base, aligned, alignment = with_vector(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        alignment.set(v=1)
        assert error(compiled(IDS, use_cache=False).logits, aligned(IDS).logits) < 1e-5
        alignment.set_rows([{"v": 1}, {"v": 0}])
        truth = torch.stack([aligned(IDS).logits[0], base(IDS).logits[1]])
        if layer is PositionFirst:
            assert error(compiled(IDS, use_cache=False).logits, truth) < 1e-5
        else:
            with pytest.raises(AlignvecError, match=r"model\.layers\.0\.mlp\.table .*instead of set_rows"):
                compiled(IDS, use_cache=False)
        assert error(model(IDS).logits, truth) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("config", ["GptOssConfig", "Gemma2Config"])
def test_compiled_rows(config: str) -> None:
    """Of a model whose parameters are read, and of one that asks for their dtypes alone."""
    model = built(config, num_local_experts=4, num_experts_per_tok=2) if config == "GptOssConfig" else built(config)
    base, aligned, alignment = with_vector(model)
    compiled = torch.compile(model, backend="aot_eager")
    alignment.set_rows([{"v": 1}, {"v": 0}])
    with torch.no_grad():
        truth = torch.stack([aligned(IDS).logits[0], base(IDS).logits[1]])
        assert error(compiled(IDS, use_cache=False).logits, truth) < 1e-5
    torch._dynamo.reset()


@torch.no_grad()
def test_choices_of_a_sequence_are_of_its_row() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2DoubleHeadsModel(config).eval()
    base, aligned, alignment = with_vector(model)
    ids = torch.randint(3, 90, (2, 4, 7), generator=torch.Generator().manual_seed(1))
    alignment.set_rows([{"v": 1}, {"v": 0}])
    truth = torch.stack([aligned(ids).logits[0], base(ids).logits[1]])
    assert error(model(ids).logits, truth) < 1e-5


@torch.no_grad()
def test_a_module_by_itself_takes_rows_of_its_own_inputs() -> None:
    """T5's shared embedding is none that the model calls."""
    how = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = built("T5Config", transformers.AutoModelForSeq2SeqLM, **how)
    base, aligned, alignment = with_vector(model)
    alignment.set_rows([{"v": 1}, {"v": 0}])
    embedded = model.get_input_embeddings()(IDS)
    truth = [net.get_input_embeddings()(IDS)[row] for row, net in enumerate((aligned, base))]
    assert error(embedded, torch.stack(truth)) < 1e-6


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_one_expert_alone(seed: int) -> None:
    """By chance it may be given as many tokens of either row when rows are tried."""
    torch.manual_seed(seed)
    model = built("LlamaConfig")
    torch.manual_seed(seed)
    model.model.layers[0].mlp = TokenSubsets(4, 32)
    base, aligned, alignment = with_vector(model, only="experts.0")
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(seed))
    truth = torch.stack([aligned(ids).logits[0], base(ids).logits[1]])
    try:
        alignment.set_rows([{"v": 1}, {"v": 0}])
        got = model(ids).logits
    except AlignvecError:  # it got no tokens when rows were tried
        return
    assert error(got, truth) < 1e-5


@torch.no_grad()
def test_a_model_that_is_position_first_is_refused_by_name() -> None:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = transformers.XLNetLMHeadModel(config).eval()
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5
    with pytest.raises(AlignvecError, match=r"transformer\.\w+.* set\(\) instead of set_rows"):
        alignment.set_rows([{"v": 1}, {"v": 0}])
    assert alignment.coefficients == {"v": 1.0}
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5


@torch.no_grad()
def test_arguments_that_belong_to_no_row() -> None:
    """A router's correction bias has as many values as the batch has sequences."""
    model = built("MiniMaxM2Config", num_local_experts=8, num_experts_per_tok=2, intermediate_size=32)
    for name, value in [*model.named_buffers(), *model.named_parameters()]:
        if "correction_bias" in name:
            value.data.copy_(torch.linspace(-1, 1, 8))
    base, aligned, alignment = with_vector(model)
    ids = torch.randint(3, 90, (8, 6), generator=torch.Generator().manual_seed(1))
    alignment.set_rows([{"v": 1}, {"v": 0}] * 4)
    truth = torch.stack([(base if row % 2 else aligned)(ids).logits[row] for row in range(8)])
    assert error(model(ids).logits, truth) < 1e-5


LLAVA = dict(
    text_config=dict(model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    | dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0),
    vision_config=dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    | dict(num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16),
    image_token_index=95,
)


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that sees, and a batch of one sequence with two images and one with none: four patches an image."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(**LLAVA, vision_feature_layer=-1)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 1:9] = 95
    return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}


@torch.no_grad()
def test_images_under_one_mix_and_under_several() -> None:
    model, batch = llava()
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    assert error(model(**batch).logits, aligned(**batch).logits) < 1e-5
    alignment.set_rows([{"v": 1}, {"v": 0}])
    with pytest.raises(AlignvecError, match=r"vision_tower.*set\(\) instead of set_rows"):
        model(**batch)


@torch.no_grad()
def test_rows_of_a_model_whose_tower_is_the_same_for_all() -> None:
    """Only the language model is edited: images do not matter to rows."""
    model, batch = llava()
    base, aligned, alignment = with_vector(model, only="language_model")
    alignment.set_rows([{"v": 1}, {"v": 0}])
    truth = torch.stack([aligned(**batch).logits[0], base(**batch).logits[1]])
    assert error(model(**batch).logits, truth) < 1e-5


@torch.no_grad()
def test_rows_that_are_alike_need_no_order() -> None:
    model, batch = llava()
    _, aligned, alignment = with_vector(model)
    alignment.set_rows([{"v": 1}, {"v": 1}])
    assert error(model(**batch).logits, aligned(**batch).logits) < 1e-5
    assert alignment.coefficients == [{"v": 1.0}, {"v": 1.0}]


@torch.no_grad()
def test_the_trial_leaves_the_model_as_it_was() -> None:
    model = built("LlamaConfig").train()
    alignment = alignvec.attach(model, {"v": random_vector(model, 1)})
    model.model.layers[0].eval()
    training = {name: module.training for name, module in model.named_modules()}
    alignment.set_rows([{"v": 1}, {"v": 0}])
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(parameter.grad is None for parameter in model.parameters())
