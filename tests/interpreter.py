"""Triton's interpreter, quick enough for tests."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator


@contextlib.contextmanager
def searching_once() -> Iterator[None]:
    """Spare the interpreter looking through all of triton.language again at every call of a kernel's helper.

    It replaces the language's functions at every such call, nested ones too, where nothing is left to replace.
    """
    import triton

    interpreter = importlib.import_module("triton.runtime.interpreter")
    search = getattr(interpreter, "_patch_builtin", None)  # not a public name: without it the tests are only slower
    is_builtin = triton.language.core.is_builtin
    replaceable: dict[object, list[str]] = {}

    def search_once(package, *arguments):
        if package not in replaceable:
            replaceable[package] = [name for name in dir(package) if is_builtin(getattr(package, name, None))]
        names = replaceable[package]
        if names and is_builtin(getattr(package, names[0])):
            search(package, *arguments)

    if search is not None:
        interpreter._patch_builtin = search_once
    try:
        yield
    finally:
        if search is not None:
            interpreter._patch_builtin = search
