"""How near two facts are in meaning, by the model's own embedding."""

import torch

from workbench.interfere.problem import Matrix, Problem


def meaning(problem: Problem) -> Matrix:
    """Cosine of two facts' mean rows of W_E: over the tokens of the subject in the prompt, and of the answer.

    Facts whose subject is not in their prompt have their answer alone.
    """
    table = problem.opened.W_E.detach()
    means = []
    for fact, span in zip(problem.tokens, problem.subjects, strict=True):
        subject = [] if span is None else [fact.prompt_ids[at] for at in span]
        means.append(table[[*subject, *fact.answer_ids]].float().mean(0).cpu().double())
    unit = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    return (unit @ unit.T).numpy()
