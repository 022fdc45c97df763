"""The page answers under the pointer, in a real browser with real pointer events.

What it says is compared with the numbers of the analysis, within what it says itself of its error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import histories
import numpy as np
import pytest
import synthetic
from seam import course, draw, error_words, page, paint, quantised

import gradflow
from gradflow.analysis import LayerAnalysis

RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
DIGITS = 0.051  # of a number of two digits
EVIL = "</script><script>document.title = 'owned'</script>"
WIDTHS = {1280: False, 400: True}  # pixels -> whether it is touched


@pytest.fixture(scope="module")
def chromium(browser: str) -> Iterator[Any]:
    if os.environ.get("GRADFLOW_REQUIRE_BROWSER") != "1":
        pytest.importorskip("playwright", reason="pip install playwright drives the browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """A page in a window: what it says at a place of a panel."""

    def __init__(self, tab: Any, *, touched: bool) -> None:
        self.tab, self.touched = tab, touched
        self.wrong: list[str] = []
        tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        tab.on("console", lambda said: self.wrong.append(said.text))

    def at(self, panel: Any, across: float, down: float) -> str:
        """Point at a place of a panel, or touch it, in shares of its width and height."""
        panel.scroll_into_view_if_needed()
        box = panel.bounding_box()
        x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
        if not 0 <= x < self.tab.viewport_size["width"]:  # the rest of a picture is scrolled to
            panel.evaluate("(one, by) => one.closest('figure').scrollLeft += by", x - 200)
            return self.at(panel, across, down)
        if self.touched:
            self.tab.touchscreen.tap(x, y)
        else:
            self.tab.mouse.move(x, y)
        assert self.tab.locator(".tip").is_visible()
        return str(self.tab.locator(".tip").inner_text())

    def panels(self, start: str) -> Any:
        """The panels of the picture whose words begin like this."""
        figure = self.tab.locator("figure").filter(has=self.tab.locator(f'img[alt^="{start}"]'))
        return figure.first.locator(".hot")


@pytest.fixture(scope="module")
def one_layer() -> gradflow.Analysis:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.LSTM(3, 12)
    x = torch.randn(40, 4, 3)
    return gradflow.diagnose(model, x, loss=lambda output: output[0].square().sum())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, one_layer: gradflow.Analysis) -> Path:
    """A page of an analysis, and one of a training."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "run.html").write_text(page(one_layer, draw(one_layer)), "utf-8")
    histories.write(folder / "history", 30)
    gradflow.report(gradflow.load(folder / "history"), folder / "training")
    return folder


