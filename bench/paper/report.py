"""The report: docs/paper/README.md and its figures, made from the kept data alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignvec.errors import AlignvecError
from alignvec.folders import replaced
from bench.paper import experiments
from bench.paper.experiment import Claim, table

RESULTS = Path(__file__).parent / "results"
Entry = dict[str, Any]


def read(results: Path) -> dict[str, list[Entry]]:
    """The kept entries by experiment, in the report's order; shipped settings first."""
    found: dict[str, list[Entry]] = {}
    for name in experiments.NAMES:
        for file in sorted(results.glob(f"*/{name}.json")):
            try:
                entry = json.loads(file.read_text(encoding="utf-8"))
                found.setdefault(entry["experiment"], []).append(entry)
            except (ValueError, KeyError, TypeError):
                raise AlignvecError(f"{file} holds no data of an experiment; run it again") from None
    return found


def write_report(results: Path, folder: Path) -> None:
    """Write the report on everything that has data."""
    found = read(results)
    parts, claims = [], []
    for name, entries in found.items():
        module = experiments.module(name)
        parts.append(f"## {module.TITLE}\n")
        for entry in entries:
            if len(entries) > 1:
                parts.append(f"### {entry['setting']}\n")
            parts.append(module.section(entry["data"], folder / f"{name}-{entry['setting']}.png"))
            parts.append(_stamp(entry))
            claims += [(entry["setting"], claim) for claim in module.claims(entry["data"])]
    with replaced(folder / "README.md") as file:
        file.write_text("\n".join([_head(found), _honesty(claims), *parts]), encoding="utf-8")


def _head(found: dict[str, list[Entry]]) -> str:
    entries = [entry for each in found.values() for entry in each]
    minutes = sum(entry["seconds"] for entry in entries) / 60
    settings = ", ".join(dict.fromkeys(entry["setting"] for entry in entries))
    return (
        "# The paper's experiments, re-run\n\n"
        'arXiv 2410.19206 ("Alignment Vectors", MEAV) at the scale of the shipped models, and what its reviewers '
        "asked for. Made by `python -m bench.paper` (`make paper-small`) from the data in bench/paper/results.\n\n"
        f"Settings: {settings}. The runs' times, beside other work or not, add up to {minutes:.0f} minutes.\n\n"
        "The paper's models have 7 billion parameters, its questions come from people; ours have a few million, "
        "and questions made from tables (alignvec/recipes/models). What fails here may hold there, and the reverse.\n"
    )


def _honesty(claims: list[tuple[str, Claim]]) -> str:
    head = ["model", "claim", "paper", "ours", "held"]
    return "## Did the claims hold?\n\n" + table(head, [[name, *claim.row()] for name, claim in claims], len(head))


def _stamp(entry: Entry) -> str:
    versions = entry["versions"]
    return (
        f"*{entry['setting']} on {entry['device']}, {entry['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {entry['date'][:10]}, commit {entry['commit']}, "
        f"{entry['seconds']:.0f} s. Not measured on a GPU.*\n"
        if not entry["device"].startswith(("NVIDIA", "AMD Instinct"))
        else f"*{entry['setting']} on {entry['device']}, {entry['date'][:10]}, {entry['seconds']:.0f} s.*\n"
    )


if __name__ == "__main__":
    write_report(RESULTS, Path("docs/paper"))
