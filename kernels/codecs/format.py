"""How a parameter and its states are kept, as the update kernel is compiled for it."""

from __future__ import annotations

from dataclasses import dataclass

# Of a parameter: how it is stored, and whether a tensor beside it, its companion, has the rest.
CAST = "cast"
# Of a state that is never below 0, in a type that ends at 6e-8.
POSITIVE_CAST = "positive cast"
STOCHASTIC = "stochastic"
KAHAN = "kahan"
REMAINDER = "remainder"
REMAINDER_STOCHASTIC = "remainder, stochastic"
FLOAT32 = "float32"
COMPANIONS = (KAHAN, REMAINDER, REMAINDER_STOCHASTIC, FLOAT32)

PARAMETERS = (CAST, STOCHASTIC, *COMPANIONS)

# Of a state besides: in 8 bits with a scale for each group, of either sign or not below 0.
SIGNED = "signed"
UNSIGNED = "unsigned"
FLOAT8 = "float8"
POSITIVE_FLOAT8 = "positive float8"
CODES = (SIGNED, UNSIGNED, FLOAT8, POSITIVE_FLOAT8)
# Stochastic is the average of the weights, in 16 bits.
STATES = (CAST, POSITIVE_CAST, STOCHASTIC, *CODES)


@dataclass(frozen=True)
class Format:
    """How the tensors of one launch are kept.

    Attributes:
        parameter: ``CAST``, ``STOCHASTIC`` or one of ``COMPANIONS``.
        states: for each state, one of ``STATES``; none for as many casts as there are.
        average: whether the last of them is not the rule's, but the average of the weights.
    """

    parameter: str = CAST
    states: tuple[str, ...] = ()
    average: bool = False

    @property
    def is_cast(self) -> bool:
        """Whether all is kept as a floating type that it is rounded to."""
        return self.parameter == CAST and set(self.states) <= {CAST}

    @property
    def has_companion(self) -> bool:
        """Whether a tensor beside the parameter has the rest of it."""
        return self.parameter in COMPANIONS

    @property
    def has_codes(self) -> bool:
        """Whether some state is in 8 bits."""
        return any(codec in CODES for codec in self.states)

    @property
    def draws_anew(self) -> bool:
        """Whether the parameter or its average is rounded stochastically."""
        return self.parameter in (STOCHASTIC, REMAINDER_STOCHASTIC) or STOCHASTIC in self.states

    @property
    def draws(self) -> bool:
        """Whether what is stored depends on seed, parameter, index and step."""
        return self.has_codes or self.draws_anew

    @property
    def counts(self) -> bool:
        """Whether what is stored depends on the step's number, whatever the rule reads."""
        return self.draws or self.average

    @property
    def columns(self) -> int:
        """Return how many coefficients there are besides the rule's: a weight, and the step."""
        return self.average + self.counts

    def rows(self, n_inputs: int, n_states: int) -> tuple[int, ...]:
        """Return for each state which operand of the table its first tensor is.

        Operands are the parameter, the inputs, the companion if there is one, then the states, of
        which codes are followed by their scales.
        """
        found, row = [], 1 + n_inputs + self.has_companion
        for codec in self.states or (CAST,) * n_states:
            found.append(row)
            row += 1 + (codec in CODES)
        return tuple(found)

    def scales(self, n_inputs: int) -> tuple[int, ...]:
        """Return which operands of the table are scales."""
        rows = self.rows(n_inputs, len(self.states))
        pairs = zip(rows, self.states, strict=True)
        return tuple(row + 1 for row, codec in pairs if codec in CODES)


PLAIN = Format()
