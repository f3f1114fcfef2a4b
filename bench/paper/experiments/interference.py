"""Over-generalisation: what each vector does to the other domains, and what surgery on the vectors changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alignvec import AlignmentVector, surgery
from alignvec.evaluate.sensitivity import sensitivity
from alignvec.search import all_targets
from alignvec.search.landscape import Landscape
from alignvec.search.lattice import grid
from alignvec.search.surrogate import surrogate
from bench.paper.experiment import Claim, panels, save, table
from bench.paper.setting import Setting

TITLE = "Over-generalisation and surgery"
QUESTIONS, SEARCHED, NODES = 40, 16, 4
COEFFICIENT = 0.5


def needs(setting: Setting) -> str:
    return "" if len(setting.domains) > 1 else "it has a single vector"


def operated(vectors: Mapping[str, AlignmentVector]) -> dict[str, dict[str, AlignmentVector]]:
    """The vectors as they are, and after each operation that leaves one a domain."""
    apart = surgery.remove_shared_mean(vectors)
    return {
        "as trained": dict(vectors),
        "less the shared mean": {name: apart[name] for name in vectors},
        "task singular vectors": surgery.tsv(vectors),
        "TIES, half kept": surgery.ties_parts(vectors, 0.5),
        "DARE, half dropped": {name: surgery.dare(vector, 0.5, seed=0) for name, vector in vectors.items()},
        "rank 32": {name: surgery.truncate(vector, 32) for name, vector in vectors.items()},
    }


def run(setting: Setting) -> dict[str, Any]:
    questions, fewer = setting.few(QUESTIONS), setting.few(SEARCHED)
    targets = all_targets(setting.domains, setting.levels)
    data: dict[str, Any] = {
        "domains": setting.domains,
        "levels": setting.levels,
        "questions": len(questions),
        "searched": len(fewer),
        "coefficient": COEFFICIENT,
        "operations": {},
    }
    for label, vectors in operated(setting.vectors).items():
        alignment = setting.attach(vectors)
        moved = sensitivity(
            lambda mixes, alignment=alignment, label=label: setting.score(alignment, questions, mixes, label).rates(),
            setting.domains,
            coefficient=COEFFICIENT,
        )
        found = {
            "sensitivity": moved.tolist(),
            "cosines": surgery.cosines(vectors).overall.tolist(),
            "norms": [vector.norm() for vector in vectors.values()],
        }
        if label in ("as trained", "less the shared mean", "task singular vectors"):
            predicted = surrogate(
                lambda mixes, alignment=alignment, label=label: setting.score(
                    alignment, fewer, mixes, f"{label}, targets"
                ),
                *(setting.domains, NODES),
            )
            landscape = Landscape(setting.domains, setting.domains, setting.levels, predicted.rates, batch=512)
            best = grid(landscape, targets)
            found["reached"] = sum(result.reached for result in best)
            found["score"] = sum(result.score for result in best) / len(best)
        data["operations"][label] = found
    return data


def section(data: dict[str, Any], picture: Path) -> str:
    domains, most = list(data["domains"]), data["levels"][-1]
    rows = []
    for label, found in data["operations"].items():
        own, others = _split(found)
        cosines = torch.tensor(found["cosines"])
        off = ~torch.eye(len(domains), dtype=torch.bool)
        rows.append(
            [
                label,
                f"{sum(found['norms']) / len(domains):.2f}",
                f"{cosines[off].min():+.2f} to {cosines[off].max():+.2f}",
                f"{100 * own:+.0f}",
                f"{100 * others:+.0f}",
                f"{others / own:.2f}" if own > 0 else "",
                found.get("reached", ""),
                f"{100 * found['score']:.0f} %" if "score" in found else "",
            ]
        )
    plain = torch.tensor(data["operations"]["as trained"]["sensitivity"])[:, :, -1]
    shown = [
        label
        for label in ("as trained", "less the shared mean", "task singular vectors")
        if label in data["operations"]
    ]
    figure, axes = panels(len(shown))
    for panel, label in zip(axes, shown, strict=True):
        matrix = torch.tensor(data["operations"][label]["sensitivity"])[:, :, -1]
        panel.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
        for i in range(len(domains)):
            for j in range(len(domains)):
                panel.text(j, i, f"{100 * matrix[i, j]:+.0f}", ha="center", va="center")
        panel.set(title=label, xticks=range(len(domains)), yticks=range(len(domains)))
        panel.set_xticklabels(domains)
        panel.set_yticklabels(domains if panel is axes[0] else [""] * len(domains))
        panel.set_xlabel("domain measured")
    axes[0].set_ylabel("vector turned")
    matrix = table(
        ["vector turned", *(f"{domain}, {most}" for domain in domains)],
        [[name, *(f"{100 * value:+.0f}" for value in row)] for name, row in zip(domains, plain.tolist(), strict=True)],
    )
    return (
        f"Points that the {most} rate gains per unit of coefficient, by central differences at ±{data['coefficient']} "
        f"on {data['questions'] // len(domains)} questions a domain. Off the diagonal is over-generalisation.\n\n"
        + matrix
        + "\nOperations on the vectors: mean gain in the own domain and in the others, their ratio (0: none, "
        f"1: a level without a domain), and, on {data['searched'] // len(domains)} questions a domain, how many of the "
        f"{len(data['levels']) ** len(domains)} targets the grid reaches and the mean of their best scores.\n\n"
        + table(["vectors", "norm", "cosines", "own", "others", "ratio", "reached", "mean score"], rows)
        + "\n"
        + save(figure, picture)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    split = {label: _split(found) for label, found in data["operations"].items()}
    ratios = {label: others / own for label, (own, others) in split.items() if own > 0}
    trained = ratios.get("as trained")
    if trained is None:
        ours, held = "vectors gain nothing in their own domains", "not tested"
    else:
        least = min(ratios, key=lambda label: abs(ratios[label]))
        ours = f"other domains move {trained:.0%} as much as the own one; least, {least}: {ratios[least]:.0%}"
        held = "yes" if trained < 0.2 else "no"
    return [Claim("a vector acts on its own domain only", "over-generalisation noted, not measured", ours, held)]


def _split(found: dict[str, Any]) -> tuple[float, float]:
    """Mean gain of the highest level's rate per unit, in the own domains and in the others."""
    matrix = torch.tensor(found["sensitivity"])[:, :, -1]
    off = ~torch.eye(len(matrix), dtype=torch.bool)
    return matrix.diagonal().mean().item(), matrix[off].mean().item()
