"""Evaluation suites, judges of sound and generation tasks by name. Importing this module or any member does not import
the engine: recipes and the page only need names and descriptions."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from .evaluation.judge import Judge
from .evaluation.suite import Suite
from .inference.task import Task

Member = TypeVar("Member", Suite, Judge, Task)


class Registry(Generic[Member]):
    """One member per file in `package`: nll.py holds the class named "nll", continue_.py the one named "continue" (the
    underscore avoids Python's keywords). A new file is a new member; there is no other list."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._members: dict[str, Member] = {}

    def register(self, member: Callable[[], Member]) -> Callable[[], Member]:
        """A class decorator."""
        made = member()
        self._members[made.name] = made
        return member

    def names(self) -> tuple[str, ...]:
        """Sorted. Lists the files without importing them."""
        return tuple(sorted({*self._files(), *self._members}))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Member:
        """Raises KeyError for an unknown name."""
        if name not in self._members and name in self._files():
            importlib.import_module(f"{self._package}.{self._files()[name]}")
        return self._members[name]

    def _files(self) -> dict[str, str]:
        """Module names by member name."""
        modules = (module.name for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__))
        return {module.removesuffix("_"): module for module in modules}


SUITES: Registry[Suite] = Registry("megatron_soda.evaluation.suites")
JUDGES: Registry[Judge] = Registry("megatron_soda.evaluation.judges")
TASKS: Registry[Task] = Registry("megatron_soda.inference.tasks")
