"""The day that chat templates write: chosen once, recorded, and the same for everything that goes on from a run."""

import datetime
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from scripted_backend import Backend
from scripted_backend import backend as backend
from scripted_backend import tasks as tasks
from tiny_models import hf_config, write_folder
from transformers.utils import chat_template_utils

import convert
from convert.chat import fix_date, parse_date, render, writes_date
from convert.tokenizer import encode_conversation, encode_prompt, load_tokenizer
from evals import __main__ as evaluate
from evals import compare, sweep
from evals.cli.tables import column_names
from evals.efficiency import __main__
from evals.results.describe import describe_setting
from evals.results.store import load_results
from evals.study.folder import load_study
from gluprune_jax import prune, recover
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.files.records import SEAL
from gluprune_jax.training import recovery

Capture = pytest.CaptureFixture[str]
CONFIG = hf_config(
    vocab_size=VOCABULARY,
    eos_token_id=VOCABULARY - 1,
    intermediate_size=83,
    num_hidden_layers=2,
    max_position_embeddings=128,
)
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
# As Llama 3.2's, and as Llama 3.1's.
CLOCK = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}: " + CHAT
)
FIXED = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}: " + CHAT
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
FIRST, SECOND = datetime.date(2025, 3, 1), datetime.date(2025, 3, 2)


def write_model(folder: Path, template: str | None) -> Path:
    write_tokenizer(write_folder(folder, CONFIG))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dates")
    write_model(folder / "clock", CLOCK)
    write_model(folder / "plain", CHAT)
    chats = ({"messages": [{**TURNS[0], "content": f"hello {i}"}, TURNS[1]]} for i in range(40))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.date], None]:
    """Moves the calendar, ours and that of `transformers`."""

    def move(day: datetime.date) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Any:
                return datetime.datetime(day.year, day.month, day.day, 15, 45)

        monkeypatch.setattr("convert.chat.today", lambda: day)
        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return move


class Tokenizer:
    def __init__(self, template: Any):
        self.chat_template = template


# ------------------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CLOCK, (True, True)),
        ("{{ strftime_now('%H:%M') }}", (True, True)),
        ("{%- generation %}{% if strftime_now is defined %}{% break %}{% endif %}{% endgeneration %}", (True, True)),
        ({"default": CHAT, "dated": CLOCK}, (False, False)),
        (FIXED, (False, True)),
        (CHAT, (False, False)),
        ("{# strftime_now #}{% raw %}{{ strftime_now() }}{% endraw %}{{ 'strftime_now' }}strftime_now", (False, False)),
        ("{% if", (False, False)),
        (None, (False, False)),
    ],
)
def test_which_templates_write_the_date(template: Any, expected: tuple[bool, bool]) -> None:
    assert tuple(writes_date(Tokenizer(template), is_given=given) for given in (False, True)) == expected


def test_a_date_stands_in_for_the_clock_of_transformers(folder: Path, on: Callable[[datetime.date], None]) -> None:
    """What stock `transformers` writes on that day, whatever day it is; but for the hour, which is midnight."""
    tokenizer = load_tokenizer(convert.load(folder / "clock"))
    on(FIRST)
    stock = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert stock.startswith("01 Mar 2025: ")
    on(SECOND)
    assert render(tokenizer, TURNS, add_generation_prompt=False, date=FIRST) == stock
    assert tokenizer.apply_chat_template(TURNS, tokenize=False).startswith("02 Mar 2025: ")  # it has its clock again
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + CHAT
    hour = render(tokenizer, TURNS[:1], add_generation_prompt=False, date=FIRST)
    assert hour == "2025-03-01 00:00:00<|user|>hello"
    tokenizer.chat_template = FIXED
    assert render(tokenizer, TURNS, add_generation_prompt=False).startswith("26 Jul 2024: ")
    stock = tokenizer.apply_chat_template(TURNS, tokenize=False, date_string="01 Mar 2025")
    assert render(tokenizer, TURNS, add_generation_prompt=False, date=FIRST) == stock


