"""Results: stores that survive being killed, files that are whole or absent, stages that know what they depend on."""

import errno
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.results import (
    RunDir,
    digest_of,
    load_frame,
    load_json,
    open_result,
    open_store,
    provenance,
    save_frame,
    save_json,
    save_result,
    store,
    validate_attribution,
    validate_interference,
)

LAYERS, UNITS = 3, 4
ATTRS = {
    "unit": "node",
    "method": "ig",
    "steps": 8,
    "rule": "midpoint",
    "baseline": "zero",
    "scope": "last",
    "objective": "logprob",
    "target": "gold",
    "model_digest": "m",
    "fact_digest": "f",
}


def labels(n_facts: int = 5, **changes: object) -> dict:
    ids = [f"capital/länd {i}" for i in range(n_facts)]
    given = {"ids": ids, "relations": ["capital"] * n_facts, "n_layers": LAYERS, "n_units": UNITS, "attrs": ATTRS}
    return {**given, **changes}


def numbers(n_facts: int = 5, n_units: int = UNITS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (n_facts, LAYERS, n_units), (n_facts, LAYERS), (n_facts,)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def some(indices: list[int], n_facts: int = 5) -> tuple:
    return (indices, *(values[indices] for values in numbers(n_facts)))


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path):
    return tmp_path / "out" / "attribution.zarr" if request.param == "disk" else None


def test_a_store_gives_back_what_was_written_in_any_order(place):
    with open_store(place, **labels()) as growing:
        assert growing.todo == [0, 1, 2, 3, 4]
        growing.write(*some([4, 1]))
        assert growing.todo == [0, 2, 3]
        assert growing.done == [1, 4]
        growing.write(*some([2, 0, 3]))
        assert growing.todo == []
        ds = growing.dataset()
    validate_attribution(ds)
    for name, values in zip(("score", "gap", "target_prob"), numbers(), strict=True):
        assert ds[name].dtype == np.float32
        assert np.array_equal(ds[name].values, values)
    assert ds["fact"].values.tolist() == labels()["ids"]
    assert ds["relation"].dims == ("fact",)
    assert ds.sel(fact="capital/länd 3")["score"].dims == ("layer", "unit")
    assert {name: ds.attrs[name] for name in ATTRS} == ATTRS


def test_partial_results_open_and_complete_ones_are_the_default(place):
    with open_store(place, **labels()) as growing:
        growing.write(*some([3, 1]))
        with pytest.raises(ValueError, match=r"partial=True"):
            growing.dataset()
        ds = growing.dataset(partial=True)
    assert ds["fact"].values.tolist() == ["capital/länd 1", "capital/länd 3"]
    assert np.array_equal(ds["score"].values, numbers()[0][[1, 3]])
    validate_attribution(ds)


def test_resuming_does_only_what_is_missing(tmp_path):
    path = tmp_path / "a.zarr"
    with open_store(path, **labels()) as growing:
        growing.write(*some([0, 2]))
    with open_store(path, **labels()) as growing:
        assert growing.todo == [1, 3, 4]
        growing.write(*some([1, 3, 4]))
    with open_store(path, **labels(), notes={"batch": 3}) as growing:
        assert growing.todo == []
    assert np.array_equal(open_result(path)["score"].values, numbers()[0])


@pytest.mark.parametrize("broken", ["score", "gap", "target_prob", "done"])
def test_an_interrupted_write_is_not_done_and_harms_no_other(tmp_path, monkeypatch, broken):
    path, put = tmp_path / "a.zarr", store._put

    def stop(array, where, values):
        if array.name.endswith(broken):
            raise KeyboardInterrupt
        put(array, where, values)

    with open_store(path, **labels()) as growing:
        growing.write(*some([0, 1]))
    monkeypatch.setattr(store, "_put", stop)
    with open_store(path, **labels()) as growing, pytest.raises(KeyboardInterrupt):
        growing.write(*some([2, 3]))
    monkeypatch.undo()
    with open_store(path, **labels()) as growing:
        assert growing.todo == [2, 3, 4]
        growing.write(*some([2, 3, 4]))
    assert np.array_equal(open_result(path)["gap"].values, numbers()[1])


