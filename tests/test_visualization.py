"""Figures: the numbers they draw, and that files are whole, closed and sized as promised."""

import sys

import numpy as np
import pytest
from PIL import Image

from hf_ehr.decision_curves import THRESHOLDS, net_benefit_band
from hf_ehr.intervals import Interval
from hf_ehr.subgroups import FIGURES, Subgroup
from hf_ehr.visualization import (
    COLORS,
    calibration_plot,
    decision_curve,
    label_efficiency_curve,
    reliability,
    subgroup_plot,
    wilson_interval,
)

CURVES = {
    "Bag-of-codes LR": {300: Interval(0.6, 0.55, 0.65), 1000: Interval(0.68, 0.65, 0.71)},
    "Med-BERT": {300: Interval(0.7, 0.66, 0.74), 1000: Interval(0.76, 0.74, 0.78)},
}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count_of(color, image):
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=2) < 3).sum())


def drawn_predictions(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.beta(2, 6, n)
    return (rng.random(n) < p).astype(int), p


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are when they are saved."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k))[1])
    return saved


def test_the_label_efficiency_curve_draws_values_and_intervals(tmp_path, figures):
    label_efficiency_curve(CURVES, tmp_path / "curve.png")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["300", "1,000"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)
    for container, curve in zip(axes.containers, CURVES.values(), strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_ydata(), [figure.value for figure in curve.values()])
        np.testing.assert_allclose(line.get_xdata(), list(curve), rtol=0.1)
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [[figure.low, figure.high] for figure in curve.values()])


def test_no_two_of_many_models_look_alike(tmp_path, figures):
    many = {f"row {number}": CURVES["Med-BERT"] for number in range(len(COLORS) + 4)}
    label_efficiency_curve(many, tmp_path / "curve.png")
    lines = [container[0] for container in figures[0].axes[0].containers]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == len(many)
    assert {line.get_linestyle() for line in lines[: len(COLORS)]} == {"-"}


def test_nothing_is_clipped_and_the_legend_covers_no_data(tmp_path, figures):
    many = {f"A model with a rather long name, number {i}": CURVES["Med-BERT"] for i in range(8)}
    label_efficiency_curve(many, tmp_path / "curve.png")
    calibration_plot({name: drawn_predictions() for name in many}, tmp_path / "calibration.png")
    for figure in figures:
        legend = figure.axes[0].get_legend().get_window_extent()
        assert legend.x0 > figure.axes[0].get_window_extent().x1
    for name in ("curve", "calibration"):
        image = pixels(tmp_path / f"{name}.png")
        border = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3), image[:, :3].reshape(-1, 3)])
        assert (border == 255).all()
        assert (image[:, -3:] == 255).all()


