"""The scripts of `analyses/` and `benchmarks/` as modules, for their tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).parent.parent


def script(folder: str, name: str) -> ModuleType:
    """`folder/name.py`, loaded anew."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", HOME / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
