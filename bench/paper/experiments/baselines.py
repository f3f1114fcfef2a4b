"""Other dials at inference time: mixed logits (DeRa, MOD) and activation steering, on one lattice with the vectors."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch

from alignvec.search import all_targets
from bench.paper.baselines import mixing, steering
from bench.paper.experiment import Claim, panels, percent, save, table
from bench.paper.setting import Setting

TITLE = "Other dials at inference time"
QUESTIONS, LEARNT = 16, 40
AT = (-1.0, -0.5, 0.0, 0.5, 1.0)
STRENGTH = 4.0  # of 1: steering's unit is the mean difference of expert and avoidance, which moves little here


def needs(setting: Setting) -> str:
    return "" if setting.train else "it has no training questions to steer by"


def run(setting: Setting) -> dict[str, Any]:
    """Rates [settings, domains, levels] of each method on the lattice of -1 to 1 in steps of a half."""
    questions = setting.few(QUESTIONS)
    mixes = [dict(zip(setting.domains, c, strict=True)) for c in itertools.product(AT, repeat=len(setting.domains))]
    data: dict[str, Any] = {
        "domains": setting.domains,
        "levels": setting.levels,
        "questions": len(questions),
        "mixes": mixes,
        "methods": {},
    }
    alignment = setting.attach()
    count = len(setting.domains)
    begin = time.perf_counter()
    turned = setting.score(alignment, questions, mixes, "vectors").rates()
    data["methods"]["alignment vectors"] = _entry(turned.tolist(), begin, 1, 1)
    begin = time.perf_counter()
    mixed = mixing.rates(alignment, setting.tokenizer, questions, mixes)
    data["methods"]["mixed logits (DeRa, MOD)"] = _entry(
        mixed["rates"], begin, mixed["forwards_per_setting"], mixed["forwards_per_token"]
    )
    alignment.detach()
    model = setting.model()
    learnt = setting.few(LEARNT, train=True)
    most, least = setting.levels[-1], setting.levels[0]
    directions = steering.directions(model, setting.tokenizer, learnt[::2], towards=most, away=least)
    layer = steering.choose_layer(
        model, setting.tokenizer, learnt[1::2], directions, strength=STRENGTH / 2, towards=most, away=least
    )
    stronger = [{domain: STRENGTH * value for domain, value in mix.items()} for mix in mixes]
    begin = time.perf_counter()
    steered = steering.rates(model, setting.tokenizer, questions, directions, layer, stronger)
    data["methods"]["activation steering"] = _entry(steered["rates"], begin, 1, 1)
    data["layer"], data["parameters"], data["vectors"] = layer, model.num_parameters(), count
    return data


def _entry(rates: Any, begin: float, forwards: float, forwards_per_token: float) -> dict[str, Any]:
    seconds = time.perf_counter() - begin
    return {"rates": rates, "seconds": seconds, "forwards": forwards, "forwards_per_token": forwards_per_token}


def section(data: dict[str, Any], picture: Path) -> str:
    domains, levels = list(data["domains"]), list(data["levels"])
    targets = all_targets(domains, levels)
    figure, axes = panels(len(domains))
    rows = []
    for (label, found), style in zip(data["methods"].items(), (".-", "x--", "+:"), strict=True):
        rates = torch.tensor(found["rates"], dtype=torch.float64)
        for panel, name in zip(axes, domains, strict=True):
            alone = [i for i, mix in enumerate(data["mixes"]) if not any(mix[d] for d in domains if d != name)]
            at = [data["mixes"][i][name] for i in alone]
            for level, colour in ((-1, "tab:blue"), (0, "tab:red")):
                panel.plot(
                    at, rates[alone, domains.index(name), level], style, color=colour, label=f"{levels[level]}, {label}"
                )
            panel.set(title=name, xlabel="coefficient", ylim=(-0.02, 1.02))
        best = [target.score(rates).max().item() for target in targets]
        reached = [bool(target.reached(rates).any()) for target in targets]
        corners = [set(mix.values()) for mix in data["mixes"]]
        full, empty = rates[corners.index({1.0}), :, -1].mean(), rates[corners.index({-1.0}), :, 0].mean()
        rows.append(
            [
                label,
                percent(full.item()),
                percent(empty.item()),
                sum(reached),
                percent(sum(best) / len(best)),
                f"{found['forwards']:.2g}",
                f"{found['forwards_per_token']:.2g}",
                f"{found['seconds']:.0f}",
            ]
        )
    axes[0].legend(frameon=False, fontsize=6)
    head = [
        *("method", f"{levels[-1]}, all at 1", f"{levels[0]}, all at -1", "targets reached", "mean best score"),
        *("forwards a setting", "forwards a token", "seconds"),
    ]
    return (
        f"{len(data['mixes'])} settings, every combination of -1 to 1 in steps of a half, scored on "
        f"{data['questions'] // len(domains)} questions a domain. *Mixed logits*: base and aligned models answer side "
        "by side and their log-probabilities are mixed (DeRa, arXiv 2402.02992; MOD, 2406.18853): settings share the "
        "forwards when stored responses are scored, but each answered token takes one a model. *Steering*: the mean "
        f"difference of {levels[-1]} and {levels[0]} activations of training questions added at layer {data['layer']} "
        f"(CAA, 2312.06681), with strengths up to {STRENGTH:g} times that difference.\n\n"
        + table(head, rows)
        + "\n"
        + save(figure, picture)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    targets = all_targets(list(data["domains"]), list(data["levels"]))
    score = {}
    for label, found in data["methods"].items():
        rates = torch.tensor(found["rates"], dtype=torch.float64)
        score[label] = sum(target.score(rates).max().item() for target in targets) / len(targets)
    vectors = score.pop("alignment vectors")
    text = ", ".join(f"{label} {percent(value)}" for label, value in score.items())
    return [
        Claim(
            "vectors reach targets better than other dials at inference time",
            "only prompting compared",
            f"mean best score {percent(vectors)}; {text}",
            "yes"
            if vectors > max(score.values()) + 0.02
            else "no"
            if vectors < max(score.values()) - 0.02
            else "partly: a tie",
        )
    ]
