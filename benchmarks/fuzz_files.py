"""Damages every kind of file that is read, and counts what readers make of it.

    python benchmarks/fuzz_files.py [--count 3000] [--seed 0] [--kind orbax] [--show]

Each mutation damages one file of a small valid input, which is then read in this process. It must be refused with a
`RequestError` or an `OperationError` of one line and at most 500 characters, or read as what it was. The script ends
with status 1 if a reader ended otherwise, warned or printed ("unclean"), or gave other contents ("wrong").

What a format cannot tell from other valid contents is not mutated: the bytes of tensors in safetensors and GGUF, which
have no checksums. Where `config.json`, GGUF metadata or the files beside an Orbax checkpoint say, as valid files, that
the model is another one (a `rope_theta` with another digit), reading them as they are written is right, and counted as
"as written". Of our own files every byte counts.

Needs the `gguf` package for the inputs of that kind, and safetensors.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import convert
from convert.checkpoint import Checkpoint
from convert.families.names import tensor_names
from convert.families.registry import FAMILIES
from convert.tokenizer import end_of_sequence_ids
from evals.harness.decoding import changes_to_greedy
from evals.results.setting import Setting
from evals.results.store import Result, load_items, load_results, open_setting
from gluprune_jax.errors import MAX_LINE, GlupruneError
from gluprune_jax.models.config import LayerAttention, ModelConfig, Rope
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.pruning.plan import PruningPlan, make_plan
from gluprune_jax.pruning.scores import Scores
from gluprune_jax.pruning.statistics import LayerStatistics, Statistics

THETA = 10000.0
CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_sizes=(12, 12),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    attention=(LayerAttention(Rope(THETA)),) * 2,
)
NAMES = tensor_names(CONFIG, FAMILIES["llama"])
OUTCOMES = ("refused", "same", "as written", "unclean", "wrong")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What was read.

    Attributes:
      weights: everything that a reader must not get wrong, as a digest.
      config: what a foreign file is free to say, as a digest; with another one, other weights may be right.
    """

    weights: str
    config: str = ""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of input.

    Attributes:
      write: makes a valid one in an empty folder.
      read: what a folder of it holds.
      spans: for a file, the bytes of it that may be damaged; all by default.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Contents]
    spans: Callable[[Path], int] = lambda file: file.stat().st_size


# ------------------------------------------------------------------------------------------------------ inputs


def tensors() -> dict[str, NDArray[np.float32]]:
    """Random weights by Hugging Face name, in the shapes of its files."""
    random_numbers = np.random.default_rng(0)
    return {name.hf: random_numbers.standard_normal(name.shape).astype(np.float32) for name in NAMES}


