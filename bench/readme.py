"""Fills README.md and docs/benchmarks.md between `<!-- bench:suite -->` marks from bench/results/suite-*.json.

`python -m bench.readme` writes them, `--check` fails where one is out of date. What is shown is what was stored,
whatever it says: in the README a step of each way to decode, and every target that was missed; on the other page every
row that has a target with its verdict, and a table a section.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alignvec.errors import AlignvecError
from bench import record
from bench.record import Row
from bench.suite import blend, breakeven, decode, prompting, switching
from bench.suite.case import median_of
from bench.suite.report import shown, verdict

BEGIN, END = "<!-- bench:suite -->", "<!-- /bench:suite -->"
README = record.RESULTS.parents[1] / "README.md"
PAGE = record.RESULTS.parents[1] / "docs" / "benchmarks.md"
NOTHING = "No results of the suite are stored yet; `make bench` measures this machine."


@dataclass(frozen=True)
class Table:
    """Rows of a section as a table: the values of one parameter are its columns, `label` names its lines.

    reasons: cells without a value say why; else a line below does, for all of them.
    """

    section: str
    title: str
    column: str
    chosen: Callable[[Row], bool]
    label: Callable[[Row], str]
    reasons: bool = False


def _decode_line(row: Row) -> str:
    said = row["parameters"]
    loop = "" if said["loop"] == decode.DECODER else f", {said['loop']}"
    vectors = f", k = {said['k']}" if said["k"] else ""
    return f"{row['name']}{vectors}{loop}"


def _own_mixes(row: Row) -> bool:
    """One mix for each sequence, or what has one mix for all by its nature."""
    said = row["parameters"]
    if "loop" not in said:
        return False
    shared = row["name"] in (decode.MERGED, decode.CONCATENATED) or (row["name"] == decode.PEFT and said["k"] > 1)
    return bool(said["batch"] == 1 or shared or said["mixes"] == "distinct")


def _request_line(row: Row) -> str:
    said = row["parameters"]
    turns, kept = (
        f"{said['turns']} turn{'s' * (said['turns'] > 1)}",
        "prefix kept" if said["cached"] else "nothing kept",
    )
    answer = f", answers of {said['answer']}" if "answer" in said else ""
    return f"{said['way']}, {turns}{answer}, {kept}"


def _of_interest(row: Row) -> bool:
    """What one would do otherwise, and alignvec's decoder; no ablations."""
    if not _own_mixes(row) or row["unit"] != "s" or row["median"] is None:
        return False
    loop = row["parameters"]["loop"]
    return loop == decode.DECODER or (loop in (decode.EAGER, decode.COMPILED) and row["name"] != decode.CONCATENATED)


FRONT = Table(
    "decode",
    "A step of a batch, each sequence with its own mix (merged weights: one for all)",
    "batch",
    _of_interest,
    _decode_line,
)
TABLES = (
    Table("switching", "Another mix", "clock", lambda row: not row["parameters"].get("graph"), lambda row: row["name"]),
    Table(
        "decode",
        "Decode: a step of a batch, each sequence with its own mix (merged weights: one for all)",
        "batch",
        lambda row: _own_mixes(row) and row["unit"] == "s",
        _decode_line,
    ),
    Table(
        "decode",
        "Decode: times the step of merged weights in the same loop",
        "batch",
        lambda row: _own_mixes(row) and row["unit"] == "x",
        _decode_line,
    ),
    Table(
        "decode",
        "Where they meet: tokens that one mix has to serve until a re-merge pays, and mixes of a batch from which "
        "on-the-fly is faster than merged copies",
        "by",
        lambda row: row["name"].startswith("break-even"),
        lambda row: f"{row['name']}, {row['parameters']['format']}",
        reasons=True,
    ),
    Table(
        "prompting",
        "Prompting: time of a request, times that of an instruction of so many tokens for one preference",
        "instruction",
        lambda row: row["name"] == prompting.RATIO and row["parameters"]["preferences"] == 1,
        _request_line,
    ),
    Table(
        "prompting",
        "The longest answer at half the cost of prompting or less (0: none), by the tokens of the instruction",
        "instruction",
        lambda row: row["name"] == prompting.HALF and row["parameters"]["preferences"] == 1,
        _request_line,
    ),
    Table("memory", "Memory of so many mixes", "mixes", lambda row: True, lambda row: row["name"]),
    Table(
        "blend",
        "Blend: a step by the summed logits of several policies",
        "policies",
        lambda row: row["unit"] == "x" and row["parameters"]["prompts"] == 1,
        lambda row: f"{row['name']}, {row['parameters']['format']}",
    ),
    Table("merge", "Extraction and merge on disk", "figure", lambda row: True, lambda row: row["name"]),
)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a page is out of date.")] = False,
    readme: Annotated[Path, typer.Option(help="The README.")] = README,
    page: Annotated[Path, typer.Option(help="The page with every table.")] = PAGE,
    results: Annotated[Path, typer.Option(help="Where the suite's data are.")] = record.RESULTS,
) -> None:
    """Show the suite's results in the README and on the page of benchmarks."""
    stored = sorted(results.glob("suite-*.json"))
    for path, made in ((readme, front), (page, block)):
        before = path.read_text()
        after = filled(before, "\n\n".join(map(made, stored)) or NOTHING, path)
        if check and after != before:
            raise AlignvecError(f"{path} does not show what is stored in {results}; run python -m bench.readme")
        if after != before:
            path.write_text(after)


