"""Names in models that torch.compile, DDP, FSDP, activation checkpointing, a value head or PEFT wrap."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import alignvec
from alignvec import AlignvecError
from alignvec.fingerprint import identify
from alignvec.names import parameter_names, resolve
from alignvec.verify import verify_base
from alignvec.wrappers import unwrapped
from tests.attach.transferred import added, new, tuned


class Wrapper(nn.Module):
    """Holds a model under a name, as DDP ("module"), FSDP and trainers with a value head do."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        setattr(self, name, model)


def layers(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = wrap(layer)
    return model


def adapted(model: nn.Module, *modules: str, **options: object) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(modules), **options))


def added_by_transformers(model: nn.Module) -> nn.Module:
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    return model


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "compiled layers": lambda model: layers(model, torch.compile),
    "DDP": lambda model: Wrapper("module", model),
    "DDP of compile": lambda model: Wrapper("module", torch.compile(model)),
    "FSDP": lambda m: Wrapper("_fsdp_wrapped_module", layers(m, lambda x: Wrapper("_fsdp_wrapped_module", x))),
    "checkpointed layers": lambda model: layers(model, checkpoint_wrapper),
    "value head": lambda model: Wrapper("pretrained_model", model),
    "LoRA": lambda model: adapted(model, "q_proj", "up_proj"),
    "LoRA of embedding and head": lambda model: adapted(model, "embed_tokens", "lm_head"),
    "compiled LoRA": lambda model: torch.compile(adapted(model, "q_proj")),
    "adapter of transformers": added_by_transformers,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(WRAPPED))
def test_every_name_resolves_and_the_base_is_recognised(kind: str) -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    model = WRAPPED[kind](new("Llama"))
    names = parameter_names(model)
    parameters = dict(model.named_parameters())
    for name, value in base.named_parameters():
        live = resolve(model, names, name)
        assert live is not None
        assert torch.equal(parameters[live], value)
    verify_base(model, {"v": vector})
    moved = added(model, vector)
    truth = dict(tuned(base).named_parameters())
    for name in vector:
        expected = truth[name].double()
        torch.testing.assert_close(moved[resolve(model, names, name)], expected, rtol=0, atol=1e-6)
    assert identify(model) == identify(base)
    with torch.no_grad():
        parameters[resolve(model, names, "model.layers.1.mlp.up_proj.weight")][0, 0] += 1
    with pytest.raises(AlignvecError, match=r"1 of 21 tensors differ \(model.layers.1.mlp.up_proj.weight\)"):
        verify_base(model, {"v": vector})


def test_an_adapter_that_stands_in_the_way_is_named() -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    merged = adapted(new("Llama"), "q_proj", init_lora_weights=False)
    merged.merge_adapter()
    with pytest.raises(AlignvecError, match=r"q_proj.weight.*call unmerge_adapter\(\) first"):
        alignvec.attach(merged, {"v": vector})
    whole = adapted(new("Llama"), "q_proj", modules_to_save=["lm_head"])
    with pytest.raises(AlignvecError, match=r"edits lm_head.weight, in whose place .*modules_to_save"):
        alignvec.attach(whole, {"v": vector})


def test_several_models_in_one_module_are_not_guessed_between() -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    both = nn.ModuleDict({"policy": new("Llama"), "reference": new("Llama")})
    with pytest.raises(AlignvecError, match=r"ModuleDict does not have: model.embed_tokens.weight"):
        alignvec.attach(both, {"v": vector})


def test_vectors_of_wrapped_models_have_plain_names() -> None:
    base = new("Llama")
    aligned = tuned(base)
    expected = dict(alignvec.extract(base, aligned).items())
    for left, right in ((torch.compile(base), Wrapper("module", aligned)), (base, torch.compile(aligned))):
        vector = alignvec.extract(left, right)
        assert set(vector) == set(expected)
        assert all(torch.equal(vector[name], delta) for name, delta in expected.items())
    with pytest.raises(AlignvecError, match=r"not merged into its weights .*lora_A.*from_peft"):
        alignvec.extract(base, adapted(tuned(base), "q_proj"))


def test_every_wrapper_is_taken_off_from_the_outside() -> None:
    base = new("Llama")
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    inside = adapted.base_model.model
    for model in (adapted, adapted.base_model, torch.compile(adapted), nn.DataParallel(adapted)):
        assert unwrapped(model) is inside
    for model in (base, torch.compile(base), torch.compile(nn.DataParallel(base))):
        assert unwrapped(model) is base
    mixed = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert unwrapped(mixed) is mixed.base_model.model
