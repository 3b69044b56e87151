"""Warnings of peft and torch about what is meant to be so."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

#: Starts of warnings about what is meant to be so.
EXPECTED = (
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers by a name that transformers has renamed
    "(PiSSA|CorDA|OLoRA) changes the base weights",  # and is converted when it is saved
    "Could not find a config file in",  # of a model without a folder, when it is converted
    "The following rank_pattern keys did not match",  # AdaLoRA's, whose keys LoRA's check does not know
    "Unsupported layer type '<class '.*(Norm|norm)",  # LN tuning trains normalisations
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias:",  # LoRA's own bias is 1-D
    "Sparse invariant checks are implicitly disabled",  # SHiRA's sparse delta
)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Leave out the warnings of `EXPECTED` inside the `with`."""
    with warnings.catch_warnings():
        for start in EXPECTED:
            warnings.filterwarnings("ignore", start)
        yield
