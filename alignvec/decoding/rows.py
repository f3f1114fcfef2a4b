"""What the host knows of a row that is being decoded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from alignvec.decoding.mixes import Follow, Values
from alignvec.decoding.sampling import Sampling
from alignvec.errors import AlignvecError
from alignvec.standing import Reading


@dataclass(eq=False)
class Row:
    """One row of a decoder.

    prompt: its token ids. limit: most tokens to generate. mix: what is set for all, or the row of the coefficient table
    by the number of the generated token; None for a model without vectors. recompute: its keys and values are written
    anew when its mix changes. policies: rows of its group. written: the weights and the mix of all of its keys and
    values, None where they have several. launched: steps that it took part in. tokens: what it has generated, as far as
    the host has seen.
    """

    index: int
    prompt: Sequence[int]
    limit: int
    sampling: Sampling
    mix: Follow | Callable[[int], Values] | None
    recompute: bool = False
    policies: int = 1
    written: tuple[Hashable, Values | None] | None = None
    launched: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """All token ids that the host knows of; keys and values of the last are not in the cache yet."""
        return [*self.prompt, *self.tokens]

    @property
    def ended(self) -> bool:
        """Whether all its steps are launched."""
        return self.launched >= self.limit

    def own(self) -> Values | None:
        """The mix of its own for its next step, which a function of the user's may give; None where it follows."""
        return None if self.mix is None or isinstance(self.mix, Follow) else self.mix(self.launched)

    def under(self, reading: Reading, own: Values | None) -> Values | None:
        """The mix of its next step; None where the weights hold all that there is. own: what `own` said.

        Raises:
            AlignvecError: it has a mix of its own and another is materialised, or a batch that rows do not divide.
        """
        if isinstance(self.mix, Follow):
            return self.mix.of(reading)
        if self.mix is not None and reading.mixes is None:
            raise AlignvecError(
                f"row {self.index} has a mix of its own, which it cannot have while a mix is materialised in the "
                "weights; call restore() first, or let it follow what is materialised: mix=None in join() and set_row()"
            )
        return own
