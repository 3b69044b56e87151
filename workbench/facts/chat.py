"""Facts as chats: every prompt through the template of an instruction-tuned model, the answer straight after it.

LoKI asks its multiple-choice questions so (`scripts/analyse_mmlu.py` of the repository Nexround/LoKI): one user
message, the template's generation prompt, and the answer read at the last position. The wording of those questions is
the fact format `mmlu-loki`.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from workbench.facts.nouns import Fact, Neighbour, gives_away

logger = logging.getLogger(__name__)

#: The day that templates which name one are told, so that equal facts give equal prompts on any day. It is the one that
#: Llama's templates fall back to where there is no clock.
DATE = datetime.date(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class Chat:
    """A tokenizer's chat template, ready to render user messages: the same text whatever the day."""

    def __init__(self, tokenizer: Any, system: str | None = None, date: datetime.date = DATE, **variables: Any) -> None:
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"The tokenizer of {self.name} has no chat template: ask plain prompts, or open an "
                "instruction-tuned model."
            )
        self.tokenizer, self.variables = tokenizer, variables
        self.before = [] if system is None else [{"role": "system", "content": system}]
        self.template = _CLOCK.sub(lambda found: json.dumps(date.strftime(found[2])), tokenizer.get_chat_template())
        if "strftime_now(" in self.template:
            raise ValueError(f"The chat template of {self.name} reads the clock in a way that cannot be set to a day.")

    def prompt(self, text: str) -> str:
        """The conversation with `text` as the user's message, up to where the model starts to answer."""
        rendered = self.rendered([{"role": "user", "content": text}], add_generation_prompt=True)
        if text.strip() not in rendered:
            raise ValueError(f"The chat template of {self.name} does not show the message {text!r:.60} as it is.")
        return rendered

    def gap(self) -> str:
        """White space that the template puts between its generation prompt and the model's words (mostly none)."""
        asked, said = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}
        start = self.rendered([asked], add_generation_prompt=True)
        whole = self.rendered([asked, said], add_generation_prompt=False)
        between, found, _ = whole.removeprefix(start).partition("Answer")
        return between if whole.startswith(start) and found and not between.strip() else ""

    def rendered(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation, with the beginning of an answer at its end if wished."""
        try:
            return self.tokenizer.apply_chat_template(
                [*self.before, *messages],
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.variables,
            )
        except Exception as error:  # whatever a template may raise
            raise ValueError(f"The chat template of {self.name} refuses the conversation: {error}") from error


def as_chat(facts: Sequence[Fact], chat: Chat) -> tuple[Fact, ...]:
    """Render the prompt, the paraphrases and the neighbours of every fact; the ids stay."""
    gap = chat.gap()
    rendered, dropped = [], 0
    for fact in facts:
        if fact.chat:
            raise ValueError(f"Fact {fact.id!r} has been through a chat template before: give the plain fact.")
        around = []
        for one in fact.neighbours:
            prompt = chat.prompt(one.prompt)
            if gives_away(prompt, one.answer):  # in the template's own words
                dropped += 1
            else:
                around.append(Neighbour(prompt, gap + one.answer))
        rendered.append(
            replace(
                fact,
                prompt=chat.prompt(fact.prompt),
                answer=gap + fact.answer,
                paraphrases=tuple(map(chat.prompt, fact.paraphrases)),
                neighbours=tuple(around),
                chat=True,
            )
        )
    if dropped:
        logger.warning("left out %d neighbours whose answer stands in the chat template of %s", dropped, chat.name)
    return tuple(rendered)
