"""Searches against the full grid, on simulated landscapes and on the recorded one where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignvec.errors import AlignvecError
from alignvec.search import (
    Landscape,
    Result,
    all_targets,
    evaluations_to_reach,
    grid,
    hierarchical,
    lattice,
    load_grid,
    optimise,
    seconds_to_reach,
    sweep,
    sweeps,
)
from alignvec.search.plot import plot_convergence, plot_slices, plot_sweeps
from tests.search.landscapes import LEVELS, NAMES, Simulated

RECORDED = Path(__file__).parents[2] / "bench" / "paper" / "results" / "mistral-4m" / "landscape.safetensors"
SIMULATED = {
    "mild": dict(seed=0),
    "interfering": dict(seed=1, interference=0.7, questions=100),
    "steep": dict(seed=2, interference=0.5, pull=8.0),
}
Measured = tuple[Landscape, list[Result]]


@pytest.fixture(scope="module", params=[*SIMULATED, *(["recorded"] if RECORDED.exists() else [])])
def measured(request: pytest.FixtureRequest) -> Measured:
    """A landscape with all of its grid known, and the grid's best for every target."""
    if request.param == "recorded":
        landscape = load_grid(RECORDED)
    else:
        landscape = Landscape(NAMES, NAMES, LEVELS, Simulated(**SIMULATED[request.param]), batch=2048)
    return landscape, grid(landscape, all_targets(landscape.domains, landscape.levels))


def simulated(**options: float) -> Landscape:
    return Landscape(NAMES, NAMES, LEVELS, Simulated(**options), batch=2048)  # type: ignore[arg-type]


def test_hierarchical_comes_within_two_points_of_the_grid_on_every_target(measured: Measured) -> None:
    landscape, best = measured
    together = landscape.view()
    alone = [hierarchical(together, result.target)[0] for result in best]
    for found, result in zip(alone, best, strict=True):
        count = evaluations_to_reach(found, result.score)
        assert count is not None, f"{found.target}: {found.score} of {result.score}"
        assert count <= found.evaluations < 150
        assert found.score == pytest.approx(max(found.trace))
        assert found.score == pytest.approx(float(found.target.score(found.rates)))
        assert torch.equal(landscape.rates([found.mix])[0], found.rates)
    assert sum(found.evaluations for found in alone) / len(alone) < 100
    assert together.evaluations < 1500


def test_hierarchical_for_all_targets_at_once(measured: Measured) -> None:
    landscape, best = measured
    found = hierarchical(landscape, [result.target for result in best])
    for one, result in zip(found, best, strict=True):
        assert one.score >= result.score - 0.02 - 1e-9
        assert one.evaluations == len(one.trace) < 1500


def test_a_grid_serves_every_target_and_ties_go_to_the_smaller_norm() -> None:
    landscape = simulated()
    results = grid(landscape, all_targets(NAMES, LEVELS), points=5)
    mixes = landscape.mixes
    assert len(mixes) == 125
    rates = landscape.rates(mixes)
    for result in results:
        scores = result.target.score(rates).tolist()
        ties = [mix for mix, score in zip(mixes, scores, strict=True) if score > max(scores) - 1e-9]
        assert result.score == pytest.approx(max(scores))
        assert sum(c * c for c in result.mix.values()) == min(sum(c * c for c in mix.values()) for mix in ties)
    with pytest.raises(AlignvecError, match="1,030,301 mixes"):
        grid(landscape, "medical=expert", points=101)
    with pytest.raises(AlignvecError, match="from a low to a high end"):
        grid(landscape, "medical=expert", low=1.0, high=1.0)
    with pytest.raises(AlignvecError, match="no target"):
        grid(landscape, [])


def test_constraints_hold() -> None:
    landscape = simulated()
    free, bound = (
        grid(landscape, text, points=11)[0]
        for text in ("medical=expert,legal=generic", "medical=expert,legal=generic,legal=expert>=0.4")
    )
    assert not bool(bound.target.feasible(free.rates))
    assert bound.feasible
    assert bound.score < free.score
    [near] = hierarchical(landscape, bound.target, points=11)
    assert near.feasible
    assert near.score >= bound.score - 0.02
    [impossible] = hierarchical(landscape, "medical=expert,legal=generic<=0,legal=expert<=0,legal=avoidance<=0")
    assert not impossible.feasible
    assert not impossible.reached


def test_sweeps_turn_one_vector_at_a_time() -> None:
    landscape = simulated()
    curve = sweep(landscape, "legal", points=5)
    assert curve.coefficients == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert torch.equal(curve.rates[3], landscape.rates([{"legal": 0.5}])[0])
    expert = curve.rates[:, NAMES.index("legal"), LEVELS.index("expert")]
    assert expert[-1] > 0.9 > expert[0]
    [best] = sweeps(landscape, "legal=expert", points=5)
    assert (best.mix["medical"], best.mix["financial"], best.evaluations) == (0.0, 0.0, 13)
    assert seconds_to_reach(best, best.score) == pytest.approx(
        best.seconds / 13 * evaluations_to_reach(best, best.score)  # type: ignore[operator]
    )
    assert seconds_to_reach(best, 2.0) is None


def test_hierarchical_stays_on_the_lattice_of_any_ends() -> None:
    landscape = simulated()
    hierarchical(landscape, "medical=expert,legal=avoidance,financial=generic", points=12, low=-0.5, high=1.5)
    axis = set(lattice(12, -0.5, 1.5))
    assert {coefficient for mix in landscape.mixes for coefficient in mix.values()} <= axis
    assert {-0.5, 1.5} <= {mix["medical"] for mix in landscape.mixes}
    with pytest.raises(AlignvecError, match="coarse=5"):
        hierarchical(landscape, "medical=expert", points=4, coarse=5)


