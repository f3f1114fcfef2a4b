"""Figures into files. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignvec.errors import AlignvecError
from alignvec.folders import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_picture(output: str | Path) -> None:
    """AlignvecError for a file name whose ending is none of a picture that matplotlib draws."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(output).suffix[1:].lower() not in known:
        raise AlignvecError(f"{output} ends like no picture: choose one of {', '.join(f'.{kind}' for kind in known)}")


def write_picture(figure: Figure, output: str | Path) -> None:
    """The figure as a picture file, which appears whole or not at all; its labels are shown as they are, no formulas.

    Raises AlignvecError for an ending that is no picture's.
    """
    from matplotlib.text import Text

    require_picture(output)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replaced(Path(output)) as beside:
        figure.savefig(beside, dpi=150, format=Path(output).suffix[1:].lower())
