"""Chat templates: which of a tokenizer's templates is meant, on which day, and a conversation written in it.

A tokenizer has no template, one, or several with names, of which `transformers` applies the one called "default". This
is the only place where a template is applied.

Some templates, such as Llama 3.2's, write today's date, which they have of a function `strftime_now` that
`transformers` gives them. Prompts must not change from day to day, so a run reads the calendar once: with `date` the
clock of every template stands at the midnight that this day begins with.
"""

import contextlib
import datetime
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gluprune_jax.errors import OperationError, RequestError, shortened
from gluprune_jax.parallel.distributed import broadcast_from_main, synchronize_errors

_MAX_NAMES = 8  # in an error


class TemplateError(OperationError):
    """A template that cannot write a conversation."""


class RefusedError(TemplateError):
    """A template that says itself that it does not write such a conversation."""


def today() -> datetime.date:
    """The day at this machine."""
    return datetime.date.today()


def parse_date(text: str) -> datetime.date:
    """A day as YYYY-MM-DD.

    Raises:
      RequestError: it is none.
    """
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise RequestError(f"the date is {shortened(text)}; give a day as YYYY-MM-DD, such as 2024-07-26") from None


def writes_date(tokenizer: Any, *, is_given: bool = False) -> bool:
    """Whether the chat template of a tokenizer may write the date of the day.

    Args:
      tokenizer: of `transformers`.
      is_given: whether somebody says what day it is: some templates look at `date_string`, and have a fixed day where
        there is none.

    Raises:
      RequestError: there are several templates and none of them is called "default".
    """
    return bool(_names_in(template_of(tokenizer)) & {"strftime_now", *(("date_string",) if is_given else ())})


def fix_date(
    tokenizer: Any | None,
    given: datetime.date | None,
    recorded: Mapping[str, str] | None = None,
    note: Callable[[str], None] | None = None,
) -> datetime.date | None:
    """The day on which chat templates are rendered; None where none writes it. All processes must call it.

    Args:
      tokenizer: of `transformers`; None if no chat template is applied.
      given: what the user says.
      recorded: the day of the run that this one builds on, as YYYY-MM-DD, by where it stands. Of several processes
        only the first one's is looked at.
      note: called with a sentence that names the day.

    Raises:
      RequestError: there are several templates and none of them is called "default", or a day is given and none of
        them writes it.
      OperationError: what is recorded is no day.
    """
    say = note or (lambda _: None)
    if tokenizer is None or not writes_date(tokenizer, is_given=given is not None):
        if given is not None:
            raise RequestError(
                f"nothing looks at `date` {given}: no chat template that writes a date is applied; leave it out"
            )
        return None
    with synchronize_errors():
        where, known = next(iter((recorded or {}).items()), ("", None))
        if given is not None:
            day, why = given, "as `date` says"
        elif known is None:
            day, why = today(), "today's; runs that resume or build on it keep it"
        else:
            day, why = _recorded_day(known, where), f"as in {where}; `date` gives another"
    text, why = broadcast_from_main(f"{day} {why}".encode()).decode().split(" ", 1)
    say(f"the chat template writes the date: {text}, {why}")
    return parse_date(text)


def _recorded_day(text: str, where: str) -> datetime.date:
    try:
        return parse_date(text)
    except RequestError as error:
        raise OperationError(f"{where} is damaged: its date is {shortened(text)}, which is no day") from error


def choose_template(tokenizer: Any, name: str, source: str) -> None:
    """Makes the template of that name the tokenizer's only one. A template without a name is called "default".

    Args:
      tokenizer: of `transformers`; it is changed.
      name: what the user asks for.
      source: what the model is called.

    Raises:
      RequestError: the tokenizer has no such template.
    """
    templates = _by_name(tokenizer)
    if name not in templates:
        there = f"its templates are {_names(templates)}" if templates else "it has no chat template"
        raise RequestError(
            f"the chat template {shortened(name)} is asked for, which the tokenizer of {source} has not: {there}"
        )
    tokenizer.chat_template = templates[name]


_THINKING = ("enable_thinking", "thinking")  # what templates call the switch of their reasoning mode


