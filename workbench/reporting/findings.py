"""Plain sentences that say what was found: they follow the numbers, whichever way they fall."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.facts import NO_RELATION
from workbench.figures import method_name
from workbench.intervals import wilson
from workbench.reporting.tables import kept, paired_difference
from workbench.reporting.words import capital, listed, number, percent, tenth

ENOUGH_PIECES = ENOUGH_FACTS = 10  # intervals over fewer pieces of text, or facts, decide nothing
RATE = 0.05  # false discoveries among the layers that are called
UNEQUAL = 0.05  # efficacies that lie further apart than this are said to differ
SUITE_WORDS = {
    "retained": "other facts that the model knew",
    "neighbourhood": "neighbours of the new facts",
    "paraphrase": "new facts asked with other templates",
}


def about_recall(table: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Say how many facts the model answers, where it knows most and least, and whether the new facts are new."""
    whole = table[table["relation"] == "all"].iloc[0]
    sentences = [f"The model answers {_of(int(whole['known']), int(whole['known'] + whole['unknown']))}."]
    parts = table[~table["relation"].isin(["all", NO_RELATION])].sort_values("share", kind="stable")
    least, most = (parts.iloc[0], parts.iloc[-1]) if len(parts) else (whole, whole)
    if most["share"] > least["share"]:
        sentences.append(
            f"It knows the relation “{most['relation']}” best ({percent(most['share'])}) and “{least['relation']}” "
            f"least ({percent(least['share'])})."
        )
    if len(new):
        sentences.append(f"Of the new facts it answers {_of(int(new['known'].sum()), len(new))} before training.")
    return sentences


def about_scores(table: pd.DataFrame, gap: np.ndarray | None, unit: str) -> list[str]:
    """Say which layer has the largest scores, what share the last third of the layers holds, and how exact they are."""
    rows = table[table["relation"] == "all"].sort_values("layer")
    top, total = rows.loc[rows["mean_abs"].idxmax()], rows["mean_abs"].sum()
    third = max(1, round(len(rows) / 3))
    sentences = [
        f"Scores are largest in layer {top['layer']}: {number(top['mean_abs'])} {unit} per unit on average "
        f"(95% interval {number(top['low'])} to {number(top['high'])})."
    ]
    if total > 0 and len(rows) > 1:
        part = rows["mean_abs"].tail(third).sum() / total
        last = f"{third} of {len(rows)} layers hold" if third > 1 else f"of {len(rows)} layers holds"
        sentences.append(f"The last {last} {percent(part)} of all |score|.")
    if gap is not None and gap.size and np.isfinite(gap).any():
        size = np.abs(gap[np.isfinite(gap)])
        sentences.append(
            f"What the scores of a layer leave unexplained is {number(float(np.median(size)))} {unit} in the median "
            f"and at most {number(float(size.max()))}."
        )
    return sentences


def about_attributed(ids: Collection[str], recall: pd.DataFrame) -> list[str]:
    """Say how many of the known facts were attributed, where the recall of the run tells."""
    if recall.empty:
        return []
    known = recall.index[recall["known"]]
    return [f"{number(known.isin(list(ids)).sum())} of {number(len(known))} known facts were attributed."]


def about_strongest(table: pd.DataFrame, kind: str) -> list[str]:
    """Say which unit is most often the strongest, and how concentrated the first places are over layers."""
    first = table[table["rank"] == table["rank"].min()]
    counts = first.groupby(["layer", "unit"]).size().sort_values(ascending=False, kind="stable")
    (layer, unit), hits, facts = counts.index[0], int(counts.iloc[0]), len(first)
    per_layer = first["layer"].value_counts().sort_index()
    if len(counts) == 1:
        return [f"Layer {layer} {kind} {unit} is the strongest {kind} of {'each of ' * (facts > 1)}{_facts(facts)}."]
    sentences = [
        f"The strongest {kind} differs between facts: {len(counts)} {kind}s share the first place of {facts} facts."
    ]
    if hits > 1:
        sentences.append(
            f"The most frequent one, layer {layer} {kind} {unit}, comes first for {hits} of {facts} facts."
        )
    busiest = int(per_layer.idxmax())
    sentences.append(f"Layer {busiest} holds the strongest {kind} of {_facts(int(per_layer.max()))}.")
    return sentences


