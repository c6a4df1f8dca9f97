# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The report says what the summary says, whatever is in it, and can be read: measured in a real browser."""

import copy
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lxml.html
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from trl_spo.comparison import plots, report
from trl_spo.comparison.report import write_report
from trl_spo.comparison.report_numbers import Shown, duration, estimate, memory, money, number, p_value
from trl_spo.comparison.report_tables import best_of, spread

from .browser import Seen, View, find_chromium, look
from .conftest import SUMMARIES


pytestmark = pytest.mark.filterwarnings("error:constrained_layout")  # matplotlib found no place for all
PICTURES = ("reward_kl", "reward_entropy", "win_rate", "displacement", "capabilities", "diversity", "cost")
HOSTILE = """<script>alert(1)</script> "><img src=x onerror="alert(2)"> | `a` *b* $c$ [d](http://e.f) {{ 7 * 6 }} </style></svg>"""


WITH_PICTURES = ("rich", "many", "hostile", "all_failed", "nothing")  # of the others, tables are enough
WITH_PNG = ("rich", "all_failed", "nothing")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """`written(name)`: the folder of the report of one of the summaries, made once."""
    folders: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            summary = hostile_summary() if name == "hostile" else SUMMARIES[name]()
            with pytest.MonkeyPatch.context() as patch:
                if name not in WITH_PICTURES:
                    patch.setattr(report, "PICTURES", {})
                if name not in WITH_PNG:
                    patch.setattr(report, "save", lambda *args, **options: None)
                assert write_report(summary, folders[name]) == folders[name] / "report.html"
        return folders[name]

    return write


def hostile_summary() -> dict[str, Any]:
    """Whatever text comes from outside has HTML, Markdown and templates in it."""

    def poison(some: Any, key: str = "") -> Any:
        if isinstance(some, dict):
            return {name: poison(one, name) for name, one in some.items()}
        if isinstance(some, list):
            return [poison(one, key) for one in some]
        fixed = ("method", "first", "second", "metric", "form", "status", "verdict", "memory_of")
        return f"{some} {HOSTILE}" if isinstance(some, str) and key not in fixed else some

    summary = SUMMARIES["one_run"]()
    summary["versus"] = [
        {"first": "stable_po", "first_setting": "a", "second": "dpo", "second_setting": "b", "p_value": 0.5}
        | {"adjusted_p_value": 0.5, "difference": {"value": 0.1, "interval": [-0.1, 0.3], "number": 9}}
    ]
    summary["runs"].append(copy.deepcopy(summary["runs"][0]) | {"status": "failed", "error": "`````", "points": []})
    poisoned = poison(summary)
    poisoned["quality"]["metric"] = "reward"
    poisoned["versions"] = {f"trl {HOSTILE}": "1"}
    for row in poisoned["settings"][0]["capabilities"]:
        row["metric"] = f"exact match {HOSTILE}"
    return poisoned


def html_of(folder: Path) -> lxml.html.HtmlElement:
    return lxml.html.fromstring((folder / "report.html").read_text(encoding="utf-8"))


def text_of(element: lxml.html.HtmlElement) -> str:
    return " ".join(element.text_content().split())


# -- numbers


@pytest.mark.parametrize(
    ("value", "interval", "sign", "shown"),
    [
        (0.6204, [0.5704, 0.6704], "", "0.62 [0.57, 0.67]"),
        (1.7812, [1.57, 1.99], "", "1.78 [1.57, 1.99]"),  # half of the width is 0.21: two digits
        (17.936, [17.52, 18.35], "", "17.9 [17.5, 18.4]"),  # 0.415: one digit
        (88.71, [88.66, 88.76], "", "88.7 [88.7, 88.8]"),  # no more than three digits of the value
        (88.71, [88.704, 88.712], "", "88.71 [88.70, 88.71]"),  # unless the ends would be the same
        (0.0003, [-0.05, 0.05], "+", "0.00 [\u22120.05, 0.05]"),  # a zero has no sign
        (-2.214, [-2.9, -1.5], "+", "\u22122.2 [\u22122.9, \u22121.5]"),
        (0.41, [-0.29, 1.11], "+", "+0.4 [\u22120.3, 1.1]"),
        (1234.4, [1200.0, 1269.0], "", "1,234 [1,200, 1,269]"),
        (0.5, [0.5, 0.5], "", "0.500 [0.500, 0.500]"),
        (0.0, [-1.0, 1.0], "", "0.0 [\u22121.0, 1.0]"),
        (0.5, None, "", "0.500"),
        (-0.061234, None, "", "\u22120.0612"),
        (0, None, "+", "0"),
        (12345.6, None, "", "12,346"),
        (None, None, "", "–"),
        (float("nan"), None, "", "–"),
        (float("inf"), [1.0, 2.0], "", "∞"),
    ],
)
def test_estimates(value, interval, sign, shown):
    assert str(estimate({"value": value, "interval": interval, "number": 5}, sign)) == shown


