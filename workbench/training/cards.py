"""Model cards: a README.md whose head the Hugging Face hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCardData

from workbench.intervals import means
from workbench.training.bounds import undone

#: Library -> what the hub calls the relation to the base model.
RELATIONS = {"peft": "adapter", "transformers": "finetune"}
#: What the hub calls models that have another name here.
HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def hub_id(name: str, path: Path | None) -> str | None:
    """The hub's name of a model that was opened, or None for a folder or a file of this machine.

    >>> hub_id("smollm2-135m", None), hub_id("org/model", None), hub_id("mine", Path("models/mine"))
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'org/model', None)
    """
    if name in HUB_IDS:
        return HUB_IDS[name]
    if path is None:  # a loaded model, by the name that its configuration has
        return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else None
    return name if path.parent.name == "snapshots" else None  # of the hub's cache


def card(
    summary: Mapping[str, Any], *, numbers: Mapping[str, str] | None = None, command: str = "", merged: bool = False
) -> str:
    """The card of an adapter, or of the model with the adapter merged into its weights.

    Args:
        summary: what `implant` writes into `training.json`.
        numbers: what was measured, name -> figure in words.
        command: the command that trained it.
        merged: whether the card is for a whole model.
    """
    kind = summary["peft_type"]
    library = "transformers" if merged or kind == "FULL" else "peft"
    origin = summary.get("base_hub_id", HUB_IDS.get(summary["base"]))
    head = ModelCardData(
        base_model=origin,
        base_model_relation=RELATIONS[library] if origin else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["knowledge-workbench", kind.lower()],
    )
    base = f"`{summary['base']}` (weights {summary['base_digest'][:12]})"
    what = f"A {kind} adapter for {base}"
    if library == "transformers":
        part = "full" if summary["trainable_parameters"] == summary["parameters"] else "part"
        what = f"{base}, fine-tuned in {part}" if kind == "FULL" else f"{base} with a {kind} adapter merged into it"
    lines = [
        f"{what}; made with the knowledge workbench.",
        "",
        f"- trained on: `{summary['facts']}`, {summary['examples']} prompts",
        f"- trained numbers: {summary['trainable_parameters']:,} of {summary['parameters']:,}",
        *([f"- rank: {summary['rank']}"] if summary.get("rank") else []),
        f"- {summary['steps']} steps, learning rate {summary['learning_rate']:g}, seed {summary['seed']}",
        f"- trained prompts answered: {summary['efficacy']:.0%}",
        *(f"- {sentence}" for sentence in undone(summary.get("watches", []))),
        *(f"- {name}: {figure}" for name, figure in (numbers or {}).items()),
    ]
    if library == "peft" and kind == "LOKI":
        lines += ["", "`import workbench`, before or after peft, is what lets peft read it."]
    if command:
        lines += ["", "```sh", command, "```"]
    return "\n".join(["---", head.to_yaml(), "---", *lines, ""])


def figures_of(frame: pd.DataFrame) -> dict[str, str]:
    """What a fine-tune cost, in words: known facts still answered, perplexity and divergence on general text.

    `frame` is one of `measure_forgetting`; the intervals are 95% bootstrap intervals of the change.
    """
    rows = means(frame).set_index(["suite", "metric"])
    words = {"retained": "known facts still answered", "paraphrase": "held-out wordings answered"}
    figures = {}
    for suite, name in words.items():
        if (suite, "accuracy") in rows.index:
            row = rows.loc[(suite, "accuracy")]
            change = f"change {row['low']:+.0%} to {row['high']:+.0%}"
            figures[name] = f"{row['after']:.0%} of {row['n']:.0f} (before: {row['before']:.0%}; {change})"
    row, kl = rows.loc[("general", "perplexity")], rows.loc[("general", "kl")]
    change = f"change {row['low']:+.2f} to {row['high']:+.2f}"
    figures["perplexity on general text"] = f"{row['after']:.2f} (before: {row['before']:.2f}; {change})"
    figures["divergence (KL) on general text"] = f"{kl['after']:.3f} nats per token"
    return figures