@pytest.fixture(params=WIDTHS)
def visit(chromium: Any, files: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, touched = request.param, WIDTHS[request.param]
    window = chromium.new_context(viewport={"width": width, "height": 800}, has_touch=touched)
    one = Visit(window.new_page(), touched=touched)
    one.tab.goto((files / "run.html").as_uri())
    one.tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    yield one
    assert one.wrong == []
    window.close()


def told(words: str) -> float:
    """log10 of the ratio in a sentence: 3.1 %, 2·10⁻⁵, 13 times; −inf for exactly zero."""
    if "exactly zero" in words:
        return -math.inf
    if found := re.search(r"([\d.]+) %", words):
        return math.log10(float(found[1]) / 100)
    if found := re.search(r"(?:([\d.]+)·)?10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", words):
        return math.log10(float(found[1] or 1)) + int(found[2].translate(RAISED))
    found = re.search(r"([\d.]+) times", words)
    assert found, words
    return math.log10(float(found[1]))


def agrees(words: str, log10: float) -> bool:
    """Whether a sentence tells this number, within the error that it states itself."""
    if "less than 10⁻⁸" in words:
        return log10 < -8
    error = re.search(r"within (\d+) % of the exact number", words)
    assert error, words
    value = told(re.sub(r"within \d+ %.*", "", words))
    return value == log10 or abs(value - log10) <= math.log10(1 + int(error[1]) / 100) + 1e-9


def map_of(layer: LayerAnalysis) -> np.ndarray:
    gains = layer.data["log_gain"].sel(norm="spectral").isel(sequence=0)
    return np.asarray(gains.transpose("target", "source").values / math.log(10))


PLACES = [(3, 3), (20, 5), (39, 0), (39, 38), (12, 11), (30, 29)]  # target, source


@pytest.mark.parametrize(("target", "source"), PLACES)
def test_a_cell_of_the_gain_map(
    visit: Visit, one_layer: gradflow.Analysis, target: int, source: int
) -> None:
    panel = visit.panels("gain-map").first
    words = visit.at(panel, (source + 0.5) / 40, (target + 0.5) / 40)
    assert agrees(words, map_of(one_layer["l0"])[target, source])
    assert f"step {target + 1}" in words
    if target > source:
        apart = target - source
        assert f"of step {source + 1}, {apart} step{'s' * (apart > 1)} earlier" in words
    else:
        assert words.startswith(f"step {target + 1} and itself: 100 %")


def test_the_comparison_sees_a_wrong_number(visit: Visit, one_layer: gradflow.Analysis) -> None:
    words = visit.at(visit.panels("gain-map").first, 5.5 / 40, 20.5 / 40)
    right = map_of(one_layer["l0"])[20, 5]
    assert agrees(words, right) and not agrees(words, right + 0.1)


def test_a_pair_out_of_order_has_no_gain(visit: Visit) -> None:
    words = visit.at(visit.panels("gain-map").first, 30.5 / 40, 10.5 / 40)
    assert words == "step 31 is not before step 11"


def test_a_step_colours_every_earlier_step(visit: Visit, one_layer: gradflow.Analysis) -> None:
    panel = visit.panels("gain-map").first
    visit.at(panel, 5.5 / 40, 20.5 / 40)
    pixels = panel.locator("canvas").evaluate(
        "one => [...one.getContext('2d').getImageData(0, 0, one.width, 1).data]"
    )
    shown = np.array(pixels).reshape(-1, 4)
    row = map_of(one_layer["l0"])[20]
    assert (shown[:21, 3] == 255).all() and (shown[21:, 3] == 0).all()
    # between two colours of the scale, which has ten for every power of ten
    exact = paint(row[None, :21])[0].astype(int)
    assert np.abs(shown[:21, :3] - exact).max() <= 12
    assert np.abs(shown[:21, :3] - exact[::-1]).max() > 50  # the comparison can fail


@pytest.mark.parametrize(("row", "back"), [(0, 0), (3, 7), (11, 39), (6, 1)])
def test_a_cell_of_the_overview(
    visit: Visit, one_layer: gradflow.Analysis, row: int, back: int
) -> None:
    panel = visit.panels("overview").first
    words = visit.at(panel, (39 - back + 0.5) / 40, (row + 0.5) / 12)
    data = one_layer["l0"].data
    unit = int(data["unit_order"].sel(state="c").values[row])
    assert agrees(words, float(data["log10_grad"].sel(state="c").values[unit, back]))
    assert words.startswith(f"cell {unit + 1}, {back} step{'s' * (back != 1)} back from the loss")


def test_a_cell_of_the_triangle(visit: Visit, one_layer: gradflow.Analysis) -> None:
    panel = visit.panels("triangle").first
    words = visit.at(panel, 10.5 / 40, 30.5 / 40)
    triangle = one_layer["l0"].data["log10_triangle"].sel(state="c").isel(sequence=0)
    rows = triangle.transpose("loss_step", "step").values
    assert agrees(words, float(rows[30, 10] - rows[30, 30]))
    assert words.startswith("step 11 ") and "the loss at step 31, 20 steps away" in words


def test_a_curve_is_read_where_it_is(visit: Visit, one_layer: gradflow.Analysis) -> None:
    panel = visit.panels("lag-curve").first
    limit = one_layer["l0"].horizon * 4
    words = visit.at(panel, 3 / min(39, max(limit, 10)), 0.5)
    data = one_layer["l0"].data
    assert words.startswith("distance t′ − t in steps: 3 — gain, median: ")
    for name, variable in (("median", "median"), ("10 % quantile", "low")):
        found = re.search(f"{name}: ([^;]*)", words)
        assert found
        exact = float(data[f"lag_{variable}"].values[3]) / math.log(10)
        assert abs(told(found[1]) - exact) < 0.004  # three digits


def test_the_keyboard_reads_as_well(visit: Visit, one_layer: gradflow.Analysis) -> None:
    panel, tip = visit.panels("gain-map").first, visit.tab.locator(".tip")
    visit.tab.keyboard.press("Tab")  # from now on the keyboard is used
    panel.focus()
    assert tip.inner_text().startswith("step 40 and itself")
    visit.tab.keyboard.press("ArrowLeft")
    visit.tab.keyboard.press("Shift+ArrowLeft")
    assert "of step 29, 11 steps earlier" in tip.inner_text()
    visit.tab.keyboard.press("ArrowUp")
    words = tip.inner_text()
    assert "step 39 " in words and agrees(words, map_of(one_layer["l0"])[38, 28])
    visit.tab.keyboard.press("Escape")
    assert not tip.is_visible()


@pytest.mark.parametrize("page_of", ["run.html", "training/report.html"])
def test_every_panel_of_every_picture_speaks(visit: Visit, files: Path, page_of: str) -> None:
    visit.tab.goto((files / page_of).as_uri())
    visit.tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    visit.tab.keyboard.press("Tab")
    panels = visit.tab.locator(".hot").all()
    assert len(panels) >= 10
    for panel in panels:
        panel.focus()
        for key in ("ArrowLeft", "ArrowRight", "Shift+ArrowRight", "ArrowDown"):
            visit.tab.keyboard.press(key)
            words = visit.tab.locator(".tip").inner_text()
            assert len(words) > 5 and not re.search(r"undefined|NaN(?! or Inf)|[{}]|null", words), (
                words
            )


def test_tab_goes_from_panel_to_panel(visit: Visit) -> None:
    first, second = (visit.panels("overview").nth(place) for place in (0, 1))
    first.focus()
    visit.tab.keyboard.press("Tab")
    assert second.evaluate("one => one === document.activeElement")


def test_words_stay_in_the_window(visit: Visit) -> None:
    panel, wide = visit.panels("overview").first, visit.tab.viewport_size["width"]
    for across in (0.01, 0.99):
        visit.at(panel, across, 0.05)
        box = visit.tab.locator(".tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= wide and box["y"] >= 0


def test_pointing_elsewhere_ends_it(visit: Visit) -> None:
    visit.at(visit.panels("overview").first, 0.5, 0.5)
    head = visit.tab.locator("h1").bounding_box()
    if visit.touched:
        visit.tab.evaluate("scrollTo(0, 0)")
        head = visit.tab.locator("h1").bounding_box()
        visit.tab.touchscreen.tap(head["x"] + 3, head["y"] + 3)
    else:
        visit.tab.mouse.move(head["x"], head["y"])
    assert not visit.tab.locator(".tip").is_visible()
    assert visit.tab.locator(".mark").count() == 0


def test_a_cell_of_the_waterfall(visit: Visit, files: Path) -> None:
    visit.tab.goto((files / "training" / "report.html").as_uri())
    history = gradflow.load(files / "history")
    layer = history.layers[0]
    one = course(history, layer)
    # of several panels the first waterfall on the page is that of the first layer at its head
    words = visit.at(visit.panels("waterfall").first, 0.5, 0.02)
    found = re.match(r"update ([\d,]+), (\d+) steps? back from the loss", words)
    assert found, words
    probe = int(np.flatnonzero(one.step == int(found[1].replace(",", "")))[0])
    place = int(np.flatnonzero(one.lag == int(found[2]))[0])
    candidates = [course(history, name).profile[probe, place] for name in history.layers]
    assert any(agrees(words, float(value)) for value in candidates)


def test_on_a_narrow_screen_all_numbers_are_cards(
    chromium: Any, files: Path, one_layer: gradflow.Analysis
) -> None:
    layer = one_layer["l0"]
    for width, cards in ((400, True), (1280, False)):
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        tab.goto((files / "run.html").as_uri())
        cell = tab.locator(".numbers td[data-of='horizon, steps']")
        assert cell.is_visible() == cards  # in the table they are folded
        if cards:
            assert cell.inner_text() == str(layer.horizon)
            label = "one => getComputedStyle(one, '::before').content"
            assert cell.evaluate(label) == '"horizon, steps"'
            boxes = [one.bounding_box() for one in tab.locator(".numbers td").all()]
            assert len(boxes) == 12 and all(box["x"] + box["width"] <= width for box in boxes)
            tops = [box["y"] for box in boxes]
            assert tops == sorted(set(tops))  # one below the other
        tab.close()


def test_without_javascript_the_page_is_whole(chromium: Any, files: Path) -> None:
    shots = {}
    for script in (True, False):
        window = chromium.new_context(
            viewport={"width": 1280, "height": 800}, java_script_enabled=script
        )
        tab = window.new_page()
        tab.goto((files / "run.html").as_uri())
        shots[script] = tab.locator("main").screenshot()
        assert tab.locator(".hint").count() == script
        window.close()
    assert shots[True] == shots[False]  # to the pixel: the script moves nothing


def test_on_paper_nothing_of_it_is_seen(visit: Visit) -> None:
    visit.at(visit.panels("overview").first, 0.5, 0.5)
    visit.tab.emulate_media(media="print")
    assert not visit.tab.locator(".tip").is_visible()
    assert not visit.tab.locator(".hint").is_visible()


def test_a_label_that_is_a_script_stays_a_label(chromium: Any, tmp_path: Path) -> None:
    layer = synthetic.layer(EVIL, sequences=1, step_labels=(EVIL,) * 100)
    analysis = synthetic.analysis(layer, title=EVIL)
    (tmp_path / "page.html").write_text(page(analysis, draw(analysis)), "utf-8")
    window = chromium.new_context(viewport={"width": 1280, "height": 800})
    visit = Visit(window.new_page(), touched=False)
    visit.tab.goto((tmp_path / "page.html").as_uri())
    words = visit.at(visit.panels("gain-map").first, 0.2, 0.8)
    assert f"“{EVIL}”" in words
    assert visit.tab.title().startswith(EVIL) and visit.wrong == []
    window.close()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_8_bits_hold_a_number_within_what_is_said(scale: float) -> None:
    values = np.random.default_rng(0).normal(-scale, scale, (40, 50))
    values[0, :3] = 0.0, -np.inf, np.nan
    codes, low, by = quantised(values, None)
    numbers = low + by * (codes.astype(float) - 5)
    shown = codes >= 5
    assert abs(numbers[0, 0]) < 1e-12 and codes[0, 1] == 0 and codes[0, 2] == 1
    assert np.abs(numbers - values)[shown].max() <= by / 2 + 1e-9
    said = int(re.findall(r"\d+", error_words(by))[0])
    assert 10 ** (by / 2) * (1 + DIGITS - 0.001) - 1 <= said / 100
    assert (np.abs(values[(codes == 3) | (codes == 4)]) > 8).all()
