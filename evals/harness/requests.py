"""What lm-eval asks, on its way to answers: each once, and not what was answered before."""

import json
from collections.abc import Hashable, Iterable
from typing import Any

from evals.results.journal import Journal, Response


class Requests:
    """Requests of one kind on their way to answers.

    Attributes:
      open: the arguments of those that must be answered, each only once.
      recorded: how many of them have been.
      truncated: how many of their contexts were cut.
    """

    def __init__(self, kind: str, arguments: Iterable[tuple[Any, ...]], journal: Journal | None, hook: Any) -> None:
        self._kind, self._journal, self._hook = kind, journal, hook
        self._keys: list[Hashable] = []
        self._responses: dict[Hashable, Response] = {}
        self._open_keys: list[Hashable] = []
        self.open: list[tuple[Any, ...]] = []
        self.recorded = self.truncated = 0
        met: set[Hashable] = set()
        for number, request in enumerate(arguments):
            # A request that is sampled may be repeated, and shall be answered differently each time.
            key = (_key(request), number) if _is_sampled(kind, request) else _key(request)
            self._keys.append(key)
            if key in met:
                continue
            met.add(key)
            known = journal.get(kind, request) if journal and not _is_sampled(kind, request) else None
            if known is None:
                self.open.append(request)
                self._open_keys.append(key)
            else:
                self._responses[key] = known

    def record(self, number: int, response: Response, *, truncated: bool = False) -> None:
        """Takes the answer to one of `open`, and passes it on to the journal and to lm-eval's cache."""
        request = self.open[number]
        self._responses[self._open_keys[number]] = response
        self.recorded += 1
        self.truncated += truncated
        if not _is_sampled(self._kind, request):
            if self._journal:
                self._journal.add(self._kind, request, response, truncated=truncated)
            self._hook.add_partial(self._kind, request, response)

    def responses(self) -> list[Any]:
        """The answer to every request, in the order they came."""
        return [self._responses[key] for key in self._keys]


def _key(arguments: tuple[Any, ...]) -> Hashable:
    if all(isinstance(argument, str) for argument in arguments):
        return arguments
    return json.dumps(arguments, sort_keys=True, default=repr)


def _is_sampled(kind: str, arguments: tuple[Any, ...]) -> bool:
    if kind != "generate_until":
        return False
    wish = arguments[1].get("do_sample")
    return bool(arguments[1].get("temperature") if wish is None else wish)
