"""The compiled extension ``flmoe_fast._C``, which nothing else imports."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and one line on why there is none."""
    try:
        return importlib.import_module("flmoe_fast._C"), ""
    except ModuleNotFoundError:
        return None, "built without the C++ extension: reinstall with a C++ compiler present and FLMOE_NATIVE=on"
    except ImportError as error:
        return None, f"the C++ extension does not load here: {error}"


def missing() -> str:
    """Why there is no extension; empty if there is one."""
    return extension()[1]


def module() -> ModuleType:
    """The compiled module, where :func:`missing` says nothing."""
    found, why = extension()
    if found is None:
        raise ImportError(why, name="flmoe_fast._C")
    return found
