"""The data filter: `spread` is exact, `near_diverse` is close to it, and every rule keeps its promises."""

import itertools
import random
import sys

import numpy as np
import pandas as pd
import pytest
from command import call
from tiny import FACTS, saved, tiny

from workbench import cli
from workbench.facts import FactSet, load_facts
from workbench.filtering import RULES, WEIGHTS, Pool, filter_facts, filtered, near_diverse, spread, target_embeddings
from workbench.recollection import recall
from workbench.semantics import semantic_distance


def named(n: int) -> FactSet:
    records = [{"id": f"f{i}", "relation": f"r{i % 2}", "prompt": f"number {i} is", "answer": "x"} for i in range(n)]
    return FactSet.from_records(records, name="some")


def frame_of(facts: FactSet, **metrics) -> pd.DataFrame:
    """Distances as `semantic_distance` gives them: metric -> one list, or several by layer."""
    parts = []
    for metric, values in metrics.items():
        layers = np.atleast_2d(np.asarray(values, dtype=float))
        for layer, row in enumerate(layers):
            part = pd.DataFrame({"fact": facts.ids, "relation": [f.relation for f in facts], "metric": metric})
            part["layer"] = pd.array([layer if metric == "d_layer" else pd.NA] * len(facts), dtype="Int64")
            parts.append(part.assign(distance=row, valid=np.isfinite(row)))
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs |= {"facts": facts.to_records(), "facts_name": facts.name}
    return frame


def pool(distance, keep: int, weight: float, embeddings=None) -> Pool:
    d = np.sort(np.asarray(distance, dtype=float))
    return Pool(tuple(map(str, range(len(d)))), d, keep, weight, None, embeddings, None, 0)


def unit(z) -> np.ndarray:
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_spread_equals_brute_force() -> None:
    draw = random.Random(0)
    weights = (0.0, 0.3, 1.0, 2.0, 7.0, 1e3)
    middles = 0
    for case in range(500):
        n = draw.randint(1, 9)
        d = [draw.choice((0.1, 0.4, 0.4, 0.9)) if case % 2 else draw.random() for _ in range(n)]
        k, lam = draw.randint(1, n), draw.choice(weights)

        def objective(subset, lam=lam) -> float:
            return float(np.mean(subset) - lam * np.var(subset))

        every = {subset: objective(subset) for subset in itertools.combinations(sorted(d), k)}
        chosen = spread(pool(d, k, lam))
        assert len(set(chosen)) == k
        assert objective(np.sort(d)[chosen]) == pytest.approx(min(every.values()), abs=1e-9 * (1 + lam))
        middles += objective(sorted(d)[:k]) > min(every.values()) + 1e-9
    assert middles > 60  # where the nearest facts alone would be wrong


def test_spread_of_equal_objectives_takes_the_nearest() -> None:
    assert spread(pool([0.0, 0.5, 1.0, 1.5], 2, 0.0)).tolist() == [0, 1]
    assert spread(pool([2.0] * 5, 3, 9.0)).tolist() == [0, 1, 2]
    assert spread(pool([0.0, 0.5, 1.0], 2, 9.0)).tolist() == [0, 2]


def test_near_diverse_is_never_better_and_mostly_as_good_as_brute_force() -> None:
    draw = np.random.default_rng(0)
    equal, cases, nearest = 0, 80, 0
    for _ in range(cases):
        n, lam = int(draw.integers(5, 10)), float(draw.choice([0.3, 1.0, 5.0]))
        k = int(draw.integers(1, n + 1))
        d, z = np.sort(draw.random(n)), draw.normal(size=(n, 3))

        def objective(subset, d=d, z=z, lam=lam) -> float:
            rows = unit(z)[list(subset)]
            return float(d[list(subset)].mean() - lam * np.trace(np.atleast_2d(np.cov(rows.T, bias=True))))

        best = min(map(objective, itertools.combinations(range(n), k)))
        found = objective(near_diverse(pool(d, k, lam, z)))
        assert found >= best - 1e-12
        equal += found <= best + 1e-9
        nearest += objective(range(k)) <= best + 1e-9
    assert equal >= 0.9 * cases
    assert nearest < 0.7 * cases


