"""Causal tracing: corrupt the subject, restore one place, see how much of the answer comes back.

ROME's protocol (Meng et al., arXiv 2202.05262).
"""

import logging
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Float
from tqdm import tqdm

from workbench.facts import Fact, FactSet, TokenisedFact
from workbench.models import HookedModel
from workbench.results import Parts, validate_trace
from workbench.tracing.restore import Corrupted, Settings, embedding_std, run_corrupted, subject_noise, sweep
from workbench.tracing.sites import SITES, enterable, patched_site
from workbench.tracing.spans import ROLES, subject_tokens, token_roles

log = logging.getLogger(__name__)

#: ROME restores 10 of gpt2-xl's 48 layers at once where it restores what a module writes.
ROME_WINDOW = 10 / 48


def trace(
    model: HookedModel,
    facts: FactSet,
    *,
    site: Literal["resid", "mlp", "attn"] | str = "resid",
    noise: float = 3.0,
    draws: int = 10,
    window: int | None = None,
    seed: int = 0,
    missing: Literal["error", "skip"] | str = "error",
    batch_size: int | str = "auto",
    parts: str | pathlib.Path | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Measure at which layer and token a fact's answer can be recovered after its subject was corrupted.

    Gaussian noise is added to the embeddings of the subject's tokens; then the clean state is put back at one layer
    (or a window of layers) and one token. With P the probability of the whole answer, teacher-forced, averaged over
    the draws of the noise: total effect = P_clean - P_corrupt, indirect effect = P_restored - P_corrupt (ROME,
    arXiv 2202.05262). The same noise serves all restorations of a fact, and depends on the seed and the fact's id only.

    Args:
        model: a model from `load_model`.
        facts: facts with a `subject` that stands in the prompt.
        site: what is restored: `"resid"` (the residual stream after a block), `"mlp"` (the output of the
            down-projection) or `"attn"` (the output of the attention's last projection).
        noise: in standard deviations of the embeddings of the subjects' tokens, over all facts given.
        draws: how many times noise is drawn for every fact.
        window: how many layers are restored at once, centred as in ROME's code; None is 1 for `resid`, and for `mlp`
            and `attn` the share of the layers that ROME restores (10 of 48).
        seed: of the noise.
        missing: what to do with a fact whose subject is not in its prompt: `"error"` or `"skip"` (and count it).
        batch_size: restorations in one pass, each with all draws; `"auto"` fills passes of about 1,000 tokens.
        parts: folder in which every fact is kept as soon as it is done; a second call goes on there.
        progress: show a progress bar.

    Returns:
        Dataset with `effect` (fact, layer, role): the indirect effect, averaged over the tokens of a role, NaN where
        the fact has none; `effect_logprob`: the same of the mean log-probability, in nats; `p_clean`, `p_corrupt`,
        `logprob_clean`, `logprob_corrupt` (fact,); `n_tokens` (fact, role). Tokens before the subject are not touched
        by the noise, so their effect is 0.

    Raises:
        ValueError: an unknown option, a fact without its subject, or a model that cannot be entered at a layer.
    """
    settings = checked_settings(model.n_layers, site, noise, draws, window, seed, batch_size, missing)
    found = subjects_of(model, facts, missing)
    n_extra = enterable(model)
    with patched_site(model, site, dict.fromkeys(range(model.n_layers), lambda value: value)):
        pass  # a site that is not known is refused before the work
    std = embedding_std(model, [(tokens, subject) for _, tokens, subject in found])
    digests = {"model_digest": model.digest, "fact_digest": facts.digest}
    kept = Parts(parts, {**vars(settings), **digests, "missing": missing})
    rows = []
    with tqdm(total=len(found) * model.n_layers, unit="layer", desc="trace", disable=not progress) as bar:
        for number, (fact, tokens, subject) in enumerate(found, 1):
            rest = (settings, std, n_extra, batch_size, bar)
            rows += kept.rows(fact.id, partial(_traced, model, fact.id, tokens, subject, *rest))
            bar.update(number * model.n_layers - bar.n)
    traced = [fact for fact, _, _ in found]
    notes = {
        "noise_std": std,
        "skipped": len(facts) - len(traced),
        "model": model.name,
        "facts": facts.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **digests,
    }
    return _labelled(traced, rows, settings, notes)


def _traced(
    model: HookedModel,
    fact_id: str,
    tokens: TokenisedFact,
    subject: range,
    settings: Settings,
    std: float,
    n_extra: int | None,
    batch_size: int | str,
    bar: tqdm,
) -> list[dict[str, Any]]:
    """One fact's share of the result, in a list of its own."""
    run = run_corrupted(model, tokens, subject, settings, subject_noise(model, fact_id, subject, settings, std))
    return [_roles_of(run, *sweep(model, run, settings, n_extra, batch_size, bar))]


def checked_settings(
    n_layers: int,
    site: str,
    noise: float,
    draws: int,
    window: int | None,
    seed: int,
    batch_size: int | str = "auto",
    missing: str = "error",
) -> Settings:
    """The settings, or one sentence about the first that is wrong.

    >>> checked_settings(30, "mlp", 3.0, 10, None, 0).window
    6
    """
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, not {site!r}.")
    if missing not in ("error", "skip"):
        raise ValueError(f'missing must be "error" or "skip", not {missing!r}.')
    if not (0 <= noise < float("inf")):
        raise ValueError(f"noise must be a number of standard deviations, at least 0, not {noise}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 layer, not {window}.")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise ValueError(f'batch_size must be "auto" or a positive number, not {batch_size!r}.')
    if window is None:
        window = 1 if site == "resid" else max(1, round(ROME_WINDOW * n_layers))
    return Settings(site, float(noise), int(draws), int(window), int(seed))


def subjects_of(model: HookedModel, facts: FactSet, missing: str) -> list[tuple[Fact, TokenisedFact, range]]:
    """Every fact with its tokens and the positions of its subject."""
    found = []
    for fact, tokens in zip(facts, model.tokenise(facts), strict=True):
        subject = subject_tokens(fact, tokens, model.tokenizer)
        if subject is not None:
            found.append((fact, tokens, subject))
        elif missing == "error":
            raise ValueError(
                f"The subject {fact.subject!r} of fact {fact.id!r} does not stand in its prompt {fact.prompt!r}: "
                'give the fact its subject, or leave such facts out with missing="skip".'
            )
    if not found:
        raise ValueError(f"None of the {len(facts)} facts of {facts.name} has its subject in its prompt.")
    if len(found) < len(facts):
        log.info("%d of %d facts are skipped: their subject is not in the prompt", len(facts) - len(found), len(facts))
    return found


def _roles_of(run: Corrupted, *effects: Float[np.ndarray, "layer pos"]) -> dict[str, Any]:
    """One fact's share of the result: effects averaged over the tokens of every role."""
    roles = token_roles(run.subject, len(run.fact.prompt_ids))
    means = [
        np.stack([x[:, roles[r]].mean(1) if roles[r] else np.full(len(x), np.nan) for r in ROLES], 1) for x in effects
    ]
    return {
        "effect": _or_none(means[0]),
        "effect_logprob": _or_none(means[1]),
        "n_tokens": [len(roles[r]) for r in ROLES],
        "p_clean": float(np.exp(run.logprob_clean)),
        "p_corrupt": float(run.logprob_corrupt.exp().mean()),
        "logprob_clean": run.logprob_clean,
        "logprob_corrupt": float(run.logprob_corrupt.mean()),
    }


def _or_none(effects: Float[np.ndarray, "layer role"]) -> list[list[float | None]]:
    """As lists with None where there is no number, for which JSON has no word."""
    return [[None if x != x else x for x in row] for row in effects.tolist()]


def _labelled(
    facts: Sequence[Fact], rows: list[dict[str, Any]], settings: Settings, notes: dict[str, Any]
) -> xr.Dataset:
    dims = {
        "effect": ("fact", "layer", "role"),
        "effect_logprob": ("fact", "layer", "role"),
        "n_tokens": ("fact", "role"),
    }
    types = {"n_tokens": np.int64}
    variables = {
        name: (dims.get(name, ("fact",)), np.array([row[name] for row in rows]).astype(types.get(name, np.float32)))
        for name in rows[0]
    }
    ds = xr.Dataset(
        variables,
        coords={
            "fact": [fact.id for fact in facts],
            "layer": np.arange(len(rows[0]["effect"])),
            "role": list(ROLES),
            "relation": ("fact", [fact.relation for fact in facts]),
            "text": ("fact", [fact.digest for fact in facts]),
        },
        attrs={**vars(settings), **notes},
    )
    validate_trace(ds)
    return ds
