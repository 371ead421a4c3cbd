"""What stands in the picture of a recipe, and that its words do not run into one another."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launcher.config import compose
from launcher.recipe import phases
from launcher.show import recipe_picture


def drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure, with everything in its place."""
    kept: list[Any] = []
    monkeypatch.setattr(recipe_picture, "save_figure", lambda figure, path: kept.append(figure))
    recipe_picture.draw(phases(compose([f"experiment={name}"])), tmp_path / "unused.png")
    kept[0].canvas.draw()
    return kept[0]


def lowest(figure: Any) -> list[Any]:
    """The axes of the bottom row, from left to right."""
    return figure.axes[-len(figure.axes) // len(recipe_picture.ROWS) :]


def test_boundaries_of_the_report_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn("deepseek_v3", tmp_path, monkeypatch)
    labels = [[label.get_text() for label in axes.get_xticklabels()] for axes in lowest(figure)]
    assert labels == [["0", "469B", "586B"], ["0", "10T", "14.8T"], ["0", "62.9B"], ["0", "62.9B"]]
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"1,920", "480", "0.073"} <= texts  # what the extensions hold throughout


@pytest.mark.parametrize("name", ["deepseek_v3", "demo", "tiny"])
def test_no_label_runs_into_the_next(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(name, tmp_path, monkeypatch)
    for axes in lowest(figure):
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    edge = figure.bbox
    for axes in figure.axes:
        for text in [*axes.texts, *axes.get_xticklabels()]:
            box = text.get_window_extent()
            assert edge.x0 <= box.x0 and box.x1 <= edge.x1, text.get_text()


def test_a_rate_that_the_data_has_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn("demo", tmp_path, monkeypatch)
    assert [text.get_text() for axes in lowest(figure) for text in axes.texts] == ["as the data was prepared"] * 2