def test_near_diverse_equals_a_search_of_all_exchanges() -> None:
    draw, exchanged = np.random.default_rng(0), 0
    for case in range(60):
        n, lam = int(draw.integers(5, 40)), float(draw.choice([0.0, 0.3, 5.0, 1e3]))
        k, d, z = int(draw.integers(1, n)), np.sort(draw.random(n)), draw.normal(size=(n, 4))
        rows = unit(z)
        rows[0] *= case % 2  # a row of zeros

        def objective(subset, d=d, rows=rows, lam=lam) -> float:
            return d[subset].mean() + lam * (rows[subset].sum(0) ** 2).sum() / len(subset) ** 2

        kept: list[int] = []
        for _ in range(k):
            kept.append(min(set(range(n)) - set(kept), key=lambda i, kept=kept: objective([*kept, i])))
        while True:
            others = [[*(set(kept) - {i}), j] for i in kept for j in range(n) if j not in kept]
            best = min(others, key=objective)
            if objective(best) >= objective(kept) - 1e-12 * (1 + lam):
                break
            kept, exchanged = best, exchanged + 1
        assert near_diverse(pool(d, k, lam, rows)).tolist() == sorted(kept)
    assert exchanged > 20


def test_near_diverse_judges_few_exchanges_of_many_facts(monkeypatch) -> None:
    draw, n = np.random.default_rng(0), 600
    judged, pairs = [], np.ix_
    monkeypatch.setattr(np, "ix_", lambda *given: judged.append(len(given[0]) * len(given[1])) or pairs(*given))
    near_diverse(pool(draw.random(n), 300, 1.0, draw.normal(size=(n, 16))))
    assert 0 < max(judged) < 300 * 300 / 10


def test_near_diverse_prefers_what_is_different() -> None:
    z = np.array([[1.0, 0], [1, 0], [1, 0], [-1, 0]])
    assert near_diverse(pool([0.1, 0.2, 0.3, 0.4], 2, 1.0, z)).tolist() == [0, 3]
    assert near_diverse(pool([0.1, 0.2, 0.3, 0.4], 2, 0.0, z)).tolist() == [0, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [1, 5, 12, 0.3, 0.5, 1.0])
def test_every_rule_keeps_its_promises(rule: str, keep: float) -> None:
    facts, draw = named(12), np.random.default_rng(1)
    d, losses = (pd.Series(draw.random(12), index=list(facts.ids)) for _ in range(2))
    z = draw.normal(size=(12, 4))
    chosen = filter_facts(d, rule=rule, keep=keep, facts=facts, embeddings=z, loss=losses, seed=3)
    size = 12 if rule == "all" else keep if isinstance(keep, int) else round(12 * keep)
    assert len(chosen) == size
    assert [fact for fact in facts if fact.id in chosen.ids] == list(chosen)
    assert chosen.name == f"some:{rule}-{size}"
    again = filter_facts(dict(d), rule=rule, keep=keep, facts=facts, embeddings=z, loss=losses, seed=3)
    assert again == chosen
    order = draw.permutation(12)
    moved = FactSet(facts.name, tuple(facts.facts[i] for i in order))
    other = filter_facts(d, rule=rule, keep=keep, facts=moved, embeddings=z[order], loss=losses, seed=3)
    assert set(other.ids) == set(chosen.ids)


def test_each_rule_is_what_it_says() -> None:
    facts = named(6)
    d = pd.Series([0.5, 0.1, 0.4, 0.2, 0.3, 0.6], index=list(facts.ids))
    assert filter_facts(d, rule="band", keep=2, facts=facts).ids == ("f2", "f4")
    assert filter_facts(d, rule="band", keep=2, facts=facts, low=0.0).ids == ("f1", "f3")
    assert filter_facts(d, rule="band", keep=0.5, facts=facts, low=0.5).ids == ("f0", "f2", "f5")
    losses = pd.Series({"f0": 1.0, "f1": 9.0, "f2": 3.0, "f3": 9.5, "f4": 2.0, "f5": 1.0})
    assert filter_facts(d, rule="loss", keep=3, facts=facts, loss=losses).ids == ("f0", "f4", "f5")
    drawn = {seed: filter_facts(d, rule="random", keep=3, facts=facts, seed=seed).ids for seed in range(6)}
    assert drawn[2] == facts.sample(3, seed=2).ids
    assert len(set(drawn.values())) > 1
    tied = pd.Series(0.25, index=list(facts.ids))
    assert filter_facts(tied, rule="band", keep=2, facts=facts, low=0.0).ids == ("f0", "f1")


