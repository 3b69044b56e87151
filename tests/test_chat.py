"""Facts as chats: the tokens of the template itself, the answer straight after it, the same on any day."""

import datetime
from pathlib import Path

import pytest
from test_cli import call
from tiny import FACTS, default, random_model, tiny, tokenizer
from tokenizers.processors import TemplateProcessing

import workbench as wb
from workbench.facts import FactSet, load_facts
from workbench.models import load_model
from workbench.recollection import recall

PLAIN = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
WITH_BOS = "{{ bos_token + ' ' }}" + PLAIN
#: The answer of the model follows the last word of the prompt after a space that is the answer's.
TIGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' in ' + m.content + ' is' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
#: Nothing at all stands between the two.
GLUED = (
    "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}{% if add_generation_prompt %}{{ '[' }}{% endif %}"
)
CLOCK = "{{ 'two ' + strftime_now(\"%d %b %Y\") + ' ' }}" + PLAIN
LLAMA_CLOCK = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} "
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN


def with_template(template: str, bos: bool = False):  # type: ignore[no-untyped-def]
    words = tokenizer()
    words.chat_template = template
    if bos:
        words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return words


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def templated(words, text: str) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    return tuple(words.apply_chat_template(conversation(text), add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("bos", [False, True], ids=["tokenizer adds no BOS", "tokenizer adds BOS"])
@pytest.mark.parametrize("template", [PLAIN, WITH_BOS, TIGHT])
def test_prompts_are_the_tokens_of_the_template_and_bos_is_never_doubled(template: str, bos: bool) -> None:
    words = with_template(template, bos)
    chats = FACTS.as_chat(words)
    assert chats.ids == FACTS.ids
    for plain, fact in zip(FACTS, chats.tokenise(words), strict=True):
        assert fact.prompt_ids == templated(words, plain.prompt)
        assert fact.answer_ids == tuple(words.encode(plain.answer, add_special_tokens=False))
        assert fact.prompt_ids.count(1) == (template != PLAIN)
        assert fact.bos == (template != PLAIN)
    if bos:  # negative control: without the mark, BOS stands before what has none
        doubled = FactSet.from_records(
            [{"prompt": "in the city is", "answer": "Paris"}, {"prompt": "sky in", "answer": "Paris", "chat": True}]
        )
        assert [fact.prompt_ids.count(1) for fact in doubled.tokenise(words)] == [1, 0]


def test_paraphrases_and_neighbours_are_rendered_and_stay_rendered(tmp_path: Path) -> None:
    words = with_template(PLAIN)
    chats = FACTS.as_chat(words)
    france = chats["france"]
    assert france.prompt == "<user> the capital of France is </s> <assistant> "
    assert france.paraphrases == ("<user> France capital is </s> <assistant> ",)
    assert france.neighbours[0].prompt == "<user> the capital of Spain is </s> <assistant> "
    assert (france.answer, france.text) == ("Paris", france.prompt + "Paris")
    assert all(fact.chat for part in (chats.paraphrased(), chats.per_prompt(), chats.neighbourhood()) for fact in part)
    again = load_facts(chats.save(tmp_path / "chats.jsonl"))
    assert again.digest == chats.digest != FACTS.digest
    with pytest.raises(ValueError, match="'france' has been through a chat template before"):
        chats.as_chat(words)


def test_nothing_comes_between_the_template_and_the_answer_but_what_the_template_puts_there() -> None:
    assert FACTS.as_chat(with_template(GLUED))["france"].text == "[the capital of France is][Paris"
    tight = FACTS.as_chat(with_template(TIGHT))["france"]
    assert (tight.prompt[-2:], tight.answer) == ("is", " Paris")
    assert FACTS["france"].text == "the capital of France is Paris"  # plain facts are joined by a space


@pytest.mark.parametrize("template", [CLOCK, LLAMA_CLOCK + PLAIN])
def test_a_template_that_names_the_day_gives_the_same_prompts_on_any_day(template: str) -> None:
    words = with_template(template)
    assert "26 Jul 2024" in FACTS.as_chat(words)["sky"].prompt
    assert datetime.date.today().strftime("%d %b %Y") not in FACTS.as_chat(words)["sky"].prompt
    assert "01 Feb 2026" in FACTS.as_chat(words, date=datetime.date(2026, 2, 1))["sky"].prompt
    assert str(datetime.date.today().year) in words.apply_chat_template(conversation("x"), tokenize=False)
    with pytest.raises(ValueError, match="reads the clock"):
        FACTS.as_chat(with_template("{% set f = '%d' %}{{ strftime_now(f) }}" + PLAIN))


def test_system_messages_and_variables_reach_the_template() -> None:
    chats = FACTS.as_chat(with_template(PLAIN), system="one two")
    assert chats["sky"].prompt.startswith("<system> one two </s> <user> ")
    assert FACTS.as_chat(with_template("{{ mood }} " + PLAIN), mood="cold")["sky"].prompt.startswith("cold <user> ")


def test_neighbours_whose_answer_the_template_says_are_left_out(caplog) -> None:
    chats = FACTS.as_chat(with_template("Madrid " + PLAIN))
    assert chats["france"].neighbours == ()
    assert "left out 1 neighbours" in caplog.text
    assert FACTS.as_chat(with_template("Paris " + PLAIN))["france"].prompt.startswith("Paris <user>")


def test_what_cannot_be_rendered_is_one_sentence() -> None:
    for template, options, message in [
        (None, {}, "has no chat template: ask plain prompts"),
        (NO_SYSTEM, {"system": "x"}, "refuses the conversation: no system"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", {}, "does not show the message"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            FACTS.as_chat(with_template(template), **options)
        assert len(str(caught.value).splitlines()) == 1


def test_mmlu_in_the_words_of_loki(tmp_path: Path) -> None:
    path = tmp_path / "high_school_geography_test.csv"
    path.write_text('"Which city is big?",Rome,Paris,"Madrid, Spain",Tokyo,B\n', encoding="utf-8")
    fact = load_facts(path, format="mmlu-loki")[0]
    assert fact.prompt == (
        "There is a single choice question about High School Geography. Answer the question by replying A, B, C or D.\n"
        "Question: Which city is big?\nChoices:\nA. Rome\nB. Paris\nC. Madrid, Spain\nD. Tokyo\nAnswer: \n"
    )
    assert (fact.answer, fact.relation, fact.answer_in_prompt) == ("B", "high_school_geography", True)
    assert load_facts(path)[0].prompt == "Which city is big?\nA. Rome\nB. Paris\nC. Madrid, Spain\nD. Tokyo\nAnswer:"


def test_the_commands_ask_as_chats(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder)
    with_template(WITH_BOS).save_pretrained(folder)
    facts, out = str(FACTS.save(tmp_path / "f.jsonl")), tmp_path / "a.zarr"
    command = ["--model", str(folder), "--facts", facts, "--chat", "-q"]
    assert call(monkeypatch, "recall", *command, "--out", str(tmp_path / "r.parquet")) == 0
    assert call(monkeypatch, "attribute", *command, "--steps", "2", "--out", str(out)) == 0
    model = load_model(str(folder))
    chats = FACTS.as_chat(model.tokenizer)
    from workbench.results import load_frame, open_result

    frame = load_frame(tmp_path / "r.parquet").set_index("fact")
    assert frame["logprob"].to_numpy() == pytest.approx(recall(model, chats)["logprob"].to_numpy())
    assert frame["logprob"].to_numpy() != pytest.approx(recall(model, FACTS)["logprob"].to_numpy())
    assert open_result(out).attrs["fact_digest"] == chats.digest
    tiny("llama").tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    capsys.readouterr()
    assert call(monkeypatch, "recall", *command) == 1
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_model_is_asked_in_its_own_template() -> None:
    model = default()
    world = wb.load_facts("world").sample(6, seed=0)
    chats = world.as_chat(model.tokenizer)
    for plain, fact in zip(world, model.tokenise(chats), strict=True):
        assert fact.prompt_ids == templated(model.tokenizer, plain.prompt)
        assert model.tokenizer.decode(list(fact.ids)).endswith("<|im_start|>assistant\n" + plain.answer)
        assert model.tokenizer.decode(list(fact.prompt_ids)).count("<|im_start|>") == 3