def test_which_date_is_taken_and_what_is_said(on: Callable[[datetime.date], None]) -> None:
    on(FIRST)
    said: list[str] = []
    clock, fixed = Tokenizer(CLOCK), Tokenizer(FIXED)
    assert fix_date(clock, None, {}, said.append) == FIRST
    assert fix_date(clock, None, {"run": "2025-01-01"}, said.append) == datetime.date(2025, 1, 1)
    assert fix_date(clock, SECOND, {"run": "2025-01-01"}, said.append) == SECOND
    assert fix_date(fixed, None, {}, said.append) is None
    assert fix_date(fixed, SECOND, {}, said.append) == SECOND
    assert said == [
        "the chat template writes the date: 2025-03-01, today's; runs that resume or build on it keep it",
        "the chat template writes the date: 2025-01-01, as in run; `date` gives another",
        "the chat template writes the date: 2025-03-02, as `date` says",
        "the chat template writes the date: 2025-03-02, as `date` says",
    ]
    with pytest.raises(OperationError, match="run is damaged: its date is 'soon', which is no day"):
        fix_date(clock, None, {"run": "soon"})
    for tokenizer in (None, Tokenizer(CHAT), Tokenizer(None)):
        with pytest.raises(RequestError, match=r"nothing looks at `date` 2025-03-02: .*; leave it out"):
            fix_date(tokenizer, SECOND)
        assert fix_date(tokenizer, None) is None


@pytest.mark.parametrize("text", ["", "2025-02-29", "20250301", "2025-W09-6", "1 March 2025", "2025-03-01 "])
def test_what_is_no_date(text: str, capsys: Capture) -> None:
    with pytest.raises(RequestError, match="give a day as YYYY-MM-DD"):
        parse_date(text)
    status, _, err = commands.run(evaluate.main, capsys, "--model", "x", "--tasks", "y", "--date", text)
    assert status == 2
    assert "--date is " in err
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_next_day_finds_the_answers_of_the_first(
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: Capture,
    backend: type[Backend],
    on: Callable[[datetime.date], None],
) -> None:
    what = ("--model", folder / "clock", "--include-path", tasks, "--tasks", "tiny_words")
    argv = (*what, "--output", tmp_path / "results")
    chat = (*argv, "--apply-chat-template")
    run = functools.partial(commands.run, evaluate.main, capsys)
    on(FIRST)
    assert "2025-03-01, today's" in run(*chat)[2]
    on(SECOND)
    status, out, err = run(*chat, "--json")
    assert status == 0, err
    assert f"the chat template writes the date: 2025-03-01, as in {tmp_path / 'results'}" in err
    assert json.loads(out)["setting"]["decides"]["chat_template"]["date"] == "2025-03-01"
    # The day of `--date` is another setting, and does not take the place of the first run's.
    assert "2024-01-01, as --date says" in run(*chat, "--date", "2024-01-01")[2]
    assert "2025-03-01, as in" in run(*chat)[2]
    assert "nothing looks at --date 2024-01-01" in run(*argv, "--date", "2024-01-01")[2]
    assert run(*argv)[0] == 0
    assert [lm.options["date"] for lm in backend.made] == [FIRST, FIRST, datetime.date(2024, 1, 1), FIRST, None]
    dates = [one.setting.date for one in load_results(tmp_path / "results")]
    assert sorted(date or "" for date in dates) == ["", "2024-01-01", "2025-03-01"]
    names = column_names(load_results(tmp_path / "results"))
    assert sorted(names) == ["clock.float32", "clock.float32 (2024-01-01)", "clock.float32 (2025-03-01)"]


def test_a_template_without_a_date_has_the_setting_that_it_had(
    folder: Path, on: Callable[[datetime.date], None]
) -> None:
    checkpoint = convert.load(folder / "plain")
    setting = describe_setting(checkpoint, load_tokenizer(checkpoint), apply_chat_template=True)
    assert setting.decides["chat_template"].keys() == {"sha256", "multiturn"}
    assert setting.on(None) == setting
    assert setting.on(FIRST).digest != setting.digest


