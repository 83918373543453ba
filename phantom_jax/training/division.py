"""What of a model a phase trains, in full or by low-rank factors, and what it keeps in few bits."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from phantom_jax.errors import InputError
from phantom_jax.lora import NO_LORA, Lora
from phantom_jax.models.linears import HEAD, match_linears
from phantom_jax.models.quantization import quantize_linear
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.patterns import match
from phantom_jax.trees import Params, flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Division:
    """How a phase divides the parameters.

    Attributes:
      trained: paths of the parameters that train in full.
      lora: the adapter.
      quantized: paths of the frozen kernels that are kept in few bits.
      kind: of those bits; `none` where there are none.
    """

    trained: frozenset[str]
    lora: Lora = NO_LORA
    quantized: frozenset[str] = frozenset()
    kind: str = "none"

    def dtype(self, path: str, compute_dtype: Any) -> Any:
        """In which dtype a parameter of the model is kept: trained ones in float32."""
        return jnp.float32 if path in self.trained else jnp.dtype(compute_dtype)

    def quantize(self, path: str, array: Any) -> Any:
        """The array at a path in its form in this phase."""
        if path not in self.quantized or isinstance(array, QuantizedTensor):
            return array
        return quantize_linear(path, array, self.kind)

    def quantize_frozen(self, frozen: dict[str, Any]) -> dict[str, Any]:
        """The frozen tree in its form in this phase, one kernel after another.

        Not to be traced. The tree is emptied, so that no kernel is held in both forms longer than it takes, if nobody
        else holds it.
        """
        flat = flatten(frozen)
        frozen.clear()
        # Popped: the last reference to the floats must go before the next kernel is quantised.
        return unflatten({path: self.quantize(path, flat.pop(path)) for path in list(flat)})

    def quantized_shapes(self, frozen: Params) -> dict[str, Any]:
        """What `quantize_frozen` makes of shapes; nothing is computed."""
        return unflatten(
            {
                path: jax.eval_shape(functools.partial(self.quantize, path), leaf)
                for path, leaf in flatten(frozen).items()
            }
        )

    @property
    def adapts_quantized(self) -> bool:
        """Whether the changes of the adapter have no float kernel to be merged into."""
        return not self.quantized.isdisjoint(self.lora.kernels)


def divide(phases: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> list[Division]:
    """The divisions of a run's phases.

    Args:
      phases: of a resolved config.
      paths: of all parameters of the model.

    Raises:
      InputError: a pattern matches nothing, a parameter would be kept in two forms, or a phase needs float values that
        the phase before it has no more.
    """
    divisions = []
    for index, phase in enumerate(phases):
        divisions.append(_divide(phase, paths, f"phases[{index}]."))
        if index:
            _check_boundary(divisions[-2], divisions[-1], index)
    return divisions


def _divide(phase: Mapping[str, Any], paths: Sequence[str], prefix: str) -> Division:
    trained = match(phase["trainable"], paths, what=f"{prefix}trainable")
    settings, quantize = phase["lora"], phase["quantize"]
    lora, quantized = NO_LORA, set()
    if settings["rank"]:
        kernels = match_linears(settings["patterns"], paths, what=f"{prefix}lora.patterns")
        _check_apart(
            kernels & trained,
            f"{prefix}trainable trains in full and {prefix}lora adapts",
            f"set {prefix}trainable to what shall train beside the adapter, ('projector/**',) for instance, or make the"
            " patterns of one of them narrower",
        )
        if HEAD in kernels and settings["dropout"]:
            raise InputError(
                f"{prefix}lora.dropout is {settings['dropout']} and {prefix}lora.patterns match the head, which is"
                " computed in chunks of tokens that would drop alike: set the dropout to 0, or leave the head out."
            )
        lora = Lora(tuple(sorted(kernels)), settings["rank"], settings["alpha"], settings["dropout"])
    if quantize["kind"] != "none":
        quantized = match_linears(quantize["patterns"], paths, what=f"{prefix}quantize.patterns")
        _check_apart(
            quantized & trained,
            f"{prefix}trainable trains in full and {prefix}quantize.kind={quantize['kind']} keeps in few bits",
            "codes have no gradient; make the patterns of one of them narrower, or adapt the kernels with lora",
        )
    return Division(frozenset(trained), lora, frozenset(quantized), quantize["kind"])


def _check_apart(both: set[str], what: str, remedy: str) -> None:
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise InputError(f"{min(both)}{more}: {what}; {remedy}.")


def _check_boundary(before: Division, after: Division, index: int) -> None:
    """Refuses what float values would be needed for that a quantised phase has no more."""
    remedy = (
        "Let this run end with that phase, and begin a second one with model.weights set to its model, merged with the"
        " adapter if it has one (phantom-jax merge)."
    )
    if before.adapts_quantized:
        raise InputError(
            f"phases[{index - 1}] trains an adapter on kernels that are quantised to {before.kind}, and a merged model"
            f" has no such codes, so phases[{index}] cannot begin from it. {remedy}"
        )
    lost = before.quantized if after.kind != before.kind else before.quantized - after.quantized
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"phases[{index}] needs the float values of {min(lost)}{more}, and phases[{index - 1}] keeps"
            f" {before.kind} codes alone. Keep the same kernels quantised to {before.kind} there as well. Otherwise:"
            f" {remedy}"
        )
