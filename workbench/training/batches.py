"""From facts and examples to batches: what is trained, what counts as learned, and how much of it is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.facts import ExampleSet, FactSet, TokenisedExample, TokenisedFact
from workbench.models import HookedModel, pad_batch
from workbench.recollection import by_length

#: The label of a token that the loss leaves out.
IGNORED = -100

Tokenised = TokenisedFact | TokenisedExample


def trained_prompts(facts: FactSet, paraphrases: int) -> FactSet:
    """The prompts of the facts, and the first few paraphrases of each."""
    if not paraphrases or not any(fact.paraphrases for fact in facts):
        return facts
    return FactSet(facts.name, facts.facts + facts.paraphrased(stop=paraphrases).facts)


def held_out_prompts(facts: FactSet, paraphrases: int) -> FactSet:
    """The paraphrases that `trained_prompts` leaves out; an empty set where there are none."""
    if all(len(fact.paraphrases) <= paraphrases for fact in facts):
        return FactSet(f"{facts.name}:paraphrased", ())
    return facts.paraphrased(start=paraphrases)


def tokenise(model: HookedModel, data: FactSet | ExampleSet, paraphrases: int = 0) -> Sequence[Tokenised]:
    """Token ids of everything that is trained; each must fit the model's context and vocabulary (else `ValueError`)."""
    if not len(data):
        raise ValueError("There is nothing to implant: the fact set is empty.")
    if isinstance(data, FactSet):
        return model.tokenise(trained_prompts(data, paraphrases))
    examples = data.tokenise(model.tokenizer, max_tokens=model.max_tokens)
    for one in examples:
        if max(one.ids) >= model.d_vocab:
            raise ValueError(
                f"The tokenizer gives example {one.example_id!r} the id {max(one.ids)}, but {model.name} has only "
                f"{model.d_vocab} tokens: the tokenizer belongs to another model."
            )
    return examples


def labelled(item: Tokenised) -> list[int]:
    """The label of every token: the token itself where it is learned.

    >>> labelled(TokenisedFact("a", (5, 6), (7,))), labelled(TokenisedExample("b", (5, 6, 7), (False, True, False)))
    ([-100, -100, 7], [-100, 6, -100])
    """
    if isinstance(item, TokenisedFact):
        return [IGNORED] * len(item.prompt_ids) + list(item.answer_ids)
    return [token if learned else IGNORED for token, learned in zip(item.ids, item.learned, strict=True)]


def name_of(item: Tokenised) -> str:
    """The id of a fact or an example."""
    return item.fact_id if isinstance(item, TokenisedFact) else item.example_id


def collate(items: Sequence[Tokenised], places: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """A padded batch whose labels are the learned tokens and nothing else.

    With `places`, `item` says which of them each is; -1 is none.

    >>> batch = collate([TokenisedFact("a", (5, 6), (7,)), TokenisedFact("b", (5,), (8,))])
    >>> batch["labels"].tolist()
    [[-100, -100, 7], [-100, 8, -100]]
    """
    ids, mask = pad_batch([item.ids for item in items], side="right")
    labels, _ = pad_batch([labelled(item) for item in items], pad_id=IGNORED, side="right")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if places is None:
        return batch
    return batch | {"item": torch.tensor([places.get(name_of(item), -1) for item in items])}


@torch.no_grad()
def efficacy(model: torch.nn.Module, items: Sequence[Tokenised]) -> float:
    """Share of facts or examples whose every learned token is the model's greedy choice (teacher-forced)."""
    right = 0
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    for indices in by_length([len(item.ids) for item in items]):
        batch = {name: tensor.to(device) for name, tensor in collate([items[i] for i in indices]).items()}
        labels = batch.pop("labels")[:, 1:]
        choice = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((choice == labels) | (labels == IGNORED)).all(-1).sum())
    model.train(training)
    return right / len(items)
