"""Tidy frames of traces and lenses, and how far tracing and attribution agree layer by layer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.intervals import interval, standard_ranks
from workbench.results import check_asked
from workbench.tracing.spans import ROLES


def by_role(result: xr.Dataset, *, value: str = "effect", draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Indirect effect per layer and role over the facts that have it, with 95% bootstrap intervals.

    Columns layer, role, effect (mean, in the units of `value`), low, high, n (facts). A role that no fact has is left
    out.
    """
    frames = []
    for role in result["role"].values:
        values = result[value].sel(role=role).values.astype(np.float64)
        values = values[~np.isnan(values).any(1)]
        if len(values):
            low, high = interval(values, draws=draws, seed=seed)
            columns = {
                "layer": result["layer"].values,
                "role": role,
                "effect": values.mean(0),
                "low": low,
                "high": high,
            }
            frames.append(pd.DataFrame({**columns, "n": len(values)}))
    return pd.concat(frames, ignore_index=True)


def lens_by_layer(frame: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """A logit lens over facts: layer, logprob (mean), low, high (95% bootstrap), top1 (share at rank 0), n (facts)."""
    table = frame.pivot(index="fact", columns="layer", values="logprob")
    low, high = interval(table.to_numpy(), draws=draws, seed=seed)
    top1 = frame.assign(first=frame["rank"] == 0).groupby("layer")["first"].mean()
    columns = {"layer": table.columns, "logprob": table.mean().to_numpy(), "low": low, "high": high}
    columns["top1"] = top1.to_numpy()
    return pd.DataFrame({**columns, "n": len(table)})


def direct_by_layer(frame: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Direct logit attribution over facts: component, layer, logit (mean), low, high (95% bootstrap), n (facts)."""
    frames = []
    for (component, layer), rows in frame.groupby(["component", "layer"], dropna=False, sort=False):
        low, high = interval(rows["logit"].to_numpy(), draws=draws, seed=seed)
        ends = {"low": float(low), "high": float(high)}
        frames.append({"component": component, "layer": layer, "logit": rows["logit"].mean(), **ends, "n": len(rows)})
    return pd.DataFrame(frames).astype({"layer": "Int64"})


def agreement(
    result: xr.Dataset,
    attribution: xr.Dataset,
    *,
    roles: Sequence[str] = ROLES,
    score: str = "magnitude",
    permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike tracing and attribution rank the layers: Spearman correlation over layers, per role and fact.

    For a fact, one number per layer is the indirect effect at a role, the other the sum of the layer's scores
    (`score="signed"`) or of their absolute values (`"magnitude"`). The mean over facts stands under the fact "all",
    with its 95% bootstrap interval over facts. The null shuffles the layers of the attribution, all facts alike, since
    facts share much of their profile; neighbouring layers resemble each other, so it is still on the narrow side.

    Args:
        result: a result of `trace`.
        attribution: a result of `attribute` for the same model; facts that only one of the two has are left out.
        roles: which roles to compare; a role that no fact has is left out.
        score: `"magnitude"` or `"signed"`.
        permutations: draws of the null, and of the bootstrap.
        seed: of both.

    Returns:
        Frame with role, fact, rho, low, high (for "all" only), null_low, null_high (95% of the null), p_value
        (two-sided), n (facts). rho is NaN for a fact with the same value in every layer; such facts are not in "all".

    Raises:
        ValueError: results of different models, layers or prompts, or without a common fact.
    """
    if permutations < 1:
        raise ValueError(f"The null and the bootstrap need at least one of the permutations, not {permutations}.")
    ids, sums = _layer_sums(result, attribution, score)
    generator = np.random.default_rng(seed)
    shuffles = np.stack([generator.permutation(sums.shape[1]) for _ in range(permutations)])
    frames = []
    for role in roles:
        effects = _effects(result, ids, role)
        has = ~np.isnan(effects).any(1)
        if has.any():
            kept = [i for i, own in zip(ids, has, strict=True) if own]
            frames.append(_agreement_of(kept, effects[has], sums[has], shuffles, seed).assign(role=role))
    if not frames:
        raise ValueError(f"No fact has a token of the roles {', '.join(roles)}.")
    frame = pd.concat(frames, ignore_index=True)
    return frame[["role", "fact", "rho", "low", "high", "null_low", "null_high", "p_value", "n"]]


def profiles(
    result: xr.Dataset, attribution: xr.Dataset, *, role: str = "last", score: str = "magnitude"
) -> pd.DataFrame:
    """The two profiles that `agreement` compares, averaged over facts and divided by their largest absolute value.

    Columns layer, measure ("indirect effect", "attribution"), value.
    """
    ids, sums = _layer_sums(result, attribution, score)
    effects = _effects(result, ids, role)
    has = ~np.isnan(effects).any(1)
    if not has.any():
        raise ValueError(f"No fact has a token of the role {role!r}.")
    frames = []
    for measure, values in (("indirect effect", effects[has].mean(0)), ("attribution", sums[has].mean(0))):
        largest = np.abs(values).max() or 1.0
        columns = {"layer": result["layer"].values, "measure": measure, "value": values / largest}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def spearman(
    first: Float[np.ndarray, "*batch layer"], second: Float[np.ndarray, "*batch layer"]
) -> Float[np.ndarray, "*batch"]:
    """Spearman's rank correlation along the last axis, ties sharing their mean rank; NaN where one side is constant.

    >>> spearman(np.array([1.0, 2.0, 4.0]), np.array([0.0, 5.0, 6.0])).round(6).item()
    1.0
    """
    return _correlation(standard_ranks(first), standard_ranks(second))


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation along the last axis of standard ranks, which are 0 where a side is constant."""
    return np.where(a.any(-1) & b.any(-1), (a * b).sum(-1), np.nan)


def _agreement_of(
    ids: list[str],
    effects: Float[np.ndarray, "fact layer"],
    sums: Float[np.ndarray, "fact layer"],
    shuffles: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """Rows of one role: every fact, then all."""
    traced, scored = standard_ranks(effects), standard_ranks(sums)
    rho = _correlation(traced, scored)
    null = np.stack([_correlation(traced, scored[:, shuffle]) for shuffle in shuffles])
    rows = [{"fact": i, "rho": r, **_against(r, own), "n": 1} for i, r, own in zip(ids, rho, null.T, strict=True)]
    varied = ~np.isnan(rho)
    if varied.any():
        mean = float(rho[varied].mean())
        low, high = interval(rho[varied], draws=len(shuffles), seed=seed)
        ends = {"low": float(low), "high": float(high)}
        together = _against(mean, null[:, varied].mean(1))
        rows.append({"fact": "all", "rho": mean, **ends, **together, "n": int(varied.sum())})
    return pd.DataFrame(rows, columns=["fact", "rho", "low", "high", "null_low", "null_high", "p_value", "n"])


def _against(observed: float, null: np.ndarray) -> dict[str, float]:
    """95% of a null and the two-sided p-value of what was observed; empty for a correlation that is not defined."""
    if np.isnan(observed):
        return {}
    low, high = np.quantile(null, [0.025, 0.975])
    extreme = int((np.abs(null) >= abs(observed) - 1e-12).sum())
    return {"null_low": float(low), "null_high": float(high), "p_value": (1 + extreme) / (1 + len(null))}


def _effects(result: xr.Dataset, ids: list[str], role: str) -> Float[np.ndarray, "fact layer"]:
    if role not in result["role"].values:
        raise ValueError(f"A trace has the roles {', '.join(map(str, result['role'].values))}, not {role!r}.")
    return result["effect"].sel(fact=ids, role=role).values.astype(np.float64)


def _layer_sums(
    result: xr.Dataset, attribution: xr.Dataset, score: str
) -> tuple[list[str], Float[np.ndarray, "fact layer"]]:
    """The facts that both results have, and the sums of each layer's scores."""
    if score not in ("magnitude", "signed"):
        raise ValueError(f'score must be "magnitude" or "signed", not {score!r}.')
    if "effect" not in result or "score" not in attribution:
        raise ValueError("Agreement is between a result of trace and one of attribute, in this order.")
    models = {str(ds.attrs.get("model_digest", "unknown")) for ds in (result, attribution)} - {"unknown"}
    if len(models) > 1:
        raise ValueError("The trace and the attribution were made with different models; make both with one.")
    if result["layer"].values.tolist() != attribution["layer"].values.tolist():
        raise ValueError("The trace and the attribution have different layers.")
    if "text" in result.coords:  # older traces do not say what they asked
        check_asked(
            attribution,
            {str(i): str(text) for i, text in zip(result["fact"].values, result["text"].values, strict=True)},
        )
    theirs = set(attribution["fact"].values)
    ids = [str(i) for i in result["fact"].values if i in theirs]
    if not ids:
        raise ValueError("The trace and the attribution have no fact in common.")
    chosen = [attribution["score"].sel(fact=i).values.astype(np.float64) for i in ids]
    return ids, np.stack([(np.abs(x) if score == "magnitude" else x).sum(-1) for x in chosen])
