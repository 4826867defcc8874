"""Several processes of one run: what their options ask for, and how they join."""

import dataclasses
import re

from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.parallel.distributed import describe_error


@dataclasses.dataclass(frozen=True)
class ProcessesRequest:
    """Which processes run together; the fields are options of the same names (`options.TABLE`)."""

    distributed: bool
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    heartbeat_timeout: int


def connect(request: ProcessesRequest) -> None:
    """Joins the other processes, if `--distributed` asks for it. Nothing may have been computed before.

    Raises:
      RequestError: arguments that do not go together, or no sign of other processes.
      OperationError: the others cannot be reached.
    """
    named = {
        "coordinator": request.coordinator,
        "num-processes": request.num_processes,
        "process-id": request.process_id,
    }
    given = [f"--{name}" for name, value in named.items() if value is not None]
    if given and not request.distributed:
        raise RequestError(f"{given[0]} goes with --distributed")
    if given and len(given) < len(named):
        missing = [f"--{name}" for name, value in named.items() if value is None]
        raise RequestError(f"{given[0]} needs {' and '.join(missing)} too; without all three the cluster is asked")
    if given and not 0 <= (request.process_id or 0) < (request.num_processes or 0):
        raise RequestError(
            f"--process-id is {request.process_id}; of {request.num_processes} processes it must be one from 0"
        )
    if request.coordinator is not None and not re.fullmatch(r".+:[0-9]{1,5}", request.coordinator):
        raise RequestError(f"--coordinator is {request.coordinator!r}; write HOST:PORT")
    if request.heartbeat_timeout < 1:
        raise RequestError(f"--heartbeat-timeout is {request.heartbeat_timeout}; it must be at least 1 second")
    if not request.distributed:
        return
    import jax

    try:
        jax.distributed.initialize(
            request.coordinator,
            request.num_processes,
            request.process_id,
            heartbeat_timeout_seconds=request.heartbeat_timeout,
        )
    except ValueError as error:
        raise RequestError(
            f"--distributed finds no cluster that it knows ({describe_error(error)}); on others give --coordinator, "
            f"--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise OperationError(f"the processes do not find each other: {describe_error(error)}") from error
