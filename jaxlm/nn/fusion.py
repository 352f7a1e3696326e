"""A hint for XLA on GPUs: which values not to compute together.

XLA decides which operations become one kernel. On a GPU it often stores an intermediate result in float32, because two
kernels need it, where each kernel could compute it again from a smaller array. `keep_apart` prevents this.
"""

from __future__ import annotations

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

PRIMITIVE = "keep_apart"  # its name in a jaxpr, for policies of `jax.checkpoint`

_primitive = Primitive(PRIMITIVE)
_primitive.def_impl(lambda x: x)
_primitive.def_abstract_eval(lambda x: x)
ad.deflinear2(_primitive, lambda gradient, _: [gradient])  # for higher derivatives
batching.defvectorized(_primitive)
mlir.register_lowering(_primitive, lambda _, x: [x])
mlir.register_lowering(
    _primitive, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False), platform="cuda"
)


def keep_apart(x: jax.Array) -> jax.Array:
    """Returns `x`. On a GPU, XLA shares no computation from `x` with one from the result.

    On other devices it has no effect: a CPU would compute twice, and a TPU fuses well.
    """
    return _primitive.bind(x)


@jax.custom_jvp
def keep_for_derivative(x: jax.Array) -> jax.Array:
    """Returns `x`. Where a derivative is computed on a GPU, it reads the result instead of computing it again."""
    return x


@keep_for_derivative.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return keep_apart(*primals), *tangents