def test_other_numbers():
    assert estimate(None) == Shown("–") and number(None) == "–"
    assert [p_value(p) for p in (None, 0.0, 0.00099, 0.0132, 1.0)] == ["–", "< 0.001", "< 0.001", "0.013", "1.000"]
    times = {
        None: "–",
        0.4214: "0.421 s",
        42.13: "42.1 s",
        59.96: "1 min 0 s",
        724.4: "12 min 4 s",
        3599.7: "1 h 0 min",
    }
    times |= {11107: "3 h 5 min", 86400 * 1.5: "36 h 0 min", 86400 * 3 + 7300: "3 d 2 h"}
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {None: "–", 500: "500 bytes", 1023 * 2**20: "0.999 GiB", 14.21 * 2**30: "14.2 GiB", 700 * 2**20: "700 MiB"}
    assert {size: memory(size) for size in sizes} == sizes
    assert [money(m) for m in (None, 0, 0.08712, 1.5, 1234.567)] == ["–", "0.00", "0.0871", "1.50", "1,234.57"]
    assert money(1.5, "EUR") == "1.50 EUR"


def test_what_is_emphasised():
    def made(*intervals):
        return [
            None if ends is None else {"value": sum(ends) / 2, "interval": ends, "number": 9} for ends in intervals
        ]

    assert best_of(made([1.0, 2.0], [2.1, 3.0], [0.0, 1.5])) == 1
    assert best_of(made([1.0, 2.0], [1.9, 3.0], [0.0, 1.5])) is None  # they overlap
    assert best_of(made([1.0, 2.0], [2.1, 3.0], [0.0, 0.9]), higher=False) == 2
    assert best_of(made([1.0, 2.0], None, [2.1, 3.0])) == 2
    assert best_of(made([1.0, 2.0])) is None  # of nothing
    unknown = made([1.0, 2.0], [2.1, 3.0]) + [{"value": 0.5, "interval": None, "number": 1}]
    assert best_of(unknown) is None


def test_what_intervals_are_over():
    def made(*numbers):
        return [({"value": 1.0, "interval": [0.0, 2.0], "number": n}, trainings) for n, trainings in numbers]

    assert spread(made((3, 3), (2, 3)), "prompts") == "over 2 to 3 seeds"
    assert spread(made((256, 1)), "prompts") == "over 256 prompts"
    assert spread(made((1256, 3), (1256, 2)), "pairs") == "over seeds and 1,256 pairs"
    assert spread(made((3, 3), (256, 1)), "prompts") == "over 3 seeds, over 256 prompts where there is one seed"
    assert spread([({"value": 1.0, "interval": None, "number": 3}, 3), (None, 3)], "prompts") == ""


# -- the tables


def parse_number(text: str) -> tuple[float, float]:
    """A number as it is shown, and how far from it what is meant may be."""
    text = text.replace(",", "").replace("\u2212", "-").lstrip("+")
    digits = len(text.partition(".")[2])
    return float(text), 0.5 * 10**-digits * (1 + 1e-9)


def says(text: str, found: dict[str, Any] | None) -> bool:
    """Whether a text is an estimate, with all digits that it shows."""
    if found is None or found["value"] is None:
        return text == "–"
    match = re.fullmatch(r"([+\u2212\d.,]+)(?: \[([\u2212\d.,]+), ([\u2212\d.,]+)\])?", text)
    assert match, text
    assert (match[2] is None) == (found["interval"] is None), text
    pairs = [(match[1], found["value"]), *zip(match.groups()[1:], found["interval"] or (), strict=False)]
    return all(abs(parse_number(shown)[0] - meant) <= parse_number(shown)[1] for shown, meant in pairs)


def says_seconds(text: str, seconds: float | None) -> bool:
    if seconds is None:
        return text == "–"
    units = {"h": 3600, "min": 60, "s": 1}
    parts = re.findall(r"([\d.]+) (h|min|s)", text)
    return abs(sum(float(n) * units[unit] for n, unit in parts) - seconds) <= 0.5 * units[parts[-1][1]]


