"""Ranges and ticks of the axes of learning curves, also for one step and for a constant."""

import pytest

from ppo_fast.common.plots import can_draw, draw_learning_curves, range_shown

pytestmark = pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
SCORE = "score (mean of the responses of a step)"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], (-0.05, 1.05)),
        ([1.0, 1.0, 1.0], (0.9, 1.1)),
        ([-4.0], (-4.4, -3.6)),
        ([0.0, 0.0], (-0.1, 0.1)),
        ([1e-9, -3e-9], (-0.1, 0.1)),
        ([2.0, 2.0 + 1e-7], (1.8, 2.2)),
        ([1e-4, 3e-4], (0.9e-4, 3.1e-4)),
    ],
)
def test_the_range_of_an_axis_exceeds_rounding(values, expected):
    assert range_shown(values) == pytest.approx(expected, abs=1e-7)


@pytest.fixture
def figure(monkeypatch):
    """Draw curves and return the drawn axes by title."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr("ppo_fast.common.plots._save", lambda figure, path, dpi: kept.append(figure))

    def draw(history):
        draw_learning_curves(history, "nowhere.png", "title")
        assert isinstance(kept[-1], Figure)
        kept[-1].canvas.draw()
        return {axis.get_title(): axis for axis in kept[-1].axes if axis.get_visible()}

    return draw


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ticks_of_few_steps_are_whole_steps(figure, count):
    axes = figure([{"step": step, "score": 1.0, "kl": 0.1 * step} for step in range(1, count + 1)])
    assert set(axes) == {SCORE, "KL to the reference (nats per token)"}
    for axis in axes.values():
        low, high = axis.get_xlim()
        ticks = [x for x in axis.get_xticks() if low <= x <= high]
        assert set(range(1, count + 1)) <= set(ticks)
        assert all(x == int(x) for x in ticks)
        assert axis.lines[0].get_marker() == "o", "a line of one point is not seen"
    assert axes[SCORE].get_ylim() == pytest.approx((0.9, 1.1))
    labels = [label.get_text() for label in axes[SCORE].get_yticklabels()]
    assert "1.00" in labels
    assert axes[SCORE].yaxis.get_offset_text().get_text() == ""


def test_a_curve_that_lacks_steps_has_the_same_axis_as_the_others(figure):
    rows = [{"step": step, "score": float(step), "eval/score": 1.0 if step % 5 == 0 else None} for step in range(31)]
    axes = figure(rows)
    assert len(axes) == 2
    for axis in axes.values():
        assert axis.get_xlim() == pytest.approx((-1.2, 31.2))
    assert axes[SCORE].lines[0].get_marker() in (None, "None")