def test_every_band_within_the_quantiles_is_given_at_every_size() -> None:
    for n in (1, 2, 3, 5, 8, 25, 33):
        d = {f"f{i}": float(i) for i in range(n)}
        facts = FactSet.from_records([{"id": i, "prompt": f"The {i} of", "answer": "x"} for i in d], name="many")
        for low, keep in ((0.3, 0.7), (0.5, 0.5), (0.1, 0.9), (0.99, 0.01), (0.25, 0.3), (0.0, 1.0)):
            kept = filter_facts(d, rule="band", keep=keep, low=low, facts=facts).ids
            assert len(kept) == max(1, round(keep * n))
            assert abs(int(kept[0][1:]) - low * n) <= 1
            assert int(kept[-1][1:]) - int(kept[0][1:]) == len(kept) - 1


def test_the_frame_of_distances_is_enough() -> None:
    assert filter_facts(frame_of(FACTS, d_emb=np.arange(8)), rule="band", keep=3, low=0.0).facts == FACTS.facts[:3]
    frame = frame_of(FACTS, d_emb=np.arange(8), d_soft=np.arange(8)[::-1])
    assert filter_facts(frame, rule="band", keep=3, low=0.0).facts == FACTS.facts[5:]
    assert filter_facts(frame, rule="band", keep=3, low=0.0, metric="d_emb").facts == FACTS.facts[:3]
    fewer = FACTS[2:6]
    assert filter_facts(frame, rule="band", keep=1, low=0.0, facts=fewer).ids == (FACTS.ids[5],)


def test_what_is_not_valid_is_left_out_and_said() -> None:
    layers = np.array([[1.0, 2, 3, 4, 5, 6, 7, 8], [3.0, 2, np.nan, np.nan, 5, 6, 7, 8]])
    layers[:, 0] = np.nan
    frame = frame_of(FACTS, d_layer=layers)
    told = filtered(frame, rule="band", keep=0.5, low=0.0).set_index("fact")
    assert told["distance"].iloc[1:].tolist() == [2, 3, 4, 5, 6, 7, 8]  # the mean over the layers that are valid
    assert told["kept"].tolist() == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
    ]  # 4 of 7
    assert told["why"].iloc[[0, 1, 7]].tolist() == ["no valid distance", "kept by band", "dropped by band"]
    assert told["place"].tolist()[1:] == list(range(7))
    assert pd.isna(told["place"].iloc[0])
    assert "france" not in filter_facts(frame, rule="all", keep=1.0)


def test_targets_are_mean_embeddings_of_the_answer() -> None:
    model = tiny("gpt2")
    rows = target_embeddings(model, FACTS)
    ids = model.tokenizer.encode("blue one two", add_special_tokens=False)
    expected = model.hf.get_input_embeddings().weight[ids].double().mean(0)
    np.testing.assert_allclose(rows[FACTS.ids.index("sky")], expected.numpy(), rtol=1e-6)
    d = dict.fromkeys(FACTS.ids, 0.5)
    assert len(filter_facts(d, rule="near_diverse", keep=3, facts=FACTS, embeddings=rows)) == 3


def test_each_rule_has_a_weight_of_its_own_by_which_spread_keeps_far_facts_too() -> None:
    facts, draw = named(40), np.random.default_rng(0)
    d = pd.Series(draw.permutation(np.linspace(0.6, 1.0, 40)), index=list(facts.ids))  # about as d_soft lies
    rows = draw.normal(size=(40, 3))
    for rule, weight, other in (("spread", 4.0, 1.0), ("near_diverse", 1.0, 4.0)):
        options = {"rule": rule, "keep": 0.7, "facts": facts, "embeddings": rows}
        own = filtered(d, **options)
        assert own.equals(filtered(d, **options, weight=weight))
        assert filter_facts(d, **options).ids == tuple(own.loc[own["kept"], "fact"])
        assert not own.equals(filtered(d, **options, weight=other))
        if rule == "spread":
            assert (own.loc[own["kept"], "place"] >= 28).sum() >= 4
            assert (filtered(d, **options, weight=1.0)["kept"] == (own["place"] < 28)).all()


