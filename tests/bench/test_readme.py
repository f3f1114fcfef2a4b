"""The README shows what the benchmark suite stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignvec.errors import AlignvecError
from bench import readme, record
from bench.record import Row
from bench.suite import breakeven, decode, prompting
from bench.suite.case import Case

MARKS = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"


def _step(name: str, batch: int, seconds: float, unit: str = "s", target: float | None = None) -> Row:
    mixes = "uniform" if batch == 1 or name == decode.MERGED else "distinct"
    k = 0 if name == decode.MERGED else 3
    said = {"k": k, "batch": batch, "mixes": mixes, "loop": decode.DECODER, "context": 8}
    return Case("decode", name, said, unit, target=target).row([seconds])


def _stored(folder: Path, rows: list[Row], **changed: Any) -> Path:
    kept = {"bench": "suite", **record.environment("cpu"), "model": "tiny", "device": "Machine", **changed}
    path = folder / "suite-machine.json"
    record.write(path, kept | {"rows": [row | {"commit": "abc", "date": "2026-01-02T03:04:05"} for row in rows]})
    return path


ROWS = [
    _step(decode.MERGED, 1, 1e-3),
    _step(decode.MERGED, 4, 2e-3),
    _step("int4", 1, 2e-3, target=3e-3),
    _step("int4", 4, 3e-3),
    _step("int4, over merged", 1, 2.0, "x", target=1.7),
    Case("decode", "int4", {"k": 3, "batch": 4, "mixes": "zipf", "loop": decode.DECODER, "context": 8}).row([9.0]),
    Case("decode", decode.COPIES, _step("", 4, 1.0)["parameters"] | {"k": 0}).skipped("too large"),
    Case("decode", breakeven.TOKENS, {"format": "int4", "k": 3, "by": "measured"}, "tokens").row([4.0]),
    Case("decode", breakeven.TOKENS, {"format": "int4", "k": 3, "by": "cost model"}, "tokens").skipped("no pass"),
    Case(
        "prompting",
        prompting.HALF,
        {"way": "int4", "instruction": 64, "preferences": 1, "turns": 1, "cached": True},
        "tokens",
    ).row([0]),
]  # fmt: skip


def test_the_block_shows_wins_and_losses(tmp_path: Path) -> None:
    text = readme.block(_stored(tmp_path, ROWS))
    assert text.startswith("**Machine** (tiny, ")
    assert "; 2026-01-02; " in text
    assert "[data](../bench/results/suite-machine.json)" in text
    assert "1 of 2 targets are met." in text
    lines = text.splitlines()
    assert "| merged | 1 ms | 2 ms |" in lines
    assert "| int4, k = 3 | 2 ms | 3 ms |" in lines, "zipf mixes are another row"
    assert "| merged copies |  | - |" in lines
    assert "Not measured (-): too large." in lines
    assert "| break-even, tokens a switch, int4 | 4 tokens | no pass |" in lines
    assert "| int4, 1 turn, prefix kept | 0 tokens |" in lines
    verdicts = [line.split(" | ")[-3:] for line in lines if line.endswith(("| met |", "| missed |"))]
    assert verdicts == [["2 ms", "<= 3 ms", "met |"], ["2 x", "<= 1.7 x", "missed |"]]


def test_the_readme_has_what_matters_and_every_loss(tmp_path: Path) -> None:
    text = readme.front(_stored(tmp_path, ROWS))
    assert "[data](bench/results/suite-machine.json)" in text
    assert "| int4, k = 3 | 2 ms | 3 ms |" in text
    assert "1 of 2 targets are met." in text
    assert [line.split(" | ")[-3:] for line in text.splitlines() if line.endswith("| missed |")] == [
        ["2 x", "<= 1.7 x", "missed |"]
    ]
    assert "The paper's half cost of prompting holds for answers of some length in 0 of 1 (int4) cases." in text
    assert "break-even" not in text


def test_only_the_blocks_are_written_and_checked(tmp_path: Path) -> None:
    first, second = tmp_path / "README.md", tmp_path / "benchmarks.md"
    first.write_text(MARKS)
    second.write_text(MARKS)
    options: dict[str, Any] = {"readme": first, "page": second, "results": tmp_path}
    path = _stored(tmp_path, ROWS)
    with pytest.raises(AlignvecError, match=r"README.md does not show what is stored .* run python -m bench.readme"):
        readme.main(check=True, **options)
    assert first.read_text() == second.read_text() == MARKS
    readme.main(check=False, **options)
    for page in (first, second):
        text = page.read_text()
        assert text.startswith(f"before\n{readme.BEGIN}\n**Machine**")
        assert text.endswith(f"\n{readme.END}\nafter\n")
    assert first.read_text() != second.read_text()
    readme.main(check=True, **options)
    second.write_text(MARKS)
    with pytest.raises(AlignvecError, match=r"benchmarks.md does not show"):
        readme.main(check=True, **options)
    _stored(tmp_path, [*ROWS[:1], _step(decode.MERGED, 4, 2.5e-3)])
    with pytest.raises(AlignvecError, match=r"README.md does not show"):
        readme.main(check=True, **options)
    path.unlink()
    readme.main(check=False, **options)
    assert readme.NOTHING in first.read_text()


@pytest.mark.parametrize("text", ["none", readme.BEGIN, f"{readme.END}{readme.BEGIN}", MARKS * 2])
def test_a_page_without_the_marks_is_refused(text: str) -> None:
    with pytest.raises(AlignvecError, match="needs the marks"):
        readme.filled(text, "new")


def test_results_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match="is not of the suite but of 'kernels'"):
        readme.block(_stored(tmp_path, ROWS, bench="kernels"))


def test_the_readme_is_up_to_date() -> None:
    readme.main(check=True, readme=readme.README, page=readme.PAGE, results=record.RESULTS)
