"""The shipped tasks are what they say, and lm-eval through the workbench scores what lm-eval by hand scores."""

import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import FACTS, default, random_model, saved, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import workbench
from workbench import cli
from workbench.facts import load_facts
from workbench.forgetting import TASKS, benchmark, measure_forgetting
from workbench.forgetting.harness import _seeded
from workbench.forgetting.shipped import items
from workbench.models import HookedModel, load_model

FOLDER = Path(workbench.__file__).parent / "data" / "tasks"
LIMIT = 16


@pytest.mark.parametrize("task", TASKS)
def test_items_are_well_formed_and_balanced(task: str) -> None:
    found = items(task)
    assert len(found) >= 100
    for key in ("id", "question"):
        assert len({item[key] for item in found}) == len(found)
    for item in found:
        assert set(item) == {"id", "question", "choices", "answer"}
        assert len(item["choices"]) == len({choice.casefold() for choice in item["choices"]}) == 4
        assert 0 <= item["answer"] < 4
        assert all(text == text.strip() and text for text in (item["question"], *item["choices"]))
    for part in (found, found[:40]):
        counts = Counter(item["answer"] for item in part)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_fact_choices_are_facts_of_the_world() -> None:
    facts = {fact.id: fact for fact in load_facts("world")}
    answers: dict[str, set[str]] = {}
    true: dict[tuple[str, str], set[str]] = {}
    for fact in facts.values():
        answers.setdefault(fact.relation, set()).add(fact.answer)
        true.setdefault((fact.relation, fact.subject), set()).add(fact.answer)
    for item in items("fact_choice"):
        fact, choices = facts[item["id"]], list(item["choices"])
        assert item["question"] in (fact.prompt, *fact.paraphrases)
        assert choices.pop(item["answer"]) == fact.answer
        assert set(choices) <= answers[fact.relation] - true[fact.relation, fact.subject]


def test_sums_are_right() -> None:
    signs = {"plus": "+", "minus": "-", "times": "*", "divided-by": "/"}
    for item in items("arithmetic_choice"):
        a, word, b = re.fullmatch(r"arithmetic/(\d+)-([a-z-]+)-(\d+)", item["id"]).groups()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[signs[word]]
        assert float(item["choices"][item["answer"]]) == value
        order = re.findall(r"\d+", item["question"])
        assert order == ([b, a] if "take" in item["question"] else [a, b])


def letters() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@cache
def small(seed: int) -> HookedModel:
    """A random model that reads letters, shared by all tests that do not change it."""
    hf = random_model("llama", seed, vocab_size=259, max_position_embeddings=256)
    return load_model(hf, tokenizer=letters())


def by_hand(model: HookedModel, task: str, monkeypatch: pytest.MonkeyPatch, limit: int):
    """lm-eval as its own users call it, less its slow report of the machine."""
    lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "knowledge-workbench[eval]"')
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    lm = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=16)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=[task], limit=limit, task_manager=manager)


def check_equal(model: HookedModel, task: str, monkeypatch: pytest.MonkeyPatch, limit: int) -> pd.DataFrame:
    """Scores and every item's score equal those of lm-eval by hand, exactly."""
    expected = by_hand(model, task, monkeypatch, limit)
    row = benchmark(model, [task], limit=limit).iloc[0]
    assert row["value"] == expected["results"][task]["acc,none"]
    assert row["stderr"] == expected["results"][task]["acc_stderr,none"]
    assert (row["task"], row["metric"], row["n"], row["mode"]) == (task, "acc", limit, "likelihood of choices")
    frame = measure_forgetting(model, model, {}, tasks=[task], limit=limit)
    assert frame["before"].tolist() == [sample["acc"] for sample in expected["samples"][task]]
    assert frame["fact"].tolist() == [item["id"] for item in items(task)[:limit]]
    assert frame["change"].eq(0).all()
    return frame


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_lm_eval_by_hand(task: str, monkeypatch) -> None:
    frame = check_equal(small(0), task, monkeypatch, LIMIT)
    assert set(frame["mode"]) == {"likelihood of choices"}
    assert 0 < frame["before"].sum() < LIMIT
    other = measure_forgetting(small(0), {"other": small(1)}, {}, tasks=[task], limit=LIMIT)
    assert other["before"].tolist() == frame["before"].tolist()
    assert other["change"].ne(0).any()


