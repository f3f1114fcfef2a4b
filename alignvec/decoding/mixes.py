"""Which mix of coefficients a row decodes its next token with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from alignvec.coefficients import Coefficients
from alignvec.errors import AlignvecError
from alignvec.printable import quoted
from alignvec.standing import Reading

Mix: TypeAlias = Mapping[str, float]
# A mix, or one for each generated token: by a table (its last entry stays) or a function of the token's number from 0.
Schedule: TypeAlias = Mix | Sequence[Mix] | Callable[[int], Mix]
Values: TypeAlias = tuple[float, ...]  # one row of the coefficient table


@dataclass(frozen=True)
class Follow:
    """What `Alignment.set` or `set_rows` gives sequence `number` of a batch, and what `materialise` does."""

    number: int = 0
    batch: int = 1

    def of(self, reading: Reading) -> Values | None:
        """The row of the table; None where the weights hold all that there is."""
        mixes = reading.mixes
        if mixes is None:
            return None
        if self.batch % len(mixes):
            raise AlignvecError(
                f"a batch of {self.batch} does not divide over the {len(mixes)} rows of coefficients; "
                "call set_rows with one mix per sequence, set() for one mix for all, or give each row a mix"
            )
        return mixes[self.number * len(mixes) // self.batch]


def resolve(coefficients: Coefficients, schedule: Schedule) -> Callable[[int], Values]:
    """The row of the table by the number of the generated token.

    Raises:
        AlignvecError: an empty table, an unknown vector or a coefficient that is not finite; those of a function are
            found when it is called.
    """
    if isinstance(schedule, Mapping):
        values = coefficients.mix(schedule)
        return lambda token: values
    if callable(schedule):
        return lambda token: coefficients.mix(schedule(token))
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise AlignvecError(
            f"{quoted(schedule)} is no schedule: give a mix, a list of mixes, or a function of the position"
        )
    table = [coefficients.mix(mix) for mix in schedule]
    return lambda token: table[min(token, len(table) - 1)]
