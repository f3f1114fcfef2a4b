"""The memory of mixes: nothing is measured twice, and files survive a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.search import Landscape, grid, landscape_key, load_grid, save_grid
from tests.search.landscapes import LEVELS, NAMES, QUESTIONS, Simulated

MIXES = [{"medical": i / 10, "legal": -0.5} for i in range(-3, 4)]


def made(measure: Simulated | None, storage: Path | None = None, key: str = "k", **options: int) -> Landscape:
    return Landscape(NAMES, NAMES, LEVELS, measure, storage, key, **options)


def test_measures_each_mix_once_in_batches_and_keeps_the_order() -> None:
    evaluator, truth = Simulated(), Simulated()
    landscape = made(evaluator, batch=3)
    asked = [MIXES[4], *MIXES, MIXES[4], {"legal": -0.5, "financial": 0.0, "medical": 0.1 + 1e-8}]
    rates = landscape.rates(asked)
    assert torch.equal(rates, truth([{**dict.fromkeys(NAMES, 0.0), **mix} for mix in asked]))
    assert (evaluator.mixes, evaluator.calls, len(landscape)) == (7, 3, 7)
    assert landscape.rates(MIXES[:1]).dtype == torch.float64
    assert evaluator.mixes == 7


def test_a_view_counts_what_its_search_would_have_needed() -> None:
    evaluator = Simulated()
    landscape = made(evaluator)
    landscape.rates(MIXES)
    together = landscape.view()
    one, two = together.view(), together.view()
    one.rates(MIXES[:3])
    one.rates(MIXES[1:4])
    two.rates(MIXES[2:6])
    assert (one.evaluations, two.evaluations, together.evaluations) == (4, 4, 6)
    assert one.seconds == pytest.approx(landscape.seconds * 4 / 7)
    coefficients, rates = one.known()
    assert coefficients[:, 0].tolist() == [-0.3, -0.2, -0.1, 0.0]
    assert torch.equal(rates, landscape.rates(MIXES[:4]))
    assert evaluator.mixes == 7


def test_a_storage_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rates.jsonl"

    class Stopped(Simulated):
        def __call__(self, mixes: Sequence[dict[str, float]]) -> Tensor:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(mixes)

    with pytest.raises(KeyboardInterrupt):
        made(Stopped(), file, batch=2).rates(MIXES)
    whole = file.read_bytes()
    for torn in (b"", whole.splitlines(keepends=True)[-1][:25], b'{"m'):
        file.write_bytes(whole + torn)
        evaluator = Simulated()
        landscape = made(evaluator, file)
        assert len(landscape) == 4
        assert torch.equal(landscape.rates(MIXES), made(Simulated()).rates(MIXES))
        assert evaluator.mixes == 3
        again = made(None, file)
        assert torch.equal(again.rates(MIXES), landscape.rates(MIXES))
        assert again.seconds == pytest.approx(landscape.seconds, rel=1e-4)


def test_a_file_killed_within_its_header_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "rates.jsonl"
    file.write_bytes(b'{"format": "alignvec lands')
    made(Simulated(), file).rates(MIXES)
    assert len(made(None, file)) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:2], lines[2][:30], *lines[3:]], "line 3: damaged"),
        (lambda lines: [*lines[:2], "", *lines[2:]], "line 3: damaged"),
        (lambda lines: [*lines[:2], lines[2].replace("[[", "[[7.0, ", 1), *lines[3:]], "line 3: damaged"),
        (lambda lines: [*lines[:2], '{"mix": [0, 0], "rates": [], "seconds": 1}', *lines[3:]], "line 3: damaged"),
        (lambda lines: [*lines[:2], "7", *lines[3:]], "line 3: damaged"),
        (lambda lines: [*lines[:-1], "some notes of mine"], "line 9: no measured mix"),
        (lambda lines: ["{}", *lines[1:]], "no file of measured mixes"),
        (lambda lines: ["some notes of mine"], "no file of measured mixes"),
    ],
)
def test_a_damaged_storage_is_refused_and_left_alone(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "rates.jsonl"
    made(Simulated(), file).rates(MIXES)
    file.write_text("\n".join(change(file.read_text().split("\n"))))
    before = file.read_bytes()
    with pytest.raises(AlignvecError, match=message):
        made(Simulated(), file)
    assert file.read_bytes() == before


def test_a_storage_of_another_landscape_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rates.jsonl"
    made(Simulated(), file).rates(MIXES)
    with pytest.raises(AlignvecError, match="another model, other vectors or questions"):
        made(Simulated(), file, key="other")
    with pytest.raises(AlignvecError, match="other levels"):
        Landscape(NAMES, NAMES, LEVELS[::-1], Simulated(), file, "k")
    with pytest.raises(AlignvecError, match="other names"):
        Landscape(NAMES[::-1], NAMES, LEVELS, Simulated(), file, "k")
    with pytest.raises(AlignvecError, match="cannot be read"):
        made(Simulated(), tmp_path)


def test_bad_mixes_and_rates_are_refused() -> None:
    landscape = made(Simulated())
    for mixes, message in (
        ([], "no mixes"),
        ([{"tax": 1.0}], "no vector is named 'tax'"),
        ([{"legal": float("nan")}], "must be finite"),
    ):
        with pytest.raises(AlignvecError, match=message):
            landscape.rates(mixes)
    with pytest.raises(AlignvecError, match=r"recorded landscape has no rates of medical=0.5"):
        made(None).rates([{"medical": 0.5}])
    with pytest.raises(AlignvecError, match=r"\[1, 3, 3\], not \[1, 3\]"):
        Landscape(NAMES, NAMES, LEVELS, lambda mixes: torch.zeros(len(mixes), 3)).rates([{}])
    for value in (1.5, float("nan")):
        with pytest.raises(AlignvecError, match="between 0 and 1"):
            Landscape(NAMES, NAMES, LEVELS, lambda m, value=value: torch.full((len(m), 3, 3), value)).rates([{}])
    with pytest.raises(AlignvecError, match="must be different"):
        Landscape(("a", "a"), NAMES, LEVELS)


@pytest.mark.parametrize("questions", [QUESTIONS, 300])
def test_a_grid_is_saved_as_counts(tmp_path: Path, questions: int) -> None:
    file = tmp_path / "landscape.safetensors"
    landscape = made(Simulated(questions=questions))
    [best] = grid(landscape, "medical=expert", points=5)
    save_grid(landscape, file, dict.fromkeys(NAMES, questions))
    loaded = load_grid(file)
    assert (loaded.names, loaded.domains, loaded.levels, loaded.key) == (NAMES, NAMES, LEVELS, "k")
    counts = (landscape.rates(landscape.mixes) * questions).round()
    assert torch.equal(loaded.rates(landscape.mixes), counts / questions)
    assert loaded.seconds == pytest.approx(landscape.seconds)
    assert file.stat().st_size < 125 * 9 * (1 if questions < 256 else 2) + 1000
    [again] = grid(loaded, "medical=expert", points=5)
    assert (again.mix, again.evaluations) == (best.mix, 125)
    assert again.score == pytest.approx(best.score, abs=1e-12)


def test_what_is_no_grid_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "landscape.safetensors"
    landscape = made(Simulated())
    grid(landscape, "medical=expert", points=3)
    with pytest.raises(AlignvecError, match="no whole numbers"):
        save_grid(landscape, file, dict.fromkeys(NAMES, 37))
    with pytest.raises(AlignvecError, match="a count for each of medical"):
        save_grid(landscape, file, {"medical": QUESTIONS})
    save_grid(landscape, file, dict.fromkeys(NAMES, QUESTIONS))
    whole = file.read_bytes()
    landscape.rates([{"legal": 0.3}])
    with pytest.raises(AlignvecError, match="knows 28 mixes of the 36"):
        save_grid(landscape, file, dict.fromkeys(NAMES, QUESTIONS))
    assert file.read_bytes() == whole
    for damage in (
        whole[:-1],
        b"",
        whole.replace(b'\\"legal\\": 40', b'\\"legal\\":  0'),
        whole.replace(b"[[-1.0, ", b"[["),
    ):
        file.write_bytes(damage)
        with pytest.raises(AlignvecError, match=r"landscape.safetensors"):
            load_grid(file)
    with pytest.raises(AlignvecError, match="cannot be read"):
        load_grid(tmp_path / "missing")


def test_the_key_tells_bases_vectors_and_questions_apart(tmp_path: Path) -> None:
    from alignvec.evaluate import Question

    asked = [Question("medical", "What?", {"generic": "It.", "expert": "That."})]
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_bytes(bytes(4 << 20))
    base, one, two = (tmp_path / name for name in ("base", "one", "two"))
    keys = {
        landscape_key(base, {"a": one}, asked),
        landscape_key(two, {"a": one}, asked),
        landscape_key(base, {"b": one}, asked),
        landscape_key(base, {"a": two}, asked),
        landscape_key(base, {"a": one}, asked * 2),
        landscape_key(base, {"a": one}, asked, dtype="float32"),
    }
    with (one / "model.safetensors").open("r+b") as file:
        file.seek((2 << 20) + 5)
        file.write(b"\1")
    keys.add(landscape_key(base, {"a": one}, asked))
    assert len(keys) == 7
    with pytest.raises(AlignvecError, match="no folder with a model"):
        landscape_key(tmp_path / "missing", {"a": one}, asked)