def choose_thinking(tokenizer: Any, mode: str, source: str) -> None:
    """Switches the reasoning mode of the tokenizer's chat template "on" or "off", which is its only one afterwards.

    The switch becomes a part of the template, so that whatever identifies the template tells the modes apart.

    Args:
      tokenizer: of `transformers`; it is changed.
      mode: "on" or "off".
      source: what the model is called.

    Raises:
      RequestError: there is no template, or one without such a mode.
    """
    template = template_of(tokenizer)
    names = [name for name in _THINKING if name in _names_in(template)]
    if template is None or not names:
        what = "has no chat template" if template is None else "has a chat template without a reasoning mode"
        raise RequestError(f"`thinking` is {mode}, and the tokenizer of {source} {what}; leave it out")
    switch = "".join(f"{{% set {name} = {'true' if mode == 'on' else 'false'} %}}" for name in names)
    tokenizer.chat_template = switch + template


def template_of(tokenizer: Any) -> str | None:
    """The template that is applied, or None if the tokenizer has none.

    Raises:
      RequestError: there are several and none of them is called "default".
    """
    templates = _by_name(tokenizer)
    if not templates:
        return None
    if "default" not in templates:
        raise RequestError(
            f"the tokenizer has the chat templates {_names(templates)}, and none is called 'default'; choose one "
            f"with `chat_template` NAME"
        )
    return templates["default"]


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    date: datetime.date | None = None,
) -> str:
    """A conversation as text, in the tokenizer's chat template.

    Args:
      tokenizer: of `transformers`, with a chat template.
      messages: the turns, each with "role" and "content".
      add_generation_prompt: whether the text ends where the answer begins.
      continue_final_message: whether the last turn is left open.
      date: the day that the template takes for today; None leaves it the clock.

    Raises:
      RequestError: there are several templates and none of them is called "default".
      TemplateError: the template fails, or refuses the conversation.
    """
    template = template_of(tokenizer)
    names = _names_in(template) if date is not None else frozenset()
    # What a template with no clock of its own is given, in the spelling of the Llama 3.1 that has one.
    known = {"date_string": f"{date:%d %b %Y}"} if "date_string" in names and "strftime_now" not in names else {}
    try:
        with _clock_at(date) if "strftime_now" in names else contextlib.nullcontext():
            text: str = tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **known,
            )
    except Exception as error:  # a template is a program
        import jinja2

        # What `raise_exception` raises in a template; those that come of mistakes in it are of classes below.
        kind = RefusedError if type(error) is jinja2.TemplateError else TemplateError
        raise kind(f"the chat template of the tokenizer fails: {first_line(error)[:300]}") from error
    return text


def first_line(error: BaseException) -> str:
    """What an exception of another library says, as far as a sentence can hold it."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


@functools.lru_cache
def _names_in(template: str | None) -> frozenset[str]:
    """Every name of a template's program; none where it is no program."""
    import jinja2

    try:
        tokens = list(jinja2.Environment().lex(template or ""))
    except jinja2.TemplateSyntaxError:  # which rendering it will say
        return frozenset()
    return frozenset(value for _, kind, value in tokens if kind == "name")


@contextlib.contextmanager
def _clock_at(date: datetime.date | None) -> Iterator[None]:
    """`transformers` with another clock for templates.

    Versions 4 let a template variable take the place of `strftime_now`; 5.24 makes a string of every function that it
    is given. What both read is this name of their module.
    """
    from transformers.utils import chat_template_utils

    assert date is not None
    midnight = datetime.datetime(date.year, date.month, date.day)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return midnight if tz is None else midnight.replace(tzinfo=tz)

    true_clock = chat_template_utils.datetime
    chat_template_utils.datetime = Clock
    try:
        yield
    finally:
        chat_template_utils.datetime = true_clock


def _by_name(tokenizer: Any) -> Mapping[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    return template if isinstance(template, Mapping) else {"default": template}


def _names(templates: Mapping[str, str]) -> str:
    names = sorted(templates)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(shortened(name) for name in names[:_MAX_NAMES]) + more
