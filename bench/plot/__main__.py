"""`python -m bench.plot`."""

from bench import plot, record

record.command(plot.main)
