"""The attention page in a real browser: what it shows is the matrix, it loads nothing, and codes stay text."""

import json
import re
import threading
from dataclasses import replace
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from hf_ehr.attention_maps import AttentionView, layer_mean, rollout
from hf_ehr.attention_page import MAX_CODES, attention_page

from .browser import NARROW, WIDE, Browser, opened

HOSTILE = "LOCAL/<img src=x onerror=alert(1)>"
CODES = [
    "ICD10CM/I10", "ICD10CM/E11.9", HOSTILE, "ICD10CM/I10", "ICD10CM/N18.30", "ICD10CM/I50.9", "ICD10CM/E11.22",
]  # fmt: skip
NAMES = [
    "Essential hypertension",
    "</script><script>alert(2)</script>",
    None,
    "Essential hypertension",
    "&lt;b&gt; <!-- <script ",
]
VIEW_SHAPE = (2, 3)  # layers, heads


def view_of(codes=CODES, visits=(1, 1, 1, 2, 2, 3, 3), shape=VIEW_SHAPE, seed=0, **fields):
    scores = np.random.default_rng(seed).normal(size=(*shape, len(codes), len(codes)), scale=1.5)
    weights = np.exp(scores)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return AttentionView(codes, np.asarray(visits), weights, **fields)


@pytest.fixture(scope="module")
def view():
    days = [date(2019, 3, 4), date(2019, 3, 5), None]
    return view_of(visit_dates=days, descriptions=[*NAMES, None, "Type 2 diabetes with kidney complication"])


class PageBrowser(Browser):
    """What the chips of the page show."""

    def shares(self):
        """The weights that the chips show, (codes,) in percent."""
        return [float(text.split()[0]) for text in self.texts(".chip .share")]

    def strengths(self):
        return [
            float(value)
            for value in self.run(
                "Array.from(document.querySelectorAll('.chip'), chip => chip.style.getPropertyValue('--strength'))"
            )
        ]


def chip(index):
    return f'.chip[data-index="{index}"]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("browser-profile"), PageBrowser) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(view, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "patient.html"
    attention_page(view, path, title="Patient <b>&</b> attention")
    return path


def percent(weights):
    return 100 * np.asarray(weights, np.float64)


def test_hovering_a_code_shows_its_row_of_the_attention_matrix(browser, page, view):
    browser.open(page)
    assert browser.texts(".chip .share") == [""] * len(CODES)
    mean = layer_mean(view)
    for index in (4, 0):
        browser.mouse(chip(index))
        np.testing.assert_allclose(browser.shares(), percent(mean[0, index]), atol=0.06)
        np.testing.assert_allclose(browser.strengths(), mean[0, index] / mean[0, index].max(), atol=2e-3)
        assert browser.run("document.querySelector('.chip.active').dataset.index") == str(index)
    strongest = np.argsort(-mean[0, 0], kind="stable")
    listed = [float(text.split()[0]) for text in browser.texts("#top .share")]
    np.testing.assert_allclose(listed, percent(mean[0, 0][strongest]), atol=0.06)
    labels = [f"{CODES[i].partition('/')[2]}, visit {view.visit_numbers[i]}" for i in strongest]
    assert browser.texts("#top .top > span:first-child") == labels
    assert browser.texts("#who") == ["I10 in visit 1 looks at"]
    assert browser.complaints() == []