def test_a_store_survives_a_process_killed_while_writing(tmp_path):
    """Kill a writer without warning; every fact that counts as done must be whole, and the lock must be free."""
    path = tmp_path / "a.zarr"
    script = (
        "import sys, numpy as np\n"
        "from workbench.results import open_store\n"
        "n = 400\n"
        f"with open_store(sys.argv[1], ids=[str(i) for i in range(n)], relations=['r'] * n, n_layers={LAYERS}, "
        f"n_units={UNITS}, attrs={ATTRS!r}) as store:\n"
        "    for i in range(n):\n"
        f"        one = np.full((1, {LAYERS}, {UNITS}), float(i))\n"
        "        store.write([i], one, one[..., 0], one[:, 0, 0])\n"
        "        print(i, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 10:
            break
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    ids = [str(i) for i in range(400)]
    with open_store(path, **labels(ids=ids, relations=["r"] * 400)) as growing:
        done = growing.done
        assert 11 <= len(done) < 400
        ds = growing.dataset(partial=True)
    expected = np.broadcast_to(np.array(done, dtype=np.float32)[:, None, None], ds["score"].shape)
    assert np.array_equal(ds["score"].values, expected)
    assert np.array_equal(ds["gap"].values, expected[..., 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attrs": {**ATTRS, "steps": 16}}, r"steps \(stored 8, now 16\).*resume=False"),
        ({"attrs": {**ATTRS, "model_digest": "n"}}, r"model_digest \(stored 'm', now 'n'\)"),
        ({"attrs": {**ATTRS, "more": 1}}, r"more \(stored 'absent', now 1\)"),
        ({"attrs": {k: v for k, v in ATTRS.items() if k != "rule"}}, r"rule \(stored 'midpoint', now 'absent'\)"),
        ({"n_units": 9}, r"the units \(4 stored, now 9\)"),
        ({"n_layers": 2}, r"the layers \(3 stored, now 2\)"),
        ({"ids": list("abcde")}, "the facts"),
    ],
)
def test_other_settings_are_named_and_nothing_is_touched(tmp_path, changes, message):
    path = tmp_path / "a.zarr"
    with open_store(path, **labels()) as growing:
        growing.write(*some([0, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match=message), open_store(path, **labels(**changes)):
        pass
    assert np.array_equal(open_result(path)["score"].values, numbers()[0])
    with open_store(path, **labels(**changes), resume=False) as growing:
        assert growing.todo == [0, 1, 2, 3, 4]


def test_tuples_and_none_in_settings_do_not_look_like_changes(tmp_path):
    attrs = {**ATTRS, "layers": (1, 2), "steps": None}
    for expected in ([0, 1, 2, 3, 4], [1, 2, 3, 4]):
        with open_store(tmp_path / "a.zarr", **labels(attrs=attrs)) as growing:
            assert growing.todo == expected
            growing.write(*some([0]))


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_not_a_result_is_never_replaced(tmp_path, resume):
    treasure = tmp_path / "photos"
    treasure.mkdir()
    (treasure / "cat.png").write_bytes(b"meow")
    foreign = tmp_path / "foreign.zarr"
    xr.Dataset({"x": ("y", np.arange(3))}).to_zarr(foreign, consolidated=False, zarr_format=3)
    other = save_result(xr.Dataset({"x": ("y", np.arange(3))}), tmp_path / "interference.zarr")
    for path, message in [(treasure, "not a result"), (foreign, "not a result"), (other, "of the kind 'result'")]:
        before = sorted(p.relative_to(path) for p in path.rglob("*"))
        with pytest.raises(ValueError, match=message), open_store(path, **labels(), resume=resume):
            pass
        assert sorted(p.relative_to(path) for p in path.rglob("*")) == before
    with pytest.raises(ValueError, match="not a result"):
        save_result(xr.Dataset(), treasure)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="not a result"), open_store(file, **labels(), resume=resume):
        pass


def test_two_writers_at_once_are_refused(tmp_path):
    path = tmp_path / "a.zarr"
    with open_store(path, **labels()) as growing:
        with pytest.raises(ValueError, match="being written by another process"), open_store(path, **labels()):
            pass
        growing.write(*some([0]))
    with open_store(path, **labels()) as growing:
        assert growing.todo == [1, 2, 3, 4]


def test_a_writer_in_another_process_is_refused(tmp_path):
    script = (
        "import sys\nfrom workbench.results import open_store\n"
        "with open_store(sys.argv[1], ids=['a'], relations=['r'], n_layers=1, n_units=1, attrs={}):\n"
        "    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    path = tmp_path / "a.zarr"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(path)], **pipes) as other:
        assert other.stdout.readline() == "open\n"
        arguments = labels(1, ids=["a"], n_layers=1, n_units=1, attrs={})
        with pytest.raises(ValueError, match="being written by another process"), open_store(path, **arguments):
            pass
        other.send_signal(signal.SIGKILL)
    with open_store(path, **arguments) as growing:  # the lock of a dead process binds nobody
        assert growing.todo == [0]


def test_memory_is_flat_in_the_number_of_facts(tmp_path):
    """Peak memory of writing and reading back; the negative control keeps everything and grows."""

    def peak(n_facts: int, path) -> int:
        tracemalloc.start()
        with open_store(path, **labels(n_facts, n_units=512)) as growing:
            for start in range(0, n_facts, 10):
                block = [np.ones(shape, np.float32) for shape in ((10, LAYERS, 512), (10, LAYERS), (10,))]
                growing.write(range(start, start + 10), *block)
            ds = growing.dataset()
            for start in range(0, n_facts, 10):
                ds["score"].isel(fact=slice(start, start + 10)).values.sum()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(10, tmp_path / "warm.zarr")
    few, many = peak(30, tmp_path / "few.zarr"), peak(300, tmp_path / "many.zarr")
    scores = 270 * LAYERS * 512 * 4  # what the additional facts would take
    assert many - few < scores / 5
    assert peak(300, None) - peak(30, None) > scores * 0.9


def test_wrong_numbers_are_refused_and_what_was_written_stays(place):
    with open_store(place, **labels()) as growing:
        growing.write(*some([0]))
        score, gap, prob = (values[[1, 2]] for values in numbers())
        score[1, 0, 0] = np.nan
        with pytest.raises(ValueError, match="score of fact capital/länd 2 is not finite"):
            growing.write([1, 2], score, gap, prob)
        with pytest.raises(ValueError, match=r"`score` of shape \(2, 3, 2\)"):
            growing.write([1, 2], score[:, :, :2], gap, prob)
        assert growing.done == [0]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_store(tmp_path / "a.zarr", **labels()) as growing:
        monkeypatch.setattr(store, "_put", full)
        with pytest.raises(OSError, match=r"^The disk is full while writing .*a\.zarr: free some space"):
            growing.write(*some([0]))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"^The disk is full while writing .*x\.json"):
        save_json(1, tmp_path / "x.json")
    assert not [p for p in tmp_path.iterdir() if "x.json" in p.name]


def test_a_store_needs_sensible_labels_and_a_place(tmp_path):
    for changes in ({"ids": []}, {"relations": ["r"]}):
        with pytest.raises(ValueError, match="needs fact ids"), open_store(None, **labels(**changes)):
            pass
    twice = labels(ids=["b", "a", "a"], relations=["r"] * 3)
    with pytest.raises(ValueError, match="'a' is given more than once"), open_store(None, **twice):
        pass
    taken = tmp_path / "file"
    taken.write_text("x")
    for place in (taken / "x.json", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"^Cannot write .*: choose another place\.$"):
            save_json(1, place)
    with pytest.raises(ValueError, match="plain JSON values"), open_store(None, **labels(attrs={"x": object()})):
        pass


# Schemas


def attribution() -> xr.Dataset:
    with open_store(None, **labels()) as growing:
        growing.write(*some([0, 1, 2, 3, 4]))
        return growing.dataset()


def interference() -> xr.Dataset:
    facts = np.array(["a", "b"], dtype=object)
    table = {
        name: (("metric", "layer"), np.zeros((2, LAYERS)))
        for name in ("within", "across", "difference", "null_low", "null_high", "p_value")
    }
    table["value"] = (("metric", "layer", "fact", "other"), np.zeros((2, LAYERS, 2, 2), np.float32))
    table["load"] = (("layer", "unit"), np.zeros((LAYERS, UNITS)))
    coords = {"metric": ["cosine", "jaccard"], "layer": range(LAYERS), "fact": facts, "other": facts}
    return xr.Dataset(table, {**coords, "relation": ("fact", ["r", "r"])}, {"unit": "node"})


def _with_nan(ds: xr.Dataset, name: str) -> xr.Dataset:
    ds = ds.copy(deep=True)
    ds[name][(1,) * ds[name].ndim] = np.nan
    return ds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ds: ds.drop_vars("gap"), r"lacks `gap` with dims \(fact, layer\)"),
        (lambda ds: ds.drop_vars("relation"), "lacks `relation`"),
        (lambda ds: ds.transpose("layer", "fact", "unit"), "`score` with dims"),
        (lambda ds: ds.assign(score=ds["score"].astype(int)), "dtype int64, expected floating point"),
        (lambda ds: ds.drop_attrs(), "does not say its unit, method"),
        (lambda ds: ds.assign_attrs(unit="row"), "unit kind 'row'"),
        (lambda ds: _with_nan(ds, "score"), "`score` at fact capital/länd 1, layer 1, unit 1 that is not finite"),
        (lambda ds: ds.isel(fact=[0, 1, 1]), "fact capital/länd 1 twice"),
    ],
)
def test_attribution_schema(change, message):
    validate_attribution(attribution())
    with pytest.raises(ValueError, match=message):
        validate_attribution(change(attribution()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ds: ds.drop_vars("load"), "lacks `load`"),
        (lambda ds: ds.assign_coords(other=["b", "a"]), "same facts, in the same order"),
        (lambda ds: _with_nan(ds, "value"), "`value` at metric jaccard, layer 1, fact b, other b that is not finite"),
    ],
)
def test_interference_schema(change, message):
    validate_interference(interference())
    validate_interference(_with_nan(interference(), "across"))
    with pytest.raises(ValueError, match=message):
        validate_interference(change(interference()))


