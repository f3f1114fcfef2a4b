"""Which backend and which execution a call takes.

`backends` says where kernels run, `cost` what each execution costs, `devices` on what, `explain` says it to a user.
"""

from alignvec.planner.backends import (
    BACKENDS,
    EXECUTIONS,
    PRECISIONS,
    check_choice,
    linear_kernel,
    resolve_backend,
)
from alignvec.planner.cost import Plan, Problem, break_even, choose, plan
from alignvec.planner.devices import find

__all__ = [
    "BACKENDS",
    "EXECUTIONS",
    "PRECISIONS",
    "Plan",
    "Problem",
    "break_even",
    "check_choice",
    "choose",
    "find",
    "linear_kernel",
    "plan",
    "resolve_backend",
]
