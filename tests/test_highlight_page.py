"""The page of a note in a real browser: it marks the evidence of a code, loads nothing, and text stays text."""

import json
import re

import pytest

from hf_ehr.highlight_page import highlight_page
from hf_ehr.models.evidence_spans import Span
from hf_ehr.pipelines import ICDCodingPipeline, highlight_note

from .browser import NARROW, WIDE, opened
from .coders import pointing_coder, words_of

NOTE = (
    "HPI: 71 y/o with 🫀 atrial fibrillation\nand chest pain.\n\n"
    "<script>alert(1)</script> &amp; <img src=x onerror=alert(2)>\n"
    "Hip fracture on the left; 心房細動 known.\n"
)


def span(part, weight, note=NOTE):
    start = note.index(part)
    return Span(start, start + len(part), weight)


CODES = [
    {
        "code": "I10", "description": None, "probability": 0.12, "decision": "ignore", "spans": [],
    },
    {
        "code": "I48.91", "description": "Unspecified <b>atrial</b> fibrillation", "probability": 0.93,
        "decision": "auto-code",
        "spans": [span("心房細動", 0.1), span("atrial fibrillation\nand", 0.4), span("fibrillation", 0.25)],
    },
    {
        "code": "S72.002A", "description": "Fracture of neck of left femur", "probability": 0.41, "decision": "review",
        "spans": [span("Hip fracture", 0.3)._asdict(), (0, 3, 0.0), (5, 5, 9)],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("browser-profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "note.html"
    highlight_page(NOTE, CODES, path, title="Note <b>&</b> codes")
    return path


def code(index):
    return f'.code[data-index="{index}"]'


def strengths(browser):
    return [
        float(value)
        for value in browser.run(
            "Array.from(document.querySelectorAll('mark'), mark => mark.style.getPropertyValue('--strength'))"
        )
    ]


def test_codes_are_listed_by_probability_with_description_and_decision(browser, page):
    browser.open(page)
    assert browser.texts(".code .value") == ["I48.91", "S72.002A", "I10"]
    assert browser.texts(".code .share") == ["93.0 %", "41.0 %", "12.0 %"]
    assert browser.texts(".code .name") == [CODES[1]["description"], CODES[2]["description"]]
    assert browser.texts(".code .decision") == ["auto-code, 3 spans", "review, 2 spans", "ignore, 0 spans"]
    assert browser.texts("#size") == ["3 predicted codes, 1 to auto-code, 1 to review, 1 to ignore."]
    assert browser.run("document.getElementById('note').textContent") == NOTE
    assert browser.texts("mark") == []


def test_choosing_a_code_marks_its_spans_by_weight(browser, page):
    browser.open(page)
    browser.mouse(code(0), click=True)
    assert browser.texts("mark") == ["atrial ", "fibrillation", "\nand", "心房細動"]
    assert strengths(browser) == pytest.approx([1, 1, 1, 0.25])
    assert browser.texts("#who") == ["Evidence of I48.91"]
    assert browser.texts(".span .value") == ["atrial fibrillation and", "fibrillation", "心房細動"]
    assert browser.texts(".span .share") == ["0.400", "0.250", "0.100"]
    assert browser.run("document.getElementById('note').textContent") == NOTE
    browser.mouse(code(1), click=True)
    assert browser.texts("mark") == ["HPI", "Hip fracture"]
    assert strengths(browser) == [0, 1]
    browser.mouse(code(2), click=True)
    assert (browser.texts("mark"), browser.texts(".span")) == ([], [])
    assert browser.texts("#who") == ["No evidence in the text for I10"]
    assert browser.run("document.querySelectorAll('[aria-pressed=\"true\"]').length") == 1
    browser.mouse(code(2), click=True)
    assert browser.run("document.querySelectorAll('[aria-pressed=\"true\"]').length") == 0
    assert browser.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_heavier_spans_are_painted_more_strongly(browser, page, scheme):
    browser.open(page, scheme=scheme)
    browser.mouse(code(0), click=True)
    heavy, light = browser.run(
        "[0, 3].map(place => { const p = document.createElement('canvas').getContext('2d');"
        "p.fillStyle = getComputedStyle(document.querySelectorAll('mark')[place]).backgroundColor;"
        "p.fillRect(0, 0, 1, 1); return p.getImageData(0, 0, 1, 1).data[3]; })"
    )
    assert heavy > 240
    assert 60 < light < 160


def test_the_page_works_from_the_keyboard(browser, page):
    browser.open(page)
    browser.key("Tab", 9)
    assert browser.run("document.activeElement.dataset.index") == "0"
    browser.key("ArrowDown", 40)
    assert browser.texts("#who") == ["Evidence of S72.002A"]
    browser.key("End", 35)
    assert browser.texts("#who") == ["No evidence in the text for I10"]
    browser.key("Home", 36)
    browser.key("ArrowUp", 38)  # there is none above
    assert browser.texts("#who") == ["Evidence of I48.91"]
    assert browser.run("Array.from(document.querySelectorAll('.code'), made => made.tabIndex)") == [0, -1, -1]
    browser.key("Tab", 9)
    assert browser.run("document.activeElement.className") == "span"
    browser.key("Escape", 27)
    assert browser.texts("#who") == ["Choose a code to see its evidence"]
    assert browser.texts("mark") == []
    assert browser.run("document.getElementById('who').getAttribute('aria-live')") == "polite"


def test_note_names_and_title_stay_text(browser, page):
    browser.open(page)
    browser.mouse(code(0), click=True)
    assert browser.texts("h1") == ["Note <b>&</b> codes"]
    assert browser.run("document.querySelectorAll('img, b, script').length") == 2  # the data and the page's script
    assert "Page.javascriptDialogOpening" not in browser.names()
    assert browser.requests() == [page.as_uri()]
    ran = browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.injected = 1';"
        "document.body.append(s); return window.injected; })()"
    )
    assert ran is None
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'reached', () => 'refused')") == "refused"


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_evidence_far_down_a_long_note_is_brought_into_view(browser, tmp_path, size):
    long = "All quiet so far, nothing to report today. " * 4000 + "A hip fracture was seen." + " Later." * 500
    found = {"code": "S72", "description": "x" * 300, "probability": 0.5, "decision": "review"}
    others = [dict(found, code=f"Z{number}", probability=0.1, spans=[]) for number in range(60)]
    start = long.index("hip")
    spans = [(0, 3, 0.5), (start, start + 12, 0.2)]
    highlight_page(long, [dict(found, spans=spans), *others], tmp_path / "long.html", title="x" * 90)
    browser.open(tmp_path / "long.html", size)
    browser.mouse(code(0), click=True)
    browser.run("scrollTo(0, 0)")
    top, bottom, window = browser.run(
        "(({top, bottom}) => [top, bottom, window.innerHeight])"
        "(document.getElementById('found').getBoundingClientRect())"
    )
    assert 0 <= top < bottom <= window, "the list of evidence is cut off by the window"
    for place, text in ((1, "hip fracture"), (0, "All")):
        browser.run(f"document.querySelectorAll('.span')[{place}].click()")
        assert browser.texts(".sought") == [text]
        box = "document.querySelector('.sought').getBoundingClientRect()"
        side = "document.querySelector('.side').getBoundingClientRect()"
        top, bottom, left, beside, above, window = browser.run(
            f"[{box}.top, {box}.bottom, {box}.right, {side}.left, {side}.top, window.innerHeight]"
        )
        assert 0 <= top < bottom <= window
        assert left <= beside or bottom <= above, "the lists lie over the evidence"
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_model_shows_in_the_page_where_in_the_note_its_codes_stand(browser, tmp_path):
    tokenizer = words_of(NOTE)
    words = {"ICD10CM/S72.002A": ["hip", "fracture"], "ICD10CM/I48.91": ["atrial", "fibrillation"], "other": ["心"]}
    model = pointing_coder(tokenizer, words, thresholds={"other": 1.0}, auto_code_thresholds={"ICD10CM/I48.91": 0.5})
    coder = ICDCodingPipeline(model=model, tokenizer=tokenizer, device="cpu")
    highlight_note(coder, NOTE, tmp_path / "note.html", title="From a model", max_length=16)
    browser.open(tmp_path / "note.html")
    assert browser.texts("h1") == ["From a model"]
    assert browser.run("document.getElementById('note').textContent") == NOTE
    seen = {}
    for index, name in enumerate(browser.texts(".code .value")):
        browser.mouse(code(index), click=True)
        seen[name] = ("".join(browser.texts("mark")), browser.texts(".code .decision")[index])
    assert seen == {
        "ICD10CM/S72.002A": ("Hip fracture", "review, 1 span"),
        "ICD10CM/I48.91": ("atrial fibrillation", "auto-code, 1 span"),
        "other": ("心", "ignore, 1 span"),
    }
    assert "Unspecified atrial fibrillation" in browser.texts(".code .name")
    assert browser.complaints() == []


def test_a_note_without_codes_and_an_empty_note_open(browser, tmp_path):
    for name, (text, codes) in {"plain": (NOTE, []), "empty": ("", [dict(CODES[0])])}.items():
        highlight_page(text, codes, tmp_path / f"{name}.html")
        browser.open(tmp_path / f"{name}.html")
        assert browser.run("document.getElementById('note').textContent") == text
        browser.key("Escape", 27)
        assert browser.complaints() == []


def test_the_file_is_whole_and_names_no_other(tmp_path):
    highlight_page("Hip fracture \ud800.", [dict(CODES[0], spans=[(0, 3, 0.2)])], tmp_path / "new" / "note.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["note.html"]
    text = (tmp_path / "new" / "note.html").read_text()
    assert "{{" not in text
    assert not re.search(r"(src|href)=|@import|url\(|https?:", text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert data["pieces"][0] == "Hip"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": [(0, len(NOTE) + 1, 1.0)]}, "`spans` must lie in"),
        ({"spans": [(4, 2, 1.0)]}, "`spans` must lie in"),
        ({"spans": [(0, 2, float("nan"))]}, "finite weights"),
        ({"spans": [(0, 2, -1.0)]}, "finite weights"),
        ({"probability": 1.4}, "sigmoid"),
        ({"decision": "bill"}, "auto-code, got 'bill'"),
    ],
    ids=["beyond the note", "backwards", "nan", "negative", "logit", "decision"],
)
def test_malformed_codes_are_refused_and_nothing_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        highlight_page(NOTE, [dict(CODES[0], **change)], tmp_path / "note.html")
    assert list(tmp_path.iterdir()) == []
