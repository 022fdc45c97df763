"""The page in a real browser: nothing sticks out sideways, and the first screen holds what matters.

A copy of the page made for the test gets a probe that writes the measures of the laid out page into
its title, which the browser then prints. What the page's own script does: `test_pointer.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import synthetic
from seam import draw, page

from gradflow.analysis import Rate

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
const card = document.querySelector(".overview figure"), drawn = card.querySelector("img");
const bottom = name => document.querySelector(name).getBoundingClientRect().bottom;
const said = JSON.stringify({
  client: root.clientWidth, scroll: root.scrollWidth,
  verdicts: bottom(".verdicts"), overview: bottom(".overview"), findings: bottom(".findings"),
  left: document.querySelector(".findings").getBoundingClientRect().left,
  overviewLeft: document.querySelector(".overview").getBoundingClientRect().left,
  hidden: card.scrollWidth - card.clientWidth, shape: drawn.clientHeight / drawn.clientWidth,
  title: document.title, scripts: [...document.scripts].filter(one => !one.type).length,
  unfolded: [...document.querySelectorAll("details[open]")].map(one => one.innerText).join(),
  tight: [...document.querySelectorAll(".outlook")]
    .filter(one => one.scrollWidth > one.clientWidth).length,
  broken: [...document.images].filter(one => !one.naturalWidth).length,
  out: [...document.querySelectorAll("p, li, h1, h2, pre, summary, .span, figure, dd, dt, .outlook")]
    .filter(one => one.getBoundingClientRect().right > root.clientWidth + 1).length});
parent.postMessage(said, "*")})</script>"""
LISTEN = """<script>addEventListener("message", event => {document.title = event.data})</script>"""


def measured(
    browser: str,
    folder: Path,
    text: str,
    width: int,
    height: int,
    *,
    open_all: bool = False,
    place: str = "",
) -> dict[str, Any]:
    """The measures of a page laid out at a size, by the probe above; place is a "#fragment"."""
    # the page forbids every script but its own; the probe of the test needs one
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
    probe = PROBE.replace("OPEN", "true" if open_all else "false")
    (folder / "page.html").write_text(text.replace("</body>", probe + "</body>"), "utf-8")
    frame = LISTEN + FRAME.format(page=f"page.html{place}", width=width, height=height)
    (folder / "frame.html").write_text(frame, "utf-8")
    done = opened(
        browser, folder, folder / "frame.html", f"--window-size={max(width, 500)},{height}",
        "--virtual-time-budget=10000", "--allow-file-access-from-files", "--dump-dom",
    )  # fmt: skip
    said = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert said, f"the browser said nothing: {done.stdout[:300]} {done.stderr[-2000:]}"
    measures: dict[str, Any] = json.loads(unescape(said[1]))
    return measures


def opened(
    browser: str, folder: Path, file: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """What the browser says of a file."""
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, file.as_uri()]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )


def printed(browser: str, folder: Path, text: str) -> bytes:
    """The page as a PDF."""
    (folder / "page.html").write_text(text, "utf-8")
    paper = folder / "page.pdf"
    done = opened(browser, folder, folder / "page.html", f"--print-to-pdf={paper}")
    assert paper.is_file(), done.stderr[-2000:]
    return paper.read_bytes()


@pytest.fixture(scope="module", params=["vanishing", "everything", "predicted", "crowded"])
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


def test_much_to_say_is_set_denser(browser: str, tmp_path: Path) -> None:
    """Without, the findings of a page with long names would end below the first screen, of 800."""
    analysis = synthetic.crowded()
    text = page(analysis, draw(analysis))
    assert 'class="first dense"' in text
    loose = text.replace('class="first dense"', 'class="first"')
    assert measured(browser, tmp_path, loose, 1280, 800)["findings"] > 850


def test_a_narrow_page_is_stacked(browser: str, tmp_path: Path, text: str) -> None:
    seen = measured(browser, tmp_path, text, 400, 800)
    assert seen["verdicts"] < seen["overview"] < seen["findings"]
    assert seen["overviewLeft"] == seen["left"]
    # its overview is one of its own: every curve below its heat map, all of it seen at once
    assert seen["hidden"] <= 1
    wide = measured(browser, tmp_path, text, 1280, 800)
    assert seen["shape"] > 1.5 * wide["shape"]


def test_what_was_tried_fits_a_narrow_page(browser: str, tmp_path: Path) -> None:
    rate = Rate(-0.0132, -0.0136, -0.0128)
    wide = synthetic.prediction(
        2, rate=rate, verdict="inconclusive", horizon=None, half_life=52.7, channels=30
    )
    now = synthetic.layer("rnn.l0", "LSTM", hidden=48, predictions=(wide,))
    analysis = synthetic.analysis(now)
    seen = measured(browser, tmp_path, page(analysis, draw(analysis)), 400, 800)
    assert seen["unfolded"] and seen["tight"] == 0


def test_the_check_sees_what_sticks_out(browser: str, tmp_path: Path, text: str) -> None:
    wide = text.replace("<main>", '<main><p style="width:2000px">wide</p>')
    seen = measured(browser, tmp_path, wide, 1280, 800)
    assert seen["scroll"] >= 2000 and seen["out"] >= 1


def test_a_layer_name_runs_no_script(browser: str, tmp_path: Path) -> None:
    evil = "</title></script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    analysis = synthetic.analysis(synthetic.layer(evil), title=evil)
    seen = measured(browser, tmp_path, page(analysis, draw(analysis)), 400, 800)
    assert seen["broken"] == 0 and seen["scroll"] == 400
    assert seen["title"].startswith(evil) and seen["scripts"] == 2  # those of page and probe


def test_the_page_forbids_every_other_script(browser: str, tmp_path: Path) -> None:
    text = page(synthetic.vanishing(), {})
    slipped_in = text.replace("</body>", "<script>document.title = 'ran'</script></body>")
    forbids = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")
    titles = []
    for one in (slipped_in, forbids.sub("", slipped_in)):
        (tmp_path / "page.html").write_text(one, "utf-8")
        said = opened(browser, tmp_path, tmp_path / "page.html", "--dump-dom").stdout
        titles += re.findall("<title>(.*?)</title>", said)
    assert titles == ["RNN net: gradient flow", "ran"]


@pytest.mark.parametrize(("case", "place", "says"), [
    ("everything", "#all-layers", "Overview of more layers"),
    ("crowded", "#words", "Gains become smaller or larger than the model's own numbers can be"),
])  # fmt: skip
def test_a_link_unfolds_what_it_leads_to(
    browser: str, tmp_path: Path, case: str, place: str, says: str
) -> None:
    analysis = synthetic.CASES[case]()
    text = page(analysis, draw(analysis))
    assert f'href="{place}"' in text
    assert says not in measured(browser, tmp_path, text, 1280, 800)["unfolded"]
    assert says in measured(browser, tmp_path, text, 1280, 800, place=place)["unfolded"]


def test_paper_shows_what_is_folded(browser: str, tmp_path: Path) -> None:
    analysis = synthetic.vanishing()
    text = page(analysis, draw(analysis))
    count = text.count("<img")
    assert printed(browser, tmp_path, text).count(b"/Subtype /Image") >= count >= 8
    kept_folded = text.replace("details::details-content", "details::nothing")
    assert printed(browser, tmp_path, kept_folded).count(b"/Subtype /Image") < count
