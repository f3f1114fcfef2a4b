"""Joint training: one DPO run for a target over all domains, which is what a mix of vectors saves.

Costs are counted on one machine: seconds of a training step here, for as many steps as the shipped vectors took, and
seconds of an evaluation, for the mixes that all targets are chosen from.
"""

from __future__ import annotations

import json
import random
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from alignvec import AlignmentVector
from alignvec.search import Target
from alignvec.train import pairs_from_questions, train_dpo
from bench.paper.experiment import Claim, panels, percent, save, table
from bench.paper.setting import SHIPPED, Setting

TITLE = "Joint training for each target"
QUESTIONS, STEPS, BATCH_SIZE = 40, 150, 16


def needs(setting: Setting) -> str:
    if not setting.train:
        return "it has no training questions"
    return "" if (setting.results / "targets.json").exists() else "run targets first: it compares with their mixes"


def mixed_target(setting: Setting) -> Target:
    """The most forthcoming level, the least and the one between, in the domains' order."""
    levels = (setting.levels[-1], setting.levels[0], setting.levels[len(setting.levels) // 2])
    wanted = (f"{domain}={level}" for domain, level in zip(setting.domains, cycle(levels), strict=False))
    return Target.parse(",".join(wanted), setting.domains, setting.levels)


def train(setting: Setting, target: Target, steps: int) -> AlignmentVector:
    """The shipped recipe's run, or on a model of one's own `train_dpo` with its defaults."""
    if setting.name in SHIPPED:
        from alignvec.recipes.align import joint

        return joint(setting.base, setting.tokenizer, dict(target.wanted), steps, device=setting.device)
    shuffled = random.Random(0).sample(setting.train, len(setting.train))
    pairs = pairs_from_questions(shuffled, dict(target.wanted), steps * BATCH_SIZE)
    return train_dpo(setting.base, setting.tokenizer, pairs, steps=steps, batch_size=BATCH_SIZE, device=setting.device)


def run(setting: Setting) -> dict[str, Any]:
    compared = json.loads((setting.results / "targets.json").read_text(encoding="utf-8"))["data"]
    questions = setting.few(QUESTIONS)
    steps = max(2, round(STEPS * min(1.0, setting.scale)))
    target = mixed_target(setting)
    begin = time.perf_counter()
    vector = train(setting, target, steps)
    seconds = time.perf_counter() - begin
    alignment = setting.attach({"joint": vector})
    rates = setting.score(alignment, questions, [{"joint": 1.0}], "the joint model").rates()[0]
    mixed = next(each for each in compared["targets"] if dict(target.wanted) == _wanted(each["target"]))
    found = {
        "target": str(target),
        "steps": steps,
        "seconds": seconds,
        "score": target.score(rates).item(),
        "reached": bool(target.reached(rates)),
        "mixed": mixed["exact"],
        "mixed_reached": mixed["reached"],
    }
    return {
        "questions": len(questions),
        "vectors": len(setting.vectors),
        "targets": len(compared["targets"]),
        "measured": compared["measured"],
        "seconds_per_evaluation": compared["seconds_per_evaluation"],
        "evaluation_questions": compared["questions"],
        "runs": [found],
    }


def _wanted(text: str) -> dict[str, str]:
    return dict(term.split("=", 1) for term in text.split(","))  # type: ignore[misc]


def _cost(data: dict[str, Any]) -> dict[str, float]:
    """Seconds: of a joint run, of training the vectors, of choosing all targets' mixes, and the ratios."""
    run = sum(each["seconds"] for each in data["runs"]) / len(data["runs"])
    train, search = data["vectors"] * run, data["measured"] * data["seconds_per_evaluation"]
    every = data["targets"] * run
    return {
        "run": run,
        "train": train,
        "search": search,
        "every": every,
        "given": every / search,
        "whole": every / (train + search),
    }


def section(data: dict[str, Any], picture: Path) -> str:
    cost = _cost(data)
    rows = [
        [
            each["target"].replace(",", ", "),
            percent(each["score"]) + ("" if each["reached"] else ", not reached"),
            percent(each["mixed"]) + ("" if each["mixed_reached"] else ", not reached"),
            f"{each['seconds']:.0f}",
        ]
        for each in data["runs"]
    ]
    figure, [panel] = panels(1, width=6)
    counts = range(1, data["targets"] + 1)
    panel.plot(counts, [cost["run"] * n / 60 for n in counts], color="tab:red", label="a joint run for each target")
    panel.plot(
        counts, [(cost["train"] + cost["search"]) / 60] * len(counts), color="tab:blue", label="vectors and their mixes"
    )
    panel.plot(counts, [cost["search"] / 60] * len(counts), ":", color="tab:blue", label="mixes alone, vectors given")
    panel.set(xlabel="targets wanted", ylabel="minutes on this machine", ylim=(0, None))
    panel.legend(frameon=False)
    steps = data["runs"][0]["steps"]
    return (
        f"A joint run of {steps} steps (16 pairs each, as many as a shipped vector was trained with) prefers the "
        "wanted level in every domain over the others. Compared with the best mix within -1 to 1; both measured, on "
        f"{data['questions']} and {data['evaluation_questions']} questions.\n\n"
        + table(["target", "joint training", "mix of vectors", "seconds of training"], rows)
        + f"\nOne run takes {cost['run']:.0f} s here, so {data['targets']} targets {cost['every'] / 60:.0f} minutes "
        f"(counted, not run). Vectors: {data['vectors']} such runs ({cost['train'] / 60:.1f} minutes) and "
        f"{data['measured']} evaluations on {data['evaluation_questions']} questions ({cost['search'] / 60:.1f} "
        f"minutes) serve all of them: **{cost['given']:.1f} times** less with the vectors given, "
        f"{cost['whole']:.1f} times with their training.\n\n" + save(figure, picture)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    cost = _cost(data)
    mixed = data["runs"][0]
    return [
        Claim(
            f"{data['targets']} targets cost less than joint training for each",
            "12 times faster",
            f"{cost['given']:.1f} times with the vectors given, {cost['whole']:.1f} times with their training",
            "yes" if cost["whole"] >= 12 else "yes, with the vectors given" if cost["given"] >= 12 else "no",
        ),
        Claim(
            "joint training reaches a mixed target better",
            "100 % against 46 %",
            f"{percent(mixed['score'])} against {percent(mixed['mixed'])}",
            "yes" if mixed["score"] > mixed["mixed"] + 0.05 else "no",
        ),
    ]
