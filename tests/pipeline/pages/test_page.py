"""The report as a page: it names the true numbers, is well formed, asks for nothing, and a browser shows it."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from models.analysis.cost import Memory
from models.analysis.effective_field import EffectiveField
from models.analysis.gradient_extent import Comparison
from models.analysis.report import Report
from models.analysis.summary import Pixels, Seen, inspect
from pipeline.pages.labels import WIDTHS, Circle, place_labels
from pipeline.pages.page import render, render_comparison
from tests.support.networks import on_meta
from tests.support.published import PUBLISHED

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = """<script>alert('&"')</script>"""
# Reads what a browser has laid out and painted, not what stands in the file.
PROBE = """<script>
const fact = document.getElementById("receptive-field"), wide = document.documentElement;
document.title = [fact.innerText, fact.getBoundingClientRect().width > 20, wide.scrollWidth <= innerWidth].join("|");
</script>"""


@dataclass
class Element:
    """A tag with its attributes, and the text of all that it holds."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """All elements of a page. Raises AssertionError where a tag is closed that is not open, or never."""

    source: str
    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()
        assert [element.tag for element in self.open] == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def of(self, tag: str) -> list[Element]:
        """All elements of a tag."""
        return [element for element in self.elements if element.tag == tag]

    def numbers(self) -> dict[str, float]:
        """What stands for machines, by id."""
        return {str(one.attributes["id"]): float(str(one.attributes["value"])) for one in self.of("data")}


@lru_cache
def report(variant: str) -> Report:
    """A report with made-up memory and a field that falls off like a bell."""
    row = next(row for row in PUBLISHED if row.variant == variant)
    found = inspect(on_meta(row), (row.in_channels, row.image_size, row.image_size))
    squares = (torch.arange(row.image_size, dtype=torch.float64) - row.image_size // 2).square()
    energy = torch.exp(-(squares[:, None] + squares[None, :]) / (row.image_size / 5) ** 2)
    middle = float(row.image_size // 2)
    layer = found.last_window.name if found.last_window else ""
    return Report(
        name=variant,
        inspection=found,
        memory=Memory(46_796_608, 46_758_048, 93_516_096, 403_944_576),
        batch_size=32,
        precision="bf16-mixed",
        effective=EffectiveField(layer, energy / energy.sum(), Pixels(middle, middle), 4),
        comparisons=[Comparison(layer, "rows", (3, 45), (3, 45), 64), Comparison(layer, "columns", (3, 45), None, 64)],
        warnings=["pixels farther out hardly count"],
    )


@lru_cache
def resnet18() -> Page:
    return Page(render(report("resnet18"), photograph=photograph(224)))


def photograph(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def svgs(source: str) -> list[str]:
    """The outermost drawings of a page."""
    depth, found, begin = 0, [], 0
    for match in re.finditer(r"<svg|</svg>", source):
        opens = match[0] == "<svg"
        begin = match.start() if opens and depth == 0 else begin
        depth += 1 if opens else -1
        if depth == 0:
            found.append(source[begin : match.end()])
    assert depth == 0
    return found


def test_the_page_names_the_true_numbers() -> None:
    known = {"parameters": 11_689_512, "gmacs": 1.814073344, "receptive-field": 435, "training-memory": 591_015_328}
    numbers = resnet18().numbers()
    assert {key: numbers[key] for key in known} == known
    effective = report("resnet18").effective
    assert effective is not None
    assert numbers["effective-field"] == numbers["effective-field-90"] == effective.side(0.9)
    assert (numbers["agreeing"], numbers["compared"]) == (1, 2)
    said = {one.attributes["id"]: one.text for one in resnet18().of("data")}
    assert said["receptive-field"] == "435 px"
    assert said["parameters"] == "11.69 M"
    assert said["training-memory"] == "564 MiB"
    assert "11,689,512" in resnet18().source
    assert "pixels farther out hardly count" in resnet18().source


def test_the_page_is_well_formed_and_accessible() -> None:
    page = resnet18()
    assert page.source.startswith('<!doctype html>\n<html lang="en">')
    assert [one.attributes["charset"] for one in page.of("meta") if "charset" in one.attributes] == ["utf-8"]
    assert [len(page.of(tag)) for tag in ("h1", "main", "header", "nav")] == [1, 1, 1, 1]
    ids = [one.attributes["id"] for one in page.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids)) > 12
    inside = [str(one.attributes["href"])[1:] for one in page.of("a")]
    assert len(inside) >= 7
    assert set(inside) <= set(ids)
    assert len(page.of("table")) == len(page.of("caption")) >= 9
    assert all("scope" in one.attributes for one in page.of("th"))
    drawings = [one.attributes for one in page.of("svg") if one.attributes.get("class") in ("plot", "heat")]
    assert len(drawings) == 6
    assert all(one["role"] == "img" and one["aria-label"] for one in drawings)


@pytest.mark.parametrize("variant", ["resnet18", "coatnet_0", "lenet5"])
def test_drawings_are_xml(variant: str) -> None:
    drawings = svgs(render(report(variant)))
    assert len(drawings) > 10
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_the_page_asks_nobody_for_anything() -> None:
    pages = [resnet18(), Page(render_comparison([report("resnet18")], images_per_second=[9.0]))]
    for page in pages:
        assert not page.of("script")
        targets = [
            str(value) for one in page.elements for key, value in one.attributes.items() if key in ("src", "href")
        ]
        assert len(targets) > 2
        assert all(target.startswith(("#", "data:")) for target in targets)
        assert not re.search(r"url\(|@import|\son\w+=", page.source)
        assert "default-src 'none'" in page.source


def test_a_hostile_name_is_a_name() -> None:
    tame = report("lenet5")
    layers = [replace(layer, name=HOSTILE, kind=HOSTILE, stage=HOSTILE) for layer in tame.inspection.layers]
    found = replace(tame.inspection, layers=layers, unknown=HOSTILE)
    comparison = Comparison(HOSTILE, "rows", None, None, 32)
    field_of_it = replace(tame.effective, layer=HOSTILE) if tame.effective else None
    hostile = replace(
        tame, name=HOSTILE, inspection=found, warnings=[HOSTILE], comparisons=[comparison], effective=field_of_it
    )
    for source in (render(hostile), render_comparison([hostile, tame], images_per_second=[1.0, 2.0])):
        assert "<script" not in source
        assert "&lt;script&gt;" in source
        page = Page(source)
        assert not page.of("script")
        assert any(one.text == HOSTILE for one in [*page.of("h1"), *page.of("th")])
        for drawing in svgs(source):
            ElementTree.fromstring(drawing)


@pytest.mark.parametrize("variant", ["resnet18", "coatnet_0"])
def test_every_layer_is_in_the_page(variant: str) -> None:
    page, layers = Page(render(report(variant))), report(variant).inspection.layers
    heads = [one.text for one in page.of("th") if one.attributes.get("scope") == "row"]
    assert len(layers) > 60
    assert _contains(heads, [layer.name for stage in report(variant).inspection.stages.values() for layer in stage])
    assert len(page.of("details")) == len(report(variant).stages) + 1


def test_a_page_of_many_layers_is_light() -> None:
    found = report("coatnet_0").inspection
    many = replace(found, layers=(found.layers * 4)[:750])
    assert len(many.layers) == 750
    assert len(render(replace(report("coatnet_0"), inspection=many), photograph=photograph(224)).encode()) < 1_000_000


def test_footnotes_are_numbered_and_lead_back() -> None:
    notes = [moment.footnote for moment in report("resnet18").moments if moment.footnote]
    items = [one for one in resnet18().of("li") if str(one.attributes.get("id", "")).startswith("note")]
    marks = [one.text for one in resnet18().of("sup") if "id" in one.attributes]
    assert len(items) == len(notes) == 4
    assert marks == ["1", "2", "3", "4"]


def test_what_is_not_known_has_no_number() -> None:
    found = report("resnet18").inspection
    blind = replace(
        found, unknown="no rule", layers=[replace(one, rows=Seen(), columns=Seen()) for one in found.layers]
    )
    page = Page(render(replace(report("resnet18"), inspection=blind, effective=None, comparisons=None)))
    assert page.numbers().keys() == {"parameters", "gmacs", "training-memory"}
    assert "no rule" in page.source
    assert "not measured" in page.source


def test_a_photograph_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(32, 32, 3\).*\(224, 224\)"):
        render(report("resnet18"), photograph=photograph(32))


def test_a_comparison_has_all_networks() -> None:
    names = ["resnet18", "coatnet_0", "mobilenet_v2"]
    page = Page(render_comparison([report(name) for name in names], images_per_second=[20.5, 8.25, 55.0]))
    heads = [one.text for one in page.of("th") if one.attributes.get("scope") == "row"]
    assert heads == names
    numbers = page.numbers()
    assert [numbers[f"parameters-{row}"] for row in (1, 2, 3)] == [11_689_512, 25_036_820, 3_504_872]
    assert [numbers[f"images-per-second-{row}"] for row in (1, 2, 3)] == [20.5, 8.25, 55.0]
    assert len([one for one in page.of("circle") if one.attributes.get("class") == "dot"]) == 6
    with pytest.raises(ValueError, match="3 reports and 1 speeds"):
        render_comparison([report(name) for name in names], images_per_second=[1.0])


def test_names_of_nine_networks_keep_clear_of_each_other() -> None:
    rows = {row.architecture: row for row in PUBLISHED if row.image_size == 224}
    names = [row.variant for row in rows.values()] + ["resnext50_32x4d"]
    random = np.random.default_rng(0)
    assert len(names) == 9
    for _ in range(4):
        circles = [Circle(x, y, r) for x, y, r in random.uniform((0.1, 30, 4), (0.9, 290, 20), (9, 3))]
        labels = place_labels(names, circles, height=320)
        for width in (*WIDTHS, 340, 500):
            boxes = [label.box(width) for label in labels]
            assert all(one.shared(other) == 0 for one, other in itertools.combinations(boxes, 2))
            assert all(box.left >= -24 and box.right <= width + 16 for box in boxes), "within the figure's margins"


def test_a_browser_shows_the_page_in_light_and_dark(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome here: make browser")
    page, probed = tmp_path / "report.html", tmp_path / "probed.html"
    page.write_text(resnet18().source, encoding="utf-8")
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", resnet18().source)
    probed.write_text(without_policy.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert "<title>435 px|true|true</title>" in browse(browser, probed, "--window-size=500,900", "--dump-dom")
    backgrounds = {}
    for theme, number in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{theme}.png"
        browse(
            browser,
            page,
            f"--screenshot={picture}",
            "--window-size=1200,900",
            f"--blink-settings=preferredColorScheme={number}",
        )
        pixels = np.asarray(Image.open(picture).convert("L"), dtype=int)
        assert pixels.shape == (900, 1200)
        backgrounds[theme] = int(np.median(pixels))
        inked = np.abs(pixels - backgrounds[theme]) > 100
        assert 0.005 < inked.mean() < 0.5, "letters on paper"
        assert inked[:200].any()
        assert inked[-200:].any()
    assert backgrounds["light"] > 240
    assert backgrounds["dark"] < 40


def browse(browser: str, page: Path, *flags: str) -> str:
    """What a browser without a window answers for a page."""
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent}/profile",
    ]
    answer = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout


def _contains(whole: Sequence[str], part: Sequence[str]) -> bool:
    """Whether a list has another in it, one item after the other."""
    rest: Iterator[str] = iter(whole)
    return all(item in rest for item in part)
