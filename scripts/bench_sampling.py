"""Time what makes tokens of logits: each sampling kernel alone, and the whole `draw` of a step, for one setting a line.

    python scripts/bench_sampling.py                      # 256 rows, a vocabulary of 151,936
    python scripts/bench_sampling.py --rows 8 --only temperature everything

All rows share the setting. Each figure is in microseconds, beside the share of it that reading and writing every array
once would take; a kernel that no row asks for has no such limit. `draw` starts from logits that the same program has
made, and the time of making them is taken off. A call's time is that of a program of several, divided by their number;
the median of several runs is printed. On a GPU the results are compared with the oracles'.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from benchmark.timing import seconds_per_run
from jax import lax
from nanovllm_jax.kernels import (
    adjust_logits,
    noisy_argmax,
    reference_sampling,
    sampling,
    sampling_threshold,
    token_logprobs,
)
from options import add_card, count

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.tables import ENDS, PROMPT
from nanovllm_jax.models.draw import DeviceState, draw
from nanovllm_jax.sampling_rows import packed, sampling_row

CALLS = 4  # to a program, each on logits of its own
CONTEXT = 1000  # tokens of each sequence, half of them its prompt
PENALTIES = dict(repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1)
NUCLEUS = dict(top_k=20, top_p=0.95)

SETTINGS = {  # a name, SamplingParams, and the kind of logits
    "greedy": (dict(temperature=0), "peaked"),
    "temperature": (dict(), "peaked"),
    "top_k": (dict(top_k=20), "peaked"),
    "top_k+top_p": (NUCLEUS, "peaked"),
    "top_p-flat": (dict(top_p=0.95), "flat"),
    "top_p-peaked": (dict(top_p=0.95), "peaked"),
    "min_p": (dict(min_p=0.05), "peaked"),
    "penalties": (PENALTIES, "peaked"),
    "logprobs": (dict(logprobs=20), "peaked"),
    "everything": (
        dict(**NUCLEUS, **PENALTIES, min_p=0.05, min_tokens=10, max_tokens=None, logit_bias={5: 1.0}, logprobs=20),
        "peaked",
    ),
}


def make_logits(kind: str, key: jax.Array, rows: int, vocab: int) -> jax.Array:
    """Flat: 95 percent of the probability is in a third of the entries. Peaked: as a language model's, in a few."""
    noise, places, heights = jax.random.split(key, 3)
    logits = jax.random.normal(noise, (rows, vocab))
    if kind == "flat":
        return logits
    at = jax.random.randint(places, (rows, 40), 0, vocab)
    return 2 * logits.at[jnp.arange(rows)[:, None], at].add(jax.random.uniform(heights, at.shape, maxval=8))


