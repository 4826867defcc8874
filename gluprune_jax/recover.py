"""Recovery training of a pruned model: `python -m gluprune_jax.recover`."""

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gluprune_jax.cli import options, terminal
from gluprune_jax.cli.processes import ProcessesRequest
from gluprune_jax.data.documents import DATA_HELP
from gluprune_jax.training.choices import COMPUTE_DTYPES, TRAINABLE

if TYPE_CHECKING:
    from gluprune_jax.memory.mesh_choice import MeshRequest

LORA_RANK, LORA_ALPHA = 16, 32.0

DESCRIPTION = """\
Trains a pruned model so that it recovers: by distillation from the dense model (--teacher), or by plain language
modelling. All windows of the data are shuffled anew in every epoch. An interrupted run resumes from its last checkpoint
when the same command is given again, with the numbers of an unbroken run.

examples:
  gluprune recover --model smollm2-2.4x --teacher demo --train-data corpus.txt --steps 500 --evaluate --output recovered
  gluprune recover --model llama-1b-2.4x --teacher meta-llama/Llama-3.2-1B --train-data chats.jsonl \\
      --train lora --lora-rank 32 --learning-rate 2e-4 --compute-dtype bfloat16 --tokens 20000000 --output recovered
"""
START = "python -m gluprune_jax.recover"


@dataclasses.dataclass(frozen=True)
class RecoverRequest:
    """What is to be trained, how, and what is written; the fields are options of the same names."""

    model: str
    revision: str | None
    dtype: str | None
    teacher: str | None
    train_data: tuple[str, ...]
    chat_template: str | None
    date: datetime.date | None
    output: Path
    format: str | None
    overwrite: bool
    resume: bool
    log: Path | None
    checkpoints: Path | None
    checkpoint_every: int
    keep_checkpoints: bool
    json: bool
    train: Literal["all", "mlp", "lora"]
    lora_rank: int
    lora_alpha: float
    kl_weight: float | None
    ce_weight: float | None
    hidden_weight: float
    temperature: float
    steps: int | None
    tokens: int | None
    sequence_length: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup_steps: int
    clip: float
    weight_decay: float
    compute_dtype: str
    seed: int
    eval_data: tuple[str, ...]
    eval_tokens: int
    devices: "MeshRequest"

    @property
    def checkpoints_at(self) -> Path:
        """The folder of the training checkpoints."""
        return self.checkpoints or self.output.with_name(f"{self.output.name}.recovery")

    @property
    def log_at(self) -> Path:
        """The file of the log."""
        return self.log or self.output.with_name(f"{self.output.name}.recovery.jsonl")


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    options.add_model(parser)
    parser.add_argument("--teacher", metavar="MODEL", help="dense model to distil from (default: train on text alone)")
    parser.add_argument("--train-data", nargs="+", required=True, metavar="TEXT", help=f"training text: {DATA_HELP}")
    options.add(parser, "--chat-template")
    options.add(parser, "--date")
    output = parser.add_argument_group("what to write")
    options.add(output, "--output", about="folder for the trained model", required=True, type=Path)
    options.add(output, "--format")
    options.add(output, "--overwrite", about="the model that is at DIR, and what --log names")
    options.add(output, "--resume")
    output.add_argument("--log", type=Path, metavar="FILE", help="JSON lines, one a step (default: DIR.recovery.jsonl)")
    output.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="folder of the training checkpoints (default: DIR.recovery)"
    )
    output.add_argument(
        "--checkpoint-every", type=int, default=500, metavar="N", help="steps between checkpoints; 0 saves none"
    )
    output.add_argument(
        "--keep-checkpoints", action="store_true", help="keep training checkpoints after the final model is saved"
    )
    options.add(output, "--json")

    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--train", choices=TRAINABLE, default="all", help="all weights, those of the MLPs, or LoRA adapters"
    )
    what.add_argument(
        "--lora-rank",
        type=int,
        default=LORA_RANK,
        metavar="R",
        help="rank of the adapters, which are merged at the end",
    )
    what.add_argument("--lora-alpha", type=float, default=LORA_ALPHA, metavar="A", help="adapters are scaled by A / R")

    losses = parser.add_argument_group("losses")
    losses.add_argument(
        "--kl-weight",
        type=float,
        metavar="W",
        help="weight of the KL distillation loss (default: 1 with --teacher, else 0)",
    )
    losses.add_argument(
        "--ce-weight",
        type=float,
        metavar="W",
        help="weight of the cross-entropy loss (default: 0 with --teacher, else 1)",
    )
    losses.add_argument(
        "--hidden-weight", type=float, default=0.0, metavar="W", help="weight of the hidden-state distillation loss"
    )
    losses.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="softmax temperature of the KL distillation loss"
    )

    steps = parser.add_argument_group("steps")
    count = steps.add_mutually_exclusive_group(required=True)
    count.add_argument("--steps", type=int, metavar="N", help="number of optimiser steps")
    count.add_argument("--tokens", type=int, metavar="N", help="training tokens: as many steps as take them")
    options.add(steps, "--sequence-length")
    options.add(steps, "--batch-size", about=", of all replicas together", default=8)
    steps.add_argument("--accumulate", type=int, default=1, metavar="N", help="gradient accumulation: batches per step")
    steps.add_argument(
        "--learning-rate", type=float, default=1e-4, metavar="X", help="peak learning rate (cosine decay to 0)"
    )
    steps.add_argument(
        "--warmup-steps", type=int, default=0, metavar="N", help="steps of linear warm-up to the peak learning rate"
    )
    steps.add_argument("--clip", type=float, default=1.0, metavar="X", help="gradient clipping: largest global norm")
    steps.add_argument(
        "--weight-decay", type=float, default=0.0, metavar="X", help="weight decay of AdamW, for matrices"
    )
    steps.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        default="float32",
        help="dtype of activations and matmuls; master weights stay float32",
    )
    options.add(steps, "--seed", about="the order of the data, and of adapters")
    measure = parser.add_argument_group("what to measure, before and after")
    options.add_evaluation(measure, "of the model before and after, and of the teacher", " in all")
    options.add_devices(parser, "as many replicas as fit and divide the batch")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    from gluprune_jax.cli.recover import kept, recover  # here: help and a refused argument need no JAX

    command = shlex.join([*start.split(), *argv])
    request = options.request(
        RecoverRequest, args, eval_data=options.eval_data(args), devices=options.mesh_request(args)
    )
    return terminal.run(
        "gluprune",
        lambda: recover(request, command),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: kept(request, command),
    )


if __name__ == "__main__":
    sys.exit(main())
