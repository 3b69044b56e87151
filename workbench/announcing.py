"""peft is told of LoKI as soon as both `workbench` and peft are imported, whichever comes first.

Rooms open when they are used, so `import workbench` alone neither imports peft nor registers LoKI with it. Where peft
is there already, LoKI is registered at once; else a finder on `sys.meta_path` waits for peft, finds it as others do,
and steps aside when peft has been executed. What goes wrong on the way is logged: it never keeps peft from opening.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def announce() -> None:
    """Register LoKI with peft now, or once peft is imported; a peft that is half imported is left alone."""
    peft = sys.modules.get("peft")
    if peft is None:
        sys.meta_path.insert(0, _AfterPeft())
    elif not getattr(peft.__spec__, "_initializing", False):
        _register()


class _AfterPeft(MetaPathFinder):
    """Finds peft, and nothing else, by asking the other finders; LoKI is registered after peft was executed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the others, with a loader that goes on to `_register`; `path` is whatever Python hands on."""
        if fullname != "peft":
            return None
        others = [one for one in sys.meta_path if one is not self and hasattr(one, "find_spec")]
        asked = (one.find_spec(fullname, path, target) for one in others)
        spec = next((spec for spec in asked if spec is not None), None)
        if spec is not None and spec.loader is not None:
            with suppress(AttributeError, TypeError):  # a loader that cannot be added to loads peft as it is
                setattr(spec.loader, "exec_module", partial(self._execute, spec.loader.exec_module))  # noqa: B010
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        with suppress(ValueError):  # another thread was first
            sys.meta_path.remove(self)
        _register()


def _register() -> None:
    """Import the room that registers LoKI."""
    try:
        import_module("workbench.loki")
    except Exception as error:  # peft works without LoKI
        logging.getLogger(__name__).warning("LoKI is not registered with peft: %s", error)
