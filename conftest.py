"""Shape and type annotations of the package are enforced in every test and doctest (jaxtyping with beartype)."""

import ast
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores

from jaxtyping import _import_hook, install_import_hook


class Outermost(_import_hook.JaxtypingTransformer):
    """Leaves closures as they are: a check is compiled where its function is made, and hooks are made at every pass."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Instrument a function unless another one makes it."""
        return (
            node if any(isinstance(one, ast.FunctionDef) for one in self._parents) else super().visit_FunctionDef(node)
        )


_import_hook.JaxtypingTransformer = Outermost
install_import_hook("workbench", typechecker="beartype. beartype")  # spelt so, its cached bytecode is this hook's own


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of every later search for garbage: each training makes one."""
    gc.collect()
    gc.freeze()
