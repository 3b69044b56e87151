"""Where a fact's state ought to be: target anchors per layer, and whether the base model confirms them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.facts import Fact, FactSet, TokenisedFact, neutral_prompts
from workbench.facts.tokens import tokenise, uses_bos
from workbench.models import HookedModel, pad_batch
from workbench.recollection import by_length, read_facts

log = logging.getLogger(__name__)

#: What a state can be measured against.
ANCHORS = ("unembedding", "stated", "centroid")


@dataclass(frozen=True)
class Target:
    """The anchor of every fact per layer, and the two origins from which angles are taken; all on the CPU.

    `centre` is the mean state of the base model over the shipped neutral prompts: the origin of states, and of anchors
    that are states. The origin of anchors that are rows of the unembedding is the mean of its rows: such a row is so
    short beside the mean state (2.6 against 665 in the last layer of the default model) that, seen from there, every
    answer would lie in the same direction. `confirmed` says of which facts the base model confirms the anchor.
    """

    anchor: str
    points: Float[Tensor, "layer fact d_model"]
    origin: Float[Tensor, "layer d_model"]
    centre: Float[Tensor, "layer d_model"]
    confirmed: Bool[Tensor, " fact"]

    @property
    def dropped(self) -> int:
        """How many facts have no anchor that the base model confirms."""
        return int((~self.confirmed).sum())

    def of(self, facts: Sequence[int]) -> "Target":
        """The same anchors for other rows: row k is that of fact `facts[k]`."""
        return replace(self, points=self.points[:, facts], confirmed=self.confirmed[facts])


def target_of(base: HookedModel, facts: FactSet, anchor: str = "unembedding") -> Target:
    """The target anchor of every fact in the base model's residual stream.

    - `"unembedding"`: W_U[y_1], the unembedding of the answer's first token, the same for every layer. Nothing has to
      be confirmed. It is a direction of the last layers.
    - `"stated"`: the state at the last prompt token when the fact is stated before: its text, a line break, its prompt.
      Confirmed where the base model then answers right (every answer token is the greedy one).
    - `"centroid"`: the mean of the states at the last token of the answer, over the contexts "prompt answer" and
      "paraphrase answer" in which the base model gives the answer by itself. Confirmed where there are two or more.

    A fact with a text that is too long for the model is not confirmed. What is not confirmed is counted in the log.

    Raises:
        ValueError: an unknown anchor, or an unembedding that is not as wide as the residual stream.
    """
    check_anchor(anchor)
    if anchor == "unembedding" and base.W_U.shape[1] != base.d_model:
        raise ValueError(
            f"{base.name}: its unembedding has width {base.W_U.shape[1]} and its residual stream {base.d_model}, so "
            "there is no direction of the answer in the residual stream to measure drift against; choose another "
            "anchor."
        )
    points, confirmed = {"unembedding": _unembedding, "stated": _stated, "centroid": _centroid}[anchor](base, facts)
    centre = neutral_mean(base)
    origin = centre
    if anchor == "unembedding":
        origin = repeat(base.W_U.detach().float().mean(0).cpu(), "d -> layer d", layer=base.n_layers)
    target = Target(anchor, points, origin, centre, confirmed)
    if target.dropped:
        log.warning(
            "%s does not confirm the anchor %r of %d of %d facts; these are left out.",
            base.name,
            anchor,
            target.dropped,
            len(facts),
        )
    return target


def check_anchor(anchor: object) -> None:
    """Refuse anything but one of `ANCHORS`."""
    if anchor not in ANCHORS:
        raise ValueError(f"There is no anchor {anchor!r}: choose from {', '.join(ANCHORS)}.")


def last_states(model: HookedModel, texts: Sequence[Sequence[int]]) -> Float[Tensor, "layer text d_model"]:
    """The residual stream after every block at the last token of every text, in float32 on the CPU."""
    hidden = torch.zeros(model.n_layers, len(texts), model.d_model)
    for indices in by_length([len(text) for text in texts]):
        ids, mask = pad_batch([texts[i] for i in indices], side="right")
        hidden[:, indices] = model.resid_post(ids, mask, mask.sum(-1) - 1).float().cpu()
    return hidden


def neutral_mean(model: HookedModel) -> Float[Tensor, "layer d_model"]:
    """The mean state at the last token of the shipped neutral prompts, which ask for no fact in particular."""
    head = [model.tokenizer.bos_token_id] if uses_bos(model.tokenizer) else []
    encoded = [model.tokenizer.encode(prompt, add_special_tokens=False) for prompt in neutral_prompts()]
    return last_states(model, [(head + ids)[: model.max_tokens] for ids in encoded]).mean(1)


def _unembedding(
    base: HookedModel, facts: FactSet
) -> tuple[Float[Tensor, "layer fact d_model"], Bool[Tensor, " fact"]]:
    answers = base.W_U[[fact.answer_ids[0] for fact in base.tokenise(facts)]].detach().float().cpu()
    return repeat(answers, "fact d -> layer fact d", layer=base.n_layers), torch.ones(len(facts), dtype=torch.bool)


def _stated(base: HookedModel, facts: FactSet) -> tuple[Float[Tensor, "layer fact d_model"], Bool[Tensor, " fact"]]:
    said = [_bare(fact, f"{fact.text}\n{fact.prompt}", fact.id) for fact in facts]
    tokens = tokenise(said, base.tokenizer)
    known = _answered(base, tokens)
    points = torch.full((base.n_layers, len(facts), base.d_model), torch.nan)
    if chosen := [i for i, right in enumerate(known) if right]:
        points[:, chosen] = last_states(base, [tokens[i].prompt_ids for i in chosen])
    return points, torch.tensor(known)


def _centroid(base: HookedModel, facts: FactSet) -> tuple[Float[Tensor, "layer fact d_model"], Bool[Tensor, " fact"]]:
    contexts, owner = [], []
    for i, fact in enumerate(facts):
        for number, prompt in enumerate(dict.fromkeys((fact.prompt, *fact.paraphrases))):
            contexts.append(_bare(fact, prompt, f"{fact.id}#{number}"))
            owner.append(i)
    tokens = tokenise(contexts, base.tokenizer)
    kept = [k for k, right in enumerate(_answered(base, tokens)) if right]
    points = torch.full((base.n_layers, len(facts), base.d_model), torch.nan)
    confirmed = torch.zeros(len(facts), dtype=torch.bool)
    if kept:
        states = last_states(base, [tokens[k].ids for k in kept])
        for i in range(len(facts)):
            rows = [row for row, k in enumerate(kept) if owner[k] == i]
            if len(rows) > 1:
                points[:, i], confirmed[i] = states[:, rows].mean(1), True
    return points, confirmed


def _bare(fact: Fact, prompt: str, name: str) -> Fact:
    """The fact asked by another prompt, which may hold the answer."""
    return replace(fact, id=name, prompt=prompt, answer_in_prompt=True, paraphrases=(), neighbours=())


def _answered(base: HookedModel, tokens: Sequence[TokenisedFact]) -> list[bool]:
    """Which prompts the base model answers greedily; those that do not fit its context count as not answered."""
    fits = [i for i, fact in enumerate(tokens) if base.max_tokens is None or len(fact.ids) <= base.max_tokens]
    answered = [False] * len(tokens)
    for i, reading in zip(fits, read_facts(base, [tokens[i] for i in fits], greedy=False), strict=True):
        answered[i] = reading.known
    return answered
