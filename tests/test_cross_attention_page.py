"""The page of codes and note in a real browser: it shows the weights, loads nothing, and text stays text."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ehr.cross_attention_maps import CrossAttentionView, KindAttention
from hf_ehr.cross_attention_page import cross_attention_page
from tests.browser import NARROW, WIDE, Browser, opened

HOSTILE = "</script><script>alert(1)</script> <b>"


def invented(codes=3, words=4, seed=0):
    text = " ".join([HOSTILE, *(f"word{number}" for number in range(words))])
    spans = [(0, 0), (0, len(HOSTILE))]
    for _ in range(words):
        start = spans[-1][1] + 1
        spans.append((start, start + text[start:].partition(" ")[0].__len__()))
    tokens = ["[CLS]", *(text[start:end] for start, end in spans[1:])]
    rng = np.random.default_rng(seed)

    def weights(rows, columns):
        drawn = rng.random((rows, columns)) ** 3
        return (drawn / drawn.sum(1, keepdims=True)).astype(np.float32)

    names = ["LOCAL/<img src=x onerror=alert(2)>", *(f"ICD10CM/X{number:02}" for number in range(codes - 1))]
    kinds = [
        KindAttention(kind, own, [HOSTILE, *[None] * (len(own) - 1)], weights(1 + len(tokens), len(own)),
                      weights(1 + len(own), len(tokens)))
        for kind, own in (("diagnosis", names), ("medication", ["ATC/A10BA", "ATC/C03CA"]))
    ]  # fmt: skip
    return CrossAttentionView(text, tokens, spans, kinds, len(tokens))


class PageBrowser(Browser):
    """What the codes and tokens of the page show."""

    def strengths(self, selector):
        found = f"Array.from(document.querySelectorAll('{selector}'), e => e.style.getPropertyValue('--strength'))"
        return [float(value or 0) for value in self.run(found)]

    def shares(self):
        return [float(text.split()[0]) if text else None for text in self.texts(".code .share")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("browser-profile"), PageBrowser) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "visit.html"
    cross_attention_page(invented(), path, title="A visit <b>&</b> its note")
    return path


def place(number):
    """The sources in order: all diagnoses, three codes, all medications, two codes, the note, its tokens."""
    return f'.source[data-source="{number}"]'


def test_pointing_at_codes_colours_the_note(browser, page):
    view = invented()
    browser.open(page)
    assert browser.strengths(".token") == [0] * len(view.tokens)
    for number, weights, called, own in (
        (0, view.kinds[0].codes_look[0], "All diagnoses look at", True),
        (2, view.kinds[0].codes_look[2], "X00 looks at", False),
        (4, view.kinds[1].codes_look[0], "All medications look at", True),
        (6, view.kinds[1].codes_look[2], "C03CA looks at", False),
    ):
        browser.mouse(place(number))
        np.testing.assert_allclose(browser.strengths(".token"), weights / weights.max(), atol=2e-3)
        assert browser.texts("#who") == [called]
        assert ("itself used" in browser.texts("#own")[0]) == own
        assert browser.shares() == [None] * 5
        listed = [float(text.split()[0]) for text in browser.texts("#top .share")]
        np.testing.assert_allclose(listed, np.sort(100 * weights)[::-1], atol=0.06)
        order = np.argsort(-weights, kind="stable")
        assert browser.texts("#top .top > span:first-child") == [view.tokens[token] for token in order]
    assert browser.complaints() == []


def test_pointing_at_the_note_or_a_token_colours_the_codes_of_both_kinds(browser, page):
    view = invented()
    browser.open(page)
    for number, row, name in ((7, 0, "The whole note"), (8, 1, "“[CLS]”"), (10, 3, "“word0”")):
        browser.mouse(place(number))
        rows = [kind.text_looks[row] for kind in view.kinds]
        np.testing.assert_allclose(browser.shares(), 100 * np.concatenate(rows), atol=0.06)
        np.testing.assert_allclose(
            browser.strengths(".code"), np.concatenate([each / each.max() for each in rows]), atol=2e-3
        )
        assert browser.texts("#who") == [f"{name} looks at"]
        assert browser.strengths(".token") == [0] * len(view.tokens)
        assert browser.texts("#top p") == ["Of all diagnoses", "Of all medications"]
    assert browser.complaints() == []


def test_the_note_reads_as_it_was_written_and_everything_stays_text(browser, page):
    view = invented()
    browser.open(page)
    assert browser.texts("#note") == [f" [CLS] {view.text}"]
    assert browser.texts(".token") == list(view.tokens)
    browser.mouse(place(1))
    assert browser.texts(f"{place(1)} .label") == ["<img src=x onerror=alert(2)>"]
    assert browser.texts(f"{place(1)} .name") == [HOSTILE]
    assert browser.texts("h1") == ["A visit <b>&</b> its note"]
    assert browser.texts("#size") == ["6 tokens, 3 diagnoses, 2 medications."]
    assert browser.run("document.querySelectorAll('img, b, script').length") == 2  # the data and the page's script
    assert "Page.javascriptDialogOpening" not in browser.names()
    assert browser.requests() == [page.as_uri()]
    assert "default-src 'none'" in page.read_text()


def test_the_page_works_from_the_keyboard_and_holds_what_is_clicked(browser, page):
    view = invented()
    browser.open(page)
    browser.key("Tab", 9)
    assert browser.run("document.activeElement.dataset.source") == "0"
    for name, code in (("ArrowRight", 39), ("ArrowDown", 40), ("ArrowLeft", 37)):
        browser.key(name, code)
    weights = view.kinds[0].codes_look[1]
    np.testing.assert_allclose(browser.strengths(".token"), weights / weights.max(), atol=2e-3)
    browser.mouse(place(0), click=True)
    held = browser.strengths(".token")
    browser.mouse(place(3))
    assert browser.strengths(".token") == held
    assert browser.run(f"document.querySelector('{place(0)}').getAttribute('aria-pressed')") == "true"
    browser.key("Escape", 27)
    browser.mouse(place(2))
    assert browser.strengths(".token") != held


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_sticks_out_of_the_window(browser, tmp_path, size, scheme):
    cross_attention_page(invented(codes=30, words=200), tmp_path / "many.html", title="x" * 80)
    browser.open(tmp_path / "many.html", size, scheme)
    for number in (29, 200):
        browser.mouse(place(number))
        for element in ("html", "aside"):
            assert browser.run(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{element}'))")
        top, window = browser.run("[document.getElementById('who').getBoundingClientRect().top, window.innerHeight]")
        assert 0 <= top < window
    assert browser.complaints() == []


def test_the_page_says_where_codes_look_at_nothing_and_where_a_note_was_cut(browser, tmp_path):
    view = invented()
    blind = [KindAttention(k.kind, k.codes, k.descriptions, k.text_looks) for k in view.kinds]
    cut = CrossAttentionView(f"{view.text} and more", view.tokens, view.spans, blind, 99)
    cross_attention_page(cut, tmp_path / "cut.html")
    browser.open(tmp_path / "cut.html")
    browser.mouse(place(0))
    assert browser.texts("#who") == ["All diagnoses look at nothing"]
    assert browser.texts("#own") == ["In this model codes do not look at the note."]
    assert "the first 6 of the note's 99 tokens" in browser.texts("#size")[0]
    assert browser.texts("#note .faint") == [" and more"]
    cross_attention_page(CrossAttentionView(view.text, view.tokens, None, blind, 6), tmp_path / "unplaced.html")
    browser.open(tmp_path / "unplaced.html")
    assert browser.texts(".token") == list(view.tokens)
    assert browser.complaints() == []
