"""`semantic_distance`: how far what a model says and holds is from what a fact means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.distances import cosine_distance, embedding_distance, soft_distance
from workbench.facts import FactSet, TokenisedFact
from workbench.intervals import interval
from workbench.models import HookedModel, pad_batch
from workbench.opening import check_comparable, hooked_among, open_model
from workbench.recollection import by_length, read_facts
from workbench.semantics.anchors import Target, check_anchor, last_states, target_of

#: Distances of one model to a fact's target.
DISTANCES = ("d_emb", "d_soft", "d_layer")


@dataclass(frozen=True)
class Said:
    """What was read of one model: its answers' distances per fact, and its states at the last prompt token."""

    answers: dict[str, Float[Tensor, " fact"]]
    hidden: Float[Tensor, "layer fact d_model"] | None


def semantic_distance(
    model: Any,
    facts: FactSet,
    *,
    metrics: Sequence[str] = DISTANCES,
    anchor: str = "unembedding",
    layers: Sequence[int] | None = None,
    base: Any = None,
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Score how far every fact is from its semantic target in one model.

    - `d_emb = 1 - cos(mean W_E[a], mean W_E[y])`: a the greedy answer with as many tokens as the gold one, y.
    - `d_soft = mean_k sum_v P(v | x, y_<k) (1 - cos(W_E[v], W_E[y_k]))`: the same, to expect of a sampled token.
    - `d_layer = 1 - cos(h_l - mu_l, c_l - o_l)`: h the residual stream after block l at the last prompt token, mu the
      mean state of `base` over the shipped neutral prompts, c the target anchor in `base` (see `target_of`), o its
      origin: mu where the anchor is a state, the mean row of W_U where it is a row of W_U (see `Target`).

    W_E, mu and c are those of `base`, so that several models are measured by one scale.

    Args:
        model: a model, name, folder or adapter (see `open_model`).
        facts: the facts.
        metrics: which of the three.
        anchor: of `d_layer`: `"unembedding"`, `"stated"` or `"centroid"`.
        layers: of `d_layer`; None is all.
        base: the model that the target belongs to; None is the model itself.
        tokenizer: of loaded models, where neither side and no folder has one.
        progress: show a progress bar.

    Returns:
        Frame with fact, relation, metric, layer (missing for `d_emb`, `d_soft`), distance (0 to 2) and valid (False
        where the base does not confirm the anchor: then the distance is missing). `attrs` holds `facts` (native
        records), `facts_name`, `anchor`, `dropped` (facts without a confirmed anchor), `model` and `base`; parquet
        keeps them (`workbench.results.save_frame`), CSV does not.

    Raises:
        ValueError: unknown metrics, anchors or layers; models that differ in shape.
    """
    chosen = check_metrics(metrics, DISTANCES)
    check_anchor(anchor)
    opened = open_model(model, beside=hooked_among(base), tokenizer=tokenizer)
    first = opened if base is None else open_model(base, beside=opened, tokenizer=tokenizer)
    check_comparable(first, opened)
    wanted = check_layers(layers, opened)
    tokens = first.tokenise(facts)
    target = target_of(first, facts, anchor) if "d_layer" in chosen else None
    found = distances(read(opened, first, tokens, chosen, progress), target, chosen)
    labels = pd.DataFrame({"fact": facts.ids, "relation": [fact.relation for fact in facts]})
    frames = []
    for metric, values in found.items():
        rows = wanted if metric == "d_layer" else [0]
        for layer in rows:
            distance = values[layer].double().numpy()
            place = {"metric": metric, "layer": layer if metric == "d_layer" else pd.NA, "distance": distance}
            frames.append(labels.assign(**place).astype({"layer": "Int64"}))
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.assign(valid=frame["distance"].notna())
    frame.attrs = {
        "facts": facts.to_records(),
        "facts_name": facts.name,
        "anchor": anchor,
        "dropped": 0 if target is None else target.dropped,
        "model": opened.name,
        "base": first.name,
    }
    return frame


def distance_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean distance over facts with a confirmed anchor: metric, layer, n, mean, low, high (95% bootstrap)."""
    records = []
    for (metric, layer), rows in frame[frame["valid"]].groupby(["metric", "layer"], sort=False, dropna=False):
        values = rows["distance"].to_numpy()
        records.append((metric, layer, len(rows), values.mean(), *(float(end) for end in interval(values))))
    found = pd.DataFrame(records, columns=["metric", "layer", "n", "mean", "low", "high"])
    return found.astype({"layer": "Int64"})


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> list[str]:
    """The metrics in the order of `known`; an unknown one, or none at all, is a `ValueError`."""
    asked = [metrics] if isinstance(metrics, str) else list(metrics)
    wrong = [metric for metric in asked if metric not in known]
    if wrong or not asked:
        raise ValueError(f"There is no metric {wrong[0] if wrong else ''!r}: choose from {', '.join(known)}.")
    return [metric for metric in known if metric in asked]


def check_layers(layers: Sequence[int] | None, model: HookedModel) -> list[int]:
    """The layers asked for, each once, or all; one that the model does not have, or none, is a `ValueError`."""
    wanted = list(range(model.n_layers)) if layers is None else list(dict.fromkeys(layers))
    if not wanted:
        raise ValueError(f"No layer is asked for: {model.name} has layers 0 to {model.n_layers - 1}; None is all.")
    for layer in wanted:
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"There is no layer {layer}: {model.name} has layers 0 to {model.n_layers - 1}.")
    return wanted