def test_numbers_of_numpy_are_shares_and_counts_as_pythons_are() -> None:
    d = dict.fromkeys(FACTS.ids, 0.5)
    for keep, size in ((np.float32(0.5), 4), (np.float16(1), 8), (np.int64(3), 3)):
        assert len(filter_facts(d, rule="spread", keep=keep, facts=FACTS)) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nearest"}, "no rule 'nearest'; known are spread"),
        ({"keep": 0}, "a number of facts from 1 on, not 0"),
        ({"keep": 5}, "keep=5 does not fit"),
        ({"keep": 1.5}, r"keep=1.5 is no share"),
        ({"keep": np.float32(1.5)}, r"keep=1.5 is no share"),
        ({"keep": True}, "a share or a count"),
        ({"weight": -1.0}, "from 0 on, of spread and near_diverse, got -1.0"),
        ({"rule": "band", "weight": 1.0}, "got 1.0 for band"),
        ({"metric": "d_emb"}, "has no metrics"),
        ({"rule": "near_diverse"}, "needs embeddings"),
        ({"rule": "near_diverse", "embeddings": np.ones((3, 2))}, "4 rows"),
        ({"rule": "loss"}, "needs loss"),
        ({"rule": "loss", "loss": pd.Series({"f0": 1.0})}, "3 facts have no loss, the first is 'f1'"),
        ({"rule": "spread", "low": 0.9}, "of the rule band alone, got 0.9 for spread"),
        ({"rule": "band", "low": 0.9}, r"cannot start at the quantile low=0.9"),
        ({"facts": None}, "give facts"),
        ({"facts": FactSet("none", ())}, "is empty"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, message: str) -> None:
    facts = named(4)
    d = {name: 0.1 * i for i, name in enumerate(facts.ids)}
    with pytest.raises(ValueError, match=message):
        filter_facts(d, **{"rule": "spread", "keep": 2, "facts": facts, **options})


def test_distances_that_do_not_fit_are_one_sentence() -> None:
    facts = named(3)
    with pytest.raises(ValueError, match=r"1 facts have no distance, the first is 'f2'"):
        filter_facts({"f0": 1.0, "f1": 2.0}, rule="spread", keep=1, facts=facts)
    with pytest.raises(ValueError, match="no metric 'd_layer'; there are d_emb"):
        filter_facts(frame_of(facts, d_emb=[1, 2, 3]), rule="spread", keep=1, metric="d_layer")
    with pytest.raises(ValueError, match="None of the 3 facts"):
        filter_facts(frame_of(facts, d_emb=[np.nan] * 3), rule="spread", keep=1)
    with pytest.raises(ValueError, match="no option 'near'"):
        filtered(frame_of(facts, d_emb=[1, 2, 3]), rule="spread", keep=1, near=1)


@pytest.mark.parametrize(("rule", "weight"), [("spread", 3.0), ("spread", None), ("near_diverse", 3.0), ("loss", None)])
def test_the_command_keeps_what_the_function_keeps(rule: str, weight, tmp_path, monkeypatch, capsys) -> None:
    place, out = FACTS.save(tmp_path / "facts.jsonl"), tmp_path / "kept.jsonl"
    options = ["--facts", place, "--model", saved(tmp_path / "model"), "--rule", rule, "--keep", "0.5"]
    options += [] if weight is None else ["--weight", weight]
    monkeypatch.setattr(sys, "argv", list(map(str, ["workbench", "filter", *options, "--out", out, "-q"])))
    rules = []
    chosen = RULES[rule]
    monkeypatch.setitem(RULES, rule, lambda pool: rules.append(pool.weight) or chosen(pool))
    cli.main()
    assert rules == [weight or WEIGHTS.get(rule, 1.0)]  # once: near_diverse is slow
    model = tiny("llama")
    distance, read = semantic_distance(model, FACTS), recall(model, FACTS)
    expected = filter_facts(
        distance, rule=rule, keep=0.5, weight=weight, embeddings=target_embeddings(model, FACTS),
        loss=-read["logprob"] / read["n_tokens"],
    )  # fmt: skip
    assert load_facts(out).facts == expected.facts
    assert expected.name == f"tiny:{rule}-4"
    table = pd.read_csv(tmp_path / "kept.filter.csv")
    assert table.loc[table["kept"], "fact"].tolist() == list(expected.ids)
    assert f"dropped by {rule}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x.jsonl", "--keep", "half"], "not 'half'"),
        (["--out", "x.jsonl", "--rule", "near"], "no rule 'near'"),
        (["--out", "x.jsonl", "--low", "0.9"], "of the rule band alone"),
        (["--out", "x.csv"], "end in .jsonl"),
    ],
)
def test_the_command_refuses_before_it_opens_a_model(options, message: str, monkeypatch, capsys) -> None:
    arguments = ["workbench", "filter", "--facts", "fictional:4", "--model", "none", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_the_facts_of_the_user_are_not_written_over(tmp_path, monkeypatch, capsys) -> None:
    mine = FACTS.save(tmp_path / "facts.jsonl")
    before = mine.read_bytes()
    arguments = ["filter", "--facts", mine, "--model", tmp_path / "none", "--out", mine]
    assert call(monkeypatch, *arguments) == 1
    assert "is the file of the facts themselves" in capsys.readouterr().err
    assert mine.read_bytes() == before
