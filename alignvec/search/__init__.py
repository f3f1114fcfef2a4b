"""Finding the coefficients that reach a target: on a grid, coarse to fine, or with Optuna.

Nothing here depends on a model: `Landscape` takes any callable that gives the rates of mixes.
"""

from alignvec.search.hierarchical import hierarchical
from alignvec.search.key import landscape_key
from alignvec.search.landscape import Landscape, View
from alignvec.search.lattice import Sweep, grid, lattice, sweep, sweeps
from alignvec.search.optimise import optimise
from alignvec.search.recorded import load_grid, save_grid
from alignvec.search.result import Result, evaluations_to_reach, seconds_to_reach
from alignvec.search.target import Constraint, Target, all_targets

__all__ = [
    "Constraint",
    "Landscape",
    "Result",
    "Sweep",
    "Target",
    "View",
    "all_targets",
    "evaluations_to_reach",
    "grid",
    "hierarchical",
    "landscape_key",
    "lattice",
    "load_grid",
    "optimise",
    "save_grid",
    "seconds_to_reach",
    "sweep",
    "sweeps",
]
