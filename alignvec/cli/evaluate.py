"""`alignvec evaluate`: level rates of mixes on questions, with intervals, and what a judge makes of the answers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from alignvec.cli.options import DeviceOption, device_or_default, mix, model_folder, vectors
from alignvec.cli.terminal import console, table
from alignvec.errors import AlignvecError

if TYPE_CHECKING:
    import torch

    from alignvec.evaluate import Question, Scores
    from alignvec.evaluate.generation import Generated

Mixes = list[dict[str, float]]


def evaluate(
    base: Annotated[str, typer.Argument(help="The model: a transformers folder or a hub id.")],
    questions: Annotated[
        Path | None, typer.Argument(help="JSON lines: domain, query, responses by level. Or --shipped.")
    ] = None,
    vector: Annotated[
        list[str] | None, typer.Option("--vector", "-v", help="NAME=FOLDER of an alignment vector; repeatable.")
    ] = None,
    mixes: Annotated[
        list[str] | None, typer.Option("--mix", "-m", help="NAME=NUMBER,NAME=NUMBER; repeatable. Default: the base.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="Evenly spaced coefficients of this vector, the others at 0; repeatable.")
    ] = None,
    points: Annotated[int, typer.Option(help="Of a sweep.")] = 21,
    low: Annotated[float, typer.Option(help="Where a sweep begins.")] = -1.0,
    high: Annotated[float, typer.Option(help="Where it ends.")] = 1.0,
    by: Annotated[
        str | None, typer.Option(help="mean or sum of token log-probabilities; default: both, and mean in pictures.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Also answer, and give answers to a judge: classifier (of the shipped questions), classifier:FILE "
            "(trained on other questions), or the URL of an OpenAI-compatible endpoint."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model to ask at the endpoint.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to a judge, in tokens.")] = 96,
    shipped: Annotated[bool, typer.Option("--shipped", help="The held-out questions of the shipped models.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Questions per domain; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write rates, intervals and settings as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweeps into this picture file.")] = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    transfer: Annotated[
        bool, typer.Option("--transfer", help="The vectors come from a different base, on purpose.")
    ] = False,
) -> None:
    """Measure which level's stored response a model finds likeliest, under mixes or over a vector's coefficients.

    Shares of questions by domain, each with its 95 % bootstrap interval over questions.

    Example: alignvec evaluate base/ questions.jsonl -v medical=medical-av --sweep medical --plot medical.png
    """
    import alignvec
    from alignvec.evaluate import Scorer
    from alignvec.loading import load_model, load_tokenizer
    from alignvec.pictures import require_picture
    from alignvec.search.lattice import lattice

    if by not in (None, "mean", "sum"):
        raise AlignvecError(f"--by is mean or sum, not {by!r}")
    if mixes and sweep:
        raise AlignvecError("--mix and --sweep exclude each other: a sweep makes the mixes")
    if plot is not None and not sweep:
        raise AlignvecError("--plot draws sweeps: give --sweep NAME")
    if plot is not None:
        require_picture(plot)
    folders = vectors(vector or [])
    if unknown := set(sweep or ()) - set(folders):
        raise AlignvecError(f"--sweep names {', '.join(sorted(unknown))}, which no --vector is called")
    asked = _questions(questions, shipped, count)
    axis = lattice(points, low, high) if sweep else ()
    wanted: Mixes = [{name: coefficient} for name in sweep or () for coefficient in axis]
    wanted = wanted or [mix("--mix", [text]) for text in mixes or []] or [{}]
    chosen_judge = None if judge is None else _judge(judge, judge_model, asked, output)
    folder, device = model_folder(base), device_or_default(device)

    tokenizer, net = load_tokenizer(folder), load_model(folder, dtype=dtype)
    net.to(device).eval()
    attached = alignvec.attach(net, folders, transfer=transfer) if folders else net
    scorer = Scorer(attached, tokenizer, asked)
    generated: Generated | None = None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("scoring stored responses", total=1.0)
        scores = scorer(wanted, progress=lambda share: progress.update(task, completed=share))
        if chosen_judge is not None:
            from alignvec.evaluate.generation import judge_generated

            answers = progress.add_task("answering, and judging the answers", total=1.0)
            generated = judge_generated(
                chosen_judge,
                attached,
                tokenizer,
                asked,
                wanted,
                max_new_tokens,
                progress=lambda share: progress.update(answers, completed=share),
            )
    kinds = ("mean", "sum") if by is None else (by,)
    _print(scorer.domains, scores, wanted, kinds, generated)
    if output is not None:
        settings = {
            "base": base,
            "vectors": {name: str(path) for name, path in folders.items()},
            "questions": "shipped" if shipped else str(questions),
            "judge": judge,
            "judge_model": judge_model,
            "max_new_tokens": max_new_tokens if judge else None,
            "form": scorer.form,
            "device": device,
            "dtype": str(net.dtype).removeprefix("torch."),
        }
        _write(output, settings, scorer.domains, scores, wanted, kinds, generated)
        console.print(f"written to {output}")
    if plot is not None:
        from alignvec.search.lattice import Sweep
        from alignvec.search.plot import plot_sweeps

        rates, ends = (made.split(len(axis)) for made in (scores.rates(kinds[0]), scores.intervals(kinds[0])))
        curves = [
            Sweep(name, axis, scorer.domains, scores.levels, own) for name, own in zip(sweep or (), rates, strict=True)
        ]
        plot_sweeps(curves, plot, ends)
        console.print(f"drawn in {plot}")


def _questions(file: Path | None, shipped: bool, count: int | None) -> list[Question]:
    from alignvec.evaluate import load_questions
    from alignvec.evaluate.questions import first_of_each

    if shipped == (file is not None):
        raise AlignvecError("give a file of questions or --shipped, one of the two")
    if file is not None:
        questions = load_questions(file)
    else:
        from alignvec.recipes.dataset import QUERIES, make_rows

        questions = [row.question() for domain in QUERIES for row in make_rows(domain, "test")]
    return first_of_each(questions, count)


def _judge(text: str, model: str | None, questions: list[Question], output: Path | None) -> Any:
    from alignvec.evaluate import load_questions
    from alignvec.evaluate.judge import ClassifierJudge, EndpointJudge

    name, _, file = text.partition(":")
    judge: ClassifierJudge | EndpointJudge
    if name == "classifier":
        judge = ClassifierJudge.train(load_questions(file)) if file else ClassifierJudge.shipped()
    elif name in ("http", "https"):
        if model is None:
            raise AlignvecError("an endpoint judges with a model: give --judge-model NAME")
        replies = None if output is None else output.with_suffix(".replies.jsonl")
        judge = EndpointJudge(model, base_url=text, cache=replies)
    else:
        raise AlignvecError(f"--judge is classifier, classifier:FILE or the URL of an endpoint, not {text!r}")
    if set(judge.levels) != set(questions[0].responses):
        raise AlignvecError(
            f"--judge {text} knows {', '.join(judge.levels)}, the questions have {', '.join(questions[0].responses)}"
        )
    return judge


def _print(
    domains: tuple[str, ...], scores: Scores, mixes: Mixes, kinds: tuple[str, ...], generated: Generated | None
) -> None:
    rates = {kind: scores.rates(kind) for kind in kinds}
    ends = {kind: scores.intervals(kind) for kind in kinds}
    judged = None if generated is None else (generated.rates(), generated.agreement(scores, kinds[0]))
    for d, domain in enumerate(domains):
        title = f"{domain}, {scores.domains.count(domain)} questions"
        more = ("agreement",) if generated is not None else ()
        shown = table(title, "mix", "by", *scores.levels, *more, numeric_from=2)
        for m, wanted in enumerate(mixes):
            name = ", ".join(f"{key}={value:g}" for key, value in wanted.items()) or "base"
            for kind in kinds:
                cells = [
                    f"{rate:.0%} [{start:.0%}, {end:.0%}]"
                    for rate, (start, end) in zip(rates[kind][m, d].tolist(), ends[kind][m, d].tolist(), strict=True)
                ]
                shown.add_row(name if kind == kinds[0] else "", kind, *cells)
            if generated is not None and judged is not None:
                share = dict(zip(generated.levels, judged[0][m, d].tolist(), strict=True))
                shown.add_row(
                    "", "judge", *(f"{share[level]:.0%}" for level in scores.levels), f"{judged[1][m, d]:.0%}"
                )
        console.print(shown)
    if generated is not None and generated.unjudged:
        console.print(f"{generated.unjudged} answers got no verdict; they count as none of the levels")


def _write(
    output: Path,
    settings: dict[str, Any],
    domains: tuple[str, ...],
    scores: Scores,
    mixes: Mixes,
    kinds: tuple[str, ...],
    generated: Generated | None,
) -> None:
    """One entry a mix: by domain and level, rates and intervals, and each level's mean log-probability a token."""
    import torch

    from alignvec.writer import replaced

    def named(values: torch.Tensor, levels: tuple[str, ...]) -> dict[str, Any]:
        """[domains, levels, ...] by name."""
        return {
            domain: dict(zip(levels, row, strict=True)) for domain, row in zip(domains, values.tolist(), strict=True)
        }

    members = [torch.tensor([own == domain for own in scores.domains]) for domain in domains]
    likelihood = torch.stack([scores.mean[:, own].mean(1) for own in members], dim=1)
    rates = {kind: (scores.rates(kind), scores.intervals(kind)) for kind in kinds}
    entries: list[dict[str, Any]] = []
    for m, wanted in enumerate(mixes):
        entry: dict[str, Any] = {"mix": wanted, "log_probability_a_token": named(likelihood[m], scores.levels)}
        for kind, (shares, ends) in rates.items():
            entry[kind] = {"rates": named(shares[m], scores.levels), "intervals": named(ends[m], scores.levels)}
        if generated is not None:
            agreement = generated.agreement(scores, kinds[0])[m].tolist()
            entry["judge"] = {
                "rates": named(generated.rates()[m], generated.levels),
                "agreement": dict(zip(domains, agreement, strict=True)),
                "unjudged": generated.verdicts[m].count(None),
            }
        entries.append(entry)
    report = {
        "settings": settings,
        "versions": {package: version(package) for package in ("alignvec", "torch", "transformers")},
        "levels": scores.levels,
        "questions": {domain: scores.domains.count(domain) for domain in domains},
        "mixes": entries,
    }
    with replaced(output) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