def colors_of_chips(browser):
    """(codes, 3) sRGB, painted to be read: the computed style is in a notation of the browser's choice."""
    return np.array(
        browser.run(
            "Array.from(document.querySelectorAll('.chip'), chip => { const p = document.createElement('canvas')"
            ".getContext('2d'); p.fillStyle = getComputedStyle(chip).backgroundColor; p.fillRect(0, 0, 1, 1);"
            "return Array.from(p.getImageData(0, 0, 1, 1).data).slice(0, 3); })"
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_stronger_weights_are_painted_more_strongly(browser, page, view, scheme):
    browser.open(page, scheme=scheme)
    assert (colors_of_chips(browser).mean() > 128) == (scheme == "light")
    browser.mouse(chip(1))
    strength = np.ptp(colors_of_chips(browser), axis=1)  # blue on a neutral ground
    assert (np.diff(strength[np.argsort(layer_mean(view)[0, 1])]) >= 0).all()
    assert strength.max() > 100
    assert strength.min() < 50


def test_layer_head_and_rollout_change_what_is_shown(browser, page, view):
    browser.open(page)
    browser.mouse(chip(3))
    shown = [browser.shares()]
    for control, value, expected in (
        ("layer", 1, layer_mean(view)[1, 3]),
        ("head", 3, view.attention[1, 2, 3]),
        ("layer", 0, view.attention[0, 2, 3]),
    ):
        browser.choose(control, value)
        shown.append(browser.shares())
        np.testing.assert_allclose(shown[-1], percent(expected), atol=0.06)
    browser.mouse("#rollout", click=True)
    np.testing.assert_allclose(browser.shares(), percent(rollout(view)[3]), atol=0.06)
    assert browser.run("document.getElementById('layer').disabled && document.getElementById('head').disabled")
    assert len({tuple(shares) for shares in [*shown, browser.shares()]}) == 5
    assert browser.texts("#layer option") == ["1", "2"]
    assert browser.texts("#head option") == ["mean of all", "1", "2", "3"]


def test_the_page_works_from_the_keyboard(browser, page, view):
    browser.open(page)
    for _ in range(4):  # layer, head, rollout, first code
        browser.key("Tab", 9)
    assert browser.run("document.activeElement.dataset.index") == "0"
    browser.key("ArrowRight", 39)
    browser.key("ArrowDown", 40)
    browser.key("ArrowLeft", 37)
    np.testing.assert_allclose(browser.shares(), percent(layer_mean(view)[0, 1]), atol=0.06)
    tabs = browser.run("Array.from(document.querySelectorAll('.chip'), chip => chip.tabIndex)")
    assert tabs == [-1, 0, -1, -1, -1, -1, -1]
    assert browser.run("document.getElementById('who').getAttribute('aria-live')") == "polite"


def test_a_held_code_stays_until_it_is_let_go(browser, page):
    browser.open(page)
    browser.mouse(chip(2), click=True)
    held = browser.shares()
    browser.mouse(chip(5))
    assert browser.shares() == held
    assert browser.run(f"document.querySelector('{chip(2)}').getAttribute('aria-pressed')") == "true"
    assert browser.texts("#hint") == ["Held. A second click or Escape lets go."]
    browser.key("Escape", 27)
    browser.mouse(chip(4))
    assert browser.shares() != held
    assert browser.run("document.querySelectorAll('[aria-pressed=\"true\"]').length") == 0


def test_codes_names_and_the_title_stay_text(browser, page):
    browser.open(page)
    browser.mouse(chip(2))
    assert browser.texts(f"{chip(2)} .code") == ["<img src=x onerror=alert(1)>"]
    assert browser.texts(f"{chip(1)} .name") == [NAMES[1]]
    assert browser.texts(f"{chip(4)} .name") == [NAMES[4]]
    assert browser.texts("#who") == ["<img src=x onerror=alert(1)> in visit 1 looks at"]
    assert browser.texts("h1") == ["Patient <b>&</b> attention"]
    assert browser.run("document.querySelectorAll('img, b, script').length") == 2  # the data and the page's script
    assert "Page.javascriptDialogOpening" not in browser.names()
    assert browser.complaints() == []


def test_the_page_asks_for_nothing_but_itself_and_may_not(browser, page):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(page)
        browser.mouse(chip(0))
        assert browser.requests() == [page.as_uri()]
        assert browser.run("performance.getEntriesByType('resource').length") == 0
        address = f"http://127.0.0.1:{server.server_port}"
        tries = browser.run(
            f"fetch('{address}/fetch', {{mode: 'no-cors'}}).then(() => 'reached', () => 'refused').then(answer =>"
            f"new Promise(done => {{ const image = new Image(); image.onload = () => done([answer, 'reached']);"
            f"image.onerror = () => done([answer, 'refused']); image.src = '{address}/image'; }}))"
        )
        ran = browser.run(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.injected = 1';"
            "document.body.append(s); return window.injected === undefined; })()"
        )
    finally:
        server.shutdown()
        server.server_close()
    assert tries == ["refused", "refused"]
    assert asked == []
    assert ran, "an inline script that is not the page's own was run"


def test_the_timeline_runs_left_to_right_with_dates(browser, page):
    browser.open(page)
    assert browser.texts(".visit strong") == ["Visit 1", "Visit 2", "Visit 3"]
    assert browser.texts(".visit .when") == ["2019-03-04", "2019-03-05", "1 day later"]
    lefts = browser.run("Array.from(document.querySelectorAll('.visit'), v => v.getBoundingClientRect().left)")
    assert lefts == sorted(set(lefts))
    assert browser.run("Array.from(document.querySelectorAll('.visit'), v => v.querySelectorAll('.chip').length)") == [
        3, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_sticks_out_of_the_window(browser, view, tmp_path, size):
    many = view_of([f"ICD10CM/X{i:02}" for i in range(40)], np.arange(40) // 20 + 1)
    long_name = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3
    attention_page(replace(many, descriptions=[long_name] * 40), tmp_path / "many.html", title="x" * 80)
    browser.open(tmp_path / "many.html", size)
    for index in (39, 0):
        browser.mouse(chip(index))
        assert browser.texts("#who") == [f"X{index:02} in visit {index // 20 + 1} looks at"]
        for element in ("html", "aside"):
            assert browser.run(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{element}'))"), (
                f"{element} must be scrolled sideways"
            )
        top, window = browser.run("[document.getElementById('who').getBoundingClientRect().top, window.innerHeight]")
        assert 0 <= top < window, "the list is out of sight while a code is pointed at"


def test_a_long_history_is_cut_to_its_newest_codes_and_says_so(browser, tmp_path):
    n = MAX_CODES + 44
    long = view_of([f"LOCAL/{i}" for i in range(n)], np.arange(n) // 10 + 1, shape=(1, 2))
    attention_page(long, tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    assert browser.texts(".chip .code")[0] == "44"
    assert browser.texts(".visit strong")[0] == "Visit 5"
    assert "newest 256 codes" in browser.texts("#size")[0]
    browser.mouse(chip(0))
    weights = layer_mean(long)[0, 44]
    np.testing.assert_allclose(browser.shares(), percent(weights[44:]), atol=0.06)
    others, share = re.fullmatch(r"(\d+) other codes together: ([\d.]+) %", browser.texts("#rest")[0]).groups()
    assert int(others) == n - 10
    assert float(share) == pytest.approx(100 * (1 - np.sort(weights[44:])[-10:].sum()), abs=0.1)


def test_the_file_is_whole_and_names_no_other(tmp_path):
    view = view_of([f"LOCAL/{number}" for number in range(7)])
    attention_page(view, tmp_path / "new" / "patient.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["patient.html"]
    text = (tmp_path / "new" / "patient.html").read_text()
    assert "{{" not in text
    assert not re.search(r"(src|href)=|@import|url\(|https?:", text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    np.testing.assert_allclose(np.array(data["rollout"]).reshape(7, 7) / data["scale"], rollout(view), atol=5.1e-5)
    assert all(isinstance(weight, int) for layer in data["layers"] for weights in layer for weight in weights)
