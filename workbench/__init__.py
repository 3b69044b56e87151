"""A workbench for where language models keep what they know, and for teaching them with less damage.

The names of `__init__.pyi` open their rooms when they are first used, so that `import workbench` and
`workbench --help` are quick. peft reads adapters of LoKI once this package is imported, before or after peft.

On Intel's and AMD's processors a number does not depend on what else is computed with it: Intel's are told to round
matrix products alike for any number of rows and threads (`MKL_CBWR`, unless it is set), AMD's do so by themselves. That
takes hold where this package is imported before the first product.
"""

import os

import lazy_loader

from workbench.announcing import announce

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # conditional numerical reproducibility of oneMKL
announce()
