"""The sections of the page: each takes a run's artefacts through tables and figures to findings."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from workbench import figures
from workbench.attribution import by_layer, strongest
from workbench.intervals import DRAWS, SEED, means
from workbench.reporting import findings, tables
from workbench.reporting.artefacts import Artefacts, has
from workbench.reporting.collisions import advice, conflicts, measures, prediction
from workbench.reporting.parts import Panel, Picker, Section
from workbench.reporting.words import listed, number
from workbench.selection import COLLISIONS, OVERLAPS


def sections(run: Artefacts) -> list[Section]:
    """Build every section of the page in reading order; one whose artefact is missing or empty only says so."""
    made = []
    for build, title, needs in BUILDERS:
        name = build.__name__.removeprefix("_")
        missing = [need for need in needs if not has(getattr(run, need))]
        if missing:
            reason = f"This run has no {' and no '.join(WORDS[need] for need in missing)}, so this part is left out."
            made.append(Section(name=name, title=title, about="", absent=reason))
        else:
            made.append(replace(build(run), name=name, title=title))
    return made


def _known(run: Artefacts) -> Section:
    table = tables.recall_by_relation(run.recall)
    text = findings.about_recall(table, run.recall_new)
    about = (
        "A fact counts as known when every token of its answer is the model's first choice. Bars on the points are 95% "
        "Wilson intervals."
    )
    drawn = _json(figures.recall_by_relation(table))
    panel = Panel("recall", "Share and number of facts known, per relation", drawn, text)
    return Section("", "", about, [panel], table, "recall.parquet", headline=text[:1])


def _scores(run: Artefacts) -> Section:
    table, unit = by_layer(run.attribution, draws=DRAWS, seed=SEED), _score_unit(run)
    shares = run.attribution.attrs.get("method") not in NO_EFFECT
    gap = run.attribution["gap"].values if "gap" in run.attribution and shares else None
    text = findings.about_scores(table, gap, unit)
    text += findings.about_attributed(run.attribution["fact"].values.astype(str).tolist(), run.recall)
    relations = list(table["relation"].unique())
    drawn = [_json(figures.score_by_layer(table, relation, unit)) for relation in relations]
    names = ["all relations" if name == "all" else name for name in relations]
    picker = Picker("Relation", names, _patches(drawn))
    panel = Panel("scores", "Mean absolute score of a unit, per layer", drawn[0], text, picker)
    says = "contributes to the answer" if shares else "scores by this method, which is no share of an effect"
    about = (
        f"How much one {_kind(run)} of each layer {says}, on average. The band is the 95% bootstrap "
        f"interval over facts. {_method(run)}"
    )
    return Section("", "", about, [panel], table, "attribution.zarr", headline=text[:1])


def _units(run: Artefacts, most: int = 400) -> Section:
    unit, kind = _score_unit(run), _kind(run)
    named = set(run.facts.ids)
    here = [str(fact) for fact in run.attribution["fact"].values if fact in named]
    table = strongest(run.attribution.sel(fact=here), run.facts)
    labels = dict(zip(table["fact"], table["label"], strict=True))
    ids = here[:most]
    drawn = _json(figures.strongest_units(table, ids[0], kind, unit))
    per_fact = dict(iter(table.groupby("fact", sort=False)))
    patches = [{"data": [figures.strongest_bars(per_fact[fact], fact, kind)], "layout": {}} for fact in ids]
    rows = [_fact_rows(run, fact) for fact in ids]
    picker = Picker("Fact", [labels[fact] for fact in ids], patches, rows, search=True)
    text = findings.about_strongest(table, kind)
    panel = Panel("units", f"The strongest {kind}s of one fact", drawn, text, picker)
    about = "Choose a fact to see its strongest units."
    if run.attribution.attrs.get("method") not in NO_EFFECT:
        about = "Choose a fact to see where it is carried. Bars to the right support the answer, the others oppose it."
    if len(here) > most:
        about += f" The first {most} of {len(here)} facts can be chosen here; the rest is in attribution.zarr."
    return Section("", "", about, [panel], table, "attribution.zarr")


def _overlap(run: Artefacts) -> Section:
    metric = _overlap_metric(run)
    if metric is None:
        return _without_overlap(run)
    overlap = tables.overlap_layers(run.interference, metric)
    layers = [str(layer) for layer in overlap["layer"].values]
    drawn = [_json(figures.overlap_map(overlap, layer)) for layer in layers]
    names = ["mean over all layers" if layer == "mean" else f"layer {layer}" for layer in layers]
    pairs, picker = tables.closest_pairs(overlap), Picker("Layer", names, _patches(drawn))
    panel = Panel("overlap", "Overlap of each pair of facts", drawn[0], findings.about_pairs(pairs), picker)
    total, shown = run.interference.sizes["fact"], overlap.sizes["fact"]
    about = (
        f"Overlap is {OVERLAP_WORDS[metric]}: bright pairs lean on the same units. "
        "The colours span the values of the chosen layer."
    )
    if shown < total:
        about += f" Of {total} facts, {shown} are drawn, evenly spread over the relations."
    return Section("", "", about, [panel], pairs, "interference.zarr")


def _relations(run: Artefacts) -> Section:
    metric = _overlap_metric(run)
    if metric is None:
        return _without_overlap(run)
    table = tables.within_across(run.interference, metric)
    text = findings.about_relations(table, tables.related_pairs(run.interference))
    if table["difference"].isna().all():
        return Section("", "", "", absent=text[0])
    drawn = _json(figures.within_across(table))
    panel = Panel("relations", "Overlap within and across relations, per layer", drawn, text)
    about = "If facts of one kind share units, pairs of one relation overlap more than pairs of two relations."
    return Section("", "", about, [panel], table, "interference.zarr", headline=text[:1])


def _selection(run: Artefacts) -> Section:
    table = tables.load_and_selection(run.interference["load"], run.selections)
    text = findings.about_selection(table, _kind(run))
    panel = Panel("load", "Load and selected units, per layer", _json(figures.load_and_selection(table)), text)
    about = (
        f"Load is how strongly the known facts lean on a {_kind(run)}. Only the selected {_kind(run)}s are trained; a "
        "careful selection sits where the load is low."
    )
    return Section("", "", about, [panel], table, "selection/", headline=text[:1])


def _training(run: Artefacts) -> Section:
    shares = [t.get("target_efficacy") for t in run.training.values() if t.get("target_loss") is None]
    targets = [float(share) for share in shares if share is not None]
    figure = _json(figures.training_curves(run.history, targets[0] if targets else None))
    text = findings.about_training(run.training, run.history)
    panel = Panel("training", "Loss and efficacy by step", figure, text)
    end = "until it answers the asked share of them (dotted line)" if targets else "until the end that was asked for"
    about = f"Every method is trained on the same new facts {end}."
    late = [line for line in text if "did not reach" in line]
    return Section("", "", about, [panel], run.history, "implant/", headline=findings.fell_short(run.training) or late)


def _drift(run: Artefacts) -> Section:
    table = tables.drift_summary(run.drift)
    panels: list[Panel] = []
    for group in table.loc[table["metric"].isin(["toward", "off"]), "group"].unique():
        caption, text = f"Where the {group} facts moved, per layer", findings.about_geometry(table, group)
        drawn = _json(figures.drift_geometry(table, group))
        panels.append(Panel(f"geometry-{len(panels)}", caption, drawn, text, half=True))
    distance = table[table["metric"] == "d_emb"]
    if len(distance):
        caption = "Semantic distance of the answers, before (open) and after (filled)"
        drawn = _json(figures.drift_distance(distance))
        panels.append(Panel("distance", caption, drawn, findings.about_distance(distance)))
    about = (
        "The movement of the state at the last prompt position is split into the part of the way to the answer's row "
        "of the unembedding, the anchor, and what is beside it, in shares of the first distance. States are longer "
        "than such rows by far, so the way to one leads to the origin whatever the answer: whether answers came near "
        "their meaning is for the distance below to say. Bands and bars are 95% bootstrap intervals over facts."
    )
    return Section("", "", about, panels, table, "drift.parquet")


def _forgetting(run: Artefacts) -> Section:
    summary = means(run.forgetting)
    right, panels = summary[summary["metric"] == "accuracy"], list[Panel]()
    keeping, text = findings.about_keeping(summary, run.forgetting), findings.about_perplexity(summary)
    main = [line for line in keeping if findings.SUITE_WORDS["neighbourhood"] not in line]
    for suites, name, caption, found in (
        (("efficacy", "paraphrase"), "learned", "What was learned", findings.about_learning(summary, run.forgetting)),
        (("neighbourhood", "retained"), "kept", "What was kept or lost", keeping),
    ):
        chosen = right[right["suite"].isin(suites)]
        if len(chosen):
            panels.append(Panel(name, caption, _json(figures.forgetting_compared(chosen)), found, half=True))
    for metric, title, caption, found in (
        ("perplexity", "change in perplexity", "General text: perplexity", text),
        ("kl", "KL from the base model (nats per token)", "General text: shift", findings.about_shift(summary)),
    ):
        chosen = summary[(summary["metric"] == metric) & (summary["suite"] == "general")]
        if len(chosen):
            panels.append(Panel(metric, caption, _json(figures.text_damage(chosen, title)), found, half=True))
    facts = run.forgetting[(run.forgetting["suite"] == "retained") & (run.forgetting["metric"] == "logprob")]
    if len(facts):
        methods = list(facts["method"].unique())
        drawn = [_json(figures.before_after(facts, method)) for method in methods]
        picker = Picker("Method", [figures.method_name(method) for method in methods], _patches(drawn))
        changed = findings.about_change(facts)
        panels.append(Panel("facts", "Each retained fact, before and after", drawn[0], changed, picker))
    about = (
        "Every number compares a trained model with the base model on the same questions. Bars are 95% intervals of a "
        f"paired bootstrap ({DRAWS} draws, seed {SEED})."
    )
    return Section(
        "",
        "",
        about,
        panels,
        summary,
        "forgetting.parquet",
        headline=main + text,
    )


BUILDERS: tuple[tuple[Callable[[Artefacts], Section], str, tuple[str, ...]], ...] = (
    (_known, "What the model knows", ("recall",)),
    (_scores, "Where the knowledge lies: score by layer", ("attribution",)),
    (_units, "The strongest units of each fact", ("attribution", "facts")),
    (_overlap, "Interference between facts", ("interference",)),
    (_relations, "Within and across relations", ("interference",)),
    (measures, "Interference by measure", ("interference",)),
    (conflicts, "Gradients that conflict", ("interference",)),
    (prediction, "Which measure predicts harm", ("prediction",)),
    (advice, "Which layers to train", ("advice",)),
    (_selection, "Load and selection", ("interference", "selections")),
    (_training, "Training", ("history",)),
    (_drift, "Drift", ("drift",)),
    (_forgetting, "Forgetting compared", ("forgetting",)),
)
OVERLAP_WORDS = {
    "cosine": "the cosine of the two facts' |score| in a layer",
    "jaccard": "the share of the two facts' top units in a layer that both have",
}
#: Methods whose scores are not shares of an effect, and what theirs are.
NO_EFFECT = {"activation": "of activation", "random": "of a random score", "loki-paper": "of slope"}
WORDS = {
    "recall": "recall",
    "attribution": "attribution",
    "facts": "facts",
    "interference": "interference",
    "prediction": "prediction of harm (interference.harm)",
    "advice": f"advice on layers (which takes one of {', '.join(COLLISIONS)})",
    "selections": "selection",
    "history": "training history",
    "drift": "drift",
    "forgetting": "forgetting",
}


def _json(figure: Any) -> dict[str, Any]:
    return figures.figure_json(figure)


def _patches(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each figure has that the first one has not: per trace, and in the layout."""
    first = drawn[0]
    return [
        {
            "data": [
                {key: value for key, value in trace.items() if old.get(key) != value}
                for old, trace in zip(first["data"], figure["data"], strict=True)
            ],
            "layout": {key: value for key, value in figure["layout"].items() if first["layout"].get(key) != value},
        }
        for figure in drawn
    ]


