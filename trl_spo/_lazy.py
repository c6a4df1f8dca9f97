# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Public names that are imported when they are first used, so that importing a package loads neither PyTorch nor Transformers."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], extra: str | None = None, needs: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    The `__getattr__` and `__dir__` of a package ([PEP 562](https://peps.python.org/pep-0562/)).

    Args:
        package (`str`):
            `__name__` of the package.
        modules (`Mapping[str, str]`):
            For each public name, the module in `package` that defines it.
        extra (`str`, *optional*):
            Extra of `trl-spo` that the error names if one of `needs` is not installed.
        needs (`Collection[str]`, *optional*):
            What that extra brings.

    Returns:
        The two functions.
    """
    names = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f".{modules[name]}", package), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in needs:
                raise
            raise ImportError(
                f'`{package}.{name}` needs the package {missing!r}. Run `pip install "trl-spo[{extra}]"`.'
            ) from error
        names[name] = value  # next time, it is found without coming here
        return value

    return get, lambda: sorted({*names, *modules})
