"""The page in a real browser: nothing sticks out sideways, and the first screen holds what matters.

The page itself has no JavaScript. A copy made for the test gets a probe that writes the measures of
the laid out page into its title, which the browser then prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import synthetic

from gradflow.reporter.files import draw
from gradflow.reporter.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
# an iframe has exactly the width asked for; a headless window is never narrower than 500 pixels
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe src="{page}" style="border:0"
width="{width}" height="{height}"></iframe><title>waiting</title>"""
PROBE = """<script>addEventListener("load", () => {
for (const one of document.querySelectorAll("details")) if (OPEN) one.open = true;
const root = document.documentElement, rest = document.querySelector(".findings, .overview");
const bottom = name => document.querySelector(name).getBoundingClientRect().bottom;
const said = JSON.stringify({
  client: root.clientWidth, scroll: root.scrollWidth,
  verdicts: bottom(".verdicts"), overview: bottom(".overview"), findings: bottom(".findings"),
  left: document.querySelector(".findings").getBoundingClientRect().left,
  overviewLeft: document.querySelector(".overview").getBoundingClientRect().left,
  broken: [...document.images].filter(one => !one.naturalWidth).length,
  out: [...document.querySelectorAll("p, li, h1, h2, pre, summary, .span, figure, dd, dt, .outlook")]
    .filter(one => one.getBoundingClientRect().right > root.clientWidth + 1).length});
parent.postMessage(said, "*")})</script>"""
LISTEN = """<script>addEventListener("message", event => {document.title = event.data})</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    words = f"the page is checked in a browser, and none of {', '.join(BROWSERS)} was found"
    if os.environ.get("GRADFLOW_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{words}; install one, or unset GRADFLOW_REQUIRE_BROWSER")
    pytest.skip(words)


def measured(
    browser: str, folder: Path, text: str, width: int, height: int, *, open_all: bool = False
) -> dict[str, float]:
    """The measures of a page laid out at a size, by the probe above."""
    # the page forbids every script; the probe of the test needs one
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
    probe = PROBE.replace("OPEN", "true" if open_all else "false")
    (folder / "page.html").write_text(text.replace("</body>", probe + "</body>"), "utf-8")
    frame = LISTEN + FRAME.format(page="page.html", width=width, height=height)
    (folder / "frame.html").write_text(frame, "utf-8")
    command = [
        browser, *FLAGS, f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, 500)},{height}", "--virtual-time-budget=10000",
        "--allow-file-access-from-files", "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )
    said = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert said, f"the browser said nothing: {done.stdout[:300]} {done.stderr[-2000:]}"
    measures: dict[str, float] = json.loads(unescape(said[1]))
    return measures


@pytest.fixture(scope="module", params=["vanishing", "everything", "predicted"])
def text(request: pytest.FixtureRequest) -> str:
    analysis = synthetic.CASES[request.param]()
    return page(analysis, draw(analysis))


@pytest.mark.parametrize("open_all", [False, True], ids=["folded", "open"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_sideways(
    browser: str, tmp_path: Path, text: str, width: int, open_all: bool
) -> None:
    seen = measured(browser, tmp_path, text, width, 800, open_all=open_all)
    assert seen["client"] == width
    assert seen["scroll"] == width
    assert seen["out"] == 0
    assert seen["broken"] == 0


def test_the_first_screen_holds_verdicts_overview_and_findings(
    browser: str, tmp_path: Path, text: str
) -> None:
    seen = measured(browser, tmp_path, text, 1280, 800)
    assert max(seen["verdicts"], seen["overview"], seen["findings"]) <= 800
    assert seen["overviewLeft"] > seen["left"] + 300  # side by side


def test_a_narrow_page_is_stacked(browser: str, tmp_path: Path, text: str) -> None:
    seen = measured(browser, tmp_path, text, 400, 800)
    assert seen["verdicts"] < seen["overview"] < seen["findings"]
    assert seen["overviewLeft"] == seen["left"]


def test_the_check_sees_what_sticks_out(browser: str, tmp_path: Path, text: str) -> None:
    wide = text.replace("<main>", '<main><p style="width:2000px">wide</p>')
    seen = measured(browser, tmp_path, wide, 1280, 800)
    assert seen["scroll"] >= 2000 and seen["out"] >= 1


def test_a_layer_name_runs_no_script(browser: str, tmp_path: Path) -> None:
    evil = "</title></script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    analysis = synthetic.analysis(synthetic.layer(evil), title=evil)
    seen = measured(browser, tmp_path, page(analysis, draw(analysis)), 400, 800)
    assert seen["broken"] == 0 and seen["scroll"] == 400