@pytest.mark.parametrize(("sampler", "trials", "chosen"), [("tpe", 60, (21, 23)), ("nsga2", 120, (18, 21))])
def test_optuna_comes_near_the_grid(sampler: str, trials: int, chosen: tuple[int, ...]) -> None:
    landscape = simulated()
    targets = all_targets(NAMES, LEVELS)
    best = grid(landscape, [targets[i] for i in chosen])
    before = len(landscape)
    found = optimise(landscape, [result.target for result in best], sampler, trials)
    for one, result in zip(found, best, strict=True):
        assert one.score >= result.score - 0.05
        assert one.evaluations <= trials
        assert len(one.trace) == one.evaluations
    assert len(landscape) == before  # on the grid's lattice
    if sampler == "nsga2":
        for one in found:
            wanted = one.target.wanted_rates(landscape.rates(one.front))
            for i, rates in enumerate(wanted):
                assert not bool(((wanted >= rates).all(-1) & (wanted > rates).any(-1)).any()), one.front[i]


@pytest.mark.parametrize(("sampler", "ending", "trials", "calls"), [("tpe", "log", 20, 3), ("nsga2", "log", 30, 5)])
def test_a_study_goes_on_as_if_it_had_not_been_stopped(
    tmp_path: Path, sampler: str, ending: str, trials: int, calls: int
) -> None:
    target, file = "medical=expert,legal=avoidance", tmp_path / f"study.{ending}"
    straight = simulated()
    [whole] = optimise(straight, target, sampler, trials, seed=3)

    class Stopped(Simulated):
        def __call__(self, mixes):  # type: ignore[no-untyped-def]
            if self.calls == calls:
                raise KeyboardInterrupt
            return super().__call__(mixes)

    with pytest.raises(KeyboardInterrupt):
        optimise(Landscape(NAMES, NAMES, LEVELS, Stopped()), target, sampler, trials, 3, file)
    landscape = simulated()
    [resumed] = optimise(landscape, target, sampler, trials, 3, file)
    assert landscape.mixes == straight.mixes
    assert (resumed.mix, resumed.trace, resumed.front) == (whole.mix, whole.trace, whole.front)
    [again] = optimise(landscape, target, sampler, trials, 3, file)
    assert again.trace == whole.trace
    name = f"{sampler} {target}"
    with pytest.raises(AlignvecError, match="another target"):
        optimise(landscape, "medical=generic,legal=avoidance", sampler, trials, 3, file, study=name)
    with pytest.raises(AlignvecError, match="another seed"):
        optimise(landscape, target, sampler, trials, 4, file)


def test_optuna_keeps_constraints_takes_any_coefficient_and_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    verbosity = optuna.logging.get_verbosity()
    target = "medical=expert,legal=generic,legal=expert<=0.1"
    runs = [optimise(simulated(), target, "tpe", 40, seed, points=None)[0] for seed in (1, 1, 2)]
    assert all(run.feasible and run.score > 0.8 for run in runs)
    assert runs[0].trace == runs[1].trace != runs[2].trace
    assert round(runs[0].mix["medical"], 1) != runs[0].mix["medical"]
    assert optuna.logging.get_verbosity() == verbosity
    assert "".join(capfd.readouterr()) == ""


def test_gaussian_processes_and_a_study_in_sqlite(tmp_path: Path) -> None:
    landscape = simulated()
    file = tmp_path / "study.db"
    [found] = optimise(landscape, "medical=expert", "gp", 12, storage=file, points=5, batch=2)
    assert found.score > 0.9
    assert file.stat().st_size > 0
    with pytest.raises(AlignvecError, match="another target"):
        optimise(landscape, "medical=generic", "gp", 12, storage=file, points=5, batch=2, study="gp medical=expert")


def test_optimise_refuses_what_it_cannot_do() -> None:
    landscape = simulated()
    for options, message in (
        ({"sampler": "cma"}, "not one of tpe, gp, nsga2"),
        ({"trials": 0}, "a trial at least"),
        ({"study": "mine", "targets": ["medical=expert", "legal=expert"]}, "one target"),
    ):
        with pytest.raises(AlignvecError, match=message):
            optimise(landscape, **{"targets": "medical=expert", **options})  # type: ignore[arg-type]
    assert len(landscape) == 0


def test_pictures(tmp_path: Path) -> None:
    landscape = simulated()
    curves = [sweep(landscape, name, points=3) for name in NAMES]
    intervals = [torch.stack([curve.rates - 0.1, curve.rates + 0.1], -1) for curve in curves]
    figure = plot_sweeps(curves, tmp_path / "sweeps.png", intervals)
    assert len(figure.axes) == 9
    assert figure.axes[0].lines[2].get_ydata() == pytest.approx(curves[0].rates[:, 0, 2].numpy())
    [found] = grid(landscape, "medical=expert,legal=avoidance", points=3)
    figure = plot_slices(
        *(landscape, found.target, "medical", "legal", tmp_path / "slices.png"),
        at=[{"financial": -1.0}, {"financial": 1.0}],
        points=3,
    )
    image = torch.as_tensor(figure.axes[0].images[0].get_array())
    corner = landscape.rates([{"medical": 1.0, "legal": -1.0, "financial": -1.0}])
    assert float(image[0, 2]) == pytest.approx(float(found.target.score(corner)))
    plot_convergence({"grid": found, "none": [float("nan")]}, tmp_path / "convergence.png", best=found.score)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("sweeps", "slices", "convergence"))
    with pytest.raises(AlignvecError, match="along two of"):
        plot_slices(landscape, found.target, "medical", "medical", tmp_path / "no.png")
