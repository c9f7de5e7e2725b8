"""How a request's tokens are chosen and when they end."""

from dataclasses import dataclass
from numbers import Integral, Real

FLOAT32_MAX = 3.4e38


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one request, under vLLM's names."""

    temperature: float = 1.0
    """0 picks the most likely token; above 0 samples from softmax(logits / temperature)."""
    max_tokens: int = 64
    """Most tokens to generate; the model's length limit may end the text before."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token: for benchmarks."""
    seed: int | None = None
    """Makes the request's draws repeatable whatever runs beside it. None: drawn from the engine's seed."""

    def __post_init__(self):
        """Raise TypeError or ValueError for a value that cannot be."""
        number = self.temperature
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"temperature must be a number, not {number!r}")
        if not 0 <= number <= FLOAT32_MAX:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {number}")
        if 0 < number < 1e-2:
            # As in vLLM: logits divided by less than this overflow in float32.
            object.__setattr__(self, "temperature", 1e-2)
        self._make_integer("max_tokens", "an integer")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if type(self.ignore_eos) is not bool:
            raise TypeError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        if self.seed is not None:
            self._make_integer("seed", "an integer or None")
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed must be from 0 to 2**63 - 1, not {self.seed}")

    def _make_integer(self, name: str, wanted: str) -> None:
        """Turn an integer of any kind, such as NumPy's, into Python's; True and False are refused."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be {wanted}, not {value!r}")
        object.__setattr__(self, name, int(value))