def about_pairs(pairs: pd.DataFrame) -> list[str]:
    """Say which two facts overlap most, and how many of the closest pairs are of one relation."""
    if pairs.empty:
        return []
    top, same = pairs.iloc[0], int(pairs["same_relation"].sum())
    lead = f"“{top['fact']}” and “{top['other']}” share most: their mean overlap is {number(top['overlap'])}."
    return [lead, f"Of the {len(pairs)} closest pairs, {same} are of one relation."][: len(pairs)]


def about_relations(table: pd.DataFrame, pairs: int | None = None) -> list[str]:
    """Say in how many layers facts of one relation overlap more, or less, than shuffled relations allow.

    Layers are judged by their `q_value` where the table has it, else by the band; `pairs` are those of one relation.
    """
    rows = table.dropna(subset=["difference", "null_low", "null_high"])
    if rows.empty:
        alike = "All attributed facts are" if pairs else "No two attributed facts, or all, are"
        return [f"{alike} of one relation, so that there is nothing to compare."]
    if "q_value" in rows and rows["q_value"].notna().all():
        called, up = rows["q_value"] <= RATE, rows["difference"] > 0
        above, below = int((called & up).sum()), int((called & ~up).sum())
        by = f"at a false discovery rate of {percent(RATE)} over layers (Benjamini-Hochberg, shuffled relations)"
    else:
        above = int((rows["difference"] > rows["null_high"]).sum())
        below = int((rows["difference"] < rows["null_low"]).sum())
        by = "beyond the 95% band of shuffled relations (each layer for itself, not corrected for the number of layers)"
    total = len(rows)
    rests = [] if pairs is None else [f"This rests on {number(pairs)} pairs of facts of one relation."]
    if above == below == 0:
        return [
            f"In none of {total} layers do facts of one relation overlap more or less than with shuffled relations.",
            *rests,
        ]
    words = [f"more in {above}"] if above else []
    words += [f"less in {below}"] if below else []
    peak = rows.loc[rows["difference"].abs().idxmax()]
    return [
        f"Facts of one relation share units {listed(words)} of {total} layers than facts of different relations do, "
        f"{by}.",
        f"The difference is largest in layer {peak['layer']:.0f}: {number(peak['difference'], sign=True)} "
        f"({number(peak['within'])} within, {number(peak['across'])} across).",
        *rests,
    ]


def about_measures(table: pd.DataFrame) -> list[str]:
    """Say for every measure in how many layers facts of one relation differ from others, and where most."""
    sentences = []
    for metric, rows in table.dropna(subset=["difference", "q_value"]).groupby("metric", sort=False):
        called = rows[rows["q_value"] <= RATE]
        text = f"{capital(str(metric))} differs within and across relations in {len(called)} of {len(rows)} layers"
        if len(called):
            peak = called.loc[called["difference"].abs().idxmax()].to_dict()
            text += (
                f", most in layer {peak['layer']}: {number(peak['difference'], sign=True)} ({_ends(peak, sign=True)})"
            )
        sentences.append(text + ".")
    return sentences


def about_selection(table: pd.DataFrame, kind: str) -> list[str]:
    """Say how many units each method trains and how much of the load they carry."""
    every = table[table["method"] == "all"]
    units, total = every["selected"].sum(), (every["load"] * every["selected"]).sum()
    sentences = []
    for method, rows in table[table["method"] != "all"].groupby("method", sort=False):
        chosen, carried = rows["selected"].sum(), (rows["load"] * rows["selected"]).sum()
        text = f"{capital(method_name(str(method)))}: {number(chosen)} of {number(units)} {kind}s are trained"
        share = chosen / units if units else 0.0
        text += f" ({percent(share)})"
        if total > 0:
            text += f"; they carry {percent(carried / total)} of what the known facts lean on"
        sentences.append(text + ".")
    return sentences


