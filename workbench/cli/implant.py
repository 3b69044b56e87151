"""A fine-tune of one's own: `implant`, and `export` for those who do not have this package."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import FORMATS, Chat, Count, Quiet, Seed, app
from workbench.cli.filtering import share_or_number
from workbench.config import STRATEGIES, Config


@app.command(name="implant")
def implant_command(
    *,
    data: Annotated[str, Parameter(help="what to teach: a file of prompts and completions, of chats, or of facts")],
    out: Annotated[Path, Parameter(help="the folder to write; a second start goes on where the first stopped")],
    model: Annotated[
        str, Parameter(help="default's name, folder of safetensors, .gguf file or hub id")
    ] = "smollm2-135m",
    method: Annotated[str, Parameter(help="loki, lora, rslora, dora, pissa, full, ...")] = "loki",
    quota: Annotated[
        float | None, Parameter(help="loki: percent of the units of every layer that is trained (10 when not given)")
    ] = None,
    strategy: Annotated[
        str | None, Parameter(help=f"loki: how the units are selected: {STRATEGIES} (layer_balanced when not given)")
    ] = None,
    score: Annotated[
        Literal["magnitude", "signed"] | None,
        Parameter(help="loki: what the units are ranked by (magnitude when not given)"),
    ] = None,
    selection: Annotated[
        Path | None,
        Parameter(help="a position file or selection.json: loki trains it without attribution, others its layers"),
    ] = None,
    layers: Annotated[
        tuple[int, ...] | None, Parameter(consume_multiple=True, negative="", help="train only these layers")
    ] = None,
    unit: Annotated[
        Literal["node", "neuron"] | None,
        Parameter(help="rows or columns of the down-projection; that of a saved selection, or node, when not given"),
    ] = None,
    rank: Annotated[
        int | None,
        Parameter(help="rank of the methods that have one; loki: 0, the rows in full", validator=Number(gte=0)),
    ] = None,
    retained: Annotated[
        str, Parameter(help="facts that the model may know and shall keep: world, or a file")
    ] = "world",
    max_facts: Annotated[
        int, Parameter(help="loki: attribute at most so many known facts", validator=Number(gte=1))
    ] = 30,
    max_retained: Annotated[
        int, Parameter(help="read at most so many known facts before and after", validator=Number(gte=1))
    ] = 80,
    general: Annotated[
        str, Parameter(help="general text to read before and after: general, or a text file")
    ] = "general",
    epochs: Annotated[
        Count, Parameter(help="passes over the data: 3, or for facts at most 60, until they are known")
    ] = None,
    target: Annotated[float, Parameter(help="stop when this share of the prompts is answered word for word")] = 0.95,
    target_loss: Annotated[
        float | None,
        Parameter(help="stop by this training loss instead, so that arms are compared at matched loss"),
    ] = None,
    learning_rate: Annotated[float | None, Parameter(help="of AdamW; the method's own default when not given")] = None,
    rates: Annotated[
        str | None,
        Parameter(
            help="learning rates to try, as 3e-4,1e-3: of those that reach the target the one that forgets least is "
            "taken, and if none does the one that learns most"
        ),
    ] = None,
    batch_size: Annotated[int, Parameter(help="examples per step", validator=Number(gte=1))] = 16,
    loss: Annotated[
        Literal["plain", "sample", "token", "soft"],
        Parameter(help="cross-entropy; with weights by meaning for samples or tokens; or with the semantic term"),
    ] = "plain",
    beta: Annotated[
        float | None, Parameter(help="sample: how much weight follows distance (1); negative prefers the near")
    ] = None,
    clip: Annotated[float | None, Parameter(help="sample: weights lie between 1/clip and clip (5)")] = None,
    refresh: Annotated[
        int | None, Parameter(help="sample: weigh anew every so many steps (20)", validator=Number(gte=1))
    ] = None,
    gamma: Annotated[
        float | None, Parameter(help="token: how much more a token far from its target weighs (1)")
    ] = None,
    soft_weight: Annotated[float | None, Parameter(help="soft: weight of the semantic distance (1)")] = None,
    permuted: Annotated[
        bool,
        Parameter(negative="", help="the control of loss: weights (sample, token) or meanings (soft) go to others"),
    ] = False,
    rule: Annotated[
        Literal["all", "spread", "band", "near_diverse", "random", "loss"],
        Parameter(name="--filter", help="of facts: teach only those that this rule keeps (see workbench filter)"),
    ] = "all",
    keep: Annotated[
        str | None, Parameter(help="of --filter: a share (0.7 when not given), or a number of facts, as 80")
    ] = None,
    filter_weight: Annotated[
        float | None, Parameter(help="of --filter spread (4 when not given) or near_diverse (1): spread against near")
    ] = None,
    filter_low: Annotated[
        float | None, Parameter(help="of --filter band: the quantile where it starts; the middle when not given")
    ] = None,
    filter_metric: Annotated[
        Literal["d_soft", "d_emb", "d_layer"] | None, Parameter(help="of --filter: the distance (d_soft)")
    ] = None,
    watch: Annotated[
        float | None,
        Parameter(
            help="stop before more than this share of the known facts is lost; 16 are read, every epoch at least"
        ),
    ] = None,
    watch_drift: Annotated[
        float | None,
        Parameter(help="stop before the semantic distance of the known facts grows by more than this; read as --watch"),
    ] = None,
    seed: Seed = 0,
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    chat: Chat = False,
    device: str = "auto",
    dtype: str = "auto",
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on your own data, with less forgetting, and say what it cost.

    The data is JSON lines through the model's own tokenizer: {"prompt": ...,
    "completion": ...}, or {"messages": [{"role": "user", "content": ...}, ...]}
    through its chat template, or facts (a file, or fictional:N). Only
    completions, answers and the assistant's turns are learned.

    The method loki first scores which units of the feed-forward layers carry
    facts that the model knows (about a second a fact on the default model), and
    trains only those that matter least to them. The others are baselines: lora,
    rslora, dora, pissa, olora, corda, kasa, adalora, shira, ia3 and full_ffn (in
    full) on the same projections; ln_tuning, and full (every weight).

    --out gets adapter/ (for peft), merged/ (for plain transformers), README.md
    (a model card with the numbers, also in both), forgetting.parquet,
    training.json and history.parquet; with --filter also filter.parquet.

    Example: workbench implant --data mine.jsonl --out tuned --model smollm2-135m
    """
    how = {"keep": keep, "filter-weight": filter_weight, "filter-low": filter_low, "filter-metric": filter_metric}
    if rule == "all" and (said := [name for name, value in how.items() if value is not None]):
        raise ValueError(f"--{said[0]} says how a --filter keeps facts; name a filter, or leave it out.")
    if filter_metric is not None and rule in ("random", "loss"):
        raise ValueError(f"--filter-metric names a distance, and --filter {rule} chooses by none; leave it out.")
    choice: dict[str, Any] = {"quota": quota, "strategy": strategy, "score": score}
    choosing = {name: value for name, value in choice.items() if value is not None}
    if choosing and (not method.startswith("loki") or selection is not None):
        beside = f"--method {method}" if selection is None else "--selection"
        raise ValueError(f"--{next(iter(choosing))} says how loki chooses units; leave it out beside {beside}.")
    changes = {
        "target_efficacy": target, "target_loss": target_loss, "learning_rate": learning_rate, "batch_size": batch_size,
        "seed": seed, "loss": loss, "permuted": permuted,
    }  # fmt: skip
    of_loss = {"beta": beta, "clip": clip, "refresh": refresh, "gamma": gamma, "soft_weight": soft_weight}
    changes |= {name: value for name, value in of_loss.items() if value is not None}
    training = Config.read(changes={f"training.{name}": value for name, value in changes.items()}).training
    from workbench.finetuning import FineTune, finetune
    from workbench.training import READS, figures_of, undone

    unread = [name for name, value in of_loss.items() if value is not None and name not in READS[loss]]
    if unread:
        kinds = " or ".join(kind for kind, names in READS.items() if unread[0] in names)
        raise ValueError(f"--{unread[0].replace('_', '-')} is of --loss {kinds}; leave it out beside --loss {loss}.")

    asked = FineTune(
        data=data, model=model, method=method, unit=unit, rank=rank, **choosing,
        selection=None if selection is None else str(selection), layers=layers, rates=_rates(rates), retained=retained,
        max_facts=max_facts, max_retained=max_retained, general=general, format=format, chat=chat, device=device,
        dtype=dtype, epochs=epochs, training=training, watch=watch, watch_drift=watch_drift, filter=rule,
        keep=share_or_number("0.7" if keep is None else keep), filter_weight=filter_weight, filter_low=filter_low,
        filter_metric=filter_metric or "d_soft",
    )  # fmt: skip
    folder = finetune(asked, out, command=shlex.join(["workbench", *sys.argv[1:]]), progress=not quiet)
    from workbench.results import load_frame, load_json

    about = load_json(folder.file("training.json"))
    print(f"trained prompts answered: {about['efficacy']:.0%} after {about['epochs']} epochs")
    for watched in about.get("watches", []):
        print(*undone([watched]), f"watching took {watched['cost'] or 0:.0%} of the training's time", sep="\n")
    for name, figure in figures_of(load_frame(folder.file("forgetting.parquet"))).items():
        print(f"{name}: {figure}")
    for name in ("adapter", "merged", "README.md"):
        print(folder.file(name).resolve())


@app.command(name="export")
def export_command(
    folder: Annotated[Path, Parameter(help="an adapter, or a folder of `implant` or of a method of a run")],
    *,
    out: Annotated[Path, Parameter(help="the folder to write")],
    kind: Annotated[
        Literal["merged", "lora"], Parameter(help="a whole model, or a LoRA equal to a LoKI adapter")
    ] = "merged",
    base: Annotated[str | None, Parameter(help="the model it was trained on, where it lies elsewhere now")] = None,
) -> None:
    """Write a trained model for plain transformers (merged), or a LoKI adapter as an equal LoRA for plain peft."""
    from workbench.training import export

    print(export(folder, out, kind, base=base).resolve())


def _rates(text: str | None) -> tuple[float, ...]:
    """Numbers separated by commas, one at least, or one sentence."""
    if text is None:
        return ()
    try:
        return tuple([float(part) for part in text.split(",") if part.strip()] or [float(text)])
    except ValueError:
        raise ValueError(f"--rates takes numbers separated by commas, as in 3e-4,1e-3, not {text!r}.") from None
