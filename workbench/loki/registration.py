"""Make LoKI known to peft, whose methods are the members of a closed enumeration."""

from __future__ import annotations

from importlib.metadata import version

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "LOKI"


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register LoKI with peft; a second call changes nothing.

    RuntimeError when this peft's `PeftType` cannot be extended, or already has a LoKI of its own.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(NAME)) if NAME in PeftType.__members__ else None
    if known is not None:
        if (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
            raise RuntimeError(f"peft {version('peft')} has a method {NAME} of its own ({known}); use peft below it.")
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(NAME)] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(NAME)] = model_cls
        return
    try:
        if NAME not in PeftType.__members__:
            _add_member(NAME)
        member = PeftType(NAME)
        whole = (
            member is PeftType[NAME] and member in list(PeftType) and member == NAME and isinstance(member, PeftType)
        )
        if not whole:
            raise TypeError("the new member is not found by every way")
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="loki_")
        if PEFT_TYPE_TO_PREFIX_MAPPING[member] != "loki_":
            raise TypeError("the prefix was not taken over")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"peft {version('peft')} does not let a method be added ({error}); install peft 0.21, which does."
        ) from error


def _add_member(name: str) -> None:
    """Add one string member to the enumeration `PeftType`."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable = getattr(PeftType, "_hashable_values_", None)
    if hashable is not None:  # Python 3.13 and later look values up here
        hashable.append(name)