# Whole results, frames, JSON


def test_a_result_round_trips_and_replaces_an_earlier_one(tmp_path):
    path = save_result(attribution(), tmp_path / "i.zarr")
    path = save_result(interference(), path)
    found = open_result(path)
    validate_interference(found)
    xr.testing.assert_identical(found.load(), interference().astype(found.dtypes))
    again = save_result(open_result(path), tmp_path / "again.zarr")
    xr.testing.assert_identical(open_result(again).load(), found)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name or "old" in p.name] == []


def test_a_failed_save_leaves_the_earlier_result(tmp_path, monkeypatch):
    path = save_result(interference(), tmp_path / "i.zarr")
    monkeypatch.setattr(xr.Dataset, "to_zarr", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_result(attribution(), path)
    validate_interference(open_result(path))
    assert [p.name for p in tmp_path.iterdir()] == ["i.zarr"]


def test_a_failed_swap_puts_the_earlier_result_back(tmp_path, monkeypatch):
    path = save_result(interference(), tmp_path / "i.zarr")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="The disk is full"):
        save_result(attribution(), path)
    validate_interference(open_result(path))
    assert [p.name for p in tmp_path.iterdir()] == ["i.zarr"]


def test_opening_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zarr is not a folder with a result"):
        open_result(tmp_path / "nowhere.zarr")


