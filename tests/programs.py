"""Walking through the programs (jaxprs) that JAX traces."""

from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program, those of every program inside it included."""
    for equation in jaxpr.eqns:
        yield equation
        waiting = list(equation.params.values())
        while waiting:
            value = waiting.pop()
            if isinstance(value, (list, tuple)):
                waiting += value
            elif isinstance(value, ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from equations(value)