def make_state(rng: np.random.Generator, rows: int, vocab: int) -> DeviceState:
    """Tables of sequences half of whose tokens are generated, and two of whose tokens would end them."""
    counts = np.zeros((rows + 1, vocab), np.int32)
    for line in counts:
        np.add.at(line, rng.integers(0, vocab, CONTEXT // 2), 1)
        line[rng.integers(0, vocab, CONTEXT // 2)] |= PROMPT
        line[:2] |= ENDS
    bias = rng.standard_normal(counts.shape, np.float32)
    return DeviceState(jnp.zeros(rows + 1, jnp.int32), jnp.asarray(counts), jnp.asarray(bias))


def make_rows(settings: dict, rows: int) -> jax.Array:
    """[R, 12] int32: every row with these SamplingParams, as the engine packs them."""
    lines, params = [], SamplingParams(**settings)
    for i in range(rows):
        seq = Sequence(i, "", [0] * (CONTEXT // 2), params, seed=i, min_len=2 * CONTEXT, max_len=4 * CONTEXT)
        lines.append(packed(sampling_row(seq)))
    return jnp.array(lines, jnp.int32)


def seconds_per_call(call, inputs: list[tuple], state: tuple = ()) -> float:
    """call(*inputs[i], *state) returns an output, and the next state."""

    def chain(state, inputs):
        outputs = []
        for one in inputs:
            output, *state = call(*one, *state)
            outputs.append(output)
        return outputs, state

    program = jax.jit(chain, donate_argnums=0).lower(list(state), inputs).compile()
    return seconds_per_run(program, state, inputs) / len(inputs)


def make_and_draw(scale, logits, sampling, slots, context_lens, *state):
    """`draw` where nobody else holds the logits, as in a step."""
    (made,) = make(scale, logits)
    *outputs, state = draw(made, sampling, slots, context_lens, DeviceState(*state))
    return outputs, *state


def make(scale, logits):
    return [lax.optimization_barrier(logits * scale)]


def adjust(*args):
    *settings, logits = args
    return adjust_logits(logits, *settings)[::-1]  # the state last: the new logits are in place of the old


def only(function):
    """A call without a state."""
    return lambda *args: [function(*args)]


class Bench:
    """One setting: the inputs of each part."""

    def __init__(self, name: str, rows: int, vocab: int):
        settings, kind = SETTINGS[name]
        keys = jax.random.split(jax.random.key(0), CALLS)
        self.logits = [jax.jit(make_logits, static_argnums=(0, 2, 3))(kind, key, rows, vocab) for key in keys]
        self.state = make_state(np.random.default_rng(0), rows, vocab)
        self.sampling = make_rows(settings, rows)
        self.slots, self.context_lens = jnp.arange(rows), jnp.full(rows, CONTEXT)
        tokens = jnp.argmax(self.logits[0], axis=1).astype(jnp.int32)
        tables = self.state.token_counts, self.state.logit_bias
        self.adjust = self.sampling, self.slots, self.context_lens, *tables
        self.sample = self.sampling, self.context_lens, jnp.full(rows, -1.0)
        self.logprobs = self.sampling, tokens
        adjusts, self.num_top, *cuts = sampling.settings(self.sampling, ("adjusts", "num_top", *sampling.CUTS), row=0)
        passes = dict(  # over the logits or what is as large
            adjust=5 * adjusts,  # logits, counts and bias come in, old and new logits go out
            threshold=sampling.asks_threshold(*cuts, vocab),
            sample=1,
            logprobs=self.num_top >= 0,
        )
        self.bytes = {part: 4.0 * rows * vocab * int(count) for part, count in passes.items()}
        self.bytes["draw"] = sum(self.bytes.values())

    def seconds(self) -> dict[str, float]:
        """Of each part."""
        scaled, rest = [(jnp.float32(1), x) for x in self.logits], (self.sampling, self.slots, self.context_lens)
        whole = seconds_per_call(make_and_draw, [(*inputs, *rest) for inputs in scaled], self.state)
        return dict(
            adjust=seconds_per_call(adjust, [self.adjust] * CALLS, (self.logits[0],)),
            threshold=seconds_per_call(only(sampling_threshold), [(x, self.sampling) for x in self.logits]),
            sample=seconds_per_call(only(noisy_argmax), [(x, *self.sample) for x in self.logits]),
            logprobs=seconds_per_call(only(token_logprobs), [(x, x, *self.logprobs) for x in self.logits]),
            draw=whole - seconds_per_call(make, scaled),
        )

    def errors(self) -> str:
        """How far the kernels are from the oracles."""
        logits = self.logits[0]

        def both(function, *args):
            oracle = getattr(reference_sampling, function.__name__)
            return zip(*(jax.tree.leaves(jax.jit(f)(*args)) for f in (function, oracle)))

        ((new, expected), _) = both(adjust_logits, logits, *self.adjust)
        ((low, oracles_low),) = both(sampling_threshold, logits, self.sampling)
        differently = ((logits >= low[:, None]) != (logits >= oracles_low[:, None])).sum()
        ((drawn, oracles_drawn), _) = both(noisy_argmax, logits, *self.sample)
        text = f"adjusted {jnp.nanmax(jnp.abs(new - expected)):.0e}, kept differently {differently}"
        text += f", drawn differently {(drawn != oracles_drawn).sum()}"
        if self.num_top >= 0:
            (pair,) = both(token_logprobs, logits, logits, *self.logprobs)
            (ids, values), (wanted, oracles) = (jnp.moveaxis(x[:, :, : 1 + self.num_top], 1, 0) for x in pair)
            text += f", ranks and ids {jnp.abs(ids - wanted).max()}"
            text += f", logprobs {jnp.abs(values.view(jnp.float32) - oracles.view(jnp.float32)).max():.0e}"
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=count, default=256)
    parser.add_argument("--vocab", type=count, default=151_936)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add_card(parser, "bandwidth")
    args = parser.parse_args()
    title = f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {args.rows} rows, vocabulary {args.vocab}"
    print(f"{title}; limit: {args.bandwidth:g} TB/s")
    for name in args.only:
        bench = Bench(name, args.rows, args.vocab)
        if name == args.only[0]:
            print(f"{'us, % of the limit':18}" + "".join(f"{part:>15}" for part in bench.bytes))
        cells = ""
        for part, seconds in bench.seconds().items():
            share = bench.bytes[part] / args.bandwidth / 1e12 / seconds
            cells += f"{seconds * 1e6:9.1f}" + (f" {share:4.0%} " if share else " " * 6)
        print(f"{name:18}{cells}", flush=True)
        if jax.default_backend() == "gpu":
            print(f"{'':18}  largest differences: {bench.errors()}", flush=True)


if __name__ == "__main__":
    main()
