"""What the memory of a device will hold, as a table."""

from rich.console import Console
from rich.table import Table

from gluprune_jax.errors import format_bytes
from gluprune_jax.memory.plan import Evaluation, MemoryPlan


def show_plan(plan: MemoryPlan, capacity: int | None, console: Console) -> None:
    """Prints a plan as a table; `capacity` is the bytes of one device, where they are known."""
    devices = f"{plan.mesh.devices} device{'s' * (plan.mesh.devices > 1)}"
    table = Table(title=f"memory of each device, {plan.mesh} ({devices})", title_justify="left")
    for column in ("", "bytes per device", "of the device"):
        table.add_column(column, justify="right" if column else "left")
    parts = {"weights": plan.weights, "cache": plan.cache, "workspace, at most": plan.workspace, "total": plan.total}
    for name, size in parts.items():
        if name == "total":
            table.add_section()
        table.add_row(name, format_bytes(size), "" if capacity is None else f"{size / capacity:.1%}")
    if capacity is not None:
        table.add_row("the device", format_bytes(capacity), "100.0%")
    console.print(table)
    if isinstance(plan.use, Evaluation):
        generated = f"; {plan.use.slots} sequences of {plan.use.decoded:,} decoded together" * bool(plan.use.decoded)
        console.print(
            f"in each replica: {plan.use.rows} rows of 512 tokens at once; documents and shared beginnings of "
            f"{plan.use.cached:,} tokens{generated}",
            style="dim",
        )
