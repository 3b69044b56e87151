"""Figures that compare attribution methods: the traces behind them, and the frames they ask for."""

import numpy as np
import pandas as pd
import pytest

from workbench import figures

GAPS = pd.DataFrame({"series": ["ig", "ig", "ig", "<b>"], "steps": [4, 1, 0, 1], "gap": [0.1, 0.5, 0.02, 0.3]}).assign(
    low=0.0, high=0.6
)
AGREEMENT = pd.DataFrame({"series": ["ig", "ig", "random"], "layer": [1, 0, 0], "agreement": [0.5, 0.9, -0.2]})


def test_gaps_are_lines_over_steps_and_a_dashed_line_where_steps_adapt() -> None:
    before = GAPS.copy(deep=True)
    fig = figures.gap_by_steps(GAPS)
    pd.testing.assert_frame_equal(GAPS, before)
    line, dashed, other = fig.data
    assert list(line.x) == [1, 4]
    assert list(line.y) == pytest.approx([50, 10])
    assert list(line.error_y.array) == pytest.approx([10, 50])
    assert (dashed.line.dash, list(dashed.y)) == ("dash", pytest.approx([2, 2]))
    assert dashed.line.color == line.line.color != other.line.color
    assert other.name == "&lt;b&gt;"
    assert "% of the effect" in fig.layout.yaxis.title.text
    assert list(fig.layout.xaxis.tickvals) == [1, 4]


def test_agreement_is_a_map_of_series_by_layer_with_holes() -> None:
    fig = figures.agreement_map(AGREEMENT, "ablation")
    (drawn,) = fig.data
    assert list(drawn.y) == ["ig", "random"]
    assert list(drawn.x) == ["0", "1"]
    np.testing.assert_array_equal(drawn.z, [[0.9, 0.5], [-0.2, np.nan]])
    assert (drawn.zmin, drawn.zmax) == (-0.2, 1)
    assert "ablation" in fig.layout.xaxis.title.text


@pytest.mark.parametrize(
    ("draw", "frame", "column"),
    [(figures.gap_by_steps, GAPS, "low"), (lambda f: figures.agreement_map(f, "x"), AGREEMENT, "layer")],
)
def test_a_missing_column_is_named_and_an_empty_frame_refused(draw, frame, column) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        draw(frame.iloc[:0])
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        draw(frame.drop(columns=column))