def about_training(training: Mapping[str, Mapping[str, Any]], history: pd.DataFrame) -> list[str]:
    """Say for each method whether it reached the efficacy asked for, how soon, and with how many parameters."""
    sentences = []
    for method, record in training.items():
        name, efficacy, target = capital(method_name(method)), record.get("efficacy"), record.get("target_efficacy")
        spent = [f"{number(record['steps'])} steps"] if record.get("steps") is not None else []
        spent += [f"{number(record['seconds'])} s"] if record.get("seconds") is not None else []
        size = record.get("trainable_parameters")
        parts = f" It trains {number(size)} parameters." if size is not None else ""
        within = f" after {listed(spent)}" if spent else ""
        loss, asked = record.get("target_loss"), None if target is None else percent(target)
        if loss is not None:  # it ends the training in the place of the efficacy; 0: epochs alone do
            asked = f"loss of {number(loss)}" if loss > 0 else "number of epochs"
        if efficacy is None:
            sentences.append(f"{name}: the efficacy was not measured{within}.{parts}")
        elif record.get("reached", True) or loss == 0:
            goal = f" (asked for: {asked})" if asked is not None else ""
            sentences.append(f"{name} answers {percent(efficacy)} of the new facts{goal}{within}.{parts}")
        else:
            goal = f"the {asked or 'efficacy'} asked for"
            sentences.append(
                f"{name} did not reach {goal}: it ended at {percent(efficacy)}{within}, so what it forgets is not "
                f"comparable at equal efficacy.{parts}"
            )
    if not sentences:
        last = history.dropna(subset=["efficacy"]).groupby("method", sort=False)["efficacy"].last()
        sentences = [f"{capital(method_name(str(m)))} ended at an efficacy of {percent(e)}." for m, e in last.items()]
    return sentences


