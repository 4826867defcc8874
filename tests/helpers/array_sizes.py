"""How large the arrays of a traced program are."""

import math
from collections.abc import Iterator

import jax
from jax.extend.core import Jaxpr


def sizes(jaxpr: Jaxpr) -> Iterator[int]:
    """Elements of every array that the program computes, inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                yield from sizes(inner)
