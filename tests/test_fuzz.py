"""A sample of `benchmarks/fuzz_files.py`: no damage ends uncleanly, and none is taken for something else."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import fuzz_files


@pytest.mark.parametrize("kind", fuzz_files.SUBJECTS)
def test_damaged_files_are_refused_in_one_line_or_read_as_what_they_were(kind: str, tmp_path: Path) -> None:
    bad = []

    def report(*mutation: str) -> None:
        if mutation[2] in ("unclean", "wrong"):
            bad.append(mutation)

    counted = fuzz_files.fuzz({kind: 60}, 1, tmp_path, report)[kind]
    assert bad == []
    assert counted.total() == 60
    assert counted["refused"] > 20  # the reader looks at what is damaged


def test_the_fuzz_tells_what_is_bad() -> None:
    before = fuzz_files.Contents("weights", "config")

    def outcome(found: object) -> str:
        def read() -> fuzz_files.Contents:
            if isinstance(found, Exception):
                raise found
            if isinstance(found, str):
                print(found)
                return before
            assert isinstance(found, fuzz_files.Contents)
            return found

        return fuzz_files.outcome_of(read, before)[0]

    assert outcome(before) == "same"
    assert outcome(fuzz_files.Contents("others", "config")) == "wrong"
    assert outcome(fuzz_files.Contents("others", "another")) == "as written"
    assert outcome(KeyError("x")) == "unclean"
    assert outcome("a line") == "unclean"
    assert outcome(fuzz_files.GlupruneError("one line")) == "refused"
    long = fuzz_files.GlupruneError("")
    long.args = ("two\nlines",)
    assert outcome(long) == "unclean"
