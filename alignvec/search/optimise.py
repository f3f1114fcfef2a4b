"""Optuna's samplers on a landscape: TPE, Gaussian processes, and NSGA-II for a front of trade-offs."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignvec.errors import AlignvecError
from alignvec.search.landscape import Landscape, View
from alignvec.search.lattice import lattice
from alignvec.search.result import Result, Targets, parsed, results
from alignvec.search.target import Target

SAMPLERS = ("tpe", "gp", "nsga2")
POPULATION = 20  # of NSGA-II: a hundred trials are five generations
DESCRIPTION = "alignvec"  # the study's attribute that says what was searched


def optimise(
    landscape: Landscape | View,
    targets: Targets,
    sampler: str = "tpe",
    trials: int = 100,
    seed: int = 0,
    storage: str | Path | None = None,
    *,
    study: str | None = None,
    points: int | None = 21,
    low: float = -1.0,
    high: float = 1.0,
    batch: int = 5,
) -> list[Result]:
    """Search each target with one of Optuna's samplers: a study and a result a target.

    Args:
        sampler: "tpe" (tree-structured Parzen estimator) and "gp" (Gaussian process; few trials, each of them slow)
            maximise the target's score; "nsga2" maximises the wanted rate of each domain by itself, and its result has
            the Pareto front, of which `mix` is the one with the best score.
        trials: of each study, those found in the storage included. A mix that comes again is a trial, not an
            evaluation.
        seed: trials are the same under one seed, also when the study was stopped and resumed.
        storage: where Optuna keeps the studies: a URL, an SQLite file (.db, .sqlite, .sqlite3) or a journal (any other
            file); default: in memory.
        study: name of the study in the storage, for a single target; default: sampler and target.
        points: coefficients are taken from a lattice of this many; None: any between `low` and `high`.
        batch: trials asked for at once, which the evaluator gets together. The next ones learn from them.

    Raises AlignvecError for an unknown sampler, no trials, a study in the storage with another target, sampler, seed,
    lattice or landscape, and as `Landscape.rates`; needs Optuna (`pip install "alignvec[search]"`).
    """
    try:
        import optuna
    except ImportError:
        raise AlignvecError('optimise needs Optuna: pip install "alignvec[search]"') from None

    if sampler not in SAMPLERS:
        raise AlignvecError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if trials < 1 or batch < 1:
        raise AlignvecError(f"a search needs a trial at least, in batches of one at least, not {trials} in {batch}")
    wanted = parsed(landscape, targets)
    if study is not None and len(wanted) > 1:
        raise AlignvecError("study= names the study of one target; leave it out for several")
    ends = lattice(2, low, high)
    axis = None if points is None else lattice(points, low, high)

    def suggest(trial: Any) -> dict[str, float]:
        if axis is None:
            return {name: round(trial.suggest_float(name, *ends), 6) for name in landscape.names}
        return {name: axis[trial.suggest_int(name, 0, len(axis) - 1)] for name in landscape.names}

    found = []
    with _quiet(optuna):
        kept = _storage(optuna, storage)
        for target in wanted:
            view, begun = landscape.view(), time.perf_counter()
            description = {
                "target": str(target),
                "sampler": sampler,
                "seed": seed,
                "batch": batch,
                "coefficients": [*ends, points],
                "names": list(view.names),
                "key": view.landscape.key,
            }
            objectives = len(target.wanted) if sampler == "nsga2" else 1
            opened = _open(optuna, kept, study or f"{sampler} {target}", description, objectives)
            front = _run(optuna, opened, view, target, trials, batch, suggest)
            found += results(sampler, [target], view, begun, front if objectives > 1 else ())
    return found


def _open(optuna: Any, storage: Any, name: str, description: dict[str, Any], objectives: int) -> Any:
    """A new study, or the stored one of that name if it is the same search."""
    directions = ["maximize"] * objectives
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    there = study.user_attrs.get(DESCRIPTION)
    if there is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(DESCRIPTION, description)
        return study
    for what, mine in description.items():
        if (there or {}).get(what) != mine:
            raise AlignvecError(
                f"the study {name!r} in the storage has another {what} than this search: "
                "choose another study= or storage="
            )
    return study


def _run(
    optuna: Any,
    study: Any,
    view: View,
    target: Target,
    trials: int,
    batch: int,
    suggest: Callable[[Any], dict[str, float]],
) -> list[dict[str, float]]:
    """Ask, measure and tell until there are enough trials; gives the distinct mixes of the best ones."""
    states, several = optuna.trial.TrialState, len(study.directions) > 1
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):  # asked for by a run that was stopped
        study.tell(trial.number, state=states.FAIL)
    done = study.get_trials(deepcopy=False, states=(states.COMPLETE,))
    mixes = [trial.user_attrs["mix"] for trial in done]
    if mixes:
        view.rates(mixes)
    description = study.user_attrs[DESCRIPTION]
    while len(mixes) < trials:
        # Storages do not keep a sampler's random state: a new one a batch makes a resumed study go the same way.
        study.sampler = _sampler(optuna, description["sampler"], description["seed"] * 1_000_003 + len(mixes))
        asked = [study.ask() for _ in range(min(batch - len(mixes) % batch, trials - len(mixes)))]
        new = [suggest(trial) for trial in asked]
        rates = view.rates(new)
        for trial, mix, rate in zip(asked, new, rates, strict=True):
            trial.set_user_attr("mix", mix)
            for constraint, broken in zip(target.constraints, target.violations(rate).tolist(), strict=True):
                trial.set_constraint(str(constraint), round(broken, 9))
            study.tell(trial, target.wanted_rates(rate).tolist() if several else float(target.score(rate)))
        mixes += new
    return list({tuple(mix.items()): mix for mix in (trial.user_attrs["mix"] for trial in study.best_trials)}.values())


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    seed %= 2**32
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)


def _storage(optuna: Any, storage: str | Path | None) -> Any:
    """A URL as it is, a file by its ending; one object for all studies."""
    if storage is None:
        return optuna.storages.InMemoryStorage()
    text = str(storage)
    if "://" in text:
        return text
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        return f"sqlite:///{path.resolve()}"
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.storages.journal.JournalStorage(backend)


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """No line a trial, and no warnings that a user of alignvec could do nothing about."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
