"""The benchmark suite: sections of cases, measured by `python -m bench.run` into one file of rows a device.

A section is a module here that is listed in `registry.py`, with

    cases(setting) -> list[Case]                every number that it gives; one that cannot be had here says why
    measure(setting, cases) -> Iterator[Row]    a row for each of the cases it is given, in any order

`case.row(samples)` makes a row of what was measured, `case.skipped(reason)` one of what turned out to be out of reach.
What a section compares it measures side by side, in one call of `bench.timing.samples` where it can: only ratios of one
run count. Ratios that have targets are cases of their own, in the unit "x". Its picture is `bench/plot/<section>.py`.
"""
