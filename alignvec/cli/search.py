"""`alignvec search`: the coefficients that reach a target, found by measuring mixes on stored responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from alignvec.cli.options import DeviceOption, device_or_default, model_folder, vectors
from alignvec.cli.terminal import console, table

if TYPE_CHECKING:
    from alignvec.evaluate import Question
    from alignvec.search import Result, Sweep

METHODS = ("hierarchical", "grid", "sweep", "tpe", "gp", "nsga2")


def search(
    base: Annotated[str, typer.Argument(help="The base model: a transformers folder or a hub id.")],
    questions: Annotated[Path, typer.Argument(help="JSON lines: domain, query, responses by level.")],
    vector: Annotated[
        list[str], typer.Option("--vector", "-v", help="NAME=FOLDER of an alignment vector; repeatable.")
    ],
    target: Annotated[str, typer.Option(help="DOMAIN=LEVEL,DOMAIN=LEVEL,...; all: every way to want a level each.")],
    constraint: Annotated[
        list[str] | None, typer.Option(help="DOMAIN=LEVEL>=SHARE, or <=, to be kept; repeatable.")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "hierarchical",
    trials: Annotated[int, typer.Option(help="Of tpe, gp and nsga2, for each target.", min=1)] = 100,
    points: Annotated[int, typer.Option(help="Coefficients of a vector, evenly spaced.", min=2)] = 21,
    low: Annotated[float, typer.Option(help="The smallest coefficient.")] = -1.0,
    high: Annotated[float, typer.Option(help="The largest.")] = 1.0,
    count: Annotated[int | None, typer.Option(help="Questions of each domain; default: all.", min=1)] = None,
    storage: Annotated[
        Path | None, typer.Option(help="Keep what is measured in this file; a search that was stopped goes on there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the best score over evaluations, or the sweeps, into this picture file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of tpe, gp and nsga2.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    transfer: Annotated[bool, typer.Option(help="The vectors come from a different base, on purpose.")] = False,
) -> None:
    """Find the mix whose preference rates come closest to a target; no mix is measured twice.

    Example: alignvec search base/ questions.jsonl -v medical=medical-av --target medical=expert --storage rates.jsonl
    """
    import alignvec.search as searching
    from alignvec.evaluate import load_questions
    from alignvec.evaluate.questions import domains_of, first_of_each, levels_of
    from alignvec.folders import replaced, write_json
    from alignvec.pictures import require_picture
    from alignvec.planner import check_choice

    check_choice("--method", method, METHODS)
    if plot is not None:
        require_picture(plot)
    folder, device = model_folder(base), device_or_default(device)
    asked = first_of_each(load_questions(questions), count)
    domains, levels, constraints = domains_of(asked), levels_of(asked), constraint or []
    if target == "all":
        targets = searching.all_targets(domains, levels, constraints)
    else:
        targets = [searching.Target.parse(target, domains, levels, constraints)]
    searching.lattice(points, low, high)
    key = searching.landscape_key(folder, vectors(vector), asked, dtype=dtype)
    names = tuple(vectors(vector))
    landscape = searching.Landscape(names, domains, levels, storage=storage, key=key)
    before = len(landscape)
    if before:
        console.print(f"{storage}: {before} mixes measured before")

    space: dict[str, Any] = {"points": points, "low": low, "high": high}
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("measuring mixes", total=points ** len(names) - before if method == "grid" else None)
        landscape.measure = _evaluator(folder, vector, asked, device, dtype, transfer)
        landscape.progress = lambda measured: bar.advance(task, measured)
        view = landscape.view()
        if method == "hierarchical":
            results = searching.hierarchical(view, targets, **space, coarse=min(3, points))
        elif method == "grid":
            results = searching.grid(view, targets, **space)
        elif method == "sweep":
            results = searching.sweeps(view, targets, **space)
        else:
            results = searching.optimise(view, targets, method, trials, seed, **space)
        curves = [searching.sweep(view, name, **space) for name in names] if method == "sweep" else []

    _show(results, view.evaluations, len(landscape) - before, curves)
    if output is not None:
        with replaced(output) as file:
            write_json(file, {"key": key, "results": [result.to_json() for result in results]})
        console.print(f"results in {output}")
    if plot is not None:
        from alignvec.search.plot import plot_convergence, plot_sweeps

        if curves:
            plot_sweeps(curves, plot)
        else:
            plot_convergence({str(result.target): result for result in results}, plot)
        console.print(f"drawn in {plot}")


def _evaluator(
    base: Path, vector: list[str], questions: list[Question], device: str, dtype: str, transfer: bool
) -> Any:
    """Rates of mixes on the model; it is loaded now, so that a vector that does not fit is refused at once."""
    import alignvec
    from alignvec.evaluate import Scorer
    from alignvec.loading import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(base), load_model(base, dtype=dtype)
    model.to(device).eval()
    scorer = Scorer(alignvec.attach(model, vectors(vector), transfer=transfer), tokenizer, questions)
    return lambda mixes: scorer(mixes).rates()


def _show(results: Sequence[Result], asked: int, measured: int, curves: Sequence[Sweep]) -> None:
    for swept in curves:
        columns = [f"{domain} {level}" for domain in swept.domains for level in swept.levels]
        shown = table(f"rates over the coefficient of {swept.name}", "coefficient", *columns, numeric_from=0)
        for coefficient, rates in zip(swept.coefficients, swept.rates.flatten(1).tolist(), strict=True):
            shown.add_row(f"{coefficient:+.2f}", *(f"{rate:.0%}" for rate in rates))
        console.print(shown)
    names = list(results[0].mix)
    shown = table(results[0].method, "target", *names, "score", "reached", "evaluations", "measuring", "searching")
    for result in results:
        reached = "yes" if result.reached else "no" if result.feasible else "no: breaks a constraint"
        shown.add_row(
            str(result.target),
            *(f"{result.mix[name]:+.2f}" for name in names),
            *(f"{result.score:.1%}", reached, str(result.evaluations)),
            *(f"{result.seconds:.1f} s", f"{result.overhead:.1f} s"),
        )
    console.print(shown)
    if results[0].front:
        console.print(f"Pareto front of {results[0].target}: {len(results[0].front)} mixes (--output writes them)")
    count = sum(result.reached for result in results)
    console.print(f"{count} of {len(results)} targets reached; {asked} mixes needed, {measured} measured now")
