"""Calls a function when torch has been imported: at once if it is, otherwise at the end of its import."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME = "torch"


def once_torch_is_imported(prepare: Callable[[], None]) -> None:
    """Calls `prepare` once, after torch's own import is complete."""
    if NAME in sys.modules:
        prepare()
    else:
        sys.meta_path.insert(0, _TorchFinder(prepare))


class _TorchFinder:
    """Finds torch where it is, and has it tell when it has been imported."""

    def __init__(self, prepare: Callable[[], None]):
        self.prepare = prepare

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_prepare(module: ModuleType) -> None:
            execute(module)
            self.prepare()

        spec.loader.exec_module = execute_and_prepare
        return spec