def filled(text: str, own: str, path: Path = README) -> str:
    """The text with the block between its marks. Raises AlignvecError where they are not there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise AlignvecError(f"{path} needs the marks {BEGIN} and {END}, once each and in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{own}\n{text[text.index(END) :]}"


def front(path: Path) -> str:
    """What the README says of a device."""
    kept = _read(path)
    missed = [row for row in _judged(kept["rows"]) if verdict(row)[1] != "met"]
    parts = [_heading(kept, path.name, "bench/results"), _table(FRONT, kept["rows"])]
    return "\n\n".join(part for part in (*parts, _told(kept["rows"]), _targets(missed, kept["rows"])) if part)


def block(path: Path) -> str:
    """All tables of a device."""
    kept = _read(path)
    made = [_targets(_judged(kept["rows"]), kept["rows"]), *(_table(table, kept["rows"]) for table in TABLES)]
    pictures = [
        f"![{name}](../bench/results/{path.stem}-{name}.png)"
        for name in dict.fromkeys(row["section"] for row in kept["rows"])
        if path.with_name(f"{path.stem}-{name}.png").exists()
    ]
    return "\n\n".join(part for part in (_heading(kept, path.name, "../bench/results"), *made, *pictures) if part)


def _read(path: Path) -> dict[str, Any]:
    kept = record.read(path)
    if kept.get("bench") != "suite":
        raise AlignvecError(f"{path} is not of the suite but of {kept.get('bench')!r}; rename it")
    return kept


def _heading(kept: dict[str, Any], name: str, folder: str) -> str:
    versions = kept["versions"]
    said = [kept["model"], *([f"driver {kept['driver']}"] if kept["driver"] else []), f"{kept['threads']} threads"]
    said += [f"{package} {versions[package]}" for package in ("torch", "triton", "transformers") if versions[package]]
    dates = sorted({row["date"][:10] for row in kept["rows"]})
    return (
        f"**{kept['device']}** ({', '.join(said)}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; medians of one "
        f"run a section, `python -m bench.run`, [data]({folder}/{name})):"
    )


def _told(rows: Sequence[Row]) -> str:
    """Switching, blending and prompting in a sentence each, where they were measured."""
    said = []
    written = median_of(rows, switching.SWITCH, k=3)
    merged = median_of(rows, f"{breakeven.ONE_PASS}, dense", clock="device", graph=False)
    if written is not None and merged is not None:
        said.append(f"Another mix takes {shown(written, 's')} to write and {shown(merged, 's')} to merge, in one pass.")
    for text in ("int4", "sign"):
        ratio = median_of(rows, blend.OVER_ONE, format=text, policies=4)
        apart = median_of(rows, blend.OVER_SEPARATE, format=text, policies=4)
        if ratio is not None and apart is not None:
            said.append(
                f"Blending 4 policies ({text}) takes {shown(ratio, 'x')} the step of one, {shown(apart, 'x')} that of "
                "4 passes."
            )
    halves = [row for row in rows if row["name"] == prompting.HALF and row["median"] is not None]
    if halves:
        ways = dict.fromkeys(row["parameters"]["way"] for row in halves)
        counts = [[row["median"] >= 1 for row in halves if row["parameters"]["way"] == way] for way in ways]
        reached = ", ".join(f"{sum(own)} of {len(own)} ({way})" for way, own in zip(ways, counts, strict=True))
        said.append(f"The paper's half cost of prompting holds for answers of some length in {reached} cases.")
    return " ".join(said)


def _judged(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["target"] is not None and row["median"] is not None]


def _targets(shown_rows: Sequence[Row], rows: Sequence[Row]) -> str:
    """How many targets are met, and some of them with their verdicts."""
    judged = _judged(rows)
    if not judged:
        return ""
    met = sum(verdict(row)[1] == "met" for row in judged)
    lines = ["", "| | measured | target | |", "| --- | ---: | ---: | --- |"] if shown_rows else []
    for row in shown_rows:
        said = ", ".join(f"{key} {value}" for key, value in row["parameters"].items())
        lines.append(_line([f"{row['name']} ({said})", shown(row["median"], row["unit"]), *verdict(row)]))
    return "\n".join([f"{met} of {len(judged)} targets are met.", *lines])


def _table(table: Table, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["section"] == table.section and table.column in row["parameters"]]
    own = [row for row in own if table.chosen(row)]
    if all(row["median"] is None for row in own):
        return ""
    columns = list(dict.fromkeys(row["parameters"][table.column] for row in own))
    cells: dict[str, dict[Any, str]] = {}
    for row in own:
        none = row["missing"] if table.reasons else "-"
        cell = none if row["median"] is None else shown(row["median"], row["unit"])
        cells.setdefault(table.label(row), {}).setdefault(row["parameters"][table.column], cell)
    lines = [_line([table.column, *map(str, columns)]), _line(["---", *["---:"] * len(columns)])]
    lines += [_line([name, *(of.get(column, "") for column in columns)]) for name, of in cells.items()]
    if not table.reasons and (missing := dict.fromkeys(row["missing"] for row in own if row["missing"])):
        lines += ["", f"Not measured (-): {'; '.join(missing)}."]
    return "\n".join([f"{table.title}:", "", *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    record.command(main)