def says_size(text: str, size: float | None) -> bool:
    if size is None:
        return text == "–"
    shown, unit = text.split()
    value, error = parse_number(shown)
    return abs(value - size / {"MiB": 2**20, "GiB": 2**30}[unit]) <= error


def says_value(text: str, value: float | None) -> bool:
    return text == "–" if value is None else abs(parse_number(text)[0] - value) <= parse_number(text)[1]


def says_p(text: str, p: float | None) -> bool:
    return says_value(text, p) if p is None or p >= 0.001 else text == "< 0.001"


COLUMNS = {
    "Reward": "reward",
    "Win rate": "win_rate",
    "KL nats": "kl",
    "Entropy nats": "entropy",
    "Length tokens": "length",
    "Preference accuracy": "preference_accuracy",
    "Chosen change nats": "chosen_change",
    "Rejected change nats": "rejected_change",
    "Distinct words": "distinct_1",
    "Distinct word pairs": "distinct_2",
    "Self-BLEU": "self_bleu",
    "Unique responses": "unique",
    "Finished": "finished",
}


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Rows by column title."""
    found = {}
    for table in html_of(folder).iter("table"):
        head, *rows = [[text_of(cell) for cell in row.iter("th", "td")] for row in table.iter("tr")]
        assert len(set(head)) == len(head)
        found[table.getparent().get("aria-label")] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


def name_of(setting: dict[str, Any]) -> str:
    return f"{setting['label']} {setting['setting_label']}"


@pytest.mark.parametrize("name", ["rich", "judged", "unpaired", "unjudged", "nothing", "all_failed"])
def test_tables_say_what_was_measured(written, name):
    summary, found = SUMMARIES[name](), tables(written(name))
    settings, checked = summary["settings"], 0

    rows = found["Settings"]
    has_base = rows[0]["Setting"] == "Reference"
    assert has_base == (name != "nothing")
    assert len(rows) == len(settings) + has_base
    for row, setting in zip(rows[has_base:], settings, strict=True):
        assert row.pop("Setting").removesuffix(" recommended") == name_of(setting)
        failed = len(setting["failed"])
        assert row.pop("Seeds") == (f"{len(setting['seeds']) - failed} of " if failed else "") + str(
            len(setting["seeds"])
        )
        assert says_p(row.pop("p-value", "–"), setting["p_value"])
        assert says_seconds(row.pop("Time", "–"), setting["seconds"])
        assert says_size(row.pop("Memory", "–"), setting["peak_memory"])
        assert says_value(row.pop("Cost USD", "–"), setting["cost"])
        missing = set(COLUMNS.values()) - {COLUMNS[title] for title in row}
        table_metrics = ("reward", "win_rate", "kl", "entropy", "length", "preference_accuracy", "chosen_change")
        assert all(setting["metrics"].get(m, {"value": None})["value"] is None for m in missing & set(table_metrics))
        for title, text in row.items():
            assert says(text, setting["metrics"].get(COLUMNS[title])), (title, text)
            checked += text != "–"
    for title, text in rows[0].items() if has_base else ():
        if title in COLUMNS:
            assert says(text, summary["base"]["metrics"].get(COLUMNS[title])), (title, text)

    rows = found.get("Diversity of responses", [])
    for row, metrics in zip(rows, [summary["base"], *settings] if rows else [], strict=True):
        for title, text in list(row.items())[1:]:
            assert says(text, metrics["metrics"].get(COLUMNS[title])), (title, text)

    rows = found.get("Methods compared with each other", [])
    for row, versus in zip(rows, summary["versus"], strict=True):
        labels = {setting["method"]: setting["label"] for setting in settings}
        assert row["Setting"] == f"{labels[versus['first']]} {versus['first_setting']}"
        assert row["Against"] == f"{labels[versus['second']]} {versus['second_setting']}"
        assert says(row["Difference"], versus["difference"])
        assert says_p(row["p-value"], versus["p_value"]) and says_p(row["Adjusted p"], versus["adjusted_p_value"])
        winner = labels[versus["first" if versus["difference"]["value"] > 0 else "second"]]
        assert row["Verdict"] == ("no difference seen" if versus["adjusted_p_value"] > 0.05 else f"{winner} is better")

    rows = found.get("Capabilities before and after", [])
    measured = [(s, c) for s in settings for c in s["capabilities"] if c["after"]["value"] is not None]
    assert len(rows) == len(measured)
    by_name = {(row["Setting"], row["Capability"]): row for row in rows}
    for setting, capability in measured:
        row = by_name[name_of(setting), f"{capability['name']}, {capability['metric']}"]
        assert all(says(row[which.title()], capability[which]) for which in ("before", "after", "difference"))
        assert row["Verdict"] == capability["verdict"]

    for row, run in zip(found["Runs"], summary["runs"], strict=True):
        assert row["Run"] == run["id"] and row["Folder"] == run["folder"]
        assert row["Status"] == {"unjudged": "not judged"}.get(run["status"], run["status"])
        assert says_seconds(row.get("Time", "–"), run["seconds"]) and says_size(
            row.get("Memory", "–"), run["peak_memory"]
        )
        assert says_value(row.get("Cost USD", "–"), run["cost"])

    rows = found.get("Wins against the reference", [])
    judged = [setting for setting in settings if setting["judged"]]
    for row, setting in zip(rows, judged, strict=True):
        assert [row[key.title()] for key in ("wins", "ties", "losses", "undecided")] == list(
            map(str, setting["judged"].values())
        )
    assert (checked > 0) == (name not in ("nothing", "all_failed"))


@pytest.mark.parametrize("name", ["rich", "judged", "nothing", "hostile"])
def test_markdown_has_the_same_tables(written, name):
    text = (written(name) / "report.md").read_text(encoding="utf-8")
    page = lxml.html.fromstring(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    theirs = [
        [[text_of(cell) for cell in row.iter("th", "td")] for row in table.iter("tr")] for table in page.iter("table")
    ]
    ours = []
    for table in html_of(written(name)).iter("table"):
        rows = []
        for row in table.iter("tr"):
            cells = []
            for cell in row.iter("th", "td"):
                for note in cell.find_class("note"):
                    note.text = f"¦{note.text}"
                for tag in cell.find_class("tag") if cell.tag == "th" else ():
                    tag.text = f"({tag.text})"
                for unit in cell.find_class("unit"):
                    unit.text = f"({unit.text})"
                cells.append(text_of(cell).replace(" ¦", ", "))
            rows.append(cells)
        ours.append(rows)
    assert sorted(theirs) == sorted(ours)
    pictures = [image.get("src") for image in page.iter("img")]
    assert pictures == [f"{shown}.png" for shown in PICTURES if (written(name) / f"{shown}.png").exists()]
    assert not list(page.iter("script"))
    # All else is there, too, in the same order
    summary = hostile_summary() if name == "hostile" else SUMMARIES[name]()
    recommended = summary["recommendation"]
    texts = [
        recommended["headline"],
        *recommended["reasons"],
        *recommended["warnings"],
        *summary["notes"],
        summary["config"],
    ]
    for content in (text_of(page), text_of(html_of(written(name)).find("body"))):
        at = 0
        for one in texts:
            at = content.index(" ".join(one.split()), at)
        for run in summary["runs"]:
            assert run["error"] is None or " ".join(run["error"].split()) in content


def test_best_is_bold_and_what_is_recommended_is_marked(written):
    page = html_of(written("rich"))
    settings = next(page.iter("table"))
    # DPO with β = 0.1 has 2.87 to 3.29, and the next one ends at 2.82. No other column has a best one.
    assert [text_of(cell) for cell in settings.find_class("best")] == ["3.08 [2.87, 3.29]"]
    (tag,) = settings.find_class("tag")
    assert text_of(tag.getparent()) == "Soft PO α = 0.1, β = 0.1 recommended"
    tiles = [" ".join(text_of(part) for part in tile) for tile in page.find_class("tiles")[0]]
    assert tiles == [
        "Reward 1.78 [1.57, 1.99]",
        "KL, nats 6.6 [6.2, 7.0]",
        "Chosen change, nats −2.2 [−2.9, −1.5]",
        "Training time 12 min 4 s",
    ]


# -- the HTML file


class Balance(HTMLParser):
    """That each element is closed where it should be."""

    VOID = frozenset({"meta", "link", "br", "wbr", "img", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())


@pytest.mark.parametrize("name", ["rich", "all_failed", "nothing", "hostile"])
def test_html_stands_alone(written, name):
    text = (written(name) / "report.html").read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    balance.close()
    assert balance.open == []
    page = lxml.html.fromstring(text)
    for tag in ("script", "img", "iframe", "object", "embed", "base", "form", "image"):
        assert not list(page.iter(tag)), tag
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    for element in page.iter():
        for key, some in element.attrib.items():
            assert not key.startswith("on")
            if key in ("href", "src", "xlink:href"):
                assert some == "data:," or some.removeprefix("#") in ids and some[0] == "#", some
            assert all(target in ids for target in re.findall(r"url\(#?([^)]*)\)", some)), some
    assert not re.search(r"@import|url\((?!#)", text)
    for style in page.iter("style"):
        assert "url" not in style.text
    sections = {link.get("href") for nav in page.iter("nav") for link in nav}
    assert sections == {f"#{section.get('id')}" for section in page.iter("section")} - {"#recommendation"}
    # All colours of pictures are of the page, so that they follow light and dark
    for svg in page.iter("svg"):
        colors = re.findall(r"(?:fill|stroke): ([^;\"]+)", lxml.html.tostring(svg, encoding="unicode"))
        assert all(re.fullmatch(r"none|var\(--[\w-]+\)", color) for color in colors)


def test_whatever_is_in_the_summary_stays_text(written):
    page = html_of(written("hostile"))
    hostile = " ".join(HOSTILE.split())
    cut = [text_of(element) for element in page.iter("text")]  # to what a picture has place for
    assert sum("<scri" in text for text in cut) > 3
    for kind, least in (
        ("h1", 1),
        ("h2", 1),
        ("dd", 3),
        ("li", 5),
        ("td", 3),
        ("th", 2),
        ("pre", 3),
        ("title", 2),
    ):
        found = sum(hostile in text_of(element) for element in page.iter(kind))
        assert found >= least, (kind, found)


@pytest.mark.parametrize("name", WITH_PNG)
def test_pictures_of_what_was_measured(written, name):
    folder = written(name)
    expected = () if name in ("all_failed", "nothing") else PICTURES
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", *(f"{p}.png" for p in expected)}
    figures = [figure.get("id").removeprefix("picture-") for figure in html_of(folder).iter("figure")]
    assert figures == list(expected)
    for picture in expected:
        with Image.open(folder / f"{picture}.png") as image:
            assert image.format == "PNG" and image.width == 1040 and image.height > 400
            colors = image.convert("RGB").getcolors(2**24)
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255) and len(colors) > 50  # something on white


def test_all_or_nothing_and_the_same_each_time(tmp_path, monkeypatch):
    def content(folder: Path = tmp_path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    monkeypatch.setattr(report, "PICTURES", {name: plots.PICTURES[name] for name in ("reward_kl", "win_rate")})
    (tmp_path / "again").mkdir()
    for folder in (tmp_path, tmp_path / "again"):
        write_report(SUMMARIES["one_run"](), folder)
    before = content()
    assert before.keys() == {"report.html", "report.md", "reward_kl.png", "win_rate.png"}
    assert before == content(tmp_path / "again")

    def fail(figure, file, format, **options):
        if format == "png":
            raise OSError("No space left on device")
        save(figure, file, format, **options)

    save = report.save
    with monkeypatch.context() as patch:
        patch.setattr(report, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            write_report(SUMMARIES["one_run"]() | {"model": "another"}, tmp_path)
    assert content() == before
    write_report(SUMMARIES["nothing"](), tmp_path)
    assert content().keys() == {"report.html", "report.md"}  # the pictures of what was before are gone


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_spo.comparison.plot_style.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "trl-spo\[plots\]"'):
        plots.check_plots()
    with pytest.raises(ImportError, match="plots"):
        write_report(SUMMARIES["rich"](), tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- in a browser

# Colours of text against what is behind it, by WCAG 2, and what is where
MEASURE = """
(() => {
  document.querySelectorAll('details').forEach(details => details.open = true);
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const cached = (key, make) => { if (!known.has(key)) known.set(key, make()); return known.get(key); };
  const rgba = color => cached(color, () => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(x => x / 255);
  });
  const over = (top, below) => below.map((x, i) => top[i] * top[3] + x * (1 - top[3])).slice(0, 3).concat(1);
  const light = color => {
    const [r, g, b] = color.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const behind = element => cached(element, () => over(
    rgba(getComputedStyle(element).backgroundColor),
    element.parentElement ? behind(element.parentElement) : rgba('white'),
  ));
  const contrasts = [];
  const add = (element, color, text) => {
    const below = behind(element);
    contrasts.push([ratio(over(rgba(color), below), below), text.trim().slice(0, 40), element.tagName]);
  };
  let smallest = 1e9, outside = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || element.tagName === 'title' || !element.getClientRects().length) continue;
    const svg = element.closest('figure svg');
    add(element, svg ? style.fill : style.color, node.data);
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    smallest = Math.min(smallest, parseFloat(style.fontSize) * scale);
    if (svg) {
      const a = element.getBoundingClientRect(), b = svg.closest('figure').getBoundingClientRect();
      if (a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom) outside.push(node.data);
    }
  }
  for (const cell of document.querySelectorAll('td')) {
    const style = getComputedStyle(cell, '::before');
    if (cell.getClientRects().length && style.content !== 'none') add(cell, style.color, style.content);
  }
  const page = document.scrollingElement;
  return {
    contrasts, smallest, outside,
    figures: document.querySelectorAll('figure').length,
    pictures: [...document.querySelectorAll('figure > svg')].map(svg => {
      const box = svg.getBoundingClientRect();
      return [box.width, box.height, svg.checkVisibility(), box.left, box.right];
    }),
    colors: [...new Set([...document.querySelectorAll('figure svg *')].flatMap(e => [
      e.style.fill && getComputedStyle(e).fill, e.style.stroke && getComputedStyle(e).stroke,
    ]))].filter(color => color && color !== 'none'),
    background: light(rgba(getComputedStyle(document.body).backgroundColor)),
    widths: [page.scrollWidth, page.clientWidth],
    aligned: [...new Set([...document.querySelectorAll('td, tbody th')].map(e => getComputedStyle(e).textAlign))],
    padded: [...new Set([...document.querySelectorAll('td, tbody th')].map(e => getComputedStyle(e).paddingLeft))],
    columns: getComputedStyle(document.querySelector('tbody tr')).display,
  };
})()
"""
VIEWS = [View(width, dark) for width in (1280, 390) for dark in (False, True)]
LOOKED_AT = [("rich", view) for view in VIEWS] + [
    ("many", VIEWS[3]),
    ("hostile", VIEWS[2]),
    ("all_failed", VIEWS[2]),
    ("nothing", VIEWS[3]),
]


@pytest.fixture(scope="module")
def seen(written) -> dict[tuple[str, View], Seen]:
    """What Chromium shows of the reports: started once for all."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium: none of chromium, chromium-browser, google-chrome is on the PATH")
    pages = {name: written(name) / "report.html" for name, _ in LOOKED_AT}
    found = look(executable, [(pages[name], view) for name, view in LOOKED_AT], MEASURE)
    return {(name, view): found[pages[name], view] for name, view in LOOKED_AT}


