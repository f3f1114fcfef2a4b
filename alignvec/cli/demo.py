"""`alignvec demo`: three real vectors turn a real model's answers, per domain, per row, without a merge."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TaskID

from alignvec.cli.terminal import answer, console, table

COEFFICIENTS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
LEVEL_COLOURS = {"avoidance": "tab:red", "generic": "0.5", "expert": "tab:blue"}

Rates = dict[str, dict[float, dict[str, float]]]  # domain -> coefficient -> level -> share of the queries


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("demo-out"),
    queries: Annotated[int, typer.Option(help="Held-out queries per domain.", min=1)] = 40,
) -> None:
    """Turn the shipped model's knobs: level rates over coefficients, answers, and a batch with a mix per row.

    Example: alignvec demo --queries 100
    """
    import torch
    import transformers

    import alignvec
    from alignvec.loading import load_model, load_tokenizer
    from alignvec.recipes import model_path
    from alignvec.recipes.dataset import DOMAINS, make_rows

    begun = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    console.rule("extract")
    vectors = {}
    for domain in DOMAINS:
        vectors[domain] = alignvec.extract(model_path("base"), model_path(domain))
        console.print(f"{domain}: {len(vectors[domain])} tensors, norm {vectors[domain].norm():.3f}")
    tokenizer, model = load_tokenizer(model_path("base")), load_model(model_path("base"), dtype=torch.float32).eval()
    alignment = alignvec.attach(model, vectors)
    rows = {domain: make_rows(domain, "test")[:queries] for domain in DOMAINS}
    console.print(f"attached to a {type(model).__name__} of {model.num_parameters():,} parameters: {alignment}")

    console.rule("the likeliest of three stored answers, on held-out queries")
    rates = _rates(alignment, tokenizer, rows)
    for domain in DOMAINS:
        console.print(_rate_table(domain, rates[domain], len(rows[domain])))
    picture = _draw(rates, output)
    (output / "level-rates.md").write_text(_markdown(rates))

    console.rule("answers")
    for domain in DOMAINS:
        _answers(alignment, tokenizer, rows[domain][0].query, domain)

    console.rule("one batch, a mix per row")
    _mixed_batch(alignment, tokenizer, {domain: rows[domain][1].query for domain in DOMAINS if len(rows[domain]) > 1})

    changes = []
    for step in range(200):
        start = time.perf_counter()
        alignment.set(dict.fromkeys(DOMAINS, step / 200))
        changes.append(time.perf_counter() - start)
    console.print(f"a coefficient change takes {sorted(changes)[100] * 1e6:.0f} microseconds here (median of 200)")
    alignment.detach()
    console.print(f"curves in {picture}; the demo took {time.perf_counter() - begun:.0f} s")


def _rates(alignment: Any, tokenizer: Any, rows: dict[str, Any]) -> Rates:
    from functools import partial

    from alignvec.evaluate import Scorer

    rates: Rates = {}
    with Progress(console=console, transient=True) as progress:
        for domain, asked in rows.items():
            report = partial(_advance, progress, progress.add_task(f"scoring stored answers, {domain}", total=1.0))
            scorer = Scorer(alignment, tokenizer, [row.question() for row in asked])
            shares = scorer([{domain: coefficient} for coefficient in COEFFICIENTS], progress=report).rates()[:, 0]
            rates[domain] = {
                coefficient: dict(zip(scorer.levels, levels, strict=True))
                for coefficient, levels in zip(COEFFICIENTS, shares.tolist(), strict=True)
            }
    return rates


def _advance(progress: Progress, task: TaskID, share: float) -> None:
    progress.update(task, completed=share)


def _rate_table(domain: str, rates: dict[float, dict[str, float]], queries: int) -> Any:
    shown = table(f"{domain}, {queries} queries", "coefficient", *LEVEL_COLOURS)
    for coefficient, levels in rates.items():
        shown.add_row(f"{coefficient:+.2f}", *(f"{levels[level]:.0%}" for level in LEVEL_COLOURS))
    return shown


def _markdown(rates: Rates) -> str:
    """The rates as the README shows them: avoidance / generic / expert in percent, a row a coefficient."""
    lines = [f"| coefficient | {' | '.join(rates)} |", "| ---: |" + " :---: |" * len(rates)]
    for coefficient in COEFFICIENTS:
        cells = (" / ".join(f"{rates[domain][coefficient][level]:.0%}" for level in LEVEL_COLOURS) for domain in rates)
        lines.append(f"| {coefficient:+.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _draw(rates: Rates, output: Path) -> Path:
    from matplotlib.figure import Figure

    from alignvec.pictures import write_picture

    figure = Figure(figsize=(4 * len(rates), 3.6), layout="constrained")
    for axes, (domain, curve) in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates.items(), strict=True):
        for level, colour in LEVEL_COLOURS.items():
            axes.plot(list(curve), [levels[level] for levels in curve.values()], ".-", color=colour, label=level)
        axes.set(
            title=domain, xlabel=f"coefficient of the {domain} vector", ylabel="share of queries", ylim=(-0.03, 1.03)
        )
    axes.legend(frameon=False)
    picture = output / "level-rates.png"
    write_picture(figure, picture)
    return picture


def _answers(alignment: Any, tokenizer: Any, query: str, domain: str) -> None:
    """One query under -1, 0 and 1, as three rows of one batch."""
    from alignvec.recipes.evaluate import answers

    mixes = [{domain: c} for c in (-1.0, 0.0, 1.0)]
    alignment.set_rows(mixes)
    console.print(answer(query, ""), soft_wrap=True)
    for mix, text in zip(mixes, answers(alignment.model, tokenizer, [query] * 3), strict=True):
        console.print(f"  {domain} {mix[domain]:+.0f}  {text}", soft_wrap=True)


def _mixed_batch(alignment: Any, tokenizer: Any, queries: dict[str, str]) -> None:
    """Different queries with different mixes, generated together."""
    from alignvec.recipes.evaluate import answers

    mixes = [{domain: c} for domain in queries for c in (1.0, -1.0)]
    alignment.set_rows(mixes)
    batch = [queries[domain] for domain in queries for _ in range(2)]
    for query, mix, text in zip(batch, mixes, answers(alignment.model, tokenizer, batch), strict=True):
        name = ", ".join(f"{domain} {c:+.0f}" for domain, c in mix.items())
        console.print(answer(name, f"  {query}\n    {text}"), soft_wrap=True)