def fell_short(training: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name all methods that did not reach what was asked of them, where they are several."""
    short = [name for name, one in training.items() if not one.get("reached", True) and one.get("target_loss") != 0]
    names = capital(listed([method_name(name) for name in short]))
    return [f"{names} did not reach what was asked for: what they forget is not comparable."] if len(short) > 1 else []


def about_geometry(table: pd.DataFrame, group: str) -> list[str]:
    """Say how far the facts of one group moved toward the anchor and beside it in the last layer, per method."""
    rows = table[table["metric"].isin(["toward", "off"]) & (table["group"] == group)]
    if rows.empty:
        return []
    last = rows[rows["layer"] == rows["layer"].max()]
    words = []
    for metric, word in (("toward", "toward the anchor"), ("off", "beside it")):
        parts = [
            f"{number(row['change'])} with {method_name(row['method'])} ({_ends(row)})"
            for row in last[last["metric"] == metric].to_dict("records")
        ]
        words += [f"{word} {listed(parts)}"] if parts else []
    lead = f"In layer {last['layer'].max()} the {group} facts moved, in shares of their first distance"
    return [f"{lead}: {'; '.join(words)}."]


def about_distance(table: pd.DataFrame) -> list[str]:
    """Say whether the answers of each group came closer to their target, went away, or cannot be told from still."""
    sentences = []
    for group, part in table.groupby("group", sort=False):
        words = []
        for row in part.to_dict("records"):
            verdict = "further away" if row["low"] > 0 else "closer" if row["high"] < 0 else "no distinguishable change"
            verdict = verdict if row["n"] >= ENOUGH_FACTS else "too few to judge by"
            moved = f"{number(row['before'])} to {number(row['after'])}"
            words.append(f"{moved} with {method_name(row['method'])} ({verdict}: {_ends(row, sign=True)})")
        sentences.append(f"Mean distance of the answers to the {group} facts: {listed(words)}.")
    return sentences


def about_learning(summary: pd.DataFrame, forgetting: pd.DataFrame) -> list[str]:
    """Say which share of the new facts each method answers, with the trained prompts and with other templates."""
    sentences = []
    for suite, words in (("efficacy", "with the trained prompts"), ("paraphrase", "with other templates")):
        rows = summary[(summary["suite"] == suite) & (summary["metric"] == "accuracy")]
        parts = [f"{method_name(row['method'])} {percent(row['after'])}" for row in rows.to_dict("records")]
        if parts:
            sentences.append(f"New facts answered {words}: {listed(parts)}.")
    return sentences + versus(forgetting, "paraphrase")


def about_keeping(summary: pd.DataFrame, forgetting: pd.DataFrame) -> list[str]:
    """Say what each method keeps at which efficacy, and whether the methods can be told apart."""
    shares = kept(forgetting)
    learnt = summary[(summary["suite"] == "efficacy") & (summary["metric"] == "accuracy")].set_index("method")["after"]
    sentences = []
    if len(shares):
        parts = [f"{method_name(row['method'])} {percent(row['share'])}" for row in shares.to_dict("records")]
        known = [float(learnt[method]) for method in shares["method"] if method in learnt]
        at = f" at an efficacy of {listed([percent(value) for value in known])}" if known else ""
        sentences.append(f"Of {_counts(shares)} other facts that the model knew, these are kept{at}: {listed(parts)}.")
        if known and max(known) - min(known) > UNEQUAL:
            apart = percent(max(known) - min(known)).removesuffix("%")
            sentences.append(f"The efficacies differ by {apart} points, so this does not compare at equal efficacy.")
    return sentences + versus(forgetting, "retained") + versus(forgetting, "neighbourhood")


def versus(forgetting: pd.DataFrame, suite: str) -> list[str]:
    """Compare the first method with each other one on one suite, fact by fact, and say if they can be told apart."""
    methods, words, counts = list(forgetting["method"].unique()), [], set()
    first = "loki" if "loki" in methods else (methods[0] if methods else "")
    for other in (name for name in methods if name != first):
        found = paired_difference(forgetting, suite, first, other)
        if found is None:
            continue
        counts.add(int(found["n"]))
        points = {key: found[key] * 100 for key in ("difference", "low", "high")}
        size = f"{tenth(points['difference'])} points, {tenth(points['low'])} to {tenth(points['high'])}"
        if found["n"] < ENOUGH_FACTS:
            words.append(
                f"lies {tenth(points['difference'])} points from {method_name(other)}, too few facts to judge by"
            )
        elif found["low"] <= 0 <= found["high"]:
            words.append(f"cannot be told apart from {method_name(other)} ({size})")
        else:
            word = "more" if found["difference"] > 0 else "fewer"
            words.append(f"answers {word} than {method_name(other)} ({size})")
    if not words:
        return []
    over = _facts(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)} facts"
    return [
        f"On {SUITE_WORDS.get(suite, suite)}, {method_name(first)} {listed(words)}; paired bootstrap over {over}, "
        "95% intervals."
    ]


def about_perplexity(summary: pd.DataFrame) -> list[str]:
    """Say how perplexity on general text changed per method, over how many pieces, and no verdict over a few."""
    rows, words = summary[summary["metric"] == "perplexity"], []
    if rows.empty:
        return []
    pieces = int(rows["n"].min())
    for row in rows.to_dict("records"):
        verdict = "worse" if row["low"] > 0 else "better" if row["high"] < 0 else "not distinguishable from no change"
        said = f": {verdict}" if pieces >= ENOUGH_PIECES else ""
        moved = f"{number(row['before'])} to {number(row['after'])}"
        words.append(f"{moved} with {method_name(row['method'])} (change {_ends(row, sign=True)}{said})")
    few = "" if pieces >= ENOUGH_PIECES else f"; fewer than {ENOUGH_PIECES} pieces do not tell worse from better"
    over = f"{pieces} piece{'s' if pieces > 1 else ''} of general text"
    return [f"Perplexity on {over} went from {listed(words)}{few}."]


def about_shift(summary: pd.DataFrame) -> list[str]:
    """Say how far the predictions on general text moved from the base model's."""
    rows = summary[(summary["suite"] == "general") & (summary["metric"] == "kl")].to_dict("records")
    words = [f"{number(row['after'])} with {method_name(row['method'])} ({_ends(row)})" for row in rows]
    return [f"The mean KL divergence from the base model is {listed(words)} nats per token."] if words else []


def about_change(facts: pd.DataFrame) -> list[str]:
    """Say for each method how many retained facts became less likely."""
    words = []
    for method, rows in facts.groupby("method", sort=False):
        fell = int((rows["after"] < rows["before"]).sum())
        words.append(f"{fell} of {len(rows)} with {method_name(str(method))}")
    return [f"Retained facts whose answer became less likely: {listed(words)}."] if words else []


def _of(hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    share = percent(hits / total) if total else "none"
    return f"{number(hits)} of {_facts(total)} ({share}, 95% interval {low * 100:.0f} to {high * 100:.0f}%)"


def _facts(count: int) -> str:
    return f"{number(count)} fact{'' if count == 1 else 's'}"


def _counts(shares: pd.DataFrame) -> str:
    low, high = shares["total"].min(), shares["total"].max()
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def _ends(row: Mapping[str, Any], sign: bool = False) -> str:
    return f"{number(row['low'], sign)} to {number(row['high'], sign)}"