@pytest.mark.parametrize(("name", "view"), LOOKED_AT, ids=[f"{name}-{view.name}" for name, view in LOOKED_AT])
def test_in_chromium(seen, written, name, view):
    found = seen[name, view]
    measured = found.measured
    assert found.complaints == []
    assert set(found.requests) <= {(written(name) / "report.html").as_uri(), "data:,"}
    scrolled, shown = measured["widths"]
    assert scrolled <= shown == view.width
    assert measured["columns"] == ("grid" if view.width < 600 else "table-row")  # cards on a phone

    if view.width < 600:
        assert measured["aligned"] == ["left"] and measured["padded"] == ["0px"]

    contrasts = sorted(measured["contrasts"])
    assert len(contrasts) > 20 and contrasts[0][0] >= 4.5, contrasts[:5]
    kinds = {kind for *_, kind in contrasts}
    assert {"H1", "P", "SPAN", "TD" if view.width < 600 else "TH"} <= kinds
    assert ("text" in kinds) == (name not in ("all_failed", "nothing"))
    if view.dark:
        assert measured["background"] < 0.02
    else:
        assert measured["background"] > 0.85
    with Image.open(io.BytesIO(found.screenshot)) as image:  # and so it is painted
        corner = image.convert("L").getpixel((3, 3))
    assert corner < 40 if view.dark else corner > 230

    expected = 0 if name in ("all_failed", "nothing") else len(PICTURES)
    assert len(measured["pictures"]) == measured["figures"] == expected
    for width, height, visible, left, right in measured["pictures"]:
        assert visible and 300 < width < 560 and height > 100 and left >= 0 and right <= view.width
    assert measured["outside"] == []
    assert measured["smallest"] >= 9.5  # pixels, also of what is in the pictures


def test_pictures_follow_light_and_dark(seen):
    for width in (1280, 390):
        light, dark = (set(seen["rich", View(width, dark)].measured["colors"]) for dark in (False, True))
        assert len(light) == len(dark) > 4
        assert not light & dark  # nothing has the same colour in both
