"""The package as a module that loads its names when they are first used."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Package(ModuleType):
    """The class of the module ``alignvec``, whose table ``_LAZY`` says which module each public name is loaded from.

    Five functions share their names with the modules that hold them: attach, check, convert, extract, merge. The name
    on the package is always the function, whichever module was imported first: Python binds a submodule that it has
    imported to its package, and that is where the function is taken out. The module itself is ``sys.modules``'s, or
    what ``from alignvec.attach import ...`` reads.
    """

    _LAZY: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        """A public name, or a submodule that nobody has imported so far; other names raise AttributeError."""
        missing = AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name.startswith("_"):
            raise missing
        if name in self._LAZY:
            value = getattr(importlib.import_module(self._LAZY[name]), name)
            setattr(self, name, value)
            return value
        module = f"{self.__name__}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise missing from None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and self._LAZY.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._LAZY})
