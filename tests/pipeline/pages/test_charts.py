"""Charts take the colours of the page, escape names, and show the numbers they are given."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.pages.charts import (
    ConfidenceBins,
    Dot,
    calibration_chart,
    heat_map,
    layer_widths,
    line_over_layers,
    scatter,
    series_style,
)

HOSTILE = '<script>"&$x^2$\x0b'
SIZES, STAGES = [3, None, 8, None], ["stem", "stem", HOSTILE, "head"]
DOTS = [Dot(HOSTILE, 0.3, 3, 50), Dot("large", 8, 300, 9), Dot("free", 0, 1, 9)]


def line() -> str:
    return line_over_layers(SIZES, STAGES, image_side=28, covering=2, first_global=3)


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_charts_are_drawn_in_the_colours_and_the_font_of_the_page() -> None:
    for svg in (line(), scatter(DOTS, x="x", y="y", reference=(28, "image"))):
        assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"muted", "line", "orange"}
        assert not re.search(r"#[0-9a-f]{3}|font-family", svg)
        assert not re.search(r"url\(| id=|<style", svg)  # what could meet the same of another chart


def test_names_in_charts_are_escaped() -> None:
    for svg in (line(), scatter(DOTS, x="x", y="y")):
        assert "<script" not in svg
        assert "&lt;script&gt;" in svg
    assert '&lt;script&gt;"&amp;$x^2$' in texts(line()), "neither markup nor mathematics"


def test_a_calibration_has_a_ring_for_each_bin_with_images() -> None:
    values = np.array([0.2, 0.5, np.nan, 0.9])
    bins = ConfidenceBins(values, values, np.array([3, 3, 0, 3]))
    svg = calibration_chart(bins, with_temperature=bins)
    for colour in ("muted", "blue"):
        assert svg.count(f'style="fill: none; stroke: var(--{colour}); stroke-width: 2') == 3
    assert not re.search(r"<use|url\(| id=", svg)


def test_a_line_over_layers_shows_its_values() -> None:
    labels = texts(line())
    assert {"1", "8", "32", "image 28 px", "8 px", "stem", "head"} <= set(labels)
    assert 'aria-label="Receptive field along 4 layers of an image of 28 px: from 3 to 8 px"' in line()
    unknown = line_over_layers([None], ["stem"], image_side=28, covering=None, first_global=0)
    assert 'aria-label="Receptive field along 1 layers of an image of 28 px"' in unknown


def test_bands_without_room_for_a_name_have_none() -> None:
    stages = [f"stage{number}" for number in range(60)]
    chart = line_over_layers([3] * 60, stages, image_side=28, covering=None, first_global=None)
    assert not any("stage" in text for text in texts(chart))


def test_layers_share_the_width_with_their_stages() -> None:
    widths = layer_widths(["stem", "body", "body", "body"])
    assert widths == pytest.approx([0.25 + 0.125, *[0.25 / 3 + 0.125] * 3])
    assert sum(widths) == pytest.approx(1)


def test_a_scatter_plot_has_a_named_dot_for_each_positive_point() -> None:
    svg = scatter(DOTS, x="cost, G", y="size, M", reference=(28, "image 28 px"))
    names = re.findall(r"<title>([^<]*)</title>", svg)
    assert len(names) == svg.count('class="dot"') == 2
    assert names[1] == "large", "smaller dots are drawn later, on top"
    assert {"cost, G", "size, M", "image 28 px"} <= set(texts(svg))
    assert all(f'style="{series_style(place, 3)}"' in svg for place in (0, 1))


@pytest.mark.parametrize(("low", "high"), [(4.0, 4.0), (4.0, 4.1), (1.0, 5.0), (0.3, 8.0), (0.1, 1e4)])
def test_logarithmic_axes_have_ticks_for_any_range(low: float, high: float) -> None:
    svg = scatter([Dot("a", low, 28, 1), Dot("b", high, 28, 1)], x="x", y="y", reference=(28, "image"))
    ticks = [float(text.replace(",", "")) for text in texts(svg) if re.fullmatch(r"[\d.,]+", text)]
    assert len([tick for tick in ticks if low * 0.6 <= tick <= high * 1.7]) >= 3


def test_heat_is_logarithmic_over_three_decades() -> None:
    energy = np.repeat([[1.0, 0.1, 0.01, 0.001, 1e-5]], 4, axis=0)
    pixels = decode(heat_map(energy, None))
    assert pixels.shape == (4, 5, 3)
    brightness = pixels[0].sum(-1)
    assert np.all(np.diff(brightness[:4]) < -60)
    assert brightness[3] == brightness[4] < 30


def test_cold_pixels_show_the_sample_image() -> None:
    energy = np.full((8, 8), 1e-6)
    energy[:, :4] = 1.0
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[4:] = 200
    pixels = decode(heat_map(energy, image))
    assert np.ptp(pixels[:, 4:], axis=-1).max() <= 1, "grey where the energy is low"
    assert pixels[7, 7, 0] - pixels[0, 7, 0] == pytest.approx(90, abs=2)
    assert np.all(pixels[0, :4] == pixels[7, :4]), "opaque where it is high"


def test_a_large_heat_map_is_scaled_down() -> None:
    assert decode(heat_map(np.ones((500, 400)), None)).shape == (336, 269, 3)


def decode(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=int)