def read(
    model: HookedModel,
    base: HookedModel,
    tokens: Sequence[TokenisedFact],
    metrics: Sequence[str],
    progress: bool = False,
) -> Said:
    """Read what some metrics need of a model; embeddings are those of `base`."""
    answers: dict[str, Tensor] = {}
    if "d_emb" in metrics:
        greedy = [reading.greedy for reading in read_facts(model, tokens, progress=progress)]
        gold = [fact.answer_ids for fact in tokens]
        answers["d_emb"] = torch.tensor(embedding_distance(base.W_E, greedy, gold), dtype=torch.float64)
    if "d_soft" in metrics:
        answers["d_soft"] = soft_distances(model, tokens, base.W_E, progress=progress)
    needed = {"d_layer", "toward", "off"} & set(metrics)
    return Said(answers, last_states(model, [fact.prompt_ids for fact in tokens]) if needed else None)


@torch.no_grad()
def soft_distances(
    model: HookedModel,
    tokens: Sequence[TokenisedFact],
    W_E: Float[Tensor, "d_vocab d_embed"],
    *,
    progress: bool = False,
) -> Float[Tensor, " fact"]:
    """`d_soft` of every fact: the mean of `soft_distance` over its answer tokens, teacher-forced."""
    found = torch.zeros(len(tokens), dtype=torch.float64)
    with tqdm(total=len(tokens), unit="fact", desc="soft distance", disable=not progress) as bar:
        for indices in by_length([len(fact.ids) for fact in tokens]):
            ids, mask = pad_batch([tokens[i].ids[:-1] for i in indices], side="left")
            answers = [tokens[i].answer_ids for i in indices]
            logits = model.logits(ids, mask, last=max(map(len, answers)))
            found[indices] = soft_of_answers(logits, answers, W_E)
            bar.update(len(indices))
    return found


def soft_of_answers(
    logits: Float[Tensor, "fact read d_vocab"],
    answers: Sequence[tuple[int, ...]],
    W_E: Float[Tensor, "d_vocab d_embed"],
) -> Float[Tensor, " fact"]:
    """`d_soft` of some facts from logits whose last rows are those of each answer's tokens."""
    lengths = [len(answer) for answer in answers]
    own = torch.cat([logits[row, -length:] for row, length in enumerate(lengths)])
    gold = torch.tensor([token for answer in answers for token in answer], device=own.device)
    each = soft_distance(own, gold, W_E.detach().to(own.device)).double().cpu().split(lengths)
    return torch.stack([part.mean() for part in each])


def distances(said: Said, target: Target | None, metrics: Sequence[str]) -> dict[str, Float[Tensor, "layer fact"]]:
    """Every asked distance as (layer, fact), with one layer for those that have none; missing where not confirmed."""
    found = {metric: rearrange(said.answers[metric], "f -> 1 f") for metric in metrics if metric in said.answers}
    if "d_layer" in metrics and target is not None and said.hidden is not None:
        found["d_layer"] = layer_distance(said.hidden, target)
    return found


def layer_distance(hidden: Float[Tensor, "layer fact d_model"], target: Target) -> Float[Tensor, "layer fact"]:
    """`1 - cos(h - mu, c - o)` per layer and fact (see `Target`); missing where the anchor is not confirmed."""
    centre, origin = (rearrange(point, "l d -> l 1 d") for point in (target.centre, target.origin))
    return cosine_distance(hidden - centre, target.points - origin).masked_fill(~target.confirmed, torch.nan)
