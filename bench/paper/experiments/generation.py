"""Generation accuracy: the level that a judge gives to answers, over coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignvec.evaluate.generation import judge_generated
from alignvec.evaluate.judge import ClassifierJudge
from bench.paper.experiment import COLOURS, Claim, panels, percent, save, table
from bench.paper.setting import Setting

TITLE = "Generated answers, judged"
QUESTIONS, HELD_OUT = 24, 100
AT = (-1.0, -0.5, 0.0, 0.5, 1.0)


def needs(setting: Setting) -> str:
    return "" if setting.train else "it has no training questions for the judge"


def run(setting: Setting) -> dict[str, Any]:
    judge = ClassifierJudge.train(setting.train)
    data: dict[str, Any] = {
        "coefficients": AT,
        "levels": setting.levels,
        "accuracy": judge.accuracy(setting.few(HELD_OUT)),
        "vectors": {},
    }
    for name, vector in setting.vectors.items():
        questions = setting.few(QUESTIONS, [name])
        alignment = setting.attach({name: vector})
        mixes = [{name: c} for c in AT]
        generated = judge_generated(judge, alignment, setting.tokenizer, questions, mixes, max_new_tokens=64)
        scores = setting.score(alignment, questions, mixes, f"scoring {name}")
        order = [generated.levels.index(level) for level in setting.levels]
        data["vectors"][name] = {
            "questions": len(questions),
            "generated": generated.rates()[:, 0, order].tolist(),
            "likelihood": scores.rates()[:, 0].tolist(),
            "agreement": generated.agreement(scores)[:, 0].tolist(),
            "samples": [[questions[0].query, texts[0]] for texts in generated.texts],
        }
    return data


def section(data: dict[str, Any], picture: Path) -> str:
    at, names, levels = list(data["coefficients"]), list(data["vectors"]), list(data["levels"])
    figure, axes = panels(len(names))
    rows, samples = [], []
    for panel, name in zip(axes, names, strict=True):
        found = data["vectors"][name]
        for level, colour in zip(range(len(levels)), COLOURS, strict=False):
            panel.plot(
                at, torch.tensor(found["generated"])[:, level], ".-", color=colour, label=f"{levels[level]}, judged"
            )
            panel.plot(
                at, torch.tensor(found["likelihood"])[:, level], ":", color=colour, label=f"{levels[level]}, likeliest"
            )
        panel.set(title=name, xlabel="coefficient", ylim=(-0.02, 1.02))
        for i, c in enumerate(at):
            judged = found["generated"][i]
            rows.append([name, f"{c:g}", *(percent(rate) for rate in judged), percent(found["agreement"][i])])
        samples.append(f"**{name}**: *{found['samples'][0][0]}*\n")
        samples += [f"- {c:+g}: {text}" for c, (_, text) in zip(at, found["samples"], strict=True)]
        samples.append("")
    axes[0].legend(frameon=False, fontsize=6)
    count = data["vectors"][names[0]]["questions"]
    return (
        f"Greedy answers to {count} held-out questions a domain, judged by a classifier that was trained on stored "
        f"training responses ({percent(data['accuracy'])} right on held-out ones). *Agreement*: the judged level is "
        "that of the likeliest stored response.\n\n"
        + table(["vector", "coefficient", *levels, "agreement"], rows, 1)
        + "\n"
        + save(figure, picture)
        + "\n"
        + "\n".join(samples)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    names, at = list(data["vectors"]), list(data["coefficients"])
    expert = [data["vectors"][name]["generated"][at.index(1.0)][-1] for name in names]
    start = [data["vectors"][name]["generated"][at.index(0.0)][-1] for name in names]
    agreed = [value for name in names for value in data["vectors"][name]["agreement"]]
    text = ", ".join(f"{n} {percent(e)} (from {percent(s)})" for n, e, s in zip(names, expert, start, strict=True))
    return [
        Claim(
            "generated answers follow the coefficient",
            "yes",
            f"expert at 1: {text}",
            "yes" if min(expert) > 0.8 else "partly",
        ),
        Claim(
            "likelihood stands for what is generated",
            "both reported",
            f"judge and likelihood agree on {percent(sum(agreed) / len(agreed))} of answers",
            "yes" if sum(agreed) / len(agreed) > 0.8 else "partly",
        ),
    ]
