"""The suite's frame, and its sections from end to end on the tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignvec.errors import AlignvecError
from bench import record, run
from bench.record import Row
from bench.suite import registry
from bench.suite.case import Case, Setting, median_of
from bench.suite.report import shown, verdict

CASES = (
    Case("memory", "one", {"k": 1}, target=2.0),
    Case("memory", "one", {"k": 2}, "x", "higher"),
    Case("memory", "none", missing="it is not there"),
)


def _section(cases: Sequence[Case] = CASES, give: Any = None) -> SimpleNamespace:
    def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        yield from (case.row([3.0, 1.0, 2.0]) for case in reversed(cases))

    return SimpleNamespace(cases=lambda setting: list(cases), measure=give or measure)


def test_rows_come_in_the_order_of_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "section", lambda name: _section())
    path = tmp_path / "suite.json"
    run.main(["memory"], device="cpu", output=path, quick=True)
    kept = record.read(path)
    assert (kept["bench"], kept["model"]) == ("suite", "tiny")
    first, second, third = kept["rows"]
    assert (first["parameters"], second["parameters"]) == ({"k": 1}, {"k": 2})
    assert [first[key] for key in ("median", "p20", "p80", "samples", "target", "missing")] == [
        2.0, pytest.approx(1.4), pytest.approx(2.6), 3, 2.0, None,
    ]  # fmt: skip
    assert (third["missing"], third["median"], third["samples"]) == ("it is not there", None, 0)
    assert {row["commit"] for row in kept["rows"]} == {kept["commit"]}
    assert median_of(kept["rows"], "one", k=2) == 2.0
    assert median_of(kept["rows"], "none") is None


def test_a_section_that_leaves_a_case_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        yield cases[0].row([1.0])

    def twice(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        yield from (cases[0].row([1.0]) for _ in range(2))

    for give, said in ((short, "no row for one {'k': 2}"), (twice, "two rows for one {'k': 1}")):
        monkeypatch.setattr(registry, "section", lambda name, give=give: _section(give=give))
        with pytest.raises(AlignvecError, match=said):
            run.main(["memory"], device="cpu", quick=True)


def test_only_the_sections_that_run_lose_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "SECTIONS", ("memory", "merge"))
    monkeypatch.setattr(registry, "section", lambda name: _section([Case(name, "one")]))
    path = tmp_path / "suite.json"
    run.main(["merge"], device="cpu", output=path, quick=True)
    run.main(["memory"], device="cpu", output=path, quick=True)
    assert [row["section"] for row in record.read(path)["rows"]] == ["memory", "merge"]
    kept = record.read(path)
    kept["versions"]["torch"] = "0.1"
    record.write(path, kept)
    run.main(["memory"], device="cpu", output=path, quick=True)
    assert [row["section"] for row in record.read(path)["rows"]] == ["memory"]
    assert "versions changed: the rows of merge" in " ".join(capsys.readouterr().out.split())


def test_another_device_s_results_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "section", lambda name: _section())
    path = tmp_path / "suite.json"
    run.main(["memory"], device="cpu", output=path, quick=True)
    kept = record.read(path) | {"device": "another"}
    path.write_text(record.json.dumps(kept))
    with pytest.raises(AlignvecError, match="holds results of 'another'"):
        run.main(["memory"], device="cpu", output=path, quick=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sections": ["speed"]}, "there is no section 'speed'; choose among"),
        ({"model": "huge"}, "--model 'huge' is not one of mistral-7b, small, tiny"),
        ({"device": "cuda"}, "there is no GPU"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(AlignvecError, match=said):
        run.main(**{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"target": None, "better": "lower", "unit": "s", "median": 1.0}, ("", "")),
        ({"target": 2.0, "better": "lower", "unit": "s", "median": 2.0}, ("<= 2 s", "met")),
        ({"target": 2e-3, "better": "lower", "unit": "s", "median": 3e-3}, ("<= 2 ms", "missed")),
        ({"target": 1000.0, "better": "higher", "unit": "x", "median": 1001.0}, (">= 1,000 x", "met")),
        ({"target": 1000.0, "better": "higher", "unit": "x", "median": 999.0}, (">= 1,000 x", "missed")),
    ],
)
def test_verdicts_of_rows(row: Row, said: tuple[str, str]) -> None:
    assert verdict(row) == said


def test_values_have_prefixes() -> None:
    assert shown(1.5e10, "B") == "15 GB"
    assert shown(4.2e-6, "s") == "4.2 us"
    assert shown(0.0, "s") == "0 s"
    assert shown(1.25, "x") == "1.25 x"


def test_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run.main(["memory"], device="cpu", quick=True, output=tmp_path / "suite.json")
    rows = record.read(tmp_path / "suite.json")["rows"]
    one = median_of(rows, "merged copies", mixes=1)
    assert one is not None
    assert median_of(rows, "merged copies", mixes=30) == 30 * one
    dense = median_of(rows, "dense", mixes=1)
    assert 4 * one < dense < 4.1 * one  # type: ignore[operator]
    assert one < median_of(rows, "sign", mixes=30) < 1.25 * one  # type: ignore[operator]
