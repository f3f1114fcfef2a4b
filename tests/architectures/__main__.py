"""Writes the table of architectures: `python -m tests.architectures [--only NAME ...] [--jobs 2] [--output FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import torch
import transformers

from tests.architectures.configurations import architectures
from tests.architectures.report import table
from tests.architectures.sweep import Record, sweep


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="model types or class names; the others' results stay"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the JSON file beside the table has already"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    _warm_up()
    data = options.output.with_suffix(".json")
    known: dict[str, Record] = {}
    if data.exists() and (options.only or options.resume):
        known = {f"{r['section']} {r['name']}": r for r in json.loads(data.read_text())["architectures"]}
    chosen = [
        a
        for a in architectures()
        if (not options.only or {a.model_type, a.class_name} & set(options.only))
        and not (options.resume and f"{a.section} {a.name}" in known)
    ]
    for number, record in enumerate(sweep(chosen, options.jobs), 1):
        known[f"{record['section']} {record['name']}"] = record
        ordered = [known[key] for a in architectures() if (key := f"{a.section} {a.name}") in known]
        _write(data, json.dumps({"architectures": ordered}, indent=1) + "\n")
        print(f"{number}/{len(chosen)} {line(record)}", flush=True)

    _write(options.output, table(ordered))


def line(record: Record) -> str:
    """One architecture in one line of the console."""
    if "checks" not in record:
        return f"{record['name']}: not built: {record['reason']}"
    parts = []
    for name, check in record["checks"].items():
        error = f" {check['error']:.0e}" if check["error"] is not None else ""
        detail = "" if check["status"] == "right" else f" [{check['detail'][:160]}]"
        parts.append(f"{name} {check['status']}{error}{detail}")
    return f"{record['name']} ({record['seconds']} s): " + "; ".join(parts)


def _warm_up() -> None:
    """Import what all models need once, before processes are forked. No operator runs here: threads do not fork."""
    torch.set_num_threads(1)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


if __name__ == "__main__":
    main()
