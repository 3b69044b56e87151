"""Shape and type annotations of the package are enforced in every test and doctest (jaxtyping with beartype)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores

from jaxtyping import install_import_hook

install_import_hook("workbench", "beartype.beartype")
