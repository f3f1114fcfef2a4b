"""Threads that end, are interrupted, or close what another one opened: nothing stays held, and no base is lost."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import alignvec
from alignvec import AlignvecError
from alignvec.coefficients import Coefficients
from alignvec.materialised import Materialised
from alignvec.standing import Standing
from tests.models import merged, random_vector, tiny

IDS = torch.tensor([list(range(3, 15))])


@pytest.fixture
def made() -> tuple[alignvec.Alignment, dict[float, torch.Tensor]]:
    """Attached, and the logits by the coefficient."""
    model = tiny(num_hidden_layers=1)
    vectors = {"v": random_vector(model, 1, 0.3)}
    with torch.no_grad():
        true = {mix: merged(model, vectors, {"v": mix})(IDS).logits for mix in (0.0, 1.0, -1.0)}
    return alignvec.attach(model, vectors), true


@torch.no_grad()
def require(alignment: alignvec.Alignment, true: torch.Tensor) -> None:
    got = alignment.model(IDS).logits
    assert float((got.double() - true).norm() / true.norm()) < 1e-5


@torch.no_grad()
def test_a_step_in_a_step_is_a_part_of_it(made: tuple[alignvec.Alignment, dict[float, torch.Tensor]]) -> None:
    alignment, true = made
    head = alignment.model.lm_head
    alignment.set(v=1.0)
    with alignment.step():
        first = head.weight.clone()
        alignment.set(v=-1.0)
        with alignment.step():
            assert torch.equal(head.weight, first)
        assert torch.equal(head.weight, first)
        require(alignment, true[1.0])
    require(alignment, true[-1.0])
    alignment.set_rows([{"v": 1.0}, {}])
    with alignment.step(2):
        with alignment.step(2), alignment.step():
            pass
        with pytest.raises(AlignvecError, match=r"step\(batch=4\) is inside of a step of 2 sequences"):
            alignment.step(4).__enter__()


def test_a_step_that_another_thread_closes(made: tuple[alignvec.Alignment, dict[float, torch.Tensor]]) -> None:
    """As that of a generator, which frameworks run in whichever thread is free."""
    alignment, true = made

    def answers() -> Iterator[int]:
        with alignment.step():
            yield 1

    generator: Any = answers()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    alignment.set(v=-1.0)
    require(alignment, true[-1.0])
    alignment.materialise(v=1.0)
    require(alignment, true[1.0])


@pytest.mark.parametrize("where", [(Coefficients, "end"), (Standing, "release")], ids=lambda where: where[1])
def test_an_interrupt_as_a_step_ends(
    made: tuple[alignvec.Alignment, dict[float, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]
) -> None:
    alignment, true = made

    def interrupt(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupt)
    try:
        with alignment.step():
            pass
    except KeyboardInterrupt:
        pass
    gc.collect()
    alignment.set(v=-1.0)
    require(alignment, true[-1.0])
    alignment.materialise(v=1.0)
    require(alignment, true[1.0])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_while_it_is_waited_for(
    made: tuple[alignvec.Alignment, dict[float, torch.Tensor]],
) -> None:
    alignment, true = made
    entered, leave = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        entered.set()
        leave.wait()
        raise SystemExit  # which passes by forward hooks

    handle = alignment.model.model.layers[0].register_forward_hook(stop)
    inside = threading.Thread(target=lambda: alignment.model(IDS))
    inside.start()
    entered.wait()
    moves = threading.Thread(target=lambda: alignment.materialise(v=1.0))
    moves.start()
    handle.remove()
    leave.set()
    inside.join()
    moves.join(30)
    assert not moves.is_alive()
    require(alignment, true[1.0])


@pytest.mark.parametrize("restored", [0, 3])
def test_the_base_outlives_a_restore_that_was_interrupted(
    made: tuple[alignvec.Alignment, dict[float, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, restored: int
) -> None:
    alignment, true = made
    base = {name: value.clone() for name, value in alignment.model.state_dict().items()}
    alignment.materialise(v=1.0)

    def undo(self: Materialised) -> None:
        for parameter, (values, _) in list(self.bases.items())[:restored]:
            parameter.data = values
        raise KeyboardInterrupt

    monkeypatch.setattr(Materialised, "undo", undo)
    with pytest.raises(KeyboardInterrupt):
        alignment.restore()
    monkeypatch.undo()
    alignment.materialise(v=-1.0)
    require(alignment, true[-1.0])
    alignment.restore()
    assert all(torch.equal(value, base[name]) for name, value in alignment.model.state_dict().items())


def test_what_is_being_materialised_can_be_asked_for(
    made: tuple[alignvec.Alignment, dict[float, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alignment, _ = made
    seen: list[Any] = []
    write = Materialised.write

    def during(self: Materialised, *args: Any) -> list[float]:
        seen.extend([alignment.coefficients, alignment.weights, repr(alignment)])
        return write(self, *args)

    monkeypatch.setattr(Materialised, "write", during)
    alignment.materialise(v=1.0)
    assert seen[:2] == [{"v": 1.0}, (1.0,)]


@pytest.mark.parametrize("what", ["materialise", "another", "restore"])
def test_gradients_are_never_of_weights_that_moved(
    made: tuple[alignvec.Alignment, dict[float, torch.Tensor]], what: str
) -> None:
    alignment, _ = made
    model = alignment.model
    if what != "materialise":
        alignment.materialise(v=1.0)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=embedded).logits.sum()
    if what == "restore":
        alignment.restore()
    else:
        alignment.materialise(v=-1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
