"""Shapes that the recipe can train: the shipped one unchanged, the others of the size that their name says."""

import json
from itertools import repeat

import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignvec.errors import AlignvecError
from alignvec.recipes import model_path
from alignvec.recipes import pretrain as recipe
from alignvec.recipes.pretrain import STAGES, pretrain, train_stage
from alignvec.recipes.shapes import SHAPES, make_config


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("base"))


def test_the_default_shape_is_the_shipped_one(tokenizer) -> None:
    shipped = json.loads((model_path("base") / "config.json").read_text())
    ours = make_config(tokenizer).to_dict()
    for key in shipped.keys() - {"architectures", "dtype", "transformers_version"}:
        assert ours[key] == shipped[key], key


@pytest.mark.parametrize(
    ("shape", "fewest", "most"),
    [("mistral-4m", 3.8e6, 3.95e6), ("qwen3-2m", 2.3e6, 2.5e6), ("llama-55m", 54e6, 56e6)],
)
def test_a_shape_has_the_size_of_its_name(tokenizer, shape: str, fewest: float, most: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(tokenizer, shape))
    assert model.config.model_type == shape.split("-")[0]
    assert fewest <= sum(parameter.numel() for parameter in model.parameters()) <= most


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains(tokenizer, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "corpus", lambda *_: repeat((tokenizer("What is a lease?")["input_ids"], 1)))
    monkeypatch.setitem(SHAPES[shape].sizes, "num_hidden_layers", 1)
    config = make_config(tokenizer, shape)
    model = AutoModelForCausalLM.from_config(config)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with Progress(disable=True) as progress:
        train_stage(model, tokenizer, STAGES[0], 1, 3, progress, batch_size=2)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_another_shape_is_refused(tokenizer) -> None:
    with Progress(disable=True) as progress, pytest.raises(AlignvecError, match="bert-1m"):
        pretrain(tokenizer, 1, 0, "cpu", progress, shape="bert-1m")
