"""Whether two tokens at one place are a tie: as far as 16 bits can tell, either may be drawn."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.tables import token_tables
from nanovllm_jax.layers.attention import causal_attention
from nanovllm_jax.models.draw import DeviceState, draw
from nanovllm_jax.sampling_rows import packed, sampling_row

MOST_RIVALS = 256  # that may have to be lowered: where a filter's edge runs through a flat distribution, they are many


class Referee:
    """Draws again with the same noise, from logits computed in float32 by a plain forward pass over the whole text.

    The largest error of the same pass in the model's own 16 bits, over the vocabulary, is what 16 bits cost at this
    place. A token could be drawn if there are logits that far from the exact ones which draw it: its own is raised by
    the error, and that of whichever is drawn in its place is lowered by it, once each. (So a token at the edge of
    top_k, top_p or min_p may be in or out.) Where min_p asks, the likeliest token may also be off by the error: its
    edge goes by that one alone, and with it go all that share top_p's part.
    """

    def __init__(self, llm: LLM):
        self.llm = llm
        self.applies = llm.runner.dtype.itemsize == 2

    def is_tie(self, prompt: list[int], params: SamplingParams, index: int, tokens: list[int], pair: tuple) -> bool:
        """Whether either of `pair` could come after `tokens`, of text `index` of a request."""
        if not self.applies or None in pair:
            return False
        llm, seed = self.llm, ((params.seed or 0) + index) % 2**63
        request = llm.check_request(prompt, params)
        seq = request.new_sequence(0, seed, llm.eos_token_ids, llm.max_model_len)
        seq.token_ids.extend(tokens)
        exact, rounded = self._logits(seq.token_ids)
        error = np.abs(exact - rounded).max()
        return all(self._may_draw(seq, exact, token, error) for token in pair)

    def _may_draw(self, seq: Sequence, exact: np.ndarray, token: int, error: float) -> bool:
        likeliest = self._draw(seq, exact, temperature=0.0)
        shifts = (0, -error, error) if seq.params.min_p else (0,)
        return any(self._may_draw_with(seq, exact, {likeliest: shift}, token, error) for shift in shifts)

    def _may_draw_with(self, seq: Sequence, exact: np.ndarray, shifts: dict, token: int, error: float) -> bool:
        logits, rivals = exact.copy(), set()
        for entry, shift in (*shifts.items(), (token, error)):
            logits[entry] += shift
        while len(rivals) < MOST_RIVALS:
            drawn = self._draw(seq, logits)
            if drawn == token or drawn in rivals:
                return drawn == token
            rivals.add(drawn)
            logits[drawn] -= error
        return False

    def _logits(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """After the last token [V]: in float32 and in the model's own dtype."""
        padded = np.zeros(self.llm.max_model_len, np.int32)
        padded[: len(tokens)] = tokens
        with jax.default_matmul_precision("highest"):
            model = self.llm.runner.weights.model
            both = [self._forward(model, padded, len(tokens) - 1, dtype) for dtype in self._dtypes]
        return tuple(map(np.asarray, both))

    @property
    def _dtypes(self) -> tuple[Any, Any]:
        return jnp.dtype("float32"), self.llm.runner.dtype

    @cached_property
    def _forward(self):
        def forward(model, tokens, last, dtype):
            model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
            hidden, _ = model(tokens, jnp.arange(len(tokens)), None, causal_attention)
            return model.logits(hidden[last])

        return jax.jit(forward, static_argnums=3)

    def _draw(self, seq: Sequence, logits: np.ndarray, **changes: float) -> int:
        row = sampling_row(seq)._replace(**changes)
        counts, bias = token_tables(seq, self.llm.eos_token_ids, len(logits))
        state = DeviceState(jnp.zeros(1, jnp.int32), jnp.asarray(counts[None]), jnp.asarray(bias[None]))
        at = jnp.full(1, len(seq.token_ids), jnp.int32)
        args = jnp.asarray(logits)[None], jnp.array([packed(row)]), jnp.zeros(1, jnp.int32), at, state
        return int(self._draw_one(*args)[0][0])

    @cached_property
    def _draw_one(self):
        return jax.jit(draw)
