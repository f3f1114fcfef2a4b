"""Benchmarks: measured on an idle machine, never part of the tests."""
