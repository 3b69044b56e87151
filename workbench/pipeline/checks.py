"""What can be known to be wrong with the settings of a run, as early as it can be known."""

from pathlib import Path
from typing import Any

from workbench.attribution import filled_in
from workbench.config import Config
from workbench.facts import FactSet, general_text
from workbench.interfere import checked_metrics
from workbench.learning import FEWEST
from workbench.loki import BASELINES
from workbench.models import HookedModel
from workbench.results import load_json
from workbench.selection import COLLISIONS, READ_INTERFERENCE, check_choice

#: What each LoKI method changes in the selection of the configuration.
LOKI_METHODS: dict[str, dict[str, Any]] = {
    "loki": {},
    "loki_random": {"strategy": "random"},
    "loki_signed": {"score": "signed"},
    "loki_magnitude": {"score": "magnitude"},
    "loki_highest": {"strategy": "layer_highest"},
    "loki_lowest": {"strategy": "global_lowest"},
}


def check(config: Config) -> None:
    """Raise for every setting that can be known to be wrong before anything is loaded."""
    for method in config.methods:
        if method not in LOKI_METHODS and method not in BASELINES:
            raise ValueError(f"methods knows {', '.join([*LOKI_METHODS, *BASELINES])}, not {method!r}.")
    check_choice(config.selection.strategy, config.selection.quota)
    out = Path(config.out)
    if out.exists() and not (out.is_dir() and ((out / "stages").is_dir() or not any(out.iterdir()))):
        raise ValueError(f"{out} holds something that is not a run; give another folder as out.")
    if (out / "provenance.json").is_file():
        load_json(out / "provenance.json")  # which every stage adds to
    filled_in(config.attribution.model_dump(exclude={"max_facts"}))
    i = config.interference
    checked_metrics(i.metrics, i.top, draws=i.draws)
    if not is_advised(config) and any(reads_advice(config, method) for method in config.methods):
        raise ValueError(
            f"The strategy {config.selection.strategy!r} reads {', '.join(COLLISIONS)}: have one of them among "
            f"interference.metrics, not only {', '.join(i.metrics)}, or give another selection.strategy."
        )
    general_text(config.evaluation.general)


def is_advised(config: Config) -> bool:
    """Whether a measure from which advice on layers is read is among those of the run."""
    return bool({*COLLISIONS} & {*config.interference.metrics})


def reads_advice(config: Config, method: str) -> bool:
    """Whether a method trains what the advice on layers says."""
    changed = LOKI_METHODS.get(method, {"strategy": "none"})
    return changed.get("strategy", config.selection.strategy) in READ_INTERFERENCE


def check_selection(config: Config, model: HookedModel, unit: str) -> None:
    """Raise if the quota or the layers do not fit the model, which is known only when it is open."""
    chosen, width = config.selection, model.width(unit)
    check_choice(chosen.strategy, chosen.quota, width)
    beyond = [layer for layer in chosen.layers or () if not 0 <= layer < model.n_layers]
    if beyond:
        raise ValueError(f"selection.layers has {beyond[0]}, but the model has layers 0 to {model.n_layers - 1}.")


def check_ids(config: Config, retained: FactSet, implanted: FactSet) -> None:
    """Raise if the harm is asked for, of all facts together, and two of them have one id."""
    texts = retained.texts if config.interference.harm else {}
    if twice := [name for name, text in implanted.texts.items() if texts.get(name, text) != text]:
        raise ValueError(
            f"interference.harm takes retained and implanted facts together, and {twice[0]!r} is the id of one fact of "
            "each: give them ids of their own, or leave the harm out."
        )


def check_harm(config: Config, n_facts: int) -> None:
    """Raise if the harm is asked for of fewer facts, known and new, than it takes to say what predicts it."""
    if config.interference.harm and n_facts < FEWEST:
        raise ValueError(
            f"interference.harm needs at least {FEWEST} attributed facts, known and new, and there are no more than "
            f"{n_facts}: raise attribution.max_facts, give more facts as retained or implanted, or leave the harm out."
        )
