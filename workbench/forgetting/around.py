"""What lies around facts, as a suite to read before and after: the same relations about other subjects."""

from workbench.facts import FactSet
from workbench.models import HookedModel
from workbench.recollection import recall


def neighbourhood_as_before(model: HookedModel, facts: FactSet) -> FactSet:
    """Prompts of the facts' relations about other subjects, with what the model says as their answer.

    Prompts that are among the facts themselves, and answers that the model does not give again, are left out; the set
    is empty where the facts have no neighbours.
    """
    taught = {fact.prompt for fact in facts}
    nothing = FactSet(f"{facts.name}:neighbourhood:as-before", ())
    if all(one.prompt in taught for fact in facts for one in fact.neighbours):
        return nothing
    others = facts.neighbourhood().filter(where=lambda fact: fact.prompt not in taught)
    said = recall(model, others)["predicted"].str.strip()
    records = [
        record | {"answer": said[record["id"]], "answer_in_prompt": True}
        for record in others.to_records()
        if said[record["id"]]
    ]
    if not records:
        return nothing
    found = FactSet.from_records(records, name=nothing.name)
    again = recall(model, found)["known"]
    return found.filter(where=lambda fact: bool(again[fact.id]))
