"""Parameters that code reads past the module's forward: what it sees is the mix, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import alignvec
from alignvec import AlignvecError
from tests.models import merged
from tests.tuned import IDS, built, error, tuned, with_vector

LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
READING: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3_5TextConfig", {**LINEAR, **BOTH}),
    (
        "Qwen3NextConfig",
        {**LINEAR, **BOTH, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        | {"shared_expert_intermediate_size": 16},
    ),
    ("MambaConfig", {"state_size": 4}),
    ("Mamba2Config", {"state_size": 4, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4}),
    ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    ("RwkvConfig", {"attention_hidden_size": 32, "context_length": 64}),
    ("RecurrentGemmaConfig", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    ("DogeConfig", {}),
    ("ApertusConfig", {"hidden_act": "xielu"}),
]


@pytest.mark.parametrize(("config", "options"), READING, ids=[config for config, _ in READING])
@torch.no_grad()
def test_what_a_forward_reads_is_the_mix(config: str, options: dict[str, Any]) -> None:
    model = built(config, **options)
    base, aligned, alignment = with_vector(model)
    half = merged(base, {"v": alignvec.extract(base, aligned)}, {"v": 0.5}).float()
    for coefficient, truth in ((1, aligned), (0.5, half), (0, base), (1, aligned)):
        alignment.set(v=coefficient)
        assert error(model(IDS).logits, truth(IDS).logits) < 1e-4
    how = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS, **how), aligned.generate(IDS, **how)), "also what it keeps of earlier tokens"
    alignment.detach()
    assert error(model(IDS).logits, base(IDS).logits) < 1e-5


class Readers(nn.Module):
    """Every way of reading a parameter that models have, in one layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(size, size, 3, groups=size, padding=2)
        self.up = nn.Linear(size, size)
        self.shift = nn.Parameter(torch.randn(size))
        self.rnn = nn.GRU(size, size, batch_first=True)

    def helper(self, x: Tensor) -> Tensor:
        return x * self.shift.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.up.weight.dtype)
        weight = self.conv.weight.squeeze(1)
        y = F.conv1d(x.mT, weight[:, None], self.conv.bias, groups=weight.shape[0], padding=2)[..., : x.shape[1]].mT
        y = y + torch.addmm(self.up.bias, x.flatten(0, 1), self.up.weight.t()).view_as(x)
        return self.helper(y) + self.rnn(x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_way_of_reading(dtype: torch.dtype) -> None:
    """In 16 bits the mix is not rounded before it is used: the error is that of the base's own arithmetic."""
    model = built("LlamaConfig")
    model.model.layers[0].mlp = Readers(32)
    model = model.to(dtype)
    base, aligned = model, tuned(model)
    vector = alignvec.extract(base, aligned)
    wide = merged(base, {"v": vector}, {"v": 0.3})
    rounding = error(base(IDS).logits, merged(base, {}, {})(IDS).logits)
    alignvec.attach(model, {"v": vector}).set(v=0.3)
    assert error(model(IDS).logits, wide(IDS).logits) < max(2 * rounding, 1e-5)


def test_gradients_reach_what_is_read() -> None:
    model = built("LlamaConfig")
    model.model.layers[0].mlp = Readers(32)
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    for net in (model, aligned):
        net(IDS).logits.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in aligned.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


class Scaled(torch.autograd.Function):
    """As kernels outside of torch are called: with a gradient of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight, (grads[0] * x).flatten(0, -2).sum(0)


class Scaling(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.randn(size)), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Scaled.apply(self.inner(x), self.scale)
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_pass_through_functions_of_others(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = built("LlamaConfig")
    model.model.layers[0].mlp = Scaling(32)
    model = model.to(dtype)
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    for net in (model, aligned):
        net(IDS).logits.float().square().mean().backward()
    got, wanted = (net.model.layers[0].mlp.scale.grad for net in (model, aligned))
    assert error(got, wanted) < (0.05 if dtype == torch.bfloat16 else 1e-3)


def test_a_reentrant_checkpoint_of_a_parameter_is_refused() -> None:
    """Its gradient would be lost."""

    class Given(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.randn(size)), nn.Linear(size, size)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda x, scale: self.inner(x) * scale, x, self.scale, use_reentrant=True)

    model = built("LlamaConfig")
    model.model.layers[0].mlp = Given(32)
    _, _, alignment = with_vector(model.bfloat16().train())
    alignment.set(v=1)
    loss = model(inputs_embeds=torch.randn(2, 3, 32, dtype=torch.bfloat16, requires_grad=True)).logits.float().sum()
    with pytest.raises(AlignvecError, match="use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_parameter_that_goes_through_edited_modules(dtype: torch.dtype) -> None:
    """Relative positions of DeBERTa are a table that is normed and projected."""
    auto = transformers.AutoModelForMaskedLM
    options = dict(relative_attention=True, norm_rel_ebd="layer_norm", pos_att_type=["c2p", "p2c"], type_vocab_size=0)
    model = built("DebertaV2Config", auto, **options, share_att_key=True, position_buckets=8).to(dtype)
    base, aligned = model, tuned(model)
    vector = alignvec.extract(base, aligned)
    wide = merged(base, {"v": vector}, {"v": 1.0})
    rounding = error(base(IDS).logits, merged(base, {}, {})(IDS).logits)
    alignvec.attach(model, {"v": vector}).set(v=1)
    assert error(model(IDS).logits, wide(IDS).logits) < max(3 * rounding, 1e-5)


def test_compiled_readers() -> None:
    model = built("LlamaConfig")
    model.model.layers[0].mlp = Readers(32)
    model.model.layers[0].mlp.rnn = nn.Identity()  # not for torch.compile
    model.model.layers[0].mlp.forward = None
    del model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.__class__ = type("NoRecurrence", (Readers,), {"forward": _without_recurrence})
    base, aligned, alignment = with_vector(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for coefficient, truth in ((1, aligned), (0, base), (1, aligned)):
            alignment.set(v=coefficient)
            assert error(compiled(IDS, use_cache=False).logits, truth(IDS).logits) < 1e-5
    torch._dynamo.reset()


def _without_recurrence(self: Readers, x: Tensor) -> Tensor:
    weight = self.conv.weight.squeeze(1)
    y = F.conv1d(x.mT, weight[:, None], self.conv.bias, groups=weight.shape[0], padding=2)[..., : x.shape[1]].mT
    return self.helper(y + F.linear(x, self.up.weight, self.up.bias))


class Reading(nn.Module):
    """A layer without parameters of its own that multiplies by those of its parts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight, self.up.bias)