def test_frames_round_trip_with_index_types_and_attrs(tmp_path):
    frame = pd.DataFrame(
        {"known": [True, False], "layer": pd.array([1, None], dtype="Int64"), "prob": [0.5, np.nan], "text": ["é", ""]},
        index=pd.Index(["a", "b"], name="fact"),
    )
    frame.attrs = {"model_digest": "m", "steps": 8}
    found = load_frame(save_frame(frame, tmp_path / "deep" / "frame.parquet"))
    pd.testing.assert_frame_equal(found, frame)
    assert found.attrs == frame.attrs
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["frame.parquet"]


def test_failed_writes_leave_the_earlier_file(tmp_path, monkeypatch):
    path = save_json({"a": 1}, tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json as JSON"):
        save_json({"a": float("nan")}, path)
    with pytest.raises(ValueError, match="object has no JSON form"):
        save_json({"a": object()}, path)
    assert load_json(path) == {"a": 1}
    table = save_frame(pd.DataFrame({"a": [1]}), tmp_path / "t.parquet")

    def half(self, target, **_):
        target.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", half)
    with pytest.raises(KeyboardInterrupt):
        save_frame(pd.DataFrame({"a": [2]}), table)
    assert load_frame(table)["a"].tolist() == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.parquet", "x.json"]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        load_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.parquet is not a readable parquet"):
        load_frame(tmp_path / "x.parquet")
    for load in (load_json, load_frame):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            load(tmp_path / "absent")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(value=JSON)
