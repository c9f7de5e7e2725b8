"""What is run: token ids and lengths, the same for every engine. Standard library only: it runs in each environment."""

import random
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """Requests that are timed together."""

    prompts: list[list[int]]
    max_tokens: list[int]
    reusable: list[int] | None = None
    """Tokens of each prompt that a prefix cache can have when the prompt's turn comes; None: no tokens of any."""
    fill: bool = False
    """Put the prompts into the prefix cache before the clock starts."""
    first_alone: bool = False
    """Also time the same prompts with one token out each: what the whole takes longer is decoding."""
    arrivals: list[float] | None = None
    """Seconds after the start at which each request arrives; None: all at once."""

    def describe(self) -> dict:
        """Lengths, and a checksum of the token ids: what a report needs, and what must be equal between engines."""
        return {
            "prompt_tokens": [len(prompt) for prompt in self.prompts],
            "output_tokens": self.max_tokens,
            "reusable_tokens": self.reusable or [0] * len(self.prompts),
            "checksum": zlib.crc32(b"".join(array("i", prompt).tobytes() for prompt in self.prompts)),
            **({} if self.arrivals is None else {"arrivals": self.arrivals}),
        }


@dataclass(frozen=True)
class Sizes:
    """What the workloads are cut to. Where one does not fit in max_model_len, all its lengths are scaled."""

    vocab_size: int
    max_model_len: int
    requests: int | None = None
    """How many in each call, in place of the workload's own number; for tests."""
    batches: list[int] = field(default_factory=lambda: [1, 8, 32, 64, 128, 256, 512])
    contexts: list[int] = field(default_factory=lambda: [128, 1024, 8192, 32768])
    rates: list[float] = field(default_factory=lambda: [4, 16, 64])
    """Arrivals per second of the online workload."""
    seconds: float = 8
    """For how long they arrive."""
    cache_tokens: int = 0
    """What the engine's KV cache holds; the sweep leaves out what does not fit."""
    max_num_seqs: int = 0
    """How many sequences the engine runs at a time; the sweep leaves out larger batches."""

    def scale(self, longest: int) -> Callable[[int], int]:
        """Lengths as they are, or cut by a factor so that `longest` fits."""
        factor = min(1.0, self.max_model_len / longest)
        return lambda length: max(1, int(length * factor))

    def draw(self, rng: random.Random, length: int) -> list[int]:
        """Random token ids."""
        return rng.choices(range(min(10_000, self.vocab_size)), k=length)


def nano(sizes: Sizes) -> Iterator[tuple[str, Call]]:
    """nano-vllm's bench.py: its seed, its order of draws."""
    rng, count, scale = random.Random(0), sizes.requests or 256, sizes.scale(2048)
    low, high, last_id = scale(100), scale(1024), min(10_000, sizes.vocab_size - 1)
    prompts = [[rng.randint(0, last_id) for _ in range(rng.randint(low, high))] for _ in range(count)]
    yield "all", Call(prompts, [rng.randint(low, high) for _ in range(count)])


def single(sizes: Sizes) -> Iterator[tuple[str, Call]]:
    """One sequence alone: 1,000 tokens in, 256 out."""
    scale = sizes.scale(1256)
    yield "all", Call([sizes.draw(random.Random(1), scale(1000))], [max(2, scale(256))], first_alone=True)


def prefill(sizes: Sizes) -> Iterator[tuple[str, Call]]:
    """64 prompts of 1,024 tokens, one token out."""
    rng, count, length = random.Random(2), sizes.requests or 64, sizes.scale(1025)(1024)
    yield "all", Call([sizes.draw(rng, length) for _ in range(count)], [1] * count)


SWEEP_STEPS = 64


def sweep(sizes: Sizes) -> Iterator[tuple[str, Call]]:
    """Decode at every batch and context that fits: of the prompts' cached blocks nothing is computed again.

    Twice, with one token out and with 65: prefill is in both, and the difference is 64 steps of decoding.
    """
    for context in sizes.contexts:
        longest = context + 1 + SWEEP_STEPS + 1
        for batch in sizes.batches:
            needed = batch * -(-longest // 256) * 256  # in whole blocks; and a few must stay free
            if longest > sizes.max_model_len or batch > sizes.max_num_seqs or needed > 0.97 * sizes.cache_tokens:
                continue
            rng = random.Random(context * 1000 + batch)
            prompts = [sizes.draw(rng, context + 1) for _ in range(batch)]
            yield (
                f"{batch} x {context}",
                Call(prompts, [1 + SWEEP_STEPS] * batch, reusable=[context] * batch, fill=True, first_alone=True),
            )


def shared(sizes: Sizes) -> Iterator[tuple[str, Call]]:
    """8 system prompts of 2,048 tokens, in mixed order 256 questions of 32 to 256 tokens to them; 128 tokens out."""
    rng, scale, count = random.Random(3), sizes.scale(2432), sizes.requests or 256
    prefixes = [sizes.draw(rng, scale(2048)) for _ in range(8)]
    prompts, reusable, seen = [], [], set()
    for _ in range(count):
        which = rng.randrange(8)
        prompts.append(prefixes[which] + sizes.draw(rng, rng.randint(scale(32), scale(256))))
        reusable.append(len(prefixes[which]) if which in seen else 0)
        seen.add(which)
    yield "all", Call(prompts, [scale(128)] * count, reusable=reusable)


def online(sizes: Sizes) -> Iterator[tuple[str, Call]]:
    """Poisson arrivals, 100 to 1,000 tokens in (every 16th request 3,500) and 50 to 250 out."""
    scale = sizes.scale(3750)
    for rate in sizes.rates:
        rng, count = random.Random(int(rate * 1000)), sizes.requests or max(16, int(rate * sizes.seconds))
        arrivals, now = [], 0.0
        for _ in range(count):
            now += rng.expovariate(rate)
            arrivals.append(now)
        # The long ones come in the middle of sixteen, when others are decoding.
        lengths = [scale(3500) if i % 16 == 8 else rng.randint(scale(100), scale(1000)) for i in range(count)]
        prompts = [sizes.draw(rng, length) for length in lengths]
        outputs = [max(2, rng.randint(scale(50), scale(250))) for _ in range(count)]
        yield f"{rate:g}/s", Call(prompts, outputs, arrivals=arrivals)


WORKLOADS = {build.__name__: build for build in (nano, single, prefill, sweep, shared, online)}
