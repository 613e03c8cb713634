"""Figures of plans: every kind of step can be told from the others."""

from dyndit.analysis.report.plan_figures import plan_figure, plan_map_figure
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import steps


def plan_of(*texts: str) -> DepthPlan:
    return DepthPlan((900, 500, 100), steps(*texts), 6, "ddim", cfg_scale=1.5)


def test_figures_mark_what_is_forecast() -> None:
    plan = plan_of("6|6", "2+|held", "6")
    figure = plan_map_figure({"one": plan})
    words = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert words == ["2+", "h"]
    key = figure.get_supxlabel()
    assert "forecast" in key
    assert "held" in key
    assert "own exit" not in key
    (axis, *_) = plan_figure({"one": plan}).axes
    (crosses,) = (line for line in axis.lines if line.get_marker() == "+")
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([2], [2])


def test_figures_mark_own_exits() -> None:
    plan = plan_of("6|6", "6|e2", "4|e1")
    figure = plan_map_figure({"one": plan})
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["e2", "e1"]
    assert "own exit" in figure.get_supxlabel()
    (axis, *_) = plan_figure({"one": plan}).axes
    (dots,) = (line for line in axis.lines if line.get_marker() == ".")
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([2, 3], [2, 1])
