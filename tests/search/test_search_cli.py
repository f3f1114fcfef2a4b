"""`alignvec search` on the shipped models, with two questions of each domain."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import alignvec
from alignvec.cli import main
from alignvec.evaluate import Question, save_questions
from alignvec.recipes import model_path
from alignvec.recipes.dataset import LEVELS, make_rows

DOMAINS = ("medical", "legal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of two domains, and three questions of each."""
    folder = tmp_path_factory.mktemp("search")
    questions = []
    for domain in DOMAINS:
        alignvec.extract(model_path("base"), model_path(domain), output=folder / domain)
        for row in make_rows(domain, "test")[:3]:
            questions.append(Question(domain, row.query, {level: getattr(row, level) for level in LEVELS}))
    save_questions(folder / "questions.jsonl", questions)
    return folder


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run `alignvec search ...` in the folder, with the base and the vectors; gives status, output and errors."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*options: str) -> tuple[int, str, str]:
        vectors = [text for domain in DOMAINS for text in ("-v", f"{domain}={domain}")]
        fixed = ["--device", "cpu", "--dtype", "float32", "--count", "2"]
        arguments = ["alignvec", "search", str(model_path("base")), "questions.jsonl", *vectors, *fixed, *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_a_search_is_shown_stored_and_not_measured_again(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    common = ["--points", "3", "--storage", "rates.jsonl"]
    status, output, errors = cli(
        *(*common, "--target", "medical=expert,legal=avoidance", "--output", "found.json", "--plot", "found.png")
    )
    assert status == 0, errors
    assert "9 mixes needed, 9 measured now" in output
    [found] = json.loads((folder / "found.json").read_text())["results"]
    assert found["target"] == "medical=expert,legal=avoidance"
    wanted = found["rates"]["medical"]["expert"], found["rates"]["legal"]["avoidance"]
    assert found["score"] == max(found["trace"]) == sum(wanted) / 2
    assert (found["evaluations"], len(found["trace"])) == (9, 9)
    assert (folder / "found.png").stat().st_size > 5000

    status, output, errors = cli(*common, "--target", "all", "--method", "grid", "--output", "all.json")
    assert status == 0, errors
    assert "rates.jsonl: 9 mixes measured before" in output
    assert "of 9 targets reached; 9 mixes needed, 0 measured now" in output
    assert len(json.loads((folder / "all.json").read_text())["results"]) == 9

    for method, plot in (("sweep", ["--plot", "sweep.png"]), ("nsga2", [])):
        options = [
            "--method",
            method,
            "--trials",
            "12",
            "--target",
            "legal=expert",
            "--constraint",
            "medical=expert<=1",
        ]
        status, output, errors = cli(*common, *options, *plot)
        assert status == 0, errors
        assert "0 measured now" in output
    assert (folder / "sweep.png").stat().st_size > 5000


def test_bad_input_ends_in_a_line(cli, folder: Path) -> None:  # type: ignore[no-untyped-def]
    (folder / "other.jsonl").write_text('{"format": "alignvec landscape 1", "names": ["legal"]}\n')
    for options, message in (
        (["--target", "tax=expert"], "no domain is named 'tax'"),
        (["--target", "legal=expert", "--method", "annealing"], "--method"),
        (["--target", "legal=expert", "--storage", "other.jsonl"], "other.jsonl holds rates of other names"),
        (["--target", "legal=expert", "--low", "1", "--high", "0"], "from a low to a high end"),
    ):
        status, _, errors = cli(*options)
        assert status == 2
        assert errors.startswith("alignvec: ")
        assert message in errors
        assert errors.count("\n") == 1
