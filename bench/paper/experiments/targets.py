"""Every combination of levels as a target: what the grid, cheaper searches and prompting reach.

The 9,261 points of the paper's grid come from 343 measured mixes (`alignvec.search.surrogate`); how near that is shows
in mixes drawn from the grid and in the best mix of every target, all of which are measured besides.
"""

from __future__ import annotations

import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignvec.evaluate import Question
from alignvec.search import (
    Landscape,
    Result,
    Target,
    all_targets,
    evaluations_to_reach,
    grid,
    hierarchical,
    optimise,
    save_grid,
    sweeps,
)
from alignvec.search.lattice import combinations
from alignvec.search.surrogate import surrogate
from bench.paper.baselines import prompting
from bench.paper.experiment import COLOURS, Claim, panels, percent, save, table
from bench.paper.setting import Setting

TITLE = "Several domains at once: the 27 targets"
QUESTIONS, DRAWN, PROMPTED, NODES = 24, 40, 12, 7
WIDE = (-2.0, -1.0, 0.0, 1.0, 2.0)  # beyond the paper's range: vectors that hold back at -1 may be turned further
# Trials of a study, and on every how-manieth target it is tried: a Gaussian process takes long to choose.
TRIALS = {"tpe": (100, 1), "nsga2": (200, 1), "gp": (30, 9)}
WITHIN = 0.02


def needs(setting: Setting) -> str:
    return "" if len(setting.domains) > 1 else "it has a single vector"


def run(setting: Setting) -> dict[str, Any]:
    questions = setting.few(QUESTIONS)
    alignment = setting.attach()
    begin = time.perf_counter()
    predicted = surrogate(
        lambda mixes: setting.score(alignment, questions, mixes, "measuring the nodes"), setting.domains, NODES
    )
    measured = len(predicted.measured.mean)
    per_evaluation = (time.perf_counter() - begin) / measured

    landscape = Landscape(setting.domains, setting.domains, setting.levels, predicted.rates, batch=512)
    targets = all_targets(setting.domains, setting.levels)
    best = grid(landscape, targets)
    save_grid(
        landscape,
        setting.results / "landscape.safetensors",
        {domain: sum(question.domain == domain for question in questions) for domain in setting.domains},
    )
    mixes = [dict(result.mix) for result in best]
    exact = setting.score(alignment, questions, mixes, "measuring the best mixes").rates()
    single = sweeps(landscape, targets)
    prompted = _prompting(setting, targets)
    return {
        "questions": len(questions),
        "domains": setting.domains,
        "levels": setting.levels,
        "measured": measured,
        "grid": len(landscape),
        "seconds_per_evaluation": per_evaluation,
        "check": _check(setting, alignment, questions, predicted, landscape),
        "base": _by_target(setting, questions, alignment, targets),
        "targets": [
            {
                "target": str(target),
                "mix": result.mix,
                "predicted": result.score,
                "exact": target.score(rates).item(),
                "rates": rates.tolist(),
                "reached": bool(target.reached(rates)),
                "single": alone.score,
            }
            for target, result, rates, alone in zip(targets, best, exact, single, strict=True)
        ],
        "wide": _wide(setting, alignment, questions, targets),
        "prompting": prompted,
        "searches": _searches(landscape, targets, best, setting),
    }


def _wide(setting: Setting, alignment: Any, questions: list[Question], targets: list[Target]) -> dict[str, Any]:
    """What the combinations of `WIDE` reach, all of them measured."""
    mixes = [dict(zip(setting.domains, values, strict=True)) for values in product(WIDE, repeat=len(setting.domains))]
    rates = setting.score(alignment, questions, mixes, "measuring a wider range").rates()
    best = [int(target.score(rates).argmax()) for target in targets]
    return {
        "range": max(WIDE),
        "mixes": [mixes[i] for i in best],
        "exact": [target.score(rates[i]).item() for target, i in zip(targets, best, strict=True)],
        "reached": [bool(target.reached(rates).any()) for target in targets],
    }


def _check(setting: Setting, alignment: Any, questions: list[Question], predicted: Any, landscape: Landscape) -> Any:
    """Predicted against measured, at mixes drawn from the grid."""
    drawn = random.Random(0).sample(combinations(landscape, 21, -1.0, 1.0), max(2, round(DRAWN * setting.scale)))
    found, guess = setting.score(alignment, questions, drawn, "checking the surrogate"), predicted.scores(drawn)
    difference = (found.rates() - guess.rates()).abs()
    return {
        "mixes": len(drawn),
        "mean": difference.mean().item(),
        "largest": difference.max().item(),
        "choices": (found.choices() != guess.choices()).double().mean().item(),
        "nats": (found.mean - guess.mean).abs().mean().item(),
    }


