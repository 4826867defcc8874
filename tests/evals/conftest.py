"""What all tests of the evaluations share."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _lm_evals_tasks_are_parsed_once() -> Iterator[None]:
    """The thousands of files of lm-eval's own tasks, which no test changes: 6 s whenever the whole index is built."""
    try:
        from lm_eval.tasks import _index as index
    except ImportError:
        yield
        return
    parse, root, parsed = index.load_yaml, Path(index.__file__).parent, dict[Any, bytes]()

    def load_yaml(path: Path, **options: Any) -> Any:
        if root not in Path(path).parents:
            return parse(path, **options)
        key = path, *sorted(options.items())
        if key not in parsed:
            parsed[key] = pickle.dumps(parse(path, **options))
        return pickle.loads(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "load_yaml", load_yaml)
        yield