def test_lm_evals_own_command_line_keeps_one_day(folder: Path, on: Callable[[datetime.date], None]) -> None:
    from evals.harness.backend import GlupruneLM

    checkpoint, notes = convert.load(folder / "clock"), list[str]()
    lm = GlupruneLM.from_checkpoint(checkpoint, date=FIRST)
    assert lm.apply_chat_template(TURNS[:1]).startswith("01 Mar 2025: ")
    assert lm.tokenizer_name.endswith("__2025-03-01")  # names the cache of prompts
    assert lm.get_model_info()["chat_template_date"] == "2025-03-01"
    lm = GlupruneLM.from_checkpoint(checkpoint, note=notes.append)
    first = lm.apply_chat_template(TURNS[:1])
    on(FIRST)
    assert lm.apply_chat_template(TURNS[:1]) == first
    assert notes == [f"the chat template writes the date: {datetime.date.today()}, today's; date= gives another"]
    plain = GlupruneLM.from_checkpoint(convert.load(folder / "plain"), date=FIRST)
    assert "2025" not in plain.tokenizer_name + plain.apply_chat_template(TURNS[:1])
    assert plain.get_model_info()["chat_template_date"] is None


def test_a_recovery_goes_on_after_midnight(
    folder: Path, tmp_path: Path, capsys: Capture, on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("--steps", 3, "--sequence-length", 32, "--batch-size", 4, "--checkpoint-every", 1, "--mesh", "data=1")
    argv = (
        "--model",
        folder / "clock",
        "--train-data",
        folder / "chats.jsonl",
        *steps,
        "--output",
        tmp_path / "out",
        "--json",
    )
    run = functools.partial(commands.run, recover.main, capsys)
    true_train = recovery.train

    def killed(*args: Any, on_step: Any, **options: Any) -> None:
        def show(line: Any) -> None:
            if line["step"] == 2:
                raise KeyboardInterrupt

        true_train(*args, on_step=show, **options)

    on(FIRST)
    monkeypatch.setattr("gluprune_jax.cli.recover.train", killed)
    assert run(*argv)[0] == 130
    assert os.listdir(tmp_path / "out.recovery")
    monkeypatch.setattr("gluprune_jax.cli.recover.train", true_train)
    on(SECOND)
    status, _, err = run(*argv, "--date", "2025-03-02")
    assert status == 2
    assert "are of a run with --date '2025-03-01', and this one has '2025-03-02'" in err
    status, out, err = run(*argv)
    assert status == 0, err
    assert "writes the date: 2025-03-01, as in" in err
    report = json.loads(out)
    assert (report["resumed_from"], report["date"]) == (2, "2025-03-01")
    record = convert.load(tmp_path / "out").history[-1]["recovery"]
    assert record["settings"]["--date"] == "2025-03-01"


def test_plans_and_statistics_say_of_which_day_their_text_is(
    folder: Path, tmp_path: Path, capsys: Capture, on: Callable[[datetime.date], None]
) -> None:
    on(FIRST)
    text = ("--calibration-data", folder / "chats.jsonl", "--calibration-tokens", 256, "--sequence-length", 32)
    argv = ("--model", folder / "clock", "--mesh", "data=1", *text)
    made = ("--criterion", "hybrid", "--width", 40, "--plan-out", tmp_path / "plan.json")
    run = functools.partial(commands.run, prune.main, capsys)
    status, _, err = run(*argv, *made, "--statistics-out", tmp_path / "statistics.npz")
    assert status == 0, err
    assert json.loads((tmp_path / "plan.json").read_text())["calibration"]["date"] == "2025-03-01"
    on(SECOND)
    # The statistics are of the text of that day: of another day it would be refused as other text.
    again = ("--criterion", "hybrid", "--width", 40, "--compensate", "least-squares", "--output", tmp_path / "out")
    status, _, err = run(
        *argv, *again, "--statistics", tmp_path / "statistics.npz", "--sample", "hi", "--sample-tokens", 2
    )
    assert status == 0, err
    assert f"the date: 2025-03-01, as in {tmp_path / 'statistics.npz'}" in err
    status, _, err = run(
        *argv, *again, "--statistics", tmp_path / "statistics.npz", "--date", "2025-03-02", "--overwrite"
    )
    assert status == 2
    assert "--statistics are of other text than --calibration" in err
    status, _, err = run(
        *argv,
        "--plan",
        tmp_path / "plan.json",
        "--compensate",
        "least-squares",
        "--output",
        tmp_path / "by-plan",
        "--json",
    )
    assert status == 0, err
    assert f"the date: 2025-03-01, as in {tmp_path / 'plan.json'}" in err


def test_a_comparison_goes_on_with_the_text_of_its_day(
    folder: Path, tmp_path: Path, capsys: Capture, on: Callable[[datetime.date], None]
) -> None:
    text = ("--calibration-data", folder / "chats.jsonl", "--calibration-tokens", 256, "--sequence-length", 32)
    (tmp_path / "text.txt").write_text("The cube of a number. " * 8)
    measured = (
        "--eval-data",
        tmp_path / "text.txt",
        "--sequence-length",
        32,
        "--width",
        40,
        "--output",
        tmp_path / "out",
    )
    argv = ("--model", folder / "clock", "--mesh", "data=1", *text, *measured)
    run = functools.partial(commands.run, compare.main, capsys)
    on(FIRST)
    assert run(*argv, "--methods", "hybrid")[0] == 0
    on(SECOND)
    status, out, err = run(*argv, "--methods", "hybrid,wanda", "--json")
    assert status == 0, err
    assert json.loads(out)["calibration"]["date"] == "2025-03-01"
    assert len(json.loads(out)["rows"]) == 3
    status, _, err = run(*argv, "--methods", "hybrid", "--date", "2025-03-02")
    assert (status, "its calibration differs" in err) == (2, True)


def test_all_rows_of_a_study_are_asked_on_one_day(
    folder: Path, tasks: Path, tmp_path: Path, capsys: Capture, on: Callable[[datetime.date], None]
) -> None:
    what = ("--model", folder / "clock", "--include-path", tasks, "--tasks", "tiny_words", "--limit", 4)
    argv = (*what, "--apply-chat-template", "--mesh", "data=1", "--output", tmp_path / "study")
    run = functools.partial(commands.run, sweep.main, capsys)
    on(FIRST)
    assert run(*argv, "--prune-percent", "20")[0] == 0
    on(SECOND)
    status, _, err = run(*argv, "--prune-percent", "20,40")
    assert status == 0, err
    stored = load_results(tmp_path / "study" / "results")
    assert [one.setting.date for one in stored] == ["2025-03-01"] * 3
    assert json.loads((tmp_path / "study" / "sweep.json").read_text())["date"] == "2025-03-01"
    status, _, err = run(*argv, "--prune-percent", "20", "--date", "2025-03-02")
    assert (status, "its date differs" in err) == (2, True)
    # As it was before: rows whose prompts name different days.
    sweep_file = tmp_path / "study" / "sweep.json"
    study = json.loads(sweep_file.read_text())
    del study[SEAL]
    other = dict(dense := study["rows"][0])
    assert run(*argv[:-1], tmp_path / "other", "--prune-percent", "40", "--date", "2025-03-02")[0] == 0
    other |= json.loads((tmp_path / "other" / "sweep.json").read_text())["rows"][1]
    shutil.copytree(
        tmp_path / "other" / "results" / other["setting"], tmp_path / "study" / "results" / other["setting"]
    )
    sweep_file.write_text(json.dumps(study | {"rows": [dense, other]}))
    with pytest.raises(RequestError, match="were asked different prompts of tiny_words"):
        load_study(tmp_path / "study")


def test_prompts_of_ones_own_are_of_one_day(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("hello\n")
    asked: list[Any] = []
    monkeypatch.setattr(
        "evals.cli.efficiency.measure", lambda model, workload, *_: asked.append(workload.prompts) or {}
    )
    monkeypatch.setattr("evals.cli.efficiency._print", lambda report: None)
    monkeypatch.setattr("evals.cli.efficiency.IDLE_SECONDS", 0.0)
    options = ("--prune-percent", 0, "--batch-sizes", 1, "--mesh", "data=1", "--new-tokens", 5, "--output", tmp_path)
    prompts = ("--prompts", tmp_path / "prompts.txt", "--date", FIRST)
    status, _, err = commands.run(__main__.main, capsys, "--model", folder / "clock", *prompts, *options)
    assert status == 0, err
    tokenizer = load_tokenizer(convert.load(folder / "clock"))
    assert asked == [[encode_prompt(tokenizer, "hello", FIRST)]]
    assert encode_conversation(tokenizer, TURNS, FIRST) != encode_conversation(tokenizer, TURNS, SECOND)
    assert json.loads((tmp_path / "efficiency.json").read_text())["date"] == "2025-03-01"
