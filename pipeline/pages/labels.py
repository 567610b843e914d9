"""Where names go beside the points of a figure: they meet nothing, whether the figure is shown narrow or wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LETTER, LINE = 7.2, 15  # px: the width of a letter, generously, and the height of a line
WIDTHS = (270, 415, 560)  # px: of a figure on a telephone, on a desk, and between
ROUNDS = 4
WORSE = 5  # times as bad as to cover a circle is to meet a name or to leave the figure


class Circle(NamedTuple):
    """A point: across as a share of the figure's width, down and its radius in px."""

    across: float
    down: float
    radius: float


class Box(NamedTuple):
    """What something covers, in px."""

    left: float
    top: float
    right: float
    bottom: float

    def area(self) -> float:
        """In square px, 0 where an edge has passed the opposite one."""
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        corner = max(self.left, other.left), max(self.top, other.top)
        return Box(*corner, min(self.right, other.right), min(self.bottom, other.bottom)).area()


class Label(NamedTuple):
    """A name that begins (`anchor` is start), has its middle or ends so many px from the middle of its circle."""

    name: str
    circle: Circle
    dx: float
    dy: float
    anchor: str

    @property
    def away(self) -> float:
        """Pixels between the name and the middle of its circle."""
        return math.hypot(self.dx, self.dy)

    def box(self, width: float) -> Box:
        """What the name covers in a figure of this width."""
        length = LETTER * len(self.name)
        left = self.circle.across * width + self.dx - length * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        bottom = self.circle.down + self.dy + 4
        return Box(left, bottom - LINE, left + length, bottom)

    def leader(self, width: float) -> list[Box]:
        """Dots on the line from the circle to the name."""
        x, y = self.circle.across * width, self.circle.down
        dots = [(x + part * self.dx, y + part * self.dy) for part in (0.2, 0.4, 0.6, 0.8, 1.0)]
        return [Box(across - 3, down - 3, across + 3, down + 3) for across, down in dots]


def place_labels(
    names: Sequence[str], circles: Sequence[Circle], *, height: float, taken: Sequence[Box] = ()
) -> list[Label]:
    """The names beside their circles in a figure of this height; `taken` is covered by something else.

    One after the other takes the place that costs least as the others lie, a few times over.
    """
    labels = [_places(name, circle)[0] for name, circle in zip(names, circles, strict=True)]
    for _ in range(ROUNDS):
        before = list(labels)
        for own, label in enumerate(labels):
            costs = dict.fromkeys(_places(label.name, label.circle), 0.0)
            for width in WIDTHS:
                others = [other.box(width) for other in labels[:own] + labels[own + 1 :]]
                covered = [*taken, *(_disc(circle, width) for circle in circles)]
                for place in costs:
                    costs[place] += _cost(place, others, covered=covered, width=width, height=height)
            labels[own] = min(costs, key=costs.__getitem__)
        if labels == before:
            break
    return labels


def _cost(label: Label, others: Sequence[Box], *, covered: Sequence[Box], width: float, height: float) -> float:
    """What speaks against a place in a figure of this size, in square px."""
    box, frame = label.box(width), Box(-20, 0, width + 12, height - 4)
    worst = sum(map(box.shared, others)) + box.area() - box.shared(frame)
    crossed = sum(dot.shared(other) for dot in label.leader(width) for other in others)
    return WORSE * worst + crossed + sum(map(box.shared, covered)) + label.away / 50


def _places(name: str, circle: Circle) -> list[Label]:
    found = []
    for beside in (5, 16, 30, 46, 64, 84):
        reach = circle.radius + beside
        slant = 0.75 * reach
        found += [Label(name, circle, reach, 4, "start"), Label(name, circle, -reach, 4, "end")]
        found += [Label(name, circle, 0, -reach, "middle"), Label(name, circle, 0, reach + 9, "middle")]
        found += [Label(name, circle, slant, dy, "start") for dy in (-slant, slant + 9)]
        found += [Label(name, circle, -slant, dy, "end") for dy in (-slant, slant + 9)]
    return found


def _disc(circle: Circle, width: float) -> Box:
    x, reach = circle.across * width, circle.radius + 1
    return Box(x - reach, circle.down - reach, x + reach, circle.down + reach)
