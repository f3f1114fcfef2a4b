"""Weights and modules do not move in a step: what moves them waits for steps, and steps wait for it."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import alignvec
from alignvec import AlignvecError, standing
from tests.models import merged, random_vector, tiny

IDS = torch.tensor([list(range(3, 15))])


@pytest.fixture
def made() -> tuple[alignvec.Alignment, list[torch.Tensor]]:
    """Attached, and the logits under coefficients 0 and 1."""
    model = tiny(num_hidden_layers=2)
    vectors = {"v": random_vector(model, 1, 0.3)}
    with torch.no_grad():
        true = [merged(model, vectors, {"v": mix})(IDS).logits for mix in (0.0, 1.0)]
    return alignvec.attach(model, vectors), true


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


MOVES: dict[str, Callable[[alignvec.Alignment], Any]] = {
    "materialise": lambda a: a.materialise(v=1.0),
    "restore": lambda a: a.restore(),
    "detach": lambda a: a.detach(),
}


@torch.no_grad()
@pytest.mark.parametrize("materialised", [False, True])
@pytest.mark.parametrize("what", MOVES)
def test_a_forward_pass_is_of_one_state(
    made: tuple[alignvec.Alignment, list[torch.Tensor]], what: str, materialised: bool
) -> None:
    """Moved from another thread between its layers; then from its own."""
    if what == "restore" and not materialised:
        pytest.skip("nothing to restore")
    alignment, true = made
    model = alignment.model
    if materialised:
        with alignment.using(v=1.0):
            alignment.materialise()
    threads: list[threading.Thread] = []
    refused: list[str] = []

    def between(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=MOVES[what], args=(alignment,)))
            threads[0].start()
            threads[0].join(0.2)
            assert threads[0].is_alive()
            with pytest.raises(AlignvecError) as refusal:
                MOVES[what](alignment)
            refused.append(str(refusal.value))

    handle = model.model.layers[0].register_forward_hook(between)
    got = model(IDS).logits
    handle.remove()
    threads[0].join()
    assert error(got, true[int(materialised)]) < 1e-5
    assert refused == [
        f"{what}() changes the model's weights or modules, and a forward pass or decode step of it is under way in "
        f"this thread; call {what}() after it"
    ]
    assert error(model(IDS).logits, true[int(what == "materialise")]) < 1e-5


@torch.no_grad()
def test_a_forward_pass_waits_for_what_moves(made: tuple[alignvec.Alignment, list[torch.Tensor]]) -> None:
    alignment, _ = made
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(alignment.model(IDS).logits)),
        threading.Thread(target=lambda: results.append(alignment.model.get_input_embeddings()(IDS))),
    ]
    with alignment._coefficients.moving("a test"):
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert not results
        alignment.set(v=1.0)  # which waits for nothing
    for thread in threads:
        thread.join()
    assert len(results) == 2


@torch.no_grad()
def test_who_does_not_let_go_is_waited_for_so_long(
    made: tuple[alignvec.Alignment, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment, true = made
    monkeypatch.setattr(standing, "PATIENCE", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with alignment.step():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait()
    for what in ("materialise", "detach"):
        with pytest.raises(AlignvecError, match=rf"another thread has been inside.*call {what}\(\) when"):
            MOVES[what](alignment)
    assert error(alignment.model(IDS).logits, true[0]) < 1e-5, "nothing was changed, and nobody waits"
    leave.set()
    thread.join()
    alignment.materialise(v=1.0)
    assert error(alignment.model(IDS).logits, true[1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("materialised", [False, True])
def test_a_thread_that_ends_in_the_middle_lets_go(
    made: tuple[alignvec.Alignment, list[torch.Tensor]], materialised: bool
) -> None:
    alignment, true = made
    if materialised:
        alignment.materialise(v=1.0)

    def stop(*_: Any) -> None:
        raise SystemExit  # which passes by forward hooks

    handle = alignment.model.model.layers[0].register_forward_hook(stop)
    thread = threading.Thread(target=lambda: alignment.model(IDS))
    thread.start()
    thread.join()
    with pytest.raises(SystemExit):
        alignment.model(IDS)
    handle.remove()
    gc.collect()
    alignment.materialise(v=1.0)
    assert error(alignment.model(IDS).logits, true[1]) < 1e-5
    alignment.restore()


@torch.no_grad()
def test_a_copy_stands_by_itself(made: tuple[alignvec.Alignment, list[torch.Tensor]]) -> None:
    alignment, true = made
    with alignment._coefficients.held():
        twin = copy.deepcopy(alignment.model)
        twin.alignment.materialise(v=1.0)
    assert error(twin(IDS).logits, true[1]) < 1e-5
    assert error(alignment.model(IDS).logits, true[0]) < 1e-5


@torch.no_grad()
def test_set_does_not_reach_what_is_materialised_meanwhile(
    made: tuple[alignvec.Alignment, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment, _ = made
    mix = alignment._coefficients.mix

    def during(values: Any) -> Any:
        monkeypatch.undo()
        thread = threading.Thread(target=MOVES["materialise"], args=(alignment,))
        thread.start()
        thread.join()
        return mix(values)

    monkeypatch.setattr(alignment._coefficients, "mix", during)
    with pytest.raises(AlignvecError, match="a mix is materialised in the weights"):
        alignment.set(v=0.5)
    assert alignment.weights == (1.0,)
    assert alignment.coefficients == {"v": 1.0}
    alignment.restore()
    assert alignment.coefficients == {"v": 1.0}


def test_gradients_of_a_materialised_model(made: tuple[alignvec.Alignment, list[torch.Tensor]]) -> None:
    """No mix of a table is in its forward passes, so nothing is to be found again in the backward pass."""
    alignment, _ = made
    model = alignment.model
    alignment.materialise(v=1.0)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    plain = embedded.grad.clone()
    embedded.grad = None
    model.gradient_checkpointing_enable()
    model.train()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert torch.allclose(embedded.grad, plain, atol=1e-5)
