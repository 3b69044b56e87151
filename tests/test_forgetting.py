"""Forgetting: numbers against plain transformers, and a model against itself."""

import pandas as pd
import pytest
import torch
from tiny import FACTS, random_model, tiny, tokenizer

from workbench.forgetting import measure_forgetting, measuring, neighbourhood_as_before
from workbench.intervals import means
from workbench.models import load_model
from workbench.recollection import recall, text_chunks

TEXT = [
    "one two three four five six seven eight red blue green sky",
    "the capital of France is Paris in a big city one",
]


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_a_model_against_itself_forgets_nothing(kind: str) -> None:
    frame = measure_forgetting(tiny(kind), tiny(kind), {"retained": FACTS, "general": TEXT})
    assert frame["change"].eq(0).all()
    assert set(frame["metric"]) == {"accuracy", "logprob", "nll", "kl"}


def test_the_neighbourhood_is_what_the_model_says_about_other_subjects() -> None:
    model = tiny("llama")
    found = neighbourhood_as_before(model, FACTS)
    assert [fact.prompt for fact in found] == ["the capital of Spain is"]
    assert recall(model, found)["known"].all()
    assert found[0].answer != "Madrid"
    assert found[0].relation == "capital"
    assert len(neighbourhood_as_before(model, FACTS.filter(ids=["gold", "sky"]))) == 0


def test_numbers_equal_plain_transformers() -> None:
    plain = [random_model("llama", seed) for seed in (0, 1)]
    first, second = (load_model(model, tokenizer=tokenizer()) for model in plain)
    frame = measure_forgetting(first, {"other": second}, {"retained": FACTS, "general": TEXT})
    assert set(frame["method"]) == {"other"}
    for name, model in (("before", first), ("after", second)):
        read = recall(model, FACTS)
        facts = frame[frame["suite"] == "retained"].set_index(["metric", "fact"])[name]
        assert facts["accuracy"].to_dict() == read["known"].astype(float).to_dict()
        assert facts["logprob"].to_dict() == pytest.approx(read["logprob"].to_dict(), rel=1e-5)
    general = frame[frame["suite"] == "general"].set_index(["metric", "fact"])
    for number, chunk in enumerate(text_chunks(first, TEXT, max_tokens=100)):
        ids = torch.tensor([chunk])
        with torch.no_grad():
            old, new = (model(ids, labels=ids) for model in plain)
        label = f"text-{number:04d}"
        assert general.loc[("nll", label), "before"] == pytest.approx(float(old.loss), rel=1e-5)
        assert general.loc[("nll", label), "after"] == pytest.approx(float(new.loss), rel=1e-5)
        p, q = (out.logits[0, :-1].log_softmax(-1) for out in (old, new))
        assert general.loc[("kl", label), "after"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        assert general.loc[("nll", label), "weight"] == len(chunk) - 1
    read = means(frame).set_index("metric")
    nll = general.loc["nll"]
    assert read.loc["nll", "after"] == pytest.approx((nll["after"] * nll["weight"]).sum() / nll["weight"].sum())
    assert read.loc["accuracy", "n"] == len(FACTS)


def test_empty_suites_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="empty: nothing"):
        measure_forgetting(tiny("gpt2"), tiny("gpt2"), {"retained": FACTS, "nothing": []})


def test_what_cannot_be_compared_is_refused_before_anything_is_read(monkeypatch) -> None:
    first, short = tiny("llama"), load_model(random_model("llama", num_hidden_layers=2), tokenizer=tokenizer())
    monkeypatch.setattr(measuring, "read_facts", lambda *given, **options: pytest.fail("read"))
    for after in (short, short.hf, {"same": first, "short": short}):
        with pytest.raises(ValueError, match="n_layers is 3 and 2"):
            measure_forgetting(first, after, {"facts": FACTS})
    with pytest.raises(ValueError, match="At least 8 tokens"):
        measure_forgetting(first, first, {"facts": FACTS, "general": TEXT}, max_tokens=7)


def test_several_models_share_what_the_first_says_about_texts(monkeypatch) -> None:
    first, second = tiny("llama"), load_model(random_model("llama", 1), tokenizer=tokenizer())
    read: list[object] = []
    plain = measuring.text_logits
    monkeypatch.setattr(measuring, "text_logits", lambda model, chunk: read.append(model) or plain(model, chunk))
    pair, n_chunks = {"one": second, "two": second}, len(text_chunks(first, TEXT, max_tokens=100))
    kept = measure_forgetting(first, pair, {"general": TEXT})
    assert read.count(first) == n_chunks
    monkeypatch.setattr(measuring, "KEPT_BYTES", 0)
    pd.testing.assert_frame_equal(measure_forgetting(first, pair, {"general": TEXT}), kept)
    assert read.count(first) == 3 * n_chunks  # without room it is read for each of the two
    alone = measure_forgetting(first, second, {"general": TEXT})
    pd.testing.assert_frame_equal(alone, kept.query("method == 'two'")[alone.columns].reset_index(drop=True))
