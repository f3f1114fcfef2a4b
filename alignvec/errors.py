"""The exceptions that alignvec raises for what it refuses."""

from alignvec.printable import printable


class AlignvecError(ValueError):
    """Bad input: one sentence that names the tensor, file or option and says what to do. Nothing was changed.

    The sentence is one line: control characters and line breaks of a hostile name are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RowsError(AlignvecError):
    """The rows of a batch cannot have different coefficients. problem: why not, without the advice."""

    def __init__(self, problem: str, advice: str = "use set() instead of set_rows()") -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
