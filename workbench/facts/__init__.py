"""Facts: what a model may know, what it is taught, and how both are read, checked, split and tokenised."""

from workbench.facts.examples import Example, ExampleSet, Message, TokenisedExample, load_training_data
from workbench.facts.nouns import NO_RELATION, Fact, Neighbour, relation_label
from workbench.facts.readers import load_facts
from workbench.facts.sets import FactSet
from workbench.facts.shipped import fictional, general_text, neutral_prompts
from workbench.facts.tokens import TokenisedFact

__all__ = [
    "NO_RELATION",
    "Example",
    "ExampleSet",
    "Fact",
    "FactSet",
    "Message",
    "Neighbour",
    "TokenisedExample",
    "TokenisedFact",
    "fictional",
    "general_text",
    "load_facts",
    "load_training_data",
    "neutral_prompts",
    "relation_label",
]
