"""Which backend and which execution a call takes.

`backends` says where kernels run, `cost` what an execution of a `problem` takes on one of `devices`, `choice` which it
is, and `explain` says it to a user.
"""

from alignvec.planner.backends import (
    BACKENDS,
    EXECUTIONS,
    GROUPED,
    PRECISIONS,
    beside_linear,
    check_choice,
    linear_kernel,
    linear_module,
    resolve_backend,
)
from alignvec.planner.choice import break_even, choose, forget, plan
from alignvec.planner.devices import find
from alignvec.planner.problem import Plan, Problem

__all__ = [
    "BACKENDS",
    "EXECUTIONS",
    "GROUPED",
    "PRECISIONS",
    "Plan",
    "Problem",
    "beside_linear",
    "break_even",
    "check_choice",
    "choose",
    "find",
    "forget",
    "linear_kernel",
    "linear_module",
    "plan",
    "resolve_backend",
]