@pytest.mark.parametrize("layer", [Readers, Reading])
@torch.no_grad()
def test_rows_of_a_layer_that_reads_run_one_by_one(layer: type[nn.Module]) -> None:
    torch.manual_seed(3)
    model = built("LlamaConfig")
    model.model.layers[0].mlp = layer(32)
    base, aligned, alignment = with_vector(model)
    alignment.set_rows([{"v": 1}, {"v": 0}])
    truth = torch.stack([aligned(IDS).logits[0], base(IDS).logits[1]])
    assert error(model(IDS).logits, truth) < 1e-5


STATEFUL = [item for item in READING if item[0] not in ("RecurrentGemmaConfig", "DogeConfig", "ApertusConfig")]


@pytest.mark.parametrize(("config", "options"), STATEFUL, ids=[config for config, _ in STATEFUL])
@torch.no_grad()
def test_rows_of_layers_that_keep_a_state(config: str, options: dict[str, Any]) -> None:
    """Each row decodes as it does alone; a model's own batch may mix its rows up (Rwkv does)."""
    model = built(config, **options)
    base, aligned, alignment = with_vector(model)
    alignment.set_rows([{"v": 1}, {"v": 0}])
    truth = torch.cat([aligned(IDS[:1]).logits, base(IDS[1:]).logits])
    assert error(model(IDS).logits, truth) < 1e-4
    how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    wanted = torch.cat([aligned.generate(IDS[:1], **how), base.generate(IDS[1:], **how)])
    assert torch.equal(model.generate(IDS, **how), wanted)


@torch.no_grad()
def test_rows_that_nobody_can_tell_apart_are_refused_by_name() -> None:
    """Here heads come before tokens when the parameter is used."""
    model = built("RecurrentGemmaConfig", lru_width=32, block_types=["recurrent", "attention"])
    base, _, alignment = with_vector(model)
    with pytest.raises(AlignvecError, match=r"model\.layers\.0\.temporal_block\.rg_lru\.\w+ .*instead of set_rows"):
        alignment.set_rows([{"v": 1}, {"v": 0}])
    assert error(model(IDS).logits, base(IDS).logits) < 1e-5


@torch.no_grad()
def test_a_forward_that_writes_to_a_parameter_is_refused() -> None:
    model = built("RwkvConfig", attention_hidden_size=32, context_length=64, rescale_every=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, _, alignment = with_vector(model)
    alignment.set(v=1)
    with pytest.raises(AlignvecError, match="rescale_every"):
        model(IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_reference_to_a_parameter_is_refused_at_attach() -> None:
    model = built("LlamaConfig")
    model.model.layers[0].mlp.kept = [model.model.layers[0].mlp.up_proj.weight]
    with pytest.raises(
        AlignvecError, match=r"model\.layers\.0\.mlp\.kept holds model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        with_vector(model)


@torch.no_grad()
def test_a_forward_put_on_the_object_is_refused_at_attach() -> None:
    model = built("LlamaConfig")
    layer = model.model.layers[0].mlp.up_proj
    vector = alignvec.extract(model, tuned(model))
    layer.forward = lambda x: F.linear(x, layer.weight)
    with pytest.raises(AlignvecError, match=r"model\.layers\.0\.mlp\.up_proj has a forward that was put on the object"):
        alignvec.attach(model, {"v": vector})
    assert not any("Aligned" in type(module).__name__ for module in model.modules())
