"""What defines a score: the settings of an attribution, and the published definitions by name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from workbench.metrics import OBJECTIVES
from workbench.models import check_unit
from workbench.path import RULES, quadrature

#: Points of the path where the user names none and the rule does not adapt.
STEPS = 16

#: What a method fixes. Everything else is the user's; `steps` here is only a default, None adapts the rule.
FIXED: dict[str, Mapping[str, Any]] = {
    "ig": {"steps": None},
    "grad_x_act": {"steps": 1},
    "ablation": {"steps": 1},
    "activation": {"steps": 1},
    "random": {"steps": 1},
    "loki-paper": {"steps": 7, "unit": "node", "rule": "right", "baseline": "zero", "scope": "last"},
    "loki-code": {
        "steps": 7,
        "unit": "node",
        "rule": "riemann_trapezoid",
        "baseline": "blank",
        "scope": "all",
        "objective": "prob",
        "target": "predicted",
        "read": "last",
    },
    "kn": {"steps": 20, "unit": "neuron", "rule": "right", "baseline": "zero", "scope": "last", "objective": "prob"},
    "kn-code": {
        "steps": 20,
        "unit": "neuron",
        "rule": "left",
        "baseline": "zero",
        "scope": "last",
        "objective": "prob",
    },
}

#: Methods that have no path, so no number of steps.
_ONE_STEP = [name for name, fixed in FIXED.items() if fixed["steps"] == 1]


@dataclass(frozen=True)
class Settings:
    """What defines a score; written into every result.

    `steps` is 0 where the rule is adaptive. `read` says at which of the moved positions scores are read: all of them
    (and summed), or the last prompt token only. `seed` is that of the method `random`, else 0.
    """

    method: str
    unit: str
    steps: int
    rule: str
    baseline: str
    scope: str
    objective: str
    target: str
    tolerance: float
    read: str = "moved"
    seed: int = 0


#: What the arguments of `attribute` are when neither the user nor the method says anything.
DEFAULTS = {
    "unit": "node",
    "rule": "midpoint",
    "baseline": "zero",
    "scope": "last",
    "objective": "logprob",
    "target": "gold",
    "read": "moved",
}


def checked_settings(
    method: str = "ig",
    unit: str | None = None,
    steps: int | None = None,
    rule: str | None = None,
    baseline: str | None = None,
    scope: str | None = None,
    objective: str | None = None,
    target: str | None = None,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Settings:
    """The settings, or one sentence about the first that is unknown or contradicts the method.

    A published definition (`loki-paper`, `loki-code`, `kn`, `kn-code`) fixes what it defines: an argument that is left
    out (None) is the definition's, or else one of `DEFAULTS`; one that contradicts the definition is refused.
    """
    if not isinstance(method, str) or method not in FIXED:
        raise ValueError(f"method must be one of {', '.join(FIXED)}, not {method!r}.")
    asked = {"unit": unit, "rule": rule, "baseline": baseline, "scope": scope, "objective": objective, "target": target}
    given = {name: value for name, value in asked.items() if value is not None}
    check_unit(given.get("unit", "node"))
    choices: dict[str, Sequence[str]] = {
        "rule": list(RULES),
        "baseline": ["zero", "blank"],
        "scope": ["last", "all"],
        "objective": list(OBJECTIVES),
        "target": ["gold", "predicted"],
    }
    for name, allowed in choices.items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {given[name]!r}.")
    fixed = {name: value for name, value in FIXED[method].items() if name != "steps"}
    for name, value in given.items():
        if value != fixed.get(name, value):
            raise ValueError(f"{method} is defined with {name}={fixed[name]!r}; leave {name} out, or use method='ig'.")
    if not (isinstance(tolerance, Real) and 0 < tolerance < 1):
        raise ValueError(f"tolerance must lie between 0 and 1, not {tolerance!r}.")
    if not (isinstance(seed, Integral) and seed >= 0):
        raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}.")
    settings = DEFAULTS | fixed | given
    steps = _checked_steps(method, steps, settings["rule"])
    return Settings(
        method=method,
        steps=steps,
        tolerance=0.0 if steps else float(tolerance),
        seed=int(seed) if method == "random" else 0,
        **settings,
    )


def filled_in(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `attribute` that define scores, checked, with what the method says where one is left out.

    Steps stay left out: their number may adapt.

    >>> filled_in({"method": "kn", "unit": None, "steps": None})
    {'method': 'kn', 'unit': 'neuron', 'steps': None}
    """
    full = asdict(checked_settings(**definition)) | {"steps": None}
    return {name: full[name] if value is None else value for name, value in definition.items()}


def _checked_steps(method: str, steps: Any, rule: str) -> int:
    """Points of the path; 0 where their number adapts."""
    if steps is not None and (not isinstance(steps, Integral) or steps < 1):
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}.")
    steps = None if steps is None else int(steps)  # of NumPy, say
    if method in _ONE_STEP:
        if steps not in (None, 1):
            raise ValueError(f"{method} has one step; use method='ig' for more.")
        return 1
    if steps is None:
        steps = FIXED[method]["steps"]
    if steps is None:
        return 0 if rule == "midpoint" else STEPS
    quadrature(rule, steps)
    return steps
