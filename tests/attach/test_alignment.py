"""Coefficients, rows, threads, compilation, gradients: what an Alignment does between attach and detach."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import alignvec
from alignvec import AlignvecError
from tests.compilers import BACKENDS
from tests.models import merged, random_vector, tiny


@pytest.fixture
def model() -> nn.Module:
    return tiny("Mistral")


@pytest.fixture
def alignment(model: nn.Module) -> alignvec.Alignment:
    return alignvec.attach(model, {"a": random_vector(model, 1), "b": random_vector(model, 2)}, max_rows=8)


def ids(rows: int = 2, tokens: int = 5) -> torch.Tensor:
    return torch.randint(3, 101, (rows, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, rows: int = 2) -> torch.Tensor:
    return model(ids(rows)).logits


def test_a_fresh_attachment_answers_as_the_base(model: nn.Module) -> None:
    before = logits(model)
    alignvec.attach(model, {"a": random_vector(model, 1)})
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_coefficients_by_name(alignment: alignvec.Alignment) -> None:
    assert alignment.coefficients == {"a": 0.0, "b": 0.0}
    alignment.set(a=0.5)
    assert alignment.coefficients == {"a": 0.5, "b": 0.0}
    alignment.set({"b": -1})
    assert alignment.coefficients == {"a": 0.0, "b": -1.0}
    alignment.set_rows([{"a": 1.0}, {}])
    assert alignment.coefficients == [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]


def test_using_restores_rows_also_after_an_error(alignment: alignvec.Alignment, model: nn.Module) -> None:
    alignment.set_rows([{"a": 1.0}, {"b": 1.0}])
    live = logits(model)
    with alignment.using(a=0.3):
        assert alignment.coefficients == {"a": 0.3, "b": 0.0}
    with pytest.raises(ZeroDivisionError), alignment.using(a=0.3):
        raise ZeroDivisionError
    assert alignment.coefficients[0] == {"a": 1.0, "b": 0.0}
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.set(c=1.0), "no vector named 'c'"),
        (lambda a: a.set(a=float("nan")), "must be finite"),
        (lambda a: a.set(a=float("inf")), "must be finite"),
        (lambda a: a.set(a="much"), "must be a number"),
        (lambda a: a.set_rows([]), "at least one mix"),
        (lambda a: a.set_rows({"a": 1.0}), "list with one mix for each row"),
        (lambda a: a.set_rows([{}] * 9), "max_rows=9"),
        (lambda a: a.set_rows([{"a": 1.0}, {"x": 1.0}]), "no vector named 'x'"),
        (lambda a: a.restore(), "nothing is materialised"),
    ],
    ids=["unknown", "nan", "inf", "text", "no-rows", "no-list", "too-many-rows", "unknown-in-row", "restore"],
)
def test_bad_calls_change_nothing(alignment: alignvec.Alignment, model: nn.Module, call, message: str) -> None:  # type: ignore[no-untyped-def]
    alignment.set(a=0.25, b=0.5)
    before, live = alignment.coefficients, logits(model)
    with pytest.raises(AlignvecError, match=message):
        call(alignment)
    assert alignment.coefficients == before
    assert torch.equal(logits(model), live)


def test_a_batch_that_does_not_divide_over_the_rows_is_refused(alignment: alignvec.Alignment, model: nn.Module) -> None:
    alignment.set_rows([{"a": 1.0}, {"b": 1.0}])
    with pytest.raises(AlignvecError, match="batch of 3 does not divide over the 2 rows"):
        logits(model, rows=3)
    logits(model, rows=4)


def test_attach_and_detach_twice(alignment: alignvec.Alignment, model: nn.Module) -> None:
    with pytest.raises(AlignvecError, match="already attached"):
        alignvec.attach(model, {"a": random_vector(model, 1)})
    assert model.alignment is alignment
    alignment.detach()
    with pytest.raises(AlignvecError, match="already detached"):
        alignment.detach()
    with pytest.raises(AlignvecError, match="detached"):
        alignment.set(a=1.0)
    alignvec.attach(model, {"a": random_vector(model, 1)})


def test_materialise_and_restore(model: nn.Module) -> None:
    model = model.bfloat16()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    alignment.set(a=0.5)
    on_the_fly = logits(model)
    realised = alignment.materialise()
    assert realised["a"] == pytest.approx(0.5, abs=0.02)
    assert not any("Aligned" in type(module).__name__ for module in model.modules())
    torch.testing.assert_close(logits(model), on_the_fly, rtol=0.1, atol=0.1)
    with pytest.raises(AlignvecError, match="restore"):
        alignment.set(a=0.1)
    alignment.restore()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), on_the_fly)
    alignment.set_rows([{"a": 1.0}, {}])
    with pytest.raises(AlignvecError, match="one mix for all rows"):
        alignment.materialise()


def test_materialise_without_measuring_writes_the_same(model: nn.Module) -> None:
    alignment = alignvec.attach(model, {"first": random_vector(model, 1)})
    assert alignment.materialise(first=0.5)["first"] == pytest.approx(0.5, abs=1e-3)
    measured = [parameter.clone() for parameter in model.parameters()]
    alignment.materialise(first=-0.5)
    assert alignment.materialise(first=0.5, measure=False) == {}
    assert all(torch.equal(one, other) for one, other in zip(measured, model.parameters(), strict=True))


@pytest.mark.parametrize("keep", ["device", "host"])
def test_materialise_again_in_the_same_buffers(model: nn.Module, keep: str) -> None:
    """The base is never written to: one mix after another goes to one buffer, and restoring switches back."""
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alignment = alignvec.attach(model, vectors)
    used = []
    for mix in ({"a": 0.5}, {"a": -1.0, "b": 0.25}, {}):
        realised = alignment.materialise(mix or {"a": 0.0}, keep=keep)
        assert realised == pytest.approx({"a": 0.0, "b": 0.0, **mix}, abs=1e-3)
        assert alignment.coefficients == {"a": 0.0, "b": 0.0, **mix}
        truth = merged(model, {}, {})
        truth.load_state_dict(merged_state(state, vectors, mix))
        torch.testing.assert_close(logits(model).double(), logits(truth), rtol=1e-4, atol=1e-4)
        used.append({name: p.data_ptr() for name, p in model.named_parameters()})
    assert used[0] == used[1] == used[2]
    assert not set(used[0].values()) & set(where.values())
    alignment.restore()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    alignment.materialise(b=1.0)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == used[0]
    alignment.detach()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def merged_state(state: dict, vectors: dict, mix: dict) -> dict:
    state = {name: value.double() for name, value in state.items()}
    for label, coefficient in mix.items():
        for name in vectors[label].names:
            state[name] += coefficient * vectors[label][name].double()
    return state


def test_a_materialise_that_fails_leaves_the_base(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    base = logits(model)
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    before = logits(model)
    with pytest.raises(AlignvecError, match="keep='disk'"):
        alignment.materialise(a=1.0, keep="disk")
    with pytest.raises(AlignvecError, match="no vector named 'c'"):
        alignment.materialise(c=1.0)
    calls = iter(range(5))

    def fails(*args: object, **options: object) -> None:
        if next(calls) == 3:
            raise MemoryError

    monkeypatch.setattr("alignvec.materialised._sample", fails)
    with pytest.raises(MemoryError):
        alignment.materialise(a=1.0)
    alignment.set(a=0.0)
    assert torch.equal(logits(model), before)
    alignment.detach()
    assert torch.equal(logits(model), base)


def test_tied_weights_are_materialised_once_and_stay_tied() -> None:
    model = tiny("Qwen2")
    vector = random_vector(model, 1)
    truth = merged(model, {"a": vector}, {"a": 0.5})
    alignment = alignvec.attach(model, {"a": vector})
    alignment.materialise(a=0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model).double(), logits(truth), rtol=1e-4, atol=1e-4)
    alignment.restore()


def test_deepcopy_is_independent(alignment: alignvec.Alignment, model: nn.Module) -> None:
    alignment.set(a=1.0)
    live = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), live)
    twin.alignment.set(b=1.0)
    assert not torch.equal(logits(twin), live)
    assert torch.equal(logits(model), live)
    assert alignment.coefficients == {"a": 1.0, "b": 0.0}
    shared = zip(model.lm_head.edit.deltas["weight"].parts, twin.lm_head.edit.deltas["weight"].parts, strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in shared), "copies share their vectors"
    twin.alignment.detach()
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_moves_convert_the_base_alone(
    alignment: alignvec.Alignment, model: nn.Module, dtype: torch.dtype
) -> None:
    alignment.set_rows([{"a": 0.5}, {"b": -0.5}])
    vectors = {"a": random_vector(tiny("Mistral"), 1), "b": random_vector(tiny("Mistral"), 2)}
    model.to(dtype)
    head = model.lm_head
    assert head.weight.dtype == dtype
    assert head.edit.deltas["weight"].parts[0].dtype == head.edit.table.dtype == torch.float32
    alignment.detach()
    truth = torch.stack(
        [merged(model, vectors, mix)(ids()).logits[row] for row, mix in enumerate([{"a": 0.5}, {"b": -0.5}])]
    )
    alignment = alignvec.attach(model, vectors, transfer=True)
    alignment.set_rows([{"a": 0.5}, {"b": -0.5}])
    assert ((logits(model).double() - truth).norm() / truth.norm()).item() < 0.03


def test_attach_in_inference_mode_then_set_outside(model: nn.Module) -> None:
    vector = random_vector(model, 1)
    with torch.inference_mode():
        alignment = alignvec.attach(model, {"a": vector})
        alignment.set(a=0.5)
        model(ids())
    alignment.set(a=1.0)
    with torch.inference_mode():
        inside = model(ids()).logits.clone()
    torch.testing.assert_close(logits(model), inside)


def test_gradients_reach_inputs_and_base_weights(model: nn.Module) -> None:
    vectors = {"a": random_vector(model, 1)}
    reference = merged(model, vectors, {"a": 0.8}).float()
    alignment = alignvec.attach(model, vectors)
    alignment.set(a=0.8)
    weights = torch.linspace(-1, 1, 101)
    for net in (model, reference):
        embeddings = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (net(inputs_embeds=embeddings).logits * weights).sum().backward()
        net.embeddings_grad = embeddings.grad
        net(ids()).logits.mean().backward()
    torch.testing.assert_close(model.embeddings_grad, reference.embeddings_grad, rtol=1e-3, atol=1e-4)
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_write_between_forward_and_backward_keeps_the_gradient(
    alignment: alignvec.Alignment, model: nn.Module
) -> None:
    def gradient(write: bool) -> torch.Tensor:
        alignment.set(a=1.0)
        model.zero_grad()
        loss = model(ids()).logits.square().mean()
        if write:
            alignment.set(b=1.0)
            model(ids())
        loss.backward()
        return model.lm_head.weight.grad.clone()

    assert torch.equal(gradient(False), gradient(True))


def test_save_pretrained_of_an_attached_model_saves_the_base(
    alignment: alignvec.Alignment, model: nn.Module, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    alignment.set(a=1.0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("hooks", ["beside", "inside"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_fullgraph_follows_coefficients_without_recompiling(backend: str, hooks: str) -> None:
    """torch.compile(model) runs the model's own hooks beside its graph; a compiled caller has them inside."""
    model = tiny("Qwen3")
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    alignment = alignvec.attach(model, vectors)
    called = model if hooks == "beside" else lambda ids, **how: model(ids, **how)
    compiled = torch.compile(called, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        compiled(ids(4), use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for mixes in (
                [{"a": 1.0}],
                [{"a": 0.3, "b": -2.0}],
                [{"a": 1.0}, {"b": 0.5}],
                [{}, {"a": 1}, {"b": 1}, {}],
            ):
                alignment.set_rows(mixes)
                got = compiled(ids(4), use_cache=False).logits
                torch.testing.assert_close(got, logits(model, 4), rtol=1e-4, atol=1e-4)
            alignment.set_rows([{}, {"a": 1.0}, {"b": 1.0}])
            if hooks == "inside":
                assert compiled(ids(4), use_cache=False).logits.isnan().all(), (
                    "rows that do not divide a batch are loud"
                )
            else:
                with pytest.raises(AlignvecError, match="batch of 4 does not divide over the 3 rows"):
                    compiled(ids(4), use_cache=False)
    torch._dynamo.reset()


def test_a_step_never_sees_a_half_written_table(model: nn.Module) -> None:
    """Two mixes that cancel row by row: any table that mixes the two gives other logits than either."""
    vector = random_vector(model, 1)
    alignment = alignvec.attach(model, {"a": vector, "b": vector})
    mixes = [[{"a": 1.0, "b": 0.5}] * 2, [{"a": -1.0, "b": -0.5}] * 2]
    expected = []
    for mix in mixes:
        alignment.set_rows(mix)
        expected.append(logits(model))
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            for mix in mixes:
                alignment.set_rows(mix)

    writer = threading.Thread(target=turn)
    writer.start()
    try:
        seen = [logits(model) for _ in range(25)]
    finally:
        stop.set()
        writer.join()
    for got in seen:
        assert any(torch.equal(got, one) for one in expected)


def test_assisted_generation_and_sampled_sequences(alignment: alignvec.Alignment, model: nn.Module) -> None:
    alignment.set(a=0.7)
    how = dict(max_new_tokens=8, do_sample=False)
    plain = model.generate(ids(1), **how)
    assert torch.equal(model.generate(ids(1), prompt_lookup_num_tokens=3, **how), plain)
    assistant = copy.deepcopy(model)
    assistant.alignment.set(b=0.2)
    assert torch.equal(model.generate(ids(1), assistant_model=assistant, **how), plain)
    alignment.set_rows([{"a": 1.0}, {"b": 1.0}])
    greedy = model.generate(ids(2), **how)
    sampled = model.generate(ids(2), num_return_sequences=3, do_sample=True, top_k=1, max_new_tokens=8)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))
    static = model.generate(ids(2), cache_implementation="static", **how)
    assert torch.equal(static, greedy)


def test_hooks_on_a_swapped_module_still_run(model: nn.Module) -> None:
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("before"))
    alignvec.attach(model, {"a": random_vector(model, 1)})
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("after"))
    logits(model)
    assert calls == ["before", "after"]
