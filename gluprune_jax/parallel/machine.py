"""The memory of this machine and its devices."""

import contextlib
import os
import re
from fractions import Fraction

from gluprune_jax.errors import RequestError

_UNITS = {f"{prefix}{end}": base**n for end, base in (("b", 1000), ("ib", 1024)) for n, prefix in enumerate("kmgt", 1)}


# -------------------------------------------------------------------------------------------------------- machine


def parse_bytes(text: str, flag: str = "`device_memory`") -> int:
    """Bytes as a flag spells them: "16GiB", "80 GB", "1.5 TiB"; units of 1000 and of 1024, in any case.

    Raises:
      RequestError: anything else, and less than a byte.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-z]+)\s*", text, re.IGNORECASE | re.ASCII)
    scale = _UNITS.get(match[2].lower()) if match else None
    size = int(Fraction(match[1]) * scale) if match and scale else 0
    if size < 1:
        raise RequestError(f"{flag} is {text!r}; write a positive number and its unit, such as 16GiB or 80GB")
    return size


def device_memory() -> int | None:
    """Bytes of one device for JAX to use, or None where it does not say.

    CPU devices share the host's memory: an equal part of it. What others use of it now is not counted, for a run takes
    hours and they may not.
    """
    import jax  # here: what a text means is known without it

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def free_memory() -> int:
    """Bytes that are free on the first device; of the host's memory, where that is the device's, an equal part."""
    import jax  # here: as above

    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    return host_memory() // jax.local_device_count()


def host_memory() -> int:
    """Bytes available on this host."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        available = next((line for line in file if line.startswith("MemAvailable:")), None)
        if available:
            return int(available.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS has no former
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
