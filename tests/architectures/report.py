"""The table of architectures as a page: one section for each group, counts, and the sentences of the refusals."""

from __future__ import annotations

import datetime
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import transformers

import alignvec
from tests.architectures.cases import CHECKS
from tests.architectures.outcomes import TOLERANCE

_HEAD = f"""# Architectures

Every causal language model class of transformers that can be built tiny, run with a vector on every parameter. Made by
`python -m tests.architectures`, which builds each in float32 on the CPU and holds it to the tuned model itself
(coefficient 1), the base (0) and a float64 merge (0.5):

- **uniform**: logits under `set`, at 1, 0.5 and 0; and of one parameter of each kind alone.
- **rows**: two and four sequences under two rows of coefficients.
- **decode**, **decode rows**: tokens and logits of `generate` with its cache, under one mix and under two.
- **decoder**: tokens of `alignment.decoder(...)`, under one mix and under two.
- **materialise**: logits and tokens of a materialised mix; `restore` and `detach` give every bit back.
- **embedding**, **submodules**: the embedding, the head, the backbone and the encoder called by themselves after `set`.
- **gradient**: the gradient of every parameter at coefficient 1.

*right*: a relative error below {TOLERANCE:g}; the largest is given. *refused*: an `AlignvecError`, its sentence below.
*n/a*: the plain model cannot do it. **wrong** is a silent error, **crashed** an exception that is not the library's.
"""

Record = dict[str, Any]


def table(records: Sequence[Record]) -> str:
    """The whole page."""
    built = [record for record in records if "checks" in record]
    parts = [_HEAD, _versions(), _counts(built)]
    refusals: dict[str, list[str]] = defaultdict(list)
    problems: list[str] = []
    for section in dict.fromkeys(record["section"] for record in records):
        inside = [record for record in records if record["section"] == section]
        parts.append(_section(section, inside, refusals, problems))
    if problems:
        parts.append("## Wrong or crashed\n\n" + "\n".join(problems) + "\n")
    if refusals:
        listed = (f"- {said} ({', '.join(dict.fromkeys(names))})" for said, names in sorted(refusals.items()))
        parts.append("## Refusals\n\n" + "\n".join(listed) + "\n")
    return "\n".join(parts)


def _versions() -> str:
    today = datetime.date.today().isoformat()
    versions = {library.__name__: library.__version__ for library in (alignvec, torch, transformers)}
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + f", {today}.\n"


def _counts(records: Sequence[Record]) -> str:
    states = ("right", "refused", "wrong", "crashed", "n/a")
    lines = [f"| {len(records)} architectures | " + " | ".join(states) + " |", "|---" * (len(states) + 1) + "|"]
    for check in CHECKS:
        counts = Counter(record["checks"][check]["status"] for record in records if check in record["checks"])
        lines.append(f"| {check} | " + " | ".join(str(counts[state]) for state in states) + " |")
    return "\n".join(lines) + "\n"


def _section(title: str, records: Sequence[Record], refusals: dict[str, list[str]], problems: list[str]) -> str:
    columns = ["architecture", "parameters read past forward", *CHECKS]
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    absent = []
    for record in records:
        name = record["name"]
        if "checks" not in record:
            absent.append(f"- {name}: {_escaped(record['reason'])}")
            continue
        reads = "; ".join(f"{read}" for read in record["read_past_forward"] or [])
        lines.append(
            f"| {name} | {reads} | " + " | ".join(_cell(record["checks"].get(check)) for check in CHECKS) + " |"
        )
        for check, found in record["checks"].items():
            if found["status"] == "refused":
                refusals[general(found["detail"], record)].append(record["model_type"])
            elif found["status"] in ("wrong", "crashed"):
                problems.append(
                    f"- {name}, {check}: {found['status']}, {_number(found['error'])} {_escaped(found['detail'])}"
                )
    if absent:
        lines += ["", "Not built:", "", *absent]
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["status"] == "right":
        return f"right {_number(found['error'])}"
    return f"**{found['status']}**" if found["status"] in ("wrong", "crashed") else found["status"]


def _number(error: float | None) -> str:
    return "" if error is None else "exact" if error == 0 else f"{error:.0e}"


def general(sentence: str, record: Record) -> str:
    """A refusal without the names and numbers of its model, so that refusals of one kind are told together."""
    sentence = sentence.replace(record["class_name"], "MODEL")
    sentence = re.sub(r"^\w+ uses its own [\w, ]+ around", "MODULE uses its own PARAMETERS around", sentence)
    return _escaped(re.sub(r"\b\d+\b", "N", sentence))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
