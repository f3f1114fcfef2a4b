"""DPO runs of two steps on a tiny random Mistral: their product is a vector that gives the trained model."""

import copy
import json

import pytest
import torch

import alignvec
from alignvec import AlignmentVector
from alignvec.errors import AlignvecError
from alignvec.recipes.models import model_path
from tests.models import tiny

pytest.importorskip("trl")

from transformers import AutoTokenizer, TrainerCallback

from alignvec.train import load_pairs, train_dpo

PAIRS = [
    {"prompt": f"What is {word}?", "chosen": f" {word.title()} is a drug.", "rejected": " Ask a doctor."}
    for word in ("metformin", "aspirin", "lithium", "codeine")
]
OPTIONS = dict(
    steps=2, batch_size=2, learning_rate=1e-2, device="cpu", max_length=48, dpo={"gradient_checkpointing": False}
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("base"))


@pytest.fixture
def base(tokenizer):
    return tiny("Mistral", vocab_size=len(tokenizer), tie_word_embeddings=True)


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return file


class _Keep(TrainerCallback):
    """Keeps the trained model's logits on a prompt, and the start's."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.logits = model.eval()(input_ids=self.ids).logits.clone()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_vector_at_1_gives_the_trained_model(method: str, base, tokenizer, pairs, tmp_path) -> None:
    before = copy.deepcopy(base.state_dict())
    ids = tokenizer("What is metformin?", return_tensors="pt")["input_ids"]
    kept = _Keep(ids)
    vector = train_dpo(base, tokenizer, pairs, method=method, rank=2, callbacks=[kept], **OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any("embed_tokens" in name or "lm_head" in name for name in vector)
    assert len(vector) == (2 * 9 + 1 if method == "full" else 2 * 7)
    assert {vector.format_of(name).name for name in vector} == {"dense" if method == "full" else "low-rank"}
    vector.save(tmp_path / "vector")
    alignment = alignvec.attach(base, {"v": tmp_path / "vector"})
    with torch.no_grad():
        start = base(input_ids=ids).logits
        with alignment.using(v=1.0):
            end = base(input_ids=ids).logits
    assert (end - start).abs().max() > 1e-3
    torch.testing.assert_close(end, kept.logits, rtol=1e-3, atol=1e-4)
    base.alignment.detach()
    half = train_dpo(base, tokenizer, pairs, method=method, rank=2, keep=0.5, **OPTIONS)
    assert half.norm() == pytest.approx(0.5 * vector.norm(), rel=1e-5)
    assert half.cosine(vector) == pytest.approx(1, abs=1e-5)


def test_frozen_patterns_and_the_dtype_of_the_deltas(base, tokenizer, pairs) -> None:
    options = {**OPTIONS, "steps": 1}
    vector = train_dpo(base, tokenizer, pairs, frozen=("embedding", "*mlp*", "*norm*"), dtype="bfloat16", **options)
    assert {name.split(".")[-3] for name in vector} == {"self_attn"}
    assert {info.dtype for info in vector.tensors.values()} == {torch.bfloat16}


def test_a_run_cut_short_goes_on(base, tokenizer, pairs, tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    options = {**OPTIONS, "steps": 3, "work_folder": tmp_path / "work"}
    whole = train_dpo(base, tokenizer, pairs, **{**options, "work_folder": None})
    with pytest.raises(KeyboardInterrupt):
        train_dpo(base, tokenizer, pairs, callbacks=[Stop()], **options)
    assert (tmp_path / "work" / "checkpoint-1").is_dir()
    resumed = train_dpo(base, tokenizer, pairs, **options)
    assert (resumed - whole).norm() < 1e-3 * whole.norm()
    with pytest.raises(AlignvecError, match="other pairs or options"):
        train_dpo(base, tokenizer, pairs, **{**options, "beta": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prefix"}, "method='prefix'"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"steps": 0}, "steps=0"),
        ({"frozen": ("*nothing*",)}, "matches no parameter"),
        ({"frozen": ("*",)}, "leave something"),
        ({"dpo": {"temperature": 1}}, "temperature"),
    ],
)
def test_bad_options_are_refused(options, message, base, tokenizer, pairs) -> None:
    with pytest.raises(AlignvecError, match=message.replace("*", r"\*")):
        train_dpo(base, tokenizer, pairs, **{**OPTIONS, **options})


def test_an_attached_base_and_a_missing_template_are_refused(base, tokenizer, pairs, tmp_path) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    file = tmp_path / "turns.jsonl"
    answers = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    file.write_text(json.dumps({"prompt": turns, **answers}))
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    with pytest.raises(AlignvecError, match="no chat template"):
        train_dpo(base, plain, load_pairs(file), **OPTIONS)
    zero = {"model.norm.weight": torch.ones_like(base.model.norm.weight)}
    alignvec.attach(base, {"v": AlignmentVector(zero)})
    with pytest.raises(AlignvecError, match="detach"):
        train_dpo(base, tokenizer, pairs, **OPTIONS)
