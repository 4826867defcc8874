"""Calibration text that a model writes itself, where there is no other (arXiv 2512.02185).

Every window of W tokens is a text of its own, sampled from the model's distribution (`TEMPERATURE`, no tokens left out)
by the one decode loop. Models without a chat template go on from a token of the vocabulary, drawn uniformly and another
one for each window (as LLM-QAT does, arXiv 2305.17888); of those with one, half of the windows are conversations
instead: the model writes the user's turn, up to its end or `QUESTION_TOKENS`, then the template opens the answer, and
the model goes on to the end of the window, whatever turns that takes.

What was written is kept in the user's cache folder, by the weights and everything else that it depends on, so that
another method or size does not write it again. The tokens depend on the seed and on the logits alone: they are the same
however many are written at once, and differ between meshes or devices only where rounding decides a draw.
"""

import contextlib
import datetime
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from convert.chat import render, template_of
from convert.checkpoint import Checkpoint
from convert.pypi import cache_folder
from convert.tokenizer import beginning, check_ids, encode_text, end_of_sequence_ids
from gluprune_jax.data.packing import PADDING
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.files.atomic import write_file_atomic
from gluprune_jax.inference.generation import generate
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import checksum
from gluprune_jax.progress import Progress, no_progress
from gluprune_jax.pruning.scores import fingerprint
from gluprune_jax.pruning.statistics import OWN_TEXT_TEMPERATURE as TEMPERATURE

# The user's turn is cut there, or at a quarter of a window, so that the answer has most of it.
QUESTION_TOKENS = 96
# A window is degenerate if one token is more of it than this.
_MOST_OF_ONE = 0.8
_SLOTS = 32  # texts written at the same time
_VERSION = 1  # of what is written: another one for other tokens from the same weights and seed
# Stands for the user's message while it is found where the template puts that.
_MESSAGE = "<message of the user>"


