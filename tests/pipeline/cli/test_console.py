"""Lines in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.cli.console import print_line


@pytest.mark.parametrize("text", ["runs/a:x:b", "[bold]a[/bold] [1, 2]", "C:warning:" + "long " * 60])
def test_a_line_is_printed_as_it_is(text: str) -> None:
    stream = io.StringIO()
    print_line(Console(file=stream, width=40, force_terminal=True), text)
    assert stream.getvalue() == text + "\n"
