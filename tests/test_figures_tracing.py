"""Figures of tracing: the traces and axes behind them, and the frames they ask for."""

import numpy as np
import pandas as pd
import pytest

from workbench import figures

MAP = pd.DataFrame(
    {
        "layer": [1, 0, 0, 1],
        "role": ["before_subject", "before_subject", "last", "last"],
        "effect": [0.0, 0.0, -0.1, 0.4],
    }
).assign(low=-0.2, high=0.5, n=[2, 2, 3, 3])
LENS = pd.DataFrame({"layer": [1, 0], "logprob": [-1.0, -4.0], "low": [-2.0, -5.0], "high": [-0.5, -3.0]}).assign(
    top1=[0.5, 0.0]
)
DIRECT = pd.DataFrame(
    {"component": ["embedding", "attention", "mlp", "attention", "mlp"], "logit": [0.1, 1.0, -2.0, 3.0, 4.0]}
).assign(layer=pd.array([pd.NA, 1, 1, 0, 0], dtype="Int64"), low=-3.0, high=5.0)
PROFILES = pd.DataFrame(
    {"layer": [1, 0, 0, 1], "measure": ["indirect effect"] * 2 + ["attribution"] * 2, "value": [1.0, 0.2, -1.0, 0.3]}
)
AGREED = pd.DataFrame(
    {"role": ["last", "last", "further"], "fact": ["f", "all", "all"], "rho": [0.1, 0.6, -0.2]}
).assign(low=-0.3, high=0.8, null_low=-0.4, null_high=0.5)

DRAWN = {
    "trace_map": (figures.trace_map, MAP, "effect"),
    "lens_trajectories": (figures.lens_trajectories, LENS, "top1"),
    "direct_bars": (figures.direct_bars, DIRECT, "component"),
    "agreement_profiles": (figures.agreement_profiles, PROFILES, "measure"),
    "agreement_by_role": (figures.agreement_by_role, AGREED, "null_low"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_leaves_its_frame_alone_and_names_its_axes(name):
    draw, frame, column = DRAWN[name]
    before = frame.copy(deep=True)
    fig = draw(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert any(axis.title.text for axis in (*fig.select_xaxes(), *fig.select_yaxes()))
    assert fig.layout.height >= 120
    assert figures.figure_json(fig) == figures.figure_json(draw(frame))
    with pytest.raises(ValueError, match="has no rows"):
        draw(frame.iloc[:0])
    with pytest.raises(ValueError, match=rf"has no column '{column}'"):
        draw(frame.drop(columns=column))


def test_the_map_has_a_row_a_role_and_its_colours_are_even_about_zero():
    (heat,) = figures.trace_map(MAP).data
    assert list(heat.y) == ["before the subject", "last token"]
    assert list(heat.x) == [0, 1]
    np.testing.assert_allclose(heat.z, [[0.0, 0.0], [-0.1, 0.4]])
    assert (heat.zmin, heat.zmax) == (-0.4, 0.4)
    np.testing.assert_allclose(heat.customdata[1, 0], [-0.2, 0.5, 3])
    named = figures.trace_map(MAP.assign(role="<b>x</b>").iloc[:2], site="mlp", unit="nats")
    assert list(named.data[0].y) == ["&lt;b&gt;x&lt;/b&gt;"]
    assert "FFN" in named.layout.xaxis.title.text
    assert "nats" in named.data[0].colorbar.title.text
    assert (named.data[0].zmin, named.data[0].zmax) == (-1.0, 1.0)  # all zero: still a scale


def test_the_lens_is_drawn_in_the_order_of_layers():
    band, mean, top = figures.lens_trajectories(LENS).data
    assert list(mean.x) == [0, 1]
    assert list(mean.y) == [-4.0, -1.0]
    assert list(band.y) == [-5.0, -2.0, -0.5, -3.0]
    assert list(top.y) == [0.0, 50.0]


def test_direct_bars_stand_by_layer_and_module():
    attention, mlp = figures.direct_bars(DIRECT).data
    assert (list(attention.x), list(attention.y)) == ([0, 1], [3.0, 1.0])
    assert (list(mlp.x), list(mlp.y)) == ([0, 1], [4.0, -2.0])
    np.testing.assert_allclose(mlp.error_y.array, [1.0, 7.0])
    assert attention.marker.color != mlp.marker.color


def test_agreement_is_drawn_for_all_facts_beside_chance():
    chance, found = figures.agreement_by_role(AGREED).data
    assert list(found.y) == ["last token", "further tokens"]
    assert list(found.x) == [0.6, -0.2]
    np.testing.assert_allclose(found.error_x.array, [0.2, 1.0])
    np.testing.assert_allclose(np.asarray(chance.base, dtype=float), -0.4)
    np.testing.assert_allclose(np.asarray(chance.x, dtype=float), 0.9)
    traced, scored = figures.agreement_profiles(PROFILES).data
    assert (list(traced.y), list(scored.y)) == ([0.2, 1.0], [-1.0, 0.3])
    with pytest.raises(ValueError, match="no rows for all facts"):
        figures.agreement_by_role(AGREED.iloc[:1])