def _fact_rows(run: Artefacts, fact: str) -> list[tuple[str, str]]:
    rows = [("fact", fact)]
    if fact in run.recall.index:
        row = run.recall.loc[fact]
        rows += [(name, str(row[name])) for name in ("relation", "prompt", "answer", "predicted") if name in row]
        rows += [("probability of the answer", number(float(row["prob"])))]
    elif "target_prob" in run.attribution:
        rows += [("probability of the answer", number(float(run.attribution["target_prob"].sel(fact=fact))))]
    return rows


def _score_unit(run: Artefacts) -> str:
    method, objective = (str(run.attribution.attrs.get(name, "")) for name in ("method", "objective"))
    if method in NO_EFFECT:
        return NO_EFFECT[method]
    objective = objective or "logprob"
    return {"logprob": "nats", "prob": "probability", "logit": "logits", "margin": "logits"}.get(objective, objective)


def _kind(run: Artefacts) -> str:
    for result in (run.attribution, run.interference, *run.selections.values()):
        kind = getattr(result, "attrs", {}).get("unit") or getattr(result, "unit", None)
        if isinstance(kind, str):
            return kind
    return "unit"


def _method(run: Artefacts) -> str:
    attrs = run.attribution.attrs
    names = ("method", "steps", "rule", "baseline", "scope", "objective")
    said = {**attrs, "steps": attrs.get("steps") or f"refined to a gap of {attrs.get('tolerance', 0):.0%}"}
    known = [f"{name} {said[name]}" for name in names if name in attrs]
    part = f" The attribution is not finished: {attrs['partial']}." if "partial" in attrs else ""
    return (f"Scores: {', '.join(known)}." if known else "") + part


def _metrics(run: Artefacts) -> list[str]:
    return [str(name) for name in np.atleast_1d(run.interference["metric"].values)]


def _overlap_metric(run: Artefacts) -> str | None:
    """The measure that says how far two facts share units; None where only others were measured."""
    return next((name for name in OVERLAPS if name in _metrics(run)), None)


def _without_overlap(run: Artefacts) -> Section:
    told = f"Shared units are told by {' or '.join(OVERLAPS)}, and this run measured {listed(_metrics(run))} alone."
    return Section("", "", "", absent=told)
