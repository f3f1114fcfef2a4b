"""What lives on an attached model is copied with it, and never pickled."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

from alignvec.errors import AlignvecError


class NotPickled:
    """A copy.deepcopy as of any object; a sentence where pickle (torch.save, another process) is tried."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AlignvecError(
            "a model with vectors attached cannot be pickled: call model.alignment.detach() first, or keep the base "
            "with model.save_pretrained() and the vectors with vector.save(), and attach them again after loading"
        )

    def __deepcopy__(self, memo: dict[int, Any], leave_out: Sequence[str] = ()) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name not in leave_out:
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin
