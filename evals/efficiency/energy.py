"""Energy as the hardware counts it: NVML on NVIDIA GPUs, RAPL on Intel and AMD CPUs, read by Zeus (arXiv 2208.06102).

What no counter tells is not available: there is no estimate from utilisation or nominal power here.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import jax

_WINDOW = "measured"


@dataclasses.dataclass(frozen=True)
class Energy:
    """Joules of a window.

    Attributes:
      joules: of all counters together, idle power included.
      seconds: how long it was.
    """

    joules: float
    seconds: float


class EnergyMeter:
    """The counters of this machine.

    Args:
      devices: those that compute: GPUs beside them would add their idle power.

    Attributes:
      sources: what is counted, such as "GPU (NVML)"; empty where nothing is.
      unavailable: why nothing is counted, in a sentence; None where something is.
    """

    def __init__(self, devices: Collection[jax.Device]) -> None:
        self._monitor: Any = None
        self.sources: tuple[str, ...] = ()
        self.unavailable: str | None = None
        platform = jax.default_backend()
        if jax.process_count() > 1:
            self.unavailable = "the counters of one machine are not those of several processes"
        elif platform == "tpu":
            self.unavailable = "TPUs tell no energy"
        elif importlib.util.find_spec("zeus") is None:
            self.unavailable = "Zeus reads the counters, and is not installed: pip install 'gluprune-jax[energy]'"
        else:
            self._open([device.local_hardware_id for device in devices if device.platform == "gpu"])

    def _open(self, gpus: list[Any]) -> None:
        from zeus.monitor import ZeusMonitor

        logging.getLogger("zeus").setLevel(logging.ERROR)
        with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
            monitor = ZeusMonitor(gpu_indices=gpus, sync_execution_with="jax")
        names = {"GPU (NVML)": monitor.gpu_indices, "CPU (RAPL)": monitor.cpu_indices}
        self.sources = tuple(name for name, indices in names.items() if indices)
        if self.sources:
            self._monitor = monitor
        else:
            self.unavailable = "this machine has no energy counter that can be read (NVML, or RAPL as root)"

    def measure(self, work: Callable[[], object]) -> Energy | None:
        """The energy of the machine while `work` runs, which must wait for its results; None where it is not told."""
        if self._monitor is None:
            work()
            return None
        self._monitor.begin_window(_WINDOW, sync_execution=False)
        work()
        found = self._monitor.end_window(_WINDOW, sync_execution=False)
        parts = (found.gpu_energy, found.cpu_energy, found.dram_energy)
        joules = sum(sum(part.values()) for part in parts if part)
        # Counters are refreshed some times a second: a window between two of them reads nothing.
        return Energy(joules, found.time) if joules > 0 else None

    def idle_watts(self, seconds: float) -> float | None:
        """The power of the machine doing nothing, over some seconds."""
        found = self.measure(lambda: time.sleep(seconds))
        return None if found is None else found.joules / found.seconds
