"""How far down bits can go before the dial changes: rates of sweeps with compressed vectors."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import alignvec
from alignvec.train import distil
from bench.paper.experiment import Claim, panels, save, table
from bench.paper.setting import Setting

TITLE = "Formats: bits against the dial"
QUESTIONS, CALIBRATION = 40, 100
FORMATS = ("dense", "int8", "int4", "sign", "low-rank:rank=32", "low-rank:rank=8", "sparse:density=0.1")
UNBIASED = "sign, turned further"
AT = (-1.0, -0.5, 0.0, 0.5, 1.0)


def run(setting: Setting) -> dict[str, Any]:
    """Rates [formats][coefficients, levels] of each vector in its own domain, and what a format costs and loses."""
    data: dict[str, Any] = {"coefficients": AT, "levels": setting.levels, "vectors": {}}
    for name, vector in setting.vectors.items():
        questions = setting.few(QUESTIONS, [name])
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            vector.save(Path(folder) / "dense")
            made = {"dense": alignvec.load(Path(folder) / "dense")}
            for format in FORMATS[1:]:
                made[format] = alignvec.convert(
                    Path(folder) / "dense", Path(folder) / format.replace(":", "-"), format, base=setting.base
                )
            if setting.train:
                calibration = setting.few(CALIBRATION, [name], train=True)
                made["sign, distilled"] = distil(setting.base, vector, made["sign"], setting.tokenizer, calibration)
            # Signs with their mean size lie short along the vector: dialled further by that share, they are unbiased.
            made[UNBIASED] = made["sign"]
            for label, compressed in made.items():
                realised = compressed.dot(vector) / vector.norm() ** 2
                factor = 1 / realised if label == UNBIASED else 1.0
                alignment = setting.attach({name: compressed})
                scores = setting.score(alignment, questions, [{name: factor * c} for c in AT], f"{name}, {label}")
                found[label] = {
                    "realised": realised * factor,
                    "rates": scores.rates()[:, 0].tolist(),
                    "mean": scores.mean.tolist(),
                    "bits": 8 * compressed.nbytes / sum(info.numel for info in compressed.tensors.values()),
                    "error": (compressed * factor - vector).norm() / vector.norm(),
                }
                alignment.detach()
        exact = torch.tensor(found["dense"]["mean"])
        for entry in found.values():
            mean = torch.tensor(entry.pop("mean"))
            entry["choices"] = (mean.argmax(-1) != exact.argmax(-1)).double().mean().item()
            entry["nats"] = (mean - exact).abs().mean().item()
        data["vectors"][name] = {"questions": len(questions), "formats": found}
    return data


def section(data: dict[str, Any], picture: Path) -> str:
    at, names = list(data["coefficients"]), list(data["vectors"])
    figure, axes = panels(len(names))
    rows = []
    for panel, name in zip(axes, names, strict=True):
        for label, entry in data["vectors"][name]["formats"].items():
            panel.plot(at, torch.tensor(entry["rates"])[:, -1], ".-", label=label)
        panel.set(title=name, xlabel="coefficient", ylim=(-0.02, 1.02))
    axes[0].set_ylabel(f"share of {data['levels'][-1]}")
    axes[0].legend(frameon=False, fontsize=7)
    for label in data["vectors"][names[0]]["formats"]:
        entries = [data["vectors"][name]["formats"][label] for name in names]
        rows.append(
            [
                label,
                f"{_mean(entries, 'bits'):.2f}",
                f"{_mean(entries, 'error'):.3f}",
                f"{_mean(entries, 'realised'):.2f}",
                *(f"{100 * _moved(data, name, label):.1f}" for name in names),
                f"{100 * _mean(entries, 'choices'):.1f} %",
                f"{_mean(entries, 'nats'):.4f}",
            ]
        )
    head = [
        "format",
        "bits a weight",
        "relative error",
        "realised",
        *(f"{name}, points" for name in names),
        "other choice",
        "nats",
    ]
    return (
        "Each vector in each format, swept over its own domain. *Points*: the largest difference of a level's rate "
        "from the dense vector's, over the sweep; *other choice*: questions whose likeliest level is another; "
        "*realised*: the format's part along the vector; *turned further*: the coefficient divided by that part; "
        "*distilled*: the scales of the signs trained to give the dense model's logits (arXiv 2402.10193).\n\n"
        + table(head, rows)
        + "\n"
        + save(figure, picture)
    )


def claims(data: dict[str, Any]) -> list[Claim]:
    names = list(data["vectors"])
    made = []
    for label in ("int4", "sign", UNBIASED, "sign, distilled"):
        if label in data["vectors"][names[0]]["formats"]:
            moved = max(_moved(data, name, label) for name in names)
            bits = _mean([data["vectors"][name]["formats"][label] for name in names], "bits")
            held = "yes" if moved <= 0.05 else "partly" if moved <= 0.15 else "no"
            made.append(
                Claim(
                    f"a vector in {label} turns as the dense one does",
                    "not tested",
                    f"rates within {100 * moved:.0f} points, {bits:.1f} bits",
                    held,
                )
            )
    return made


def _mean(entries: list[dict[str, Any]], key: str) -> float:
    return sum(entry[key] for entry in entries) / len(entries)


def _moved(data: dict[str, Any], name: str, label: str) -> float:
    found = data["vectors"][name]["formats"]
    return (torch.tensor(found[label]["rates"]) - torch.tensor(found["dense"]["rates"])).abs().max().item()
