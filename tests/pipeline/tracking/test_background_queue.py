"""The queue in front of a dashboard: in order, bounded, and never in the way."""

from __future__ import annotations

import threading

from pipeline.tracking.background_queue import BackgroundQueue


def test_failures_are_counted_and_the_rest_arrives() -> None:
    queue, arrived = BackgroundQueue(OSError), []

    def refused() -> None:
        raise OSError("the disk is full\nand more")

    for task in (lambda: arrived.append(1), refused, lambda: arrived.append(2)):
        queue.put(task)
    assert queue.finish(10) == "the dashboard lacks 1 messages: the disk is full"
    assert arrived == [1, 2]


def test_a_slow_server_holds_up_nobody() -> None:
    queue, answer = BackgroundQueue(OSError), threading.Event()
    for _ in range(3):
        queue.put(answer.wait)
    missing = queue.finish(0.1)  # returns although the server has not answered
    assert missing is not None
    assert missing.endswith("the server is too slow")
    answer.set()
