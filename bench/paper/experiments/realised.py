"""Requested against realised coefficients: what a merge stored in bfloat16 makes of a sweep.

The same curves three ways: exact (float32 weights), merged into bfloat16 weights, and turned on the fly over bfloat16
weights. What the merge does to rates is its difference from the other two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import alignvec
from bench.paper.experiment import Claim, panels, save, table
from bench.paper.setting import COEFFICIENTS, Setting

TITLE = "Requested and realised coefficients in bfloat16"
QUESTIONS = 40
SMALL = 0.01  # of a vector: an edit that 16 bits can hardly hold


def run(setting: Setting) -> dict[str, Any]:
    data: dict[str, Any] = {"coefficients": COEFFICIENTS, "levels": setting.levels, "vectors": {}}
    for name, vector in setting.vectors.items():
        questions = setting.few(QUESTIONS, [name])
        mixes = [{name: c} for c in COEFFICIENTS]
        rates = {}
        for label, dtype, form in (
            ("exact", "float32", "merged"),
            ("merged in bfloat16", "bfloat16", "merged"),
            ("on the fly in bfloat16", "bfloat16", "rows"),
        ):
            alignment = setting.attach({name: vector}, dtype)
            scores = setting.score(alignment, questions, mixes, f"{name}, {label}", form=form)
            rates[label] = {"rates": scores.rates()[:, 0].tolist(), "mean": scores.mean.tolist()}
        realised = {}
        for label, source in (("whole", vector), ("a hundredth", vector * SMALL)):
            rows = alignvec.check(setting.base, {name: source})
            realised[label] = [[row.requested, row.naive, row.alignvec] for row in rows]
        exact = torch.tensor(rates["exact"].pop("mean"))
        for label in rates:
            if label != "exact":
                theirs = torch.tensor(rates[label].pop("mean"))
                rates[label]["nats"] = (theirs - exact).abs().mean().item()
                rates[label]["choices"] = (theirs.argmax(-1) != exact.argmax(-1)).double().mean().item()
        data["vectors"][name] = {"questions": len(questions), "rates": rates, "realised": realised}
    return data


def section(data: dict[str, Any], picture: Path) -> str:
    at = list(data["coefficients"])
    figure, axes = panels(len(data["vectors"]) + 1)
    rows, errors = [], []
    for panel, (name, found) in zip(axes, data["vectors"].items(), strict=False):
        for (label, entry), style in zip(found["rates"].items(), ("-", "--", ":"), strict=True):
            panel.plot(at, torch.tensor(entry["rates"])[:, -1], style, label=label)
        panel.set(title=name, xlabel="requested coefficient", ylim=(-0.02, 1.02))
        exact = torch.tensor(found["rates"]["exact"]["rates"])
        for label, entry in found["rates"].items():
            if label != "exact":
                difference = 100 * (torch.tensor(entry["rates"]) - exact).abs()
                rows.append(
                    [
                        name,
                        label,
                        f"{difference.mean():.2f}",
                        f"{difference.max():.1f}",
                        f"{100 * entry['choices']:.2f} %",
                        f"{entry['nats']:.4f}",
                    ]
                )
        for label, points in found["realised"].items():
            table_ = torch.tensor(points)
            wrong = (table_[:, 1:] - table_[:, :1]).abs().amax(0)
            errors.append([name, label, f"{wrong[0]:.3f}", f"{wrong[1]:.0e}"])
            if name == next(iter(data["vectors"])):
                axes[-1].plot(table_[:, 0], table_[:, 1], ".-", label=f"merged, {label} {name} vector")
    axes[0].set_ylabel(f"share of {data['levels'][-1]}")
    axes[0].legend(frameon=False)
    axes[-1].plot(at, at, color="0.8", zorder=0)
    axes[-1].set(xlabel="requested coefficient", ylabel="realised coefficient")
    axes[-1].legend(frameon=False)
    return (
        "Rates of a sweep in bfloat16 against float32's, in points: on average, at most, questions whose likeliest "
        "level is another, and nats a token.\n\n"
        + table(["vector", "form", "mean", "largest", "other choice", "nats"], rows, 2)
        + "\nLargest error of the realised coefficient over the sweep, for the vector and for a hundredth of it, "
        "whose edits are mostly smaller than a step of bfloat16.\n\n"
        + table(["vector", "size", "merged", "alignvec"], errors, 2)
        + "\n"
        + save(figure, picture)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    worst = {"whole": [0.0, 0.0], "a hundredth": [0.0, 0.0]}
    moved = 0.0
    for found in data["vectors"].values():
        exact = torch.tensor(found["rates"]["exact"]["rates"])
        merged = torch.tensor(found["rates"]["merged in bfloat16"]["rates"])
        moved = max(moved, (merged - exact).abs().max().item())
        for label, points in found["realised"].items():
            rows = torch.tensor(points)
            errors = (rows[:, 1:] - rows[:, :1]).abs().amax(0).tolist()
            worst[label] = [max(pair) for pair in zip(worst[label], errors, strict=True)]
    held = "yes" if worst["whole"][0] < 0.05 and moved < 0.1 else "no"
    if held == "yes" and worst["a hundredth"][0] > 0.1:
        held = "partly: not for small edits"
    return [
        Claim(
            "a merge realises the coefficient asked for",
            "taken for granted",
            f"error up to {worst['whole'][0]:.3f}, of a vector a hundredth as long {worst['a hundredth'][0]:.2f}; "
            f"rates move by up to {100 * moved:.0f} points",
            held,
        )
    ]
