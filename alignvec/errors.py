"""The exceptions that alignvec raises for what it refuses."""

from alignvec.printable import printable

LONGEST = 4000  # characters of a sentence, whatever a file says


class AlignvecError(ValueError):
    """Bad input: one sentence that names the tensor, file or option and says what to do. Nothing was changed.

    The sentence is one line of bounded length: control characters and line breaks of a hostile name are shown as
    escapes, and of what is very long the beginning and the end.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 1000]} ... {text[-900:]}")


class RowsError(AlignvecError):
    """The rows of a batch cannot have different coefficients. problem: why not, without the advice."""

    def __init__(self, problem: str, advice: str = "use set() instead of set_rows()") -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