def test_scores_equal_the_likelihood_of_each_choice() -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "knowledge-workbench[eval]"')
    model = small(0)
    frame = measure_forgetting(model, model, {}, tasks=["fact_choice"], limit=12).set_index("fact")["before"]
    for item in items("fact_choice")[:12]:
        start, found = len(model.tokenizer(item["question"]).input_ids), []
        for choice in item["choices"]:
            ids = torch.tensor([model.tokenizer(f"{item['question']} {choice}").input_ids])
            with torch.no_grad():
                each = model.hf(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            found.append(float(each[start - 1 :].sum()))
        assert frame[item["id"]] == float(found.index(max(found)) == item["answer"])


def test_reading_tasks_changes_nothing_else() -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "knowledge-workbench[eval]"')
    model = small.__wrapped__(0)
    model.tokenizer.pad_token = None
    digest, drawn = model.digest, (torch.random.get_rng_state(), np.random.get_state()[1].copy())
    benchmark(model, ["arithmetic_choice"], limit=2)
    assert model.tokenizer.pad_token is None
    assert model.digest == digest
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert (np.random.get_state()[1] == drawn[1]).all()


def test_what_is_drawn_depends_on_the_seed_and_nothing_after_it_does() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    first = draw()
    with _seeded(7):
        inside = draw()
    assert [first, draw()] == expected
    with _seeded(7):
        assert draw() == inside


def test_a_task_of_the_users_own(tmp_path) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "knowledge-workbench[eval]"')
    text = (FOLDER / "fact_choice.yaml").read_text(encoding="utf-8").replace("task: fact_choice", "task: mine")
    (tmp_path / "mine.yaml").write_text(text + "  note: own\n", encoding="utf-8")
    both = benchmark(small(0), ["mine", "fact_choice"], limit=8, folder=tmp_path)
    assert both["task"].tolist() == ["mine", "fact_choice"]
    assert both["value"].nunique() == 1
    for wrong, sentence in ((["mine", "mine"], "stands twice"), ([], "list of tasks"), ("mine", "list of tasks")):
        with pytest.raises(ValueError, match=sentence):
            benchmark(small(0), wrong, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of tasks"):
        benchmark(small(0), ["mine"], folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 1 item"):
        benchmark(small(0), ["mine"], limit=0, folder=tmp_path)


def test_without_lm_eval_one_sentence_says_the_way_out(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    for call in (
        lambda: benchmark("no-such-model"),
        lambda: measure_forgetting("no-such-model", "none", {"facts": FACTS}, tasks=TASKS),
    ):
        with pytest.raises(ValueError, match=re.escape('pip install "knowledge-workbench[eval]"')):
            call()


def test_a_suite_and_a_task_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="both a suite and a task"):
        measure_forgetting(tiny("gpt2"), tiny("gpt2"), {"fact_choice": FACTS}, tasks=["fact_choice"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["workbench", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_compares_tasks_too(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "knowledge-workbench[eval]"')
    folder, facts = str(saved(tmp_path / "model")), str(FACTS.save(tmp_path / "facts.jsonl"))
    out = tmp_path / "lost.parquet"
    common = ("--facts", facts, "--limit", "5", "--max-tokens", "64", "-q")
    assert run(monkeypatch, "forgetting", folder, folder, "--tasks", "shipped", "--out", str(out), *common) == 0
    printed = capsys.readouterr().out
    assert "Average loss over" in printed or "Left out of the average" in printed
    frame = pd.read_parquet(out)
    assert frame["change"].eq(0).all()
    sizes = frame.query("metric == 'accuracy'").groupby("suite").size().to_dict()
    assert {name: sizes[name] for name in ("facts", *TASKS)} == dict.fromkeys(("facts", *TASKS), 5)
    assert run(monkeypatch, "benchmark", "--model", folder, "--tasks", "fact_choice", "--limit", "4", "-q") == 0
    assert "likelihood of choices" in capsys.readouterr().out


def test_the_command_says_what_it_leaves_out(tmp_path, monkeypatch, capsys) -> None:
    folder, facts = str(saved(tmp_path / "model")), str(FACTS.save(tmp_path / "facts.jsonl"))
    monkeypatch.setattr("workbench.forgetting.lm_eval_installed", lambda: False)
    assert run(monkeypatch, "forgetting", folder, folder, "--facts", facts, "--max-tokens", "64", "-q") == 0
    printed = capsys.readouterr()
    assert "knowledge-workbench[eval]" in printed.err
    assert "accuracy" in printed.out
    assert "Average" not in printed.out


@pytest.mark.real
def test_the_default_model_equals_lm_eval_by_hand(monkeypatch) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "knowledge-workbench[eval]"')
    check_equal(default(), "fact_choice", monkeypatch, 4)