def test_json_round_trips_and_its_digest_ignores_the_order_of_keys(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "value.json"
    assert load_json(save_json(value, path)) == value
    turned = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert digest_of(turned) == digest_of(value) == digest_of(load_json(path))
    assert digest_of([value]) != digest_of(value)


# Runs


def test_a_stage_is_done_only_for_its_key_and_its_files(tmp_path):
    run = RunDir(tmp_path / "run")
    key = {"quota": 10, "inputs": ["abc"]}
    assert not run.stage_done("implant/loki", key)
    with pytest.raises(FileNotFoundError, match=r"did not write .*history\.parquet"):
        run.mark_done("implant/loki", key, ["implant/loki/history.parquet"])
    assert not run.stage_done("implant/loki", key)
    save_frame(pd.DataFrame({"loss": [1.0]}), run.file("implant/loki/history.parquet"))
    run.mark_done("implant/loki", key, ["implant/loki/history.parquet"])
    assert run.stage_done("implant/loki", {"inputs": ("abc",), "quota": 10})
    assert not run.stage_done("implant/loki", {**key, "quota": 11})
    assert not run.stage_done("implant/lora", key)
    run.file("implant/loki/history.parquet").unlink()
    assert not run.stage_done("implant/loki", key)


def test_a_name_with_a_star_stands_for_the_files_that_are_there(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did not write .*\.json"):
        run.mark_done("merged", 1, ["merged/*.json"])
    for name in ("a", "b"):
        save_json({}, run.file(f"merged/{name}.json"))
    run.mark_done("merged", 1, ["merged/*.json"])
    assert run.stage_done("merged", 1)
    run.file("merged/b.json").unlink()
    assert not run.stage_done("merged", 1)


def test_a_stage_can_be_invalidated_and_a_broken_marker_marks_nothing(tmp_path):
    run = RunDir(tmp_path)
    run.invalidate("recall")
    run.mark_done("recall", 1)
    assert run.stage_done("recall", 1)
    run.invalidate("recall")
    assert not run.stage_done("recall", 1)
    run.mark_done("recall", 1)
    run.file("stages/recall.json").write_text('{"key"')
    assert not run.stage_done("recall", 1)


def test_run_files_stay_inside(tmp_path):
    run = RunDir(tmp_path)
    assert run.file("facts/retained.jsonl") == tmp_path / "facts" / "retained.jsonl"
    for name in ("../x", "/etc/passwd", "", "a/../../b"):
        with pytest.raises(ValueError, match="not the name of something inside a run"):
            run.file(name)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock():
        with pytest.raises(ValueError, match="Another run is at work in"), RunDir(tmp_path / "run").lock():
            pass
        with RunDir(tmp_path / "other").lock():
            pass
    with run.lock():
        pass


def test_provenance_names_versions_without_importing_them():
    script = (
        "import json, sys\nfrom workbench.results import provenance\n"
        "found = provenance()\nfound['imported'] = [m for m in ('torch', 'transformers', 'peft') if m in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["imported"] == []
    assert found["packages"]["xarray"] == xr.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft", "zarr"} <= set(found["packages"])
    assert set(found) - {"imported"} == set(provenance())
