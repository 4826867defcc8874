"""What long work tells its caller while it runs: the library takes such functions, and only commands draw bars."""

import contextlib
from collections.abc import Callable
from typing import Protocol


class Report(Protocol):
    """Is told how much is done."""

    def __call__(self, done: int, /, *, at_most: int | None = None, state: str = "") -> None:
        """Takes what is done so far.

        Args:
          done: how much, in the unit of the work.
          at_most: how much there is in all, where that is only bounded: a bound may fall while the work goes on.
          state: what else there is to say, such as "7/10 answers".
        """


# `progress(what, total, unit)` opens a block of countable work, and gives what is to be called with how much is done.
Progress = Callable[[str, int, str], contextlib.AbstractContextManager[Report]]


def no_progress(what: str, total: int, unit: str) -> contextlib.AbstractContextManager[Report]:
    """Says nothing."""

    def report(done: int, /, *, at_most: int | None = None, state: str = "") -> None:
        pass

    return contextlib.nullcontext(report)
