"""A back end that answers by hashes in place of the model's, and the tiny tasks that it is asked."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny_tasks import HashLM, write_tasks

import convert
from evals.results.journal import Journal


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


class Backend(HashLM):
    """In place of the real one: what it is given can be seen, and it can be told to fail."""

    made: ClassVar[list["Backend"]]
    fails_after: ClassVar[int]
    failure: ClassVar[BaseException]

    def __init__(self, checkpoint: convert.Checkpoint, journal: Journal, **options: Any):
        masks = options["neuron_masks"]
        super().__init__(journal, salt="" if masks is None else str(float(np.concatenate(masks).sum())))
        self.checkpoint, self.options = checkpoint, options
        self.made.append(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: convert.Checkpoint, **options: Any) -> "Backend":
        return cls(checkpoint, **options)

    def _answer(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        if len(self.asked) == self.fails_after:
            raise self.failure
        return super()._answer(kind, arguments)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> type[Backend]:
    class Fresh(Backend):
        made: ClassVar[list[Backend]] = []
        fails_after: ClassVar[int] = -1

    module = ModuleType("evals.harness.backend")
    module.GlupruneLM = Fresh  # type: ignore[attr-defined]
    command = ModuleType("evals.lm_eval_command")
    command.run_lm_eval = len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evals.harness.backend", module)
    monkeypatch.setitem(sys.modules, "evals.lm_eval_command", command)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # what a command sets for its process stays out of the tests
    return Fresh