def _by_target(setting: Setting, questions: list[Question], alignment: Any, targets: list[Target]) -> list[float]:
    rates = setting.score(alignment, questions, [{}], "the base").rates()[0]
    return [target.score(rates).item() for target in targets]


def _prompting(setting: Setting, targets: list[Target]) -> dict[str, Any]:
    """Scores [targets] of instructions alone and of examples with them, and tokens they add."""
    questions = setting.few(PROMPTED)
    wanted = [dict(target.wanted) for target in targets]
    model = setting.model()
    found = {}
    for label, shots in (("instructions", 0), ("two examples", 2)):
        if shots and not setting.train:
            continue
        told = prompting.rates(
            *(model, setting.tokenizer, questions, wanted),
            examples=setting.train,
            shots=shots,
            instructions=None if shots else prompting.INSTRUCTIONS,
        )
        rates = torch.tensor(told["rates"])
        found[label] = {
            "scores": [target.score(each).item() for target, each in zip(targets, rates, strict=True)],
            "reached": sum(bool(target.reached(each)) for target, each in zip(targets, rates, strict=True)),
            "extra_tokens": torch.tensor(told["extra_tokens"]).mean().item(),
        }
    return found


def _searches(landscape: Landscape, targets: list[Target], best: list[Result], setting: Setting) -> dict[str, Any]:
    """What each search needs on the recorded landscape, target by target."""
    report = setting.track("searching")
    found: dict[str, Any] = {}
    together = hierarchical(landscape, targets)
    found["hierarchical, all 27 at once"] = _summary(together, best, len(targets))
    for label in ("hierarchical", *TRIALS):
        trials, every = TRIALS.get(label, (0, 1))
        chosen = targets[::every]
        own = []
        for i, target in enumerate(chosen):
            if label == "hierarchical":
                own += hierarchical(landscape, [target])
            else:
                own += optimise(landscape, [target], label, trials)
            report((i + 1) / len(chosen))
        found[label] = _summary(own, best[::every]) | {"overhead": sum(result.overhead for result in own) / len(own)}
    return found


