"""Runs with a corrupted subject, and what comes back when a clean state is put back.

Everything above the restored layers is computed anew; everything below is that of the corrupted run, so a pass begins
at the first layer that it restores. All rows of a pass are of one fact, so nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from workbench.facts import TokenisedFact
from workbench.metrics import logprob
from workbench.models import HookedModel
from workbench.results import digest_of
from workbench.tracing.sites import Patch, entered, kept_inputs, patched_site

#: Tokens in one pass when restorations are batched.
TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class Settings:
    """What defines a trace; written into every result."""

    site: str
    noise: float
    draws: int
    window: int
    seed: int


@dataclass(frozen=True)
class Corrupted:
    """One fact run clean and under every draw of the noise."""

    fact: TokenisedFact
    subject: range
    resid_pre: list[Tensor]  # per layer (draw, pos, d_model), corrupted
    clean: list[Tensor]  # per layer (1, pos, d_model), what the site writes in the clean run
    logprob_clean: float
    logprob_corrupt: Float[Tensor, " draw"]


@torch.no_grad()
def embedding_std(model: HookedModel, found: Sequence[tuple[TokenisedFact, range]]) -> float:
    """Standard deviation over all numbers in the embeddings of the subjects' tokens, as ROME's code takes it."""
    ids = sorted(tokens.prompt_ids[place] for tokens, subject in found for place in subject)
    embedded = model.hf.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return float(embedded.cpu().double().std())


def subject_noise(
    model: HookedModel, fact_id: str, subject: range, settings: Settings, std: float
) -> Float[Tensor, "draw subject d_embed"]:
    """The noise of a fact: it depends on the seed and on the fact's id, not on the facts around it."""
    generator = np.random.default_rng(int(digest_of([settings.seed, fact_id])[:16], 16))
    shape = (settings.draws, len(subject), model.W_E.shape[1])
    drawn = generator.standard_normal(shape, dtype=np.float32) * (settings.noise * std)
    return torch.from_numpy(drawn.astype(np.float32)).to(model.device)


@torch.no_grad()
def run_corrupted(
    model: HookedModel,
    fact: TokenisedFact,
    subject: range,
    settings: Settings,
    noise: Float[Tensor, "draw subject d_embed"],
) -> Corrupted:
    """Run a fact clean (the first row) and under every draw of the noise, and keep what restorations need."""
    resid_pre: list[Tensor] = []
    written: dict[int, Tensor] = {}

    def corrupt(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, subject.start : subject.stop] += noise.to(output.dtype)
        return output

    def keep(layer: int) -> Patch:
        def patch(value: Tensor) -> Tensor:
            written[layer] = value[:1].clone()
            return value

        return patch

    handle = model.hf.get_input_embeddings().register_forward_hook(corrupt)
    try:
        with (
            kept_inputs(model, resid_pre),
            patched_site(model, settings.site, {layer: keep(layer) for layer in range(model.n_layers)}),
        ):
            scores = _answer_logprob(model, fact, 1 + len(noise))
    finally:
        handle.remove()
    clean = [written[layer] for layer in range(model.n_layers)]
    return Corrupted(fact, subject, [x[1:] for x in resid_pre], clean, float(scores[0]), scores[1:])


def restored(
    model: HookedModel,
    run: Corrupted,
    settings: Settings,
    layers: range,
    places: Bool[Tensor, "variant pos"],
    n_extra: int | None,
) -> Float[Tensor, "variant draw"]:
    """Log-probability of the answer when the clean state is put back in some layers, at the places of each variant."""
    n_variants, draws = len(places), settings.draws
    hidden = repeat(run.resid_pre[layers[0]], "d p m -> (v d) p m", v=n_variants)
    where = repeat(places, "v p -> (v d) p 1", d=draws)

    def put_back(layer: int) -> Patch:
        return lambda value: torch.where(where, run.clean[layer], value)

    with (
        entered(model, layers[0], hidden, n_extra),
        patched_site(model, settings.site, {layer: put_back(layer) for layer in layers}),
    ):
        return _answer_logprob(model, run.fact, n_variants * draws).view(n_variants, draws)


def _answer_logprob(model: HookedModel, fact: TokenisedFact, rows: int) -> Float[Tensor, " row"]:
    """Log-probability of the whole answer in as many rows of one fact."""
    ids = torch.tensor([fact.ids[:-1]], device=model.device).expand(rows, -1)
    target = torch.tensor([fact.answer_ids], device=model.device).expand(rows, -1)
    return logprob(model.logits(ids, last=target.shape[1]), target).sum(-1)


def window_of(layer: int, window: int, n_layers: int) -> range:
    """The layers that are restored together around one, as in ROME's code.

    >>> window_of(5, 10, 48), window_of(0, 3, 12)
    (range(0, 10), range(0, 2))
    """
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))


def sweep(
    model: HookedModel, run: Corrupted, settings: Settings, n_extra: int | None, batch_size: int | str, bar: tqdm
) -> tuple[Float[np.ndarray, "layer pos"], Float[np.ndarray, "layer pos"]]:
    """Indirect effects on probability and log-probability of every layer and prompt token; 0 before the subject."""
    n_prompt, n_fed = len(run.fact.prompt_ids), len(run.fact.ids) - 1
    places = torch.eye(n_fed, dtype=torch.bool, device=model.device)[run.subject.start : n_prompt]
    size = batch_size if isinstance(batch_size, int) else max(1, TOKENS_PER_PASS // (settings.draws * n_fed))
    effect, effect_logprob = (np.zeros((model.n_layers, n_prompt), dtype=np.float32) for _ in range(2))
    corrupt = run.logprob_corrupt.cpu().double()
    for layer in range(model.n_layers):
        layers = window_of(layer, settings.window, model.n_layers)
        scores = (
            torch.cat([restored(model, run, settings, layers, x, n_extra) for x in places.split(size)]).cpu().double()
        )
        effect[layer, run.subject.start :] = (scores.exp() - corrupt.exp()).mean(1).cpu()
        effect_logprob[layer, run.subject.start :] = (scores - corrupt).mean(1).cpu()
        bar.update()
    return effect, effect_logprob
