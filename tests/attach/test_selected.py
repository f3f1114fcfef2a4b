"""A vector of which some tensors are left out: attached, it edits the others alone; as an adapter, PEFT does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec import extract
from alignvec.peft import to_peft
from tests.models import random_vector, tiny

IDS = torch.arange(3, 13).view(2, 5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("format", ["dense", "lossless", "int8"])
def test_attached(format: str, tied: bool, tmp_path: Path) -> None:
    base = tiny("Mistral", torch.bfloat16, tie_word_embeddings=tied)
    tune = copy.deepcopy(base)
    vector = random_vector(base, 3)
    with torch.no_grad():
        for name, parameter in tune.named_parameters():
            parameter.add_(vector[name])
    extract(base, tune, format=format, output=tmp_path / "v")
    part = alignvec.load(tmp_path / "v").select(exclude=["*embed*", "*.layers.1.*"])
    merged = copy.deepcopy(base).double()
    bound = part.with_base(base) if part.needs_base else part
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name in part:
                parameter.add_(0.5 * bound[name].double())
    wanted = merged(IDS).logits
    base = base.float()
    alignment = alignvec.attach(base, {"v": bound}) if format == "lossless" else alignvec.attach(base, {"v": part})
    alignment.set(v=0.5)
    with torch.no_grad():
        got = base(IDS).logits
    assert not torch.equal(merged.get_input_embeddings().weight, tune.get_input_embeddings().weight.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_some_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny("Mistral")
    base.save_pretrained(tmp_path / "base")
    tune = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tune.named_parameters():
            if name.endswith(("q_proj.weight", "up_proj.weight")):
                low = torch.randn(parameter.shape[0], 2, generator=generator)
                parameter.add_(0.05 * low @ torch.randn(2, parameter.shape[1], generator=generator))
    vector = extract(tmp_path / "base", tune, format="low-rank:rank=2", dtype="float32")
    part = vector.select(exclude=["*.layers.1.*q_proj*", "*.layers.0.*up_proj*"])
    assert len(part) == 2
    to_peft(part, tmp_path / "adapter", tmp_path / "base")
    wanted = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if name in part:
                parameter.add_(part[name].double())
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits.double(), wanted(IDS).logits, rtol=1e-3, atol=1e-3)
