"""When a mix takes effect: with the next call of anything that is edited, and for the whole of that call."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers

import alignvec
from tests.tuned import IDS, built, error, tuned, with_vector

SEQ2SEQ = transformers.AutoModelForSeq2SeqLM
BYPASSING: list[tuple[str, dict[str, Any]]] = [  # families whose forward calls a model inside of their backbone
    ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("BartConfig", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}),
    ("TrOCRConfig", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}),
    ("BigBirdPegasusConfig", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}),
    ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    ("BertConfig", {"is_decoder": True}),
]
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


@pytest.mark.parametrize(("config", "options"), BYPASSING, ids=[config for config, _ in BYPASSING])
@torch.no_grad()
def test_models_that_go_past_their_backbone(config: str, options: dict[str, Any]) -> None:
    model = built(config, **options)
    base, aligned, alignment = with_vector(model)
    for coefficient, truth in ((1, aligned), (0, base), (1, aligned)):
        alignment.set(v=coefficient)
        assert error(model(IDS).logits, truth(IDS).logits) < 1e-5


@torch.no_grad()
def test_encoder_and_decoder_of_one_generate() -> None:
    """The encoder runs by itself, before the model is ever called."""
    model = built("T5Config", SEQ2SEQ, **T5)
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    how = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS, **how), aligned.generate(IDS, **how))
    states = model.get_encoder()(IDS).last_hidden_state
    assert error(states, aligned.get_encoder()(IDS).last_hidden_state) < 1e-5


@torch.no_grad()
def test_modules_called_by_themselves() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    x = torch.randn(2, 3, 32)
    for coefficient, truth in ((1, aligned), (0, base)):
        alignment.set(v=coefficient)
        embedded = model.get_input_embeddings()(IDS)
        assert error(embedded, truth.get_input_embeddings()(IDS)) < 1e-6
        assert error(model(inputs_embeds=embedded).logits, truth(IDS).logits) < 1e-5
        assert error(model.model.layers[0].mlp(x), truth.model.layers[0].mlp(x)) < 1e-5
        assert error(model.model.norm(x), truth.model.norm(x)) < 1e-6
    alignment.set_rows([{"v": 1}, {"v": 0}])
    model(IDS)
    alignment.set(v=1)
    assert error(model.get_input_embeddings()(IDS[:1]), aligned.get_input_embeddings()(IDS[:1])) < 1e-6


@torch.no_grad()
def test_a_write_in_the_middle_of_a_step_waits_for_the_next() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    handle = model.model.layers[0].register_forward_hook(lambda *_: alignment.set(v=0))
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5
    handle.remove()
    assert error(model(IDS).logits, base(IDS).logits) < 1e-5


@torch.no_grad()
def test_threads_keep_their_mixes() -> None:
    """Four threads decode under what each has set; a step of one is never seen by another."""
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    truths = {1.0: aligned(IDS).logits, 0.0: base(IDS).logits}
    wrong: list[float] = []

    def run(coefficient: float) -> None:
        with torch.no_grad():
            for _ in range(15):
                alignment.set(v=coefficient)
                got = model(IDS).logits
                wrong.extend([1.0] if all(error(got, truth) > 1e-5 for truth in truths.values()) else [])

    threads = [threading.Thread(target=run, args=(coefficient,)) for coefficient in (0.0, 1.0, 0.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
@torch.no_grad()
def test_a_call_that_fails_ends_its_step(failure: type[BaseException]) -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    alignment.set(v=1)

    def fail(*_: Any) -> None:
        raise failure

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(failure):
        model(IDS)
    handle.remove()
    alignment.set(v=0)
    assert error(model.get_input_embeddings()(IDS), base.get_input_embeddings()(IDS)) < 1e-6
    assert error(model(IDS).logits, base(IDS).logits) < 1e-5
    thread = threading.Thread(target=lambda: alignment.set(v=1))
    thread.start()
    thread.join()
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5


@pytest.mark.parametrize("part", ["model", "model.layers.0.mlp", "lm_head"])
def test_a_compiled_part_follows_writes(part: str) -> None:
    """Called through the model and by itself."""
    model = built("Qwen3Config")
    base, aligned, alignment = with_vector(model)
    inner = model.get_submodule(part)
    x = IDS if part == "model" else torch.randn(2, 3, 32)
    inner.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for coefficient, truth in ((1, aligned), (0, base), (1, aligned)):
            alignment.set(v=coefficient)
            assert error(model(IDS, use_cache=False).logits, truth(IDS).logits) < 1e-5
            got, wanted = inner(x), truth.get_submodule(part)(x)
            assert error(got[0] if part == "model" else got, wanted[0] if part == "model" else wanted) < 1e-5
    torch._dynamo.reset()


@torch.no_grad()
def test_another_thread_that_compiles_is_not_noticed() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    truths = [net(IDS).logits for net in (aligned, base)]
    stop = threading.Event()

    def compile_other() -> None:
        while not stop.is_set():
            torch._dynamo.reset()
            torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), backend="aot_eager")(
                torch.ones(4)
            )

    thread = threading.Thread(target=compile_other)
    thread.start()
    try:
        for number in range(150):
            alignment.set(v=(number + 1) % 2)
            assert error(model(IDS).logits, truths[number % 2]) < 1e-5
    finally:
        stop.set()
        thread.join()


def test_compiled_steps_of_two_threads_keep_their_mixes() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    compiled = torch.compile(model, backend="aot_eager")
    wrong: list[float] = []
    with torch.no_grad():
        truths = [net(IDS).logits for net in (aligned, base)]
        compiled(IDS, use_cache=False)

    def run(coefficient: float) -> None:
        with torch.no_grad():
            for _ in range(30):
                alignment.set(v=coefficient)
                got = compiled(IDS, use_cache=False).logits
                wrong.extend([1.0] if all(error(got, truth) > 1e-5 for truth in truths) else [])

    threads = [threading.Thread(target=run, args=(coefficient,)) for coefficient in (0.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    torch._dynamo.reset()


def test_steps_leave_nothing_behind() -> None:
    model = built("LlamaConfig")
    _, _, alignment = with_vector(model)
    alignment.set(v=1)
    results = []
    for backward in (True, False):
        logits = model(IDS).logits
        if backward:
            logits.sum().backward()
        results.append(weakref.ref(logits))
        del logits
    gc.collect()
    assert [ref() for ref in results] == [None, None]


@torch.no_grad()
def test_a_thread_that_ends_in_a_step_lets_go_of_it() -> None:
    model = built("LlamaConfig")
    _, aligned, alignment = with_vector(model)

    def fail(*_: Any) -> None:
        raise SystemExit

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    thread = threading.Thread(target=lambda: model(IDS))
    thread.start()
    thread.join()
    handle.remove()
    gc.collect()
    how = dict(mixes=[{"v": 1}], max_new_tokens=4)
    got = alignment.decoder(max_length=32).generate(IDS[:1], torch.ones_like(IDS[:1]), **how)
    assert torch.equal(got, aligned.generate(IDS[:1], max_new_tokens=4, do_sample=False))


@torch.no_grad()
def test_a_step_around_code_that_reads_weights() -> None:
    """As chunked losses do: the head's weight times what the backbone gives."""
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    for coefficient, truth in ((1, aligned), (0, base)):
        alignment.set(v=coefficient)
        with alignment.step(batch=2):
            logits = torch.nn.functional.linear(model.model(IDS)[0], model.lm_head.weight)
        assert error(logits, truth(IDS).logits) < 1e-5


@torch.no_grad()
def test_copies_of_a_model_have_steps_of_their_own() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    twin = copy.deepcopy(model)
    twin.alignment.set(v=0)
    assert error(twin(IDS).logits, base(IDS).logits) < 1e-5
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5


def test_an_attached_model_is_not_pickled(tmp_path: Any) -> None:
    model = built("LlamaConfig")
    _, _, alignment = with_vector(model)
    with pytest.raises(alignvec.AlignvecError, match="detach"):
        torch.save(model, tmp_path / "model.pt")
    alignment.detach()
    torch.save(model, tmp_path / "model.pt")


@torch.no_grad()
def test_tuned_copies_are_really_different() -> None:
    model = built("LlamaConfig")
    assert error(tuned(model)(IDS).logits, model(IDS).logits) > 0.1
