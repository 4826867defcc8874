"""The log names what is compiled within its blocks, and nothing else."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from evals.compile_log import CompileLog, Program


def fresh(name: str) -> Callable[[Any], Any]:
    """A jitted function of this name that has not been compiled for anything."""

    def function(x: Any) -> Any:
        return x * 2 + 1

    function.__name__ = name
    return jax.jit(function)


def names(log: CompileLog) -> list[str]:
    return [program.name for program in log.programs]


def test_what_is_compiled_in_a_block_is_named() -> None:
    log, one, other = CompileLog(), fresh("one"), fresh("other")
    with log.naming("three numbers"):
        one(np.ones(3))
        one(np.zeros(3))
        other(np.ones(3))
    with log.naming("four numbers"):
        one(np.ones(4))
    assert [program[:2] for program in log.programs] == [
        ("one", "three numbers"),
        ("other", "three numbers"),
        ("one", "four numbers"),
    ]
    assert all(isinstance(program, Program) for program in log.programs)
    assert all(0 < program.compile_seconds < 60 for program in log.programs)


def test_what_is_compiled_outside_or_was_compiled_before_is_not_logged() -> None:
    log, before, after = CompileLog(), fresh("before"), fresh("after")
    before(np.ones(3))
    with log.naming("here"):
        before(np.ones(3))
    after(np.ones(3))
    assert log.programs == []


def test_a_jitted_function_within_another_is_no_program_of_its_own() -> None:
    log, inner = CompileLog(), fresh("inner")
    outer = jax.jit(lambda x: inner(x) + inner(x + 1))
    with log.naming("here"):
        outer(np.ones(3))
    assert names(log) == ["<lambda>"]


def test_tracing_counts_but_is_no_program() -> None:
    log = CompileLog()

    def slow_to_trace(x: Any) -> Any:
        time.sleep(0.3)
        return x + 1

    with log.naming("here"):
        jax.jit(slow_to_trace)(np.ones(3))
        jax.jit(slow_to_trace).lower(np.ones(5))
    assert names(log) == ["slow_to_trace"]
    assert log.programs[0].compile_seconds >= 0.3


def test_blocks_nest() -> None:
    """The innermost log is told, and afterwards the outer one again."""
    outer, inner = CompileLog(), CompileLog()
    with outer.naming("outer"):
        fresh("first")(np.ones(3))
        with inner.naming("inner"):
            fresh("second")(np.ones(3))
            with outer.naming("innermost"):
                fresh("third")(np.ones(3))
        fresh("fourth")(np.ones(3))
    assert [program[:2] for program in outer.programs] == [
        ("first", "outer"),
        ("third", "innermost"),
        ("fourth", "outer"),
    ]
    assert [program[:2] for program in inner.programs] == [("second", "inner")]


def test_an_exception_ends_a_block() -> None:
    log = CompileLog()
    with pytest.raises(KeyError), log.naming("here"):
        raise KeyError
    fresh("after")(np.ones(3))
    assert log.programs == []


def test_what_another_thread_compiles_is_not_logged() -> None:
    log, others = CompileLog(), CompileLog()

    def work() -> None:
        fresh("unlogged")(np.ones(3))
        with others.naming("there"):
            fresh("theirs")(np.ones(3))

    with log.naming("here"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        fresh("ours")(np.ones(3))
    assert names(log) == ["ours"]
    assert names(others) == ["theirs"]


def test_programs_from_the_persistent_cache_are_logged_too(tmp_path: Path) -> None:
    """Else a second process would seem to run what it never compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    log, files = CompileLog(), list[set[str]]()
    compilation_cache.reset_cache()
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        for shapes in ("compiled", "fetched"):
            with log.naming(shapes):
                fresh("kept")(np.ones(3))
            files.append({file.name for file in tmp_path.glob("*kept*-cache")})
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert len(files[0]) == 1
    assert files[0] == files[1]
    assert [program[:2] for program in log.programs] == [("kept", "compiled"), ("kept", "fetched")]
