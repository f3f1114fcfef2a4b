"""The exceptions that alignvec raises for what it refuses."""


class AlignvecError(ValueError):
    """Bad input: one sentence that names the tensor, file or option and says what to do. Nothing was changed."""


class RowsError(AlignvecError):
    """The rows of a batch cannot have different coefficients. problem: why not, without the advice."""

    def __init__(self, problem: str, advice: str = "use set() instead of set_rows()") -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