def _summary(found: list[Result], best: list[Result], share: int = 1) -> dict[str, Any]:
    needed = [evaluations_to_reach(one, top.score, WITHIN) for one, top in zip(found, best, strict=True)]
    reached = sorted(count for count in needed if count is not None)
    return {
        "within": len(reached),
        "targets": len(found),
        "median": reached[len(reached) // 2] if reached else None,
        "most": reached[-1] if reached else None,
        "evaluations": sum(result.evaluations for result in found) / len(found) / share,
        "traces": [result.trace for result in found[:1]] if share == 1 else [],
        "needed": needed,
    }


def section(data: dict[str, Any], picture: Path) -> str:
    domains, found = data["domains"], data["targets"]
    check, seconds = data["check"], data["seconds_per_evaluation"]
    wide = data["wide"]
    exact = torch.tensor([each["exact"] for each in found])
    reached = sum(each["reached"] for each in found)
    figure = _draw(data, exact)
    order = sorted(range(len(found)), key=lambda i: -found[i]["exact"])
    prompts = list(data["prompting"])
    head = ["target", *domains, "base", "one vector", "best mix", "reached", f"up to {wide['range']:g}", *prompts]
    rows = [
        [
            found[i]["target"].replace(",", ", "),
            *(f"{found[i]['mix'][domain]:+.1f}" for domain in domains),
            percent(data["base"][i]),
            percent(found[i]["single"]),
            percent(found[i]["exact"]),
            "yes" if found[i]["reached"] else "no",
            percent(wide["exact"][i]) + (", reached" if wide["reached"][i] else ""),
            *(percent(data["prompting"][label]["scores"][i]) for label in prompts),
        ]
        for i in order
    ]
    tokens = "; ".join(
        f"{label}: {data['prompting'][label]['reached']} of {len(found)} reached, "
        f"{data['prompting'][label]['extra_tokens']:.0f} tokens more a prompt"
        for label in prompts
    )
    return (
        "A target names a level for every domain; its score is the mean rate of the wanted levels on "
        f"{data['questions'] // len(domains)} held-out questions a domain, and it is *reached* where each wanted level "
        f"is its domain's most frequent one. {reached} of {len(found)} are, within the paper's -1 to 1; on a lattice "
        f"of -{wide['range']:g} to {wide['range']:g} in steps of 1 it is {sum(wide['reached'])}.\n\n"
        f"**The grid from {data['measured']} mixes.** Log-probabilities are smooth in the coefficients, so polynomials "
        f"through {data['measured']} measured mixes give all {data['grid']:,} points. Against {check['mixes']} mixes "
        f"drawn from the grid and measured: rates differ by {100 * check['mean']:.2f} points on average and "
        f"{100 * check['largest']:.1f} at most, {100 * check['choices']:.2f} % of choices, {check['nats']:.4f} nats a "
        f"token. One evaluation takes {seconds:.2f} s: {seconds * data['measured'] / 60:.1f} minutes instead of "
        f"{seconds * data['grid'] / 3600:.1f} hours. *Best mix* below was measured, not predicted.\n\n"
        + table(head, rows)
        + f"\nPrompting, on {PROMPTED} questions a domain: {tokens or 'not run'}.\n\n"
        + save(figure, picture)
        + "\n"
        + _search_table(data)
    )


def _search_table(data: dict[str, Any]) -> str:
    seconds = data["seconds_per_evaluation"]
    rows = [["grid", "all", "", "", f"{data['grid']:,}", f"{seconds * data['grid'] / 60:.0f}", ""]]
    rows += [["grid, predicted", "", "", "", data["measured"], f"{seconds * data['measured'] / 60:.1f}", ""]]
    for label, found in data["searches"].items():
        rows.append(
            [
                label,
                f"{found['within']} of {found['targets']}",
                (found["median"] or "") if found["traces"] else "",
                (found["most"] or "") if found["traces"] else "",
                f"{found['evaluations']:.0f}",
                f"{seconds * found['evaluations'] / 60:.1f}",
                f"{found['overhead']:.2f}" if "overhead" in found else "",
            ]
        )
    return (
        f"**Searches.** Evaluations until a search's best is within {100 * WITHIN:.0f} points of the grid's, on the "
        "predicted landscape: for how many targets it gets there, the median and the most; what it evaluates for a "
        "target in all (the grid serves all targets), the minutes that takes, and the search's own seconds.\n\n"
        + table(
            ["search", "targets within", "median", "most", "evaluations a target", "minutes", "own seconds"],
            rows,
        )
    )


def _draw(data: dict[str, Any], exact: Tensor) -> Any:
    figure, (left, right) = panels(2, width=5)
    order = exact.argsort(descending=True)
    at = torch.arange(len(order))
    left.plot(at, exact[order], ".-", color="tab:blue", label="best mix")
    left.plot(
        at,
        torch.tensor([each["single"] for each in data["targets"]])[order],
        ".",
        color="tab:green",
        label="one vector",
    )
    left.plot(at, torch.tensor(data["base"])[order], ".", color="0.5", label="base")
    for (label, found), colour in zip(data["prompting"].items(), ("tab:red", "tab:orange"), strict=False):
        left.plot(at, torch.tensor(found["scores"])[order], "x", color=colour, label=f"prompting, {label}")
    left.set(xlabel="targets, by the score of their best mix", ylabel="score", ylim=(0, 1.02))
    left.legend(fontsize=7, loc="upper right")
    shown = [(label, found) for label, found in data["searches"].items() if found["traces"]]
    for (label, found), colour in zip(shown, COLOURS, strict=False):
        trace = found["traces"][0]
        right.step(range(1, len(trace) + 1), trace, where="post", color=colour, label=label)
    right.axhline(data["targets"][0]["predicted"], color="0.8", zorder=0)
    right.set(xscale="log", xlabel="evaluations", ylabel="best score so far", title=data["targets"][0]["target"])
    right.title.set_fontsize(8)
    right.legend(frameon=False)
    return figure


def claims(data: dict[str, Any]) -> list[Claim]:
    reached, count = sum(each["reached"] for each in data["targets"]), len(data["targets"])
    alone = data["searches"]["hierarchical"]
    prompted = max((found["reached"] for found in data["prompting"].values()), default=None)
    made = [
        Claim(
            "level combinations reached",
            "22 of 27",
            f"{reached} of {count}; with coefficients up to {data['wide']['range']:g}, {sum(data['wide']['reached'])}",
            "yes" if reached >= 22 else "no",
        ),
        Claim(
            "a hierarchical search can replace the grid",
            "proposed, not done",
            f"within 2 points on {alone['within']} of {count} targets, {alone['evaluations']:.0f} evaluations each",
            "yes" if alone["within"] == count else "partly",
        ),
    ]
    if prompted is not None:
        text = f"{reached} against {prompted} targets reached"
        held = "yes, against a model that never learnt to follow instructions" if reached > prompted else "no"
        made.append(Claim("vectors steer better than prompting", "better than prompting", text, held))
    return made
