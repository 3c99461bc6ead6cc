import json
import shutil
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from shenhong.domains import domain
from shenhong.domains.verse import DOMAIN as VERSE
from shenhong.errors import RunError
from shenhong.evaluate.charts import Curves, Series, short, ticks
from shenhong.evaluate.evaluate import evaluate, read_split
from shenhong.evaluate.metrics import ScoredText
from shenhong.evaluate.page import escape, escape_markdown
from shenhong.evaluate.report import headline, write_report
from shenhong.evaluate.settings import EvaluateSettings
from tests.evaluate.run_folder import HOSTILE, poem, write_corpus, write_run

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; counts tags that were left open."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def safe(html):
    page = Page(html)
    assert not page.open
    assert not {"script", "img", "iframe", "object", "link", "a", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "href"), (tag, name)
        assert "http:" not in (value or "") and "https:" not in (value or "")
    assert "url(" not in html and "@import" not in html
    return page


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    characters = [len(text) for text in read_split(folder, "test")["text"]]
    scored = ScoredText([4.5 * n for n in characters], characters, characters)
    answers = [poem(3), HOSTILE + poem(4), HOSTILE, "", "白" + HOSTILE]

    def generate(prompts):
        return [answers[i % len(answers)] for i in range(len(prompts))]

    settings = EvaluateSettings(titles=20, samples=6, ngram_order=3)
    return evaluate(folder, VERSE, scored, generate, [poem(1)], settings, 1)


def test_a_whole_report(tmp_path, evaluation):
    write_run(tmp_path, evaluation)
    html, markdown = write_report(tmp_path, VERSE)
    assert (tmp_path / "report.html").read_text() == html
    assert (tmp_path / "report.md").read_text() == markdown
    page = safe(html)
    text = " ".join(page.text)
    for words in (
        "Poems", "Form, rhyme and tones", "How well it predicts held-out text", "Training",
        "Variety and copying", "Experts", "What it cost", "Refining the text", "Settings",
    ):  # fmt: skip
        assert words in text and f"## {words}" in markdown
    for number in ("3 min 10 s", "1.00 GiB", "1,228,800", "7.37e+13"):
        assert number in text and number in markdown
    assert page.tags.count("svg") == 7 and "polyline" in page.tags
    assert "nan" not in html.lower().replace("nanum", "")
    assert page.tags.count("ruby") > 20
    assert "default-src 'none'" in html


def test_the_terminal_gets_the_first_lines(tmp_path, evaluation):
    write_run(tmp_path, evaluation)
    lines = headline(tmp_path, VERSE)
    assert any(line.startswith("rhyme: ") and "human" in line for line in lines)
    assert any("3 min 10 s" in line for line in lines)


def test_a_report_names_the_corpus_and_not_the_folders_of_this_machine(tmp_path):
    write_run(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        'name = "poet"\n[corpus]\npaths = ["/home/libai/secret/poems.jsonl", "../more.txt"]\n'
    )
    for text in write_report(tmp_path, VERSE):
        assert "poems.jsonl" in text and "../more.txt" in text and "libai" not in text


def test_on_a_phone_tables_scroll_and_the_page_does_not(tmp_path, evaluation):
    api = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no browser on this machine")
    write_run(tmp_path, evaluation)
    share = [1 / 256] * 256
    with open(tmp_path / "events.jsonl", "a") as events:
        line = {"kind": "train", "step": 300, "steps": 300, "loss": 3.0, "load": [share] * 2}
        events.write("\n" + json.dumps(line) + "\n")
    write_report(tmp_path, VERSE)
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width in (320, 390):
            page = chromium.new_page(viewport={"width": width, "height": 700})
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            wide = "[...document.querySelectorAll('.wide, .heat')].map(e => e.scrollWidth - e.clientWidth)"
            assert sum(room > 0 for room in page.evaluate(wide)) >= 2
            tall = (
                "[...document.querySelectorAll('.tile')].every(e => e.scrollWidth <= e.clientWidth)"
            )
            assert page.evaluate(tall)
        chromium.close()


def test_nothing_of_a_run_becomes_markup(tmp_path, evaluation):
    hostile = json.loads(json.dumps(evaluation).replace("佚名", json.dumps(HOSTILE)[1:-1]))
    for sample in hostile["samples"]:
        sample["title"] = sample["form"] = HOSTILE
    write_run(tmp_path, hostile, words=HOSTILE)
    html, markdown = write_report(tmp_path, VERSE)
    page = safe(html)
    assert any("<script>alert(1)</script>" in text for text in page.text)
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    kinds = {t.type for t in tokens} | {c.type for t in tokens for c in t.children or []}
    assert "table_open" in kinds and "heading_open" in kinds
    assert not kinds & {"html_block", "html_inline", "image", "link_open"}


def test_verse_of_a_model_that_is_no_verse_is_shown_as_text(tmp_path, evaluation):
    write_run(tmp_path, evaluation)
    html, _ = write_report(tmp_path, VERSE)
    assert "not in form" in html


def test_plain_text_has_no_verse(tmp_path):
    evaluation = {"kind": "text", "samples": [{"prompt": "The", "text": HOSTILE}]}
    write_run(tmp_path, evaluation)
    html, markdown = write_report(tmp_path, domain("text"))
    safe(html)
    assert "Samples" in html and "rhyme" not in markdown


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "stages": {}}')
    html, markdown = write_report(tmp_path, VERSE)
    safe(html)
    assert markdown.startswith(f"# {escape_markdown(tmp_path.name)}")


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(RunError, match=r"manifest\.json"):
        write_report(tmp_path, VERSE)
    write_run(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match=r"evaluation\.json"):
        write_report(tmp_path, VERSE)


@given(st.text())
def test_escaped_text_is_text(text):
    page = Page(f"<p>{escape(text)}</p>")
    assert page.tags == ["p"]
    tokens = MarkdownIt("commonmark").parse(f"a {escape_markdown(text)} b")
    kinds = {c.type for t in tokens for c in t.children or []}
    assert kinds <= {"text", "text_special", "softbreak"}


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12), st.integers(2, 9))
def test_ticks_span_the_range(low, width, count):
    found = ticks(low, low + width, count)
    assert 2 <= len(found) <= 3 * count + 3 and found == sorted(set(found))
    slack = 1e-6 * max(1.0, abs(low), width)
    assert found[0] <= low + slack and found[-1] >= low + width - slack


def test_curves_skip_what_is_not_a_number_and_thin_out():
    series = Series("loss", list(range(1000)), [float("nan")] + [1.0] * 998 + [5.0])
    chart = Curves("Loss", "step", [series])
    assert "nan" not in chart.html() and len(chart.clean[0].x) == 999
    thin = chart.clean[0].thinned(50)
    assert len(thin.x) == 50 and thin.y[-1] == 5.0
    assert Curves("Empty", "step", [Series("x", [], [])]).html() == ""


def test_short_numbers():
    assert [short(x) for x in (0, 12, 8192, 17_500_000, 0.00025, 0.02)] == [
        "0", "12", "8192", "17.5M", "2.5e-4", "0.02",
    ]  # fmt: skip
