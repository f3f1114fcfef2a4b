"""The one exception that alignvec raises for input it refuses."""


class AlignvecError(ValueError):
    """Bad input: one sentence that names the tensor, file or option and says what to do. Nothing was changed."""