def test_a_figure_is_a_png_at_150_dpi_without_a_window_or_a_leftover(tmp_path):
    label_efficiency_curve(CURVES, tmp_path / "new" / "curve.png")
    calibration_plot({"Med-BERT": drawn_predictions()}, tmp_path / "new" / "calibration.png")
    for name in ("curve.png", "calibration.png"):
        with Image.open(tmp_path / "new" / name) as image:
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert count_of(COLORS[0], pixels(tmp_path / "new" / name)) > 300
    assert len(list((tmp_path / "new").iterdir())) == 2
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_single_size_and_an_undefined_figure_can_be_drawn(tmp_path):
    nan = float("nan")
    curves = {"Med-BERT": {84: Interval(0.6, 0.4, 0.8)}, "Broken": {84: Interval(nan, nan, nan)}}
    label_efficiency_curve(curves, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="`results` must hold at least one figure"):
        label_efficiency_curve({"Med-BERT": {}}, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_the_calibration_plot_draws_equal_mass_bins_with_intervals(tmp_path, figures):
    y, p = drawn_predictions()
    calibration_plot({"Med-BERT": (y, p), "Prevalence": (y, np.full(len(y), y.mean()))}, tmp_path / "plot.png", bins=5)
    upper, lower = figures[0].axes
    line, _, (bars,) = upper.containers[0]
    by_risk = np.array_split(np.argsort(p), 5)
    np.testing.assert_allclose(line.get_xdata(), [p[rows].mean() for rows in by_risk])
    np.testing.assert_allclose(line.get_ydata(), [y[rows].mean() for rows in by_risk])
    low, high = np.array([segment[:, 1] for segment in bars.get_segments()]).T
    assert (low < line.get_ydata()).all()
    assert (high > line.get_ydata()).all()
    np.testing.assert_allclose(upper.containers[1][0].get_xdata(), [y.mean()])
    assert lower.get_xlim() == upper.get_xlim() == upper.get_ylim()
    diagonal = next(drawn for drawn in upper.lines if drawn.get_label() == "Perfect")
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert {text.get_text() for text in upper.get_legend().get_texts()} == {"Perfect", "Med-BERT", "Prevalence"}


def test_bins_without_positives_and_without_negatives_are_drawn(tmp_path):
    for rows in (10, 44):  # where rounding puts an end of Wilson's interval beyond the rate
        p = np.r_[np.linspace(0, 0.1, rows), np.linspace(0.9, 1, rows)]
        calibration_plot({"Separated": ((p > 0.5).astype(int), p)}, tmp_path / f"{rows}.png", bins=2)
        assert (tmp_path / f"{rows}.png").stat().st_size > 1000


def test_reliability_of_four_rows_by_hand():
    mean, positives, rows = reliability([0, 1, 1, 1], [0.1, 0.3, 0.6, 0.8], 2)
    np.testing.assert_allclose(mean, [0.2, 0.7])
    np.testing.assert_array_equal(positives, [1, 2])
    np.testing.assert_array_equal(rows, [2, 2])


def test_wilson_interval_gives_the_published_numbers():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    low, high = wilson_interval(np.array([81, 15, 0, 1.0]), np.array([263, 148, 20, 29.0]))
    np.testing.assert_allclose(low, [0.2553, 0.0624, 0, 0.0061], atol=5e-5)
    np.testing.assert_allclose(high, [0.3662, 0.1605, 0.1611, 0.1718], atol=5e-5)


def test_the_decision_curve_draws_net_benefit_beside_treating_all_and_none(tmp_path, figures):
    y, p = drawn_predictions(500)
    patients = np.arange(500) // 2
    models = {"MedHMP": (y, p), "Prevalence": (y, np.full(500, y.mean()))}
    decision_curve(models, tmp_path / "decisions.png", patients=patients, n_resamples=30)
    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"Treat all", "Treat none", *models}
    expected = net_benefit_band(y, p, patients, THRESHOLDS, n_resamples=30)
    np.testing.assert_allclose(lines["MedHMP"].get_xdata(), 100 * THRESHOLDS)
    np.testing.assert_allclose(lines["MedHMP"].get_ydata(), expected.value)
    odds = THRESHOLDS / (1 - THRESHOLDS)
    np.testing.assert_allclose(lines["Treat all"].get_ydata(), y.mean() - (1 - y.mean()) * odds)
    assert set(lines["Treat none"].get_ydata()) == {0}
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(expected.low.min())
    assert band.max() == pytest.approx(expected.high.max())
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1
    with pytest.raises(ValueError, match="`predictions` must hold at least one model"):
        decision_curve({}, tmp_path / "none.png")


def test_the_subgroup_plot_has_a_row_a_group_and_a_panel_a_figure(tmp_path, figures):
    shown = {name: Interval(0.3, 0.2, 0.5) for name in FIGURES}
    groups = [
        Subgroup("all", "all", 1200, 99, shown),
        Subgroup("sex", "F", 700, 60, shown | {"ppv": Interval(0.6, 0.5, 0.7)}),
        Subgroup("sex", "M", 500, None, {}),
    ]
    subgroup_plot(groups, tmp_path / "groups.png")
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == list(FIGURES.values())
    names = [tick.get_text() for tick in panels[0].get_yticklabels()]
    assert names == ["all (1,200)", "sex: F (700)", "sex: M (500, too few)"]
    points = [(float(c[0].get_xdata()[0]), float(c[0].get_ydata()[0])) for c in panels[-1].containers]
    assert points == [(0.3, 0), (0.6, 1)]
    assert all(axes.get_ylim()[0] > axes.get_ylim()[1] for axes in panels)
    with pytest.raises(ValueError, match="`groups` must hold at least one with figures"):
        subgroup_plot(groups[2:], tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["groups.png"]


def test_bad_predictions_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"`p` must lie in \[0, 1\]"):
        calibration_plot({"Med-BERT": ([0, 1], [-2.0, 3.0])}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="`predictions` must hold at least one model"):
        calibration_plot({}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers-ehr\[viz\]'"):
        label_efficiency_curve(CURVES, tmp_path / "curve.png")
