"""How much perplexity recovery training wins back, by the tokens it was trained on.

    python benchmarks/recovery.py --teacher demo --students pruned-10 pruned-20 --data corpus.txt \\
        --test wikitext/test.jsonl --tokens 2000000 --every 500000 [--json FILE]

Each student is distilled from the teacher with the library behind `python -m gluprune_jax.recover`, and before, during
and after that its token perplexity is taken (`evals.perplexity`, see there for the definition) on a test text: a text
file, or JSON lines with the key `page` or `text`, such as the test pages of WikiText-2. The teacher's own perplexity is
the goal. Nothing is written but the table, and the JSON document.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import convert
from convert.tokenizer import encode_documents, encode_text, load_tokenizer, separator
from evals.perplexity import perplexity
from gluprune_jax.data.documents import evaluation_text, read_documents
from gluprune_jax.data.packing import pack
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.training.choices import COMPUTE_DTYPES, TRAINABLE
from gluprune_jax.training.recovery import Recipe, Recovery
from gluprune_jax.training.step import Objective, Schedule
from gluprune_jax.training.trainable import Trainable


def measured(model: Decoder, tokens: list[int], window: int) -> float:
    return perplexity(model, tokens, sequence_length=window).value


def recover(
    student: convert.Checkpoint, teacher: convert.Checkpoint, windows: Any, test: list[int], args: argparse.Namespace
) -> list[dict[str, float]]:
    """Perplexity, training loss and seconds of training, at intervals of tokens."""
    per_step = args.window * args.batch_size * args.accumulate
    steps = math.ceil(args.tokens / per_step)
    every = max(1, round(args.every / per_step))
    recipe = Recipe(
        schedule=Schedule(steps, args.learning_rate, steps // 20),
        objective=Objective(args.kl_weight, args.ce_weight, args.hidden_weight, args.temperature),
        trainable=Trainable(args.train, args.lora_rank, 2.0 * args.lora_rank),
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        compute_dtype=args.compute_dtype,
        seed=args.seed,
    )
    recovery = Recovery(student.model, teacher.model, windows, recipe)
    rows = [{"tokens": 0, "perplexity": measured(student.model, test, args.window), "seconds": 0.0}]
    losses: list[float] = []
    while recovery.step < steps:
        line = recovery.advance()
        losses.append(line["loss"])
        if recovery.step % every == 0 or recovery.step == steps:
            found = measured(recovery.model(), test, args.window)
            loss = float(np.mean(losses))
            rows.append({"tokens": recovery.tokens, "perplexity": found, "loss": loss, "seconds": recovery.seconds})
            print(f"{student.source}: {rows[-1]}", file=sys.stderr)
            losses.clear()
    return rows


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"token perplexity of {report['test']}, windows of {report['window']}", title_justify="left")
    for column in ("student", "training tokens", "perplexity", "times the teacher's", "loss since", "seconds"):
        table.add_column(column, justify="left" if column == "student" else "right")
    table.add_row(f"{report['teacher']} (teacher)", "", f"{report['teacher_perplexity']:.2f}", "1.00", "", "")
    for name, rows in report["students"].items():
        table.add_section()
        for row in rows:
            table.add_row(
                name,
                f"{row['tokens']:,}",
                f"{row['perplexity']:.2f}",
                f"{row['perplexity'] / report['teacher_perplexity']:.2f}",
                f"{row['loss']:.4f}" if "loss" in row else "",
                f"{row['seconds']:.0f}",
            )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="as for gluprune_jax.recover")
    parser.add_argument("--test", type=Path, required=True, help="the text that perplexity is measured on")
    parser.add_argument("--test-tokens", type=int, help="only the first so many")
    parser.add_argument("--tokens", type=int, required=True, help="to train on")
    parser.add_argument("--every", type=int, required=True, help="training tokens between two measurements")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--train", choices=TRAINABLE, default="all")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--kl-weight", type=float, default=1.0)
    parser.add_argument("--ce-weight", type=float, default=0.0)
    parser.add_argument("--hidden-weight", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the document")
    args = parser.parse_args()
    teacher = convert.load(args.teacher)
    tokenizer = load_tokenizer(teacher)
    test = encode_text(tokenizer, evaluation_text(str(args.test)))[: args.test_tokens]
    documents = read_documents(args.data, "--data")
    windows = pack(encode_documents(tokenizer, documents), args.window, separator(teacher, tokenizer))
    report: dict[str, Any] = {
        "teacher": args.teacher,
        "teacher_perplexity": measured(teacher.model, test, args.window),
        "test": str(args.test),
        "test_tokens": len(test),
        "window": args.window,
        "training_windows": len(windows),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "students": {},
    }
    start = time.perf_counter()
    for name in args.students:
        report["students"][name] = recover(convert.load(name), teacher, windows, test, args)
    report["seconds"] = time.perf_counter() - start
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
