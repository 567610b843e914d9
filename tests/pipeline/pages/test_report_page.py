"""The pages hold the true numbers, are well formed, request nothing, and a browser shows them."""

from __future__ import annotations

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
from torch import nn

from models.analysis.cost import TrainingMemory
from models.analysis.effective_field import EffectiveField
from models.analysis.gradient_extent import FieldComparison
from models.analysis.receptive_field import ReceptiveField
from models.analysis.report import Report
from models.analysis.summary import Pixels, summarize
from pipeline.pages.report_page import render_comparison, render_report
from tests.support.networks import on_meta
from tests.support.published import PUBLISHED

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = """<script>alert('&"')</script>"""
# Reads what a browser has laid out, not what stands in the file.
PROBE = """<script>
const fact = document.getElementById("receptive-field"), root = document.documentElement;
document.title = [fact.innerText, fact.getBoundingClientRect().width > 20, root.scrollWidth <= innerWidth].join("|");
</script>"""


@dataclass
class Element:
    """A tag with its attributes, and the text inside it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """All elements of a page. Raises AssertionError for a tag that is closed but not open, or never closed."""

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
        """All elements with this tag."""
        return [element for element in self.elements if element.tag == tag]

    def of_class(self, name: str) -> list[Element]:
        """All elements with this class."""
        return [element for element in self.elements if name in (element.attributes.get("class") or "").split()]

    def numbers(self) -> dict[str, float]:
        """The numbers for machines, by id."""
        return {str(one.attributes["id"]): float(str(one.attributes["value"])) for one in self.of("data")}


@lru_cache
def report(variant: str) -> Report:
    """A report with invented memory and an effective field in the shape of a bell."""
    row = next(row for row in PUBLISHED if row.variant == variant)
    summary = summarize(on_meta(row), (row.in_channels, row.image_size, row.image_size))
    squares = (torch.arange(row.image_size, dtype=torch.float64) - row.image_size // 2).square()
    energy = torch.exp(-(squares[:, None] + squares[None, :]) / (row.image_size / 5) ** 2)
    middle = float(row.image_size // 2)
    layer = summary.last_local_layer.name if summary.last_local_layer else ""
    return Report(
        name=variant,
        summary=summary,
        memory=TrainingMemory(46_796_608, 46_758_048, 93_516_096, 403_944_576),
        batch_size=32,
        precision="bf16-mixed",
        effective=EffectiveField(layer, energy / energy.sum(), Pixels(middle, middle), 4),
        measured_with="weights of mine.pt, over 4 crops",
        comparisons=[
            FieldComparison(layer, "rows", (3, 45), (3, 45), 64),
            FieldComparison(layer, "columns", (3, 45), None, 64),
        ],
        warnings=["pixels farther out hardly count"],
    )


@lru_cache
def resnet18() -> Page:
    return Page(render_report(replace(report("resnet18"), sample_image=sample_image(224))))


def sample_image(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def svgs(source: str) -> list[str]:
    """The drawings of a page, none inside another."""
    return re.findall(r"<svg.*?</svg>", source, re.DOTALL)


def test_the_page_has_the_true_numbers() -> None:
    known = {"parameters": 11_689_512, "gmacs": 1.814073344, "receptive-field": 435, "training-memory": 591_015_328}
    numbers = resnet18().numbers()
    assert {key: numbers[key] for key in known} == known
    effective = report("resnet18").effective
    assert effective is not None
    assert numbers["effective-field"] == numbers["effective-field-90"] == effective.side(0.9)
    assert (numbers["agreeing"], numbers["compared"]) == (1, 2)
    words = {one.attributes["id"]: one.text for one in resnet18().of("data")}
    assert words["receptive-field"] == "435 px"
    assert words["parameters"] == "11.69 M"
    assert words["training-memory"] == "564 MiB"
    for text in ("11,689,512", "pixels farther out hardly count", "measured with weights of mine.pt, over 4 crops"):
        assert text in resnet18().source


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
    drawings = [one.attributes for one in [*page.of_class("chart"), *page.of_class("heat")]]
    assert len(drawings) == 2  # the receptive field, the heat map
    assert all(one["role"] == "img" and one["aria-label"] for one in drawings)
    assert len(page.of_class("bars")) == 3
    assert {one.attributes["title"] for one in page.of("abbr")} >= {
        "distance between the receptive fields of neighbouring units: the product of the strides so far",
        "first pixel of the first unit’s receptive field; negative in the padding",
    }


@pytest.mark.parametrize("variant", ["resnet18", "coatnet_0", "lenet5"])
def test_drawings_are_xml(variant: str) -> None:
    drawings = svgs(render_report(report(variant)))
    assert len(drawings) > 6
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_pages_request_nothing() -> None:
    pages = [resnet18(), Page(render_comparison([report("resnet18")], images_per_second=[9.0]))]
    for page in pages:
        assert not page.of("script")
        links = ("src", "href", "xlink:href")
        targets = [str(value) for one in page.elements for key, value in one.attributes.items() if key in links]
        assert len(targets) > 2
        assert all(target.startswith(("#", "data:")) for target in targets)
        assert not re.search(r"url\(|@import|\son\w+=", page.source)
        assert "default-src 'none'" in page.source


def test_a_hostile_name_is_a_name() -> None:
    tame = report("lenet5")
    layers = [replace(layer, name=HOSTILE, kind=HOSTILE, stage=HOSTILE) for layer in tame.summary.layers]
    summary = replace(tame.summary, layers=layers, unknown=HOSTILE)
    comparison = FieldComparison(HOSTILE, "rows", None, None, 32)
    assert tame.effective is not None
    hostile = replace(
        tame,
        name=HOSTILE,
        summary=summary,
        warnings=[HOSTILE],
        comparisons=[comparison],
        effective=replace(tame.effective, layer=HOSTILE),
        measured_with=HOSTILE,
    )
    for source in (render_report(hostile), render_comparison([hostile, tame], images_per_second=[1.0, 2.0])):
        assert "<script" not in source
        assert "&lt;script&gt;" in source
        page = Page(source)
        assert not page.of("script")
        assert any(one.text == HOSTILE for one in [*page.of("h1"), *page.of("th")])
        drawings = svgs(source)
        assert any("&lt;script&gt;" in drawing for drawing in drawings)
        for drawing in drawings:
            ElementTree.fromstring(drawing)


@pytest.mark.parametrize("variant", ["resnet18", "coatnet_0"])
def test_every_layer_is_in_the_page(variant: str) -> None:
    page, layers = Page(render_report(report(variant))), report(variant).summary.layers
    heads = [one.text for one in page.of("th") if one.attributes.get("scope") == "row"]
    assert len(layers) > 60
    assert _contains(heads, [layer.name for stage in report(variant).summary.stages.values() for layer in stage])
    assert len(page.of("details")) == len(report(variant).stages) + 1


def test_a_page_of_many_layers_is_light() -> None:
    summary = report("coatnet_0").summary
    large = replace(summary, layers=(summary.layers * 4)[:750])
    assert len(large.layers) == 750
    page = render_report(replace(report("coatnet_0"), summary=large, sample_image=sample_image(224)))
    assert len(page.encode()) < 1_000_000


def test_footnotes_are_numbered_and_lead_back() -> None:
    sketches = [stage.sketch for stage in report("resnet18").lifecycle if stage.sketch]
    items = [one for one in resnet18().of("li") if str(one.attributes.get("id", "")).startswith("note")]
    marks = [one.text for one in resnet18().of("sup") if "id" in one.attributes]
    assert len(items) == len(sketches) == 4
    assert marks == ["1", "2", "3", "4"]
    assert [str(sketch.field) in item.text for sketch, item in zip(sketches, items, strict=True)] == [True] * 4


def test_unknown_results_have_no_number() -> None:
    summary = report("resnet18").summary
    layers = [replace(one, rows=ReceptiveField(), columns=ReceptiveField()) for one in summary.layers]
    unknown = replace(summary, unknown="no rule", layers=layers)
    page = Page(render_report(replace(report("resnet18"), summary=unknown, effective=None, comparisons=None)))
    assert page.numbers().keys() == {"parameters", "gmacs", "training-memory"}
    assert "no rule" in page.source
    assert "not measured" in page.source


def test_a_network_without_parameters_has_a_page() -> None:
    empty = TrainingMemory(0, 0, 0, 0)
    relu = Report("relu", summarize(nn.ReLU(), (3, 8, 8)), empty, batch_size=1, precision="32-true")
    assert Page(render_report(relu)).numbers() == {
        "parameters": 0,
        "gmacs": 0,
        "receptive-field": 1,
        "training-memory": 0,
    }
    page = Page(render_comparison([relu], images_per_second=[1.0]))
    assert not page.of_class("chart"), "nothing above 0 to draw on logarithmic axes"


def test_a_sample_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(32, 32, 3\).*\(224, 224\)"):
        render_report(replace(report("resnet18"), sample_image=sample_image(32)))


def test_a_comparison_has_all_networks() -> None:
    names = ["resnet18", "coatnet_0", "mobilenet_v2"]
    page = Page(render_comparison([report(name) for name in names], images_per_second=[20.5, 8.25, 55.0]))
    heads = [one.text for one in page.of("th") if one.attributes.get("scope") == "row"]
    assert heads == names
    numbers = page.numbers()
    assert [numbers[f"parameters-{row}"] for row in (1, 2, 3)] == [11_689_512, 25_036_820, 3_504_872]
    assert [numbers[f"images-per-second-{row}"] for row in (1, 2, 3)] == [20.5, 8.25, 55.0]
    assert "measured with weights of mine.pt, over 4 crops" in page.source
    dots = [one for one in page.of_class("dot") if one.tag == "g"]
    assert [one.text.strip() for one in dots] == ["mobilenet_v2", "resnet18", "coatnet_0"] * 2  # the largest below
    styles = {one.attributes["style"] for one in page.of_class("dot")}
    assert len(page.of_class("dot")) == 9  # two charts and a legend
    assert len(styles) == 3, "the legend shows what the charts show"
    with pytest.raises(ValueError, match="3 reports and 1 speeds"):
        render_comparison([report(name) for name in names], images_per_second=[1.0])


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
    """The output of a headless browser for a page."""
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


def _contains(sequence: Sequence[str], part: Sequence[str]) -> bool:
    """Whether a sequence contains another, item after item."""
    rest: Iterator[str] = iter(sequence)
    return all(item in rest for item in part)
