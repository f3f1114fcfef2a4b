"""Single-domain sweeps: one vector turned from -1 to 1, level rates in every domain.

Own-domain curves are the paper's first experiment; the same forwards give what the vector does elsewhere
(over-generalisation), and how far the two directions differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.paper.experiment import COLOURS, Claim, panels, percent, save, table
from bench.paper.setting import COEFFICIENTS, Setting

TITLE = "Single-domain sweeps"
QUESTIONS = 100
# Expert rates that the paper reports, at its best coefficient.
PAPER = {"medical": (0.95, 0.5), "financial": (0.85, 0.3), "legal": (1.0, 0.3)}


def run(setting: Setting) -> dict[str, Any]:
    """Rates [coefficients, domains, levels] of every vector, by mean and by sum, with intervals of the mean's."""
    questions = setting.few(QUESTIONS)
    data: dict[str, Any] = {
        "coefficients": COEFFICIENTS,
        "domains": setting.domains,
        "levels": setting.levels,
        "questions": len(questions),
        "vectors": {},
    }
    for name, vector in setting.vectors.items():
        alignment = setting.attach({name: vector})
        mixes = [{name: c} for c in COEFFICIENTS]
        scores = setting.score(alignment, questions, mixes, f"sweeping {name}")
        data["vectors"][name] = {
            "mean": scores.rates().tolist(),
            "sum": scores.rates("sum").tolist(),
            "intervals": scores.intervals().tolist(),
        }
    return data


def section(data: dict[str, Any], picture: Path) -> str:
    """Curves of the own domain, where expert peaks, and how the negative side differs from the positive one."""
    domains, levels, at = list(data["domains"]), list(data["levels"]), list(data["coefficients"])
    figure, axes = panels(len(domains))
    rows = []
    for panel, name in zip(axes, domains, strict=True):
        found = data["vectors"][name]
        own = domains.index(name)
        rates = torch.tensor(found["mean"])[:, own]
        interval = torch.tensor(found["intervals"])[:, own]
        for level, colour in zip(range(len(levels)), COLOURS, strict=False):
            panel.fill_between(at, interval[:, level, 0], interval[:, level, 1], color=colour, alpha=0.15, linewidth=0)
            panel.plot(at, rates[:, level], color=colour, label=levels[level])
            panel.plot(at, torch.tensor(found["sum"])[:, own, level], ":", color=colour)
        panel.set(title=name, xlabel="coefficient", ylim=(-0.02, 1.02))
        best = int(rates[:, -1].argmax())
        zero = at.index(0.0)
        rows.append(
            [
                name,
                percent(rates[zero, -1].item(), *interval[zero, -1].tolist()),
                percent(rates[best, -1].item(), *interval[best, -1].tolist()) + f" at {at[best]:g}",
                percent(torch.tensor(found["sum"])[best, own, -1].item()),
                percent(rates[0, 0].item(), *interval[0, 0].tolist()),
                percent(torch.tensor(found["sum"])[0, own, 0].item()),
            ]
        )
    axes[0].set_ylabel("share of questions")
    axes[0].legend(frameon=False)
    most, least = levels[-1], levels[0]
    head = ["vector", f"{most} at 0", f"most {most}", "by sum", f"{least} at -1", "by sum"]
    return (
        f"Level rates on {data['questions'] // len(domains)} held-out questions of the vector's own domain, by mean "
        "token log-probability (lines, with 95 % bootstrap intervals) and by sum (dotted).\n\n"
        + table(head, rows)
        + "\n"
        + save(figure, picture)
        + "\n"
        + _asymmetry(data)
    )


def _asymmetry(data: dict[str, Any]) -> str:
    levels, at, domains = list(data["levels"]), list(data["coefficients"]), list(data["domains"])
    zero = at.index(0.0)
    rows = []
    for name in domains:
        rates = torch.tensor(data["vectors"][name]["mean"])[:, domains.index(name)]
        rows.append(
            [
                name,
                f"{100 * (rates[-1, -1] - rates[zero, -1]):+.0f}",
                f"{100 * (rates[0, 0] - rates[zero, 0]):+.0f}",
                f"{100 * (rates[-1, 0] - rates[zero, 0]):+.0f}",
                f"{100 * (rates[0, -1] - rates[zero, -1]):+.0f}",
            ]
        )
    most, least = levels[-1], levels[0]
    return (
        f"**Negative coefficients.** Points that {most} and {least} gain from 0 to +1, the direction that a vector was "
        "trained in, and from 0 to -1, its reverse.\n\n"
        + table(["vector", f"{most}, 0 to 1", f"{least}, 0 to -1", f"{least}, 0 to 1", f"{most}, 0 to -1"], rows)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    domains, at = list(data["domains"]), list(data["coefficients"])
    made = []
    for name in domains:
        rates = torch.tensor(data["vectors"][name]["mean"])[:, domains.index(name), -1]
        best = int(rates.argmax())
        reached = PAPER.get(name)
        paper = f"{percent(reached[0])} at {reached[1]}" if reached else "not reported"
        held = "not tested" if reached is None else "yes" if rates[best] >= reached[0] - 0.02 else "no"
        if held == "yes" and reached is not None and at[best] > reached[1] + 0.1:
            held = "partly: a larger coefficient is needed"
        made.append(
            Claim(f"{name}: expert rate in its own domain", paper, f"{percent(rates[best])} at {at[best]:g}", held)
        )
    expert = torch.stack([torch.tensor(data["vectors"][n]["mean"])[:, domains.index(n), -1] for n in domains])
    least = torch.stack([torch.tensor(data["vectors"][n]["mean"])[:, domains.index(n), 0] for n in domains])
    drops = int((expert.diff(dim=1) < -0.02).sum() + (least.diff(dim=1) > 0.02).sum())
    steps = 2 * expert[:, 1:].numel()
    made.append(
        Claim(
            "the coefficient dials the level smoothly",
            "smooth, monotone curves",
            f"{steps - drops} of {steps} steps go the right way (2 points of slack)",
            "yes" if drops <= steps * 0.05 else "partly",
        )
    )
    return made