def own_windows(
    checkpoint: Checkpoint,
    tokenizer: Any,
    count: int,
    *,
    sequence_length: int,
    seed: int = 0,
    date: datetime.date | None = None,
    progress: Progress = no_progress,
) -> NDArray[np.int32]:
    """Windows `[count, sequence_length]` int32 of token ids that the model writes: first texts, then conversations.

    Where W is the whole context of the model, those with a shorter beginning are filled up with `packing.PADDING`.
    Degenerate ones, of an end token or any other over and over, are left out.

    Args:
      checkpoint: the dense model.
      tokenizer: of the model.
      count: how many windows.
      sequence_length: W, the tokens of a window.
      seed: of the first tokens and of the draws.
      date: see `convert.chat.render`.
      progress: is told what is being done.

    Raises:
      RequestError: a seed or a window that the model cannot have; tokens of the chat template outside its vocabulary.
      OperationError: more than half of the windows are degenerate, naming the token; logits that are not finite.
    """
    if not 0 <= seed < 1 << 32:
        raise RequestError(f"the seed of the model's own text is {seed}; it must be at least 0 and below {1 << 32}")
    model, begin = checkpoint.runnable_model(), beginning(checkpoint, tokenizer)
    chats = 0 if template_of(tokenizer) is None else count // 2
    turns = _turns(tokenizer, date) if chats else ([], [])
    try:
        check_ids(tokenizer, [*turns[0], *turns[1]], checkpoint.config.vocab_size)
    except RequestError as error:
        raise RequestError(f"the chat template of {checkpoint.source}: {error}") from error
    longest_turn = min(QUESTION_TOKENS, sequence_length // 4)
    if chats and (least := len(turns[0]) + longest_turn + len(turns[1])) >= sequence_length:
        raise RequestError(
            f"windows of {sequence_length} tokens (`sequence_length`) have no room for a conversation, whose beginning "
            f"takes up to {least}; give a larger window, or other text than the model's own"
        )
    ends = {*end_of_sequence_ids(checkpoint), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    special = {*tokenizer.all_special_ids, *ends}
    known = min(len(tokenizer), checkpoint.config.vocab_size)
    ordinary = [token for token in range(known) if token not in special]
    drawn = np.random.default_rng(seed).choice(ordinary, count - chats)
    starts = [[*([] if begin is None else [begin]), int(token)] for token in drawn]
    end_of_turn = sorted(ends | ({turns[1][0]} & special if turns[1] else set()))

    def write() -> NDArray[np.int32]:
        with progress("writing calibration text", count * sequence_length, "tokens") as report:
            prompts = [*starts, *_questions(model, turns, chats, longest_turn, end_of_turn, seed)]
            lengths = [len(prompt) for prompt in prompts]
            most = min(sequence_length - min(lengths), checkpoint.config.context_length - max(lengths))
            written = generate(
                model,
                prompts,
                max_new_tokens=most,
                temperature=TEMPERATURE,
                seed=seed,
                slots=_SLOTS,
                on_tokens=report,
            )
        windows = np.full((count, sequence_length), PADDING, np.int32)
        for window, prompt, text in zip(windows, prompts, written, strict=True):
            tokens = [*prompt, *text][:sequence_length]
            window[: len(tokens)] = tokens
        return windows

    about = [_VERSION, fingerprint(model), checksum(model, mlps=False), str(model.embed_tokens[...].dtype), starts]
    windows = _kept([*about, turns, chats, end_of_turn, sequence_length, seed, TEMPERATURE, longest_turn], write)
    return _sensible(windows, tokenizer)


def _turns(tokenizer: Any, date: datetime.date | None) -> tuple[list[int], list[int]]:
    """What the chat template writes before the user's message, and from there to where the answer begins."""
    text = render(tokenizer, [{"role": "user", "content": _MESSAGE}], add_generation_prompt=True, date=date)
    before, found, behind = text.partition(_MESSAGE)
    if not (found and before):
        raise RequestError(
            "the chat template does not say where a user's message begins, so the model cannot write one; give other "
            "text than its own"
        )
    return encode_text(tokenizer, before), encode_text(tokenizer, behind)


def _questions(
    model: Decoder, turns: tuple[list[int], list[int]], count: int, most_tokens: int, ends: Sequence[int], seed: int
) -> list[list[int]]:
    """Conversations up to where their first answer begins."""
    before, behind = turns
    # Another seed than that of what follows: a draw depends on it, on the number of the text and on the position.
    seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    questions = generate(
        model,
        [before] * count,
        max_new_tokens=most_tokens,
        eos_ids=ends,
        temperature=TEMPERATURE,
        seed=seed,
        slots=_SLOTS,
    )
    return [[*before, *question, *behind] for question in questions]


def _kept(about: list[Any], write: Callable[[], NDArray[np.int32]]) -> NDArray[np.int32]:
    """What was written before, or is now. Several processes write it together, and look at no files."""
    if jax.process_count() > 1:
        return write()
    path = cache_folder() / "own-text" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            windows: NDArray[np.int32] = arrays["windows"]
            if hashlib.sha256(windows.tobytes()).digest() == arrays["sha256"].tobytes():
                return windows
    except Exception:  # there mostly is none yet; and whatever numpy says of files that are damaged
        pass
    windows = write()
    buffer = io.BytesIO()
    np.savez(buffer, windows=windows, sha256=np.frombuffer(hashlib.sha256(windows.tobytes()).digest(), np.uint8))
    with contextlib.suppress(GlupruneError):  # nothing is lost but time
        write_file_atomic(path, buffer.getvalue(), overwrite=True)
    return windows


def _sensible(windows: NDArray[np.int32], tokenizer: Any) -> NDArray[np.int32]:
    """The windows without degenerate ones.

    Raises:
      OperationError: more than half of them are.
    """
    commonest = [int(np.bincount(window[window >= 0]).argmax()) for window in windows]
    shares = [float((window == token).mean()) for window, token in zip(windows, commonest, strict=True)]
    is_bad = np.array(shares) > _MOST_OF_ONE
    if is_bad.mean() > 0.5:
        worst = commonest[int(np.argmax(shares))]
        raise OperationError(
            f"{is_bad.sum()} of {len(windows)} texts that the model writes are degenerate, with "
            f"{tokenizer.convert_ids_to_tokens(worst)!r} (id {worst}) over and over: such a model cannot be calibrated "
            f"on its own text; check the weights, or give other text"
        )
    return windows[~is_bad]