def write_hf(folder: Path, shards: int = 1) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_sizes[0],
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "head_dim": CONFIG.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "do_sample": False}))
    (folder / "gluprune_history.json").write_text(json.dumps([{"base_model": "x", "criterion": "ppm"}]))
    all_tensors = tensors()
    if shards == 1:
        save_file(all_tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard, names in enumerate(np.array_split(sorted(all_tensors), shards), start=1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        save_file({name: all_tensors[name] for name in names.tolist()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names.tolist(), file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in all_tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_sizes[0])
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_key_length(CONFIG.head_dim)
    writer.add_value_length(CONFIG.head_dim)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_rope_freq_base(THETA)
    writer.add_vocab_size(CONFIG.vocab_size)
    values = tensors()
    for name in NAMES:
        writer.add_tensor(name.gguf, values[name.hf])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_orbax(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_hf(Path(name))
        convert.save(convert.load(name), folder / "model", formats=("orbax",))


def write_plan(folder: Path) -> None:
    random_numbers = np.random.default_rng(0)
    values = tuple(random_numbers.random(40).astype(np.float32) for _ in range(6))
    plan = make_plan(Scores("ppm", values, 16, "float32", "sha256:" + "5c" * 32), prune_percent=40, drop_layers=[4])
    plan.save(folder / "plan.json")


def write_statistics(folder: Path) -> None:
    random_numbers = np.random.default_rng(0)

    def numbers() -> NDArray[np.float32]:
        return random_numbers.random(12).astype(np.float32)

    layers = tuple(LayerStatistics(9, numbers(), numbers(), numbers(), 0.25 + i, numbers()) for i in range(3))
    texts = {"texts": ["a.txt"], "tokens": 9, "window": 9, "digest": "sha256:00"}
    Statistics(layers, 8, "sha256:" + "5c" * 32, texts).save(folder / "statistics.npz")


def write_results(folder: Path) -> None:
    setting = Setting(label="tiny", dtype="float32", decides={"weights": "a", "window": 64}, about={"model": "x"})
    result = Result(
        benchmark="piqa",
        title="PIQA",
        metric="acc,none",
        higher_is_better=True,
        shots="0",
        limit=None,
        identity="1f" * 32,
        data="2e" * 32,
        metrics={"acc,none": {"value": 0.75, "stderr": 0.25}},
        tasks={"piqa": {"version": 1.0, "items": 2}},
        num_items=2,
        requests=4,
        computed=4,
        truncated=0,
        seconds=1.5,
        bootstrap_iterations=100,
        about={"jax": "0.1"},
        items=[{"task": "piqa", "item": 0, "acc": 1.0}, {"task": "piqa", "item": 1, "acc": 0.5}],
    )
    with open_setting(folder / "results", setting) as opened:
        for i in range(4):
            opened.journal.add("loglikelihood", (f"context {i}", " x"), (-1.25 - i, i % 2 == 0))
        opened.journal.add("generate_until", ("context", {"until": ["."]}), "a text")
        opened.save(result)


# ------------------------------------------------------------------------------------------------------ reading


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def text(value: Any) -> bytes:
    return repr(value).encode(errors="backslashreplace")


def of_checkpoint(checkpoint: Checkpoint, *, is_ours: bool) -> Contents:
    arrays = [
        text(name) + text(array.dtype) + np.asarray(array).tobytes()
        for name, array in parameters_of(checkpoint.model).items()
    ]
    architecture = text((checkpoint.config, dict(checkpoint.hf_config), list(checkpoint.history)))
    endings = text((end_of_sequence_ids(checkpoint), list(changes_to_greedy(checkpoint))))
    beside = text(sorted(checkpoint.assets.items())) + endings
    if is_ours:
        return Contents(digest(*arrays, architecture), digest(beside))
    return Contents(digest(*arrays), digest(architecture, beside))


def read_hf(folder: Path) -> Contents:
    return of_checkpoint(convert.load(folder), is_ours=False)


def read_gguf(folder: Path) -> Contents:
    return of_checkpoint(convert.load(folder / "model.gguf"), is_ours=False)


def read_orbax(folder: Path) -> Contents:
    return of_checkpoint(convert.load(folder / "model" / "orbax"), is_ours=True)


def read_plan(folder: Path) -> Contents:
    plan = PruningPlan.load(folder / "plan.json")
    return Contents(digest(text(json.dumps(plan.summary())), *(kept.tobytes() for kept in plan.kept)))


def read_statistics(folder: Path) -> Contents:
    return Contents(digest(*Statistics.load(folder / "statistics.npz").parts()))


def read_results(folder: Path) -> Contents:
    found = []
    for setting in load_results(folder / "results"):
        for result in setting.results:
            found += [text(result), text(load_items(setting.path, result))]
        found.append(text(setting.setting))
        with open_setting(folder / "results", setting.setting) as opened:
            # An answer that is not there is asked for again; one that is must be the right one.
            answers = [opened.journal.get("loglikelihood", (f"context {i}", " x")) for i in range(4)]
            answers.append(opened.journal.get("generate_until", ("context", {"until": ["."]})))
            right: list[Any] = [*((-1.25 - i, i % 2 == 0) for i in range(4)), "a text"]
            wrong = [answer for answer, known in zip(answers, right, strict=True) if answer not in (None, known)]
            found.append(text(wrong))
    return Contents(digest(*found))


def header_of(file: Path) -> int:
    """The bytes of a file before its tensors: those of a safetensors header, all of JSON."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    return int(8 + length)


def header_of_gguf(file: Path) -> int:
    return file.stat().st_size - sum(-(-t.nbytes // 32) * 32 for t in tensors().values())


SUBJECTS = {
    "hf": Subject(write_hf, read_hf, header_of),
    "hf-sharded": Subject(lambda folder: write_hf(folder, shards=3), read_hf, header_of),
    "gguf": Subject(write_gguf, read_gguf, header_of_gguf),
    "orbax": Subject(write_orbax, read_orbax),
    "plan": Subject(write_plan, read_plan),
    "statistics": Subject(write_statistics, read_statistics),
    "results": Subject(write_results, read_results),
}


# ---------------------------------------------------------------------------------------------------- mutations

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "x",
    "\n",
    "x" * 3000,
    [],
    [1],
    {},
    {"x": 1},
)


def damage_bytes(data: bytes, span: int, chance: random.Random) -> tuple[str, bytes]:
    """Flips, cuts, adds or overwrites bytes among the first `span`."""
    at = chance.randrange(span) if span else 0
    match chance.choice(("flip", "flip", "byte", "cut", "cut out", "insert", "repeat", "zeros")):
        case "flip" if data:
            return f"bit of byte {at}", data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case "byte":
            return f"byte {at}", data[:at] + chance.randbytes(1) + data[at + 1 :]
        case "cut":
            length = chance.randrange(len(data)) if data else 0
            return f"cut to {length}", data[:length]
        case "cut out":
            count = chance.randint(1, 8)
            return f"without {count} bytes at {at}", data[:at] + data[min(at + count, span) :]
        case "insert":
            return f"bytes inserted at {at}", data[:at] + chance.randbytes(chance.randint(1, 8)) + data[at:]
        case "repeat":
            return f"bytes repeated at {at}", data[: min(at + 8, span)] + data[at:]
    end = min(at + chance.randint(1, 16), span)
    return f"zeros at {at}", data[:at] + bytes(end - at) + data[end:]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (object or list, key or index) in parsed JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from places(part)


def damage_json(document: Any, chance: random.Random) -> tuple[str, Any]:
    """Changes a type, deletes, renames or swaps in parsed JSON."""
    document = copy.deepcopy(document)
    all_places = list(places(document))
    if not all_places:
        return "another document", chance.choice(WRONG)
    holder, key = chance.choice(all_places)
    kind = chance.choice(("value", "value", "delete", "rename", "swap"))
    if kind == "rename" and isinstance(holder, dict):
        items = list(holder.items())
        new = chance.choice((f"{key}x", key[:-1], key.upper(), "", "\n" + key))
        holder.clear()
        holder.update((new if name == key else name, value) for name, value in items)
        return f"{key} renamed to {new!r}", document
    if kind == "delete":
        del holder[key]
        return f"{key} deleted", document
    if kind == "swap":
        # Of single values: whole entries of two tensors of one shape make another valid file.
        leaves = [(h, k) for h, k in all_places if not isinstance(h[k], dict | list)]
        if len(leaves) > 1:
            (a, i), (b, j) = chance.sample(leaves, 2)
            a[i], b[j] = b[j], a[i]
            return f"{i} and {j} swapped", document
    value = chance.choice(WRONG)
    holder[key] = value
    return f"{key} is {str(value)[:20]!r}", document


def mutate(file: Path, span: int, chance: random.Random) -> str:
    """Damages a file in place and says how."""
    data = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.6:
        what, document = damage_json(json.loads(data), chance)
        file.write_text(json.dumps(document, indent=1))
        return what
    if file.suffix == ".jsonl" and chance.random() < 0.6:
        lines = data.splitlines()
        number = chance.randrange(len(lines))
        what, document = damage_json(json.loads(lines[number]), chance)
        lines[number] = json.dumps(document).encode()
        file.write_bytes(b"\n".join(lines) + b"\n")
        return f"line {number}: {what}"
    if file.suffix == ".safetensors" and chance.random() < 0.6:
        what, header = damage_json(json.loads(data[8:span]), chance)
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[span:])
        return what
    if file.suffix == ".npz" and chance.random() < 0.5:
        with np.load(file) as arrays:
            found = dict(arrays)
        what, head = damage_json(json.loads(found["head"].tobytes()), chance)
        found["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        if chance.random() < 0.3:
            name = chance.choice(sorted(found))
            what = f"array {name} damaged"
            array = found.pop(name)
            found |= chance.choice(
                ({}, {f"{name}x": array}, {name: array[:-1]}, {name: array.astype(np.float64)}, {name: array[::-1]})
            )
        np.savez(file, **found)
        return what
    what, data = damage_bytes(data, span, chance)
    file.write_bytes(data)
    return what


# ---------------------------------------------------------------------------------------------------- counting


def outcome_of(read: Callable[[], Contents], before: Contents) -> tuple[str, str]:
    """How a reader deals with an input, one of `OUTCOMES`, and what it said."""
    said = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        warnings.simplefilter("always")
        try:
            found = read()
            outcome, message = "same", ""
        except GlupruneError as error:
            outcome, message = "refused", str(error)
        except BaseException as error:  # whatever it is, it is what we look for
            if isinstance(error, KeyboardInterrupt):
                raise
            return "unclean", f"{type(error).__name__}: {error}"
    if warned:
        return "unclean", f"a warning: {warned[0].message}"
    if said.getvalue():
        return "unclean", f"printed: {said.getvalue()}"
    if "\n" in message or len(message) > MAX_LINE:
        return "unclean", f"a message of {len(message)} characters: {message}"
    if outcome == "refused" or found == before:
        return outcome, message
    return ("as written", "") if found.config != before.config else ("wrong", "other contents")


def fuzz(
    kinds: Mapping[str, int], seed: int, folder: Path, report: Callable[[str, str, str, str], None] | None = None
) -> dict[str, Counter[str]]:
    """Counts outcomes by kind.

    Args:
      kinds: how many mutations of each of `SUBJECTS`.
      seed: of the mutations; those of one kind do not depend on the others.
      folder: an empty one to work in.
      report: called with kind, mutation, outcome and message.
    """
    counts: dict[str, Counter[str]] = {}
    for kind, count in kinds.items():
        subject, chance, counted = SUBJECTS[kind], random.Random(f"{seed} {kind}"), counts.setdefault(kind, Counter())
        original, damaged = folder / f"{kind}-original", folder / f"{kind}-damaged"
        original.mkdir()
        subject.write(original)
        before = subject.read(original)
        names = sorted(
            file.relative_to(original) for file in original.rglob("*") if file.is_file() and file.stat().st_size
        )
        for _ in range(count):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(original, damaged)
            name = chance.choice(names)
            what = mutate(damaged / name, subject.spans(original / name), chance)
            outcome, message = outcome_of(lambda: subject.read(damaged), before)  # noqa: B023
            counted[outcome] += 1
            if report:
                report(kind, f"{name}: {what}", outcome, message)
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="mutations in all (default: 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=SUBJECTS, help="this kind alone")
    parser.add_argument("--show", action="store_true", help="show every mutation, and not the bad ones alone")
    args = parser.parse_args(argv)
    names = [args.kind] if args.kind else list(SUBJECTS)
    share = {kind: len(range(i, args.count, len(names))) for i, kind in enumerate(names)}

    def report(kind: str, what: str, outcome: str, message: str) -> None:
        if args.show or outcome in ("unclean", "wrong"):
            print(f"{kind}: {what[:100]!r}: {outcome}: {message[:200]!r}", flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(share, args.seed, Path(folder), report)
    print("kind        mutations" + "".join(f"{outcome:>12}" for outcome in OUTCOMES))
    for kind, counted in counts.items():
        print(f"{kind:11}{counted.total():10}" + "".join(f"{counted[outcome]:12}" for outcome in OUTCOMES))
    bad = sum(counted["unclean"] + counted["wrong"] for counted in counts.values())
    total = sum(counted.total() for counted in counts.values())
    print(f"{total} mutations, seed {args.seed}, {time.monotonic() - began:.0f} s: {bad} unclean or wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
