"""Teach the embedded tiny model by reinforcement: GRPO, with this engine's rollouts and the same modules' gradients.

    python scripts/rl_tiny.py --minutes 10                              (a GPU)
    python scripts/rl_tiny.py --steps 25 --prompts 16 --samples 8       (a CPU)

Each step asks questions, samples a group of answers to each, rewards the right ones, and moves the weights towards what
was better than its group (Shao et al., 2024), in place. One process, one set of weights, no files in between.

Shapes: M minibatches of a step, B sequences of each, T tokens of a sequence.
"""

import argparse
import math
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from options import above_zero, count, from_zero, picture, refusals, seed, writing

from nanovllm_jax import LLM, RequestOutput, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL, load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.parallel.sharding import make_mesh
from nanovllm_jax.tiny.tasks import ROOM_TO_GROW, UNSEEN, Problem, draw, held_out_problems
from nanovllm_jax.training import cast, token_logprobs

MAX_TOKENS = 32  # of an answer
MINIBATCHES = 2  # optimizer steps on each batch of rollouts
CLIP = 0.2  # how far a token's probability ratio may go before its gradient ends
FEWEST_ROWS, LENGTH_STEP = 16, 32  # rows are padded to a power of two, lengths to a multiple: few programs
WARM_UP = 10  # optimizer steps
HELD_OUT = 100


class Rollouts(NamedTuple):
    """Sampled answers, ready to learn from; a step's arrays have M as their first dimension."""

    tokens: np.ndarray
    """[B, T] int32: a prompt, an answer, padding."""
    sampled: np.ndarray
    """[B, T] bool: the answer's tokens."""
    logprobs: np.ndarray
    """[B, T] float32: the engine's, when it sampled them; 0 elsewhere."""
    advantages: np.ndarray
    """[B] float32: reward less the group's mean, over its standard deviation."""


class Gap(NamedTuple):
    """Between the engine's log probabilities of what it sampled and the trainer's, under the same weights."""

    mean: jax.Array
    max: jax.Array


class Step(NamedTuple):
    """A line of the table."""

    step: int
    seconds: float
    reward: float
    """Share of right answers among the samples."""
    held_out: float
    """Right greedy answers to held-out questions, in percent, when last measured."""
    rollout_rate: float
    """Sampled tokens per second of sampling."""
    train_rate: float
    """Tokens per second of training, padding included."""
    gap_mean: float
    gap_max: float


class Trainer(NamedTuple):
    """What stays the same from step to step."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    compute_dtype: jnp.dtype
    kl: float
    """Weight of the divergence from the first weights; 0 leaves it out."""

    def logprobs(self, params: nnx.State, tokens: jax.Array) -> jax.Array:
        return token_logprobs(nnx.merge(self.graph, cast(params, self.compute_dtype)), tokens)

    def loss(self, params: nnx.State, start: nnx.State, batch: Rollouts) -> tuple[jax.Array, Gap]:
        """The clipped objective of PPO and GRPO, a mean over tokens; and how far engine and trainer are apart."""
        logprobs = self.logprobs(params, batch.tokens)
        difference, advantages = logprobs - batch.logprobs, batch.advantages[:, None]
        ratio = jnp.exp(difference)
        gains = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
        if self.kl:
            rest = self.logprobs(start, batch.tokens) - logprobs  # Schulman's k3 estimate: positive, unbiased
            gains -= self.kl * (jnp.exp(rest) - rest - 1)
        count, apart = jnp.maximum(jnp.sum(batch.sampled), 1), jnp.abs(difference) * batch.sampled
        return -jnp.sum(gains * batch.sampled) / count, Gap(jnp.sum(apart) / count, jnp.max(apart))

    def update(self, params: nnx.State, state: optax.OptState, start: nnx.State, batches: Rollouts):
        """M optimizer steps: new params and state, and the gap before the first of them."""

        def step(carry, batch):
            params, state = carry
            gradients, gap = jax.grad(self.loss, has_aux=True)(params, start, batch)
            updates, state = self.optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), gap

        (params, state), gaps = jax.lax.scan(step, (params, state), batches)
        return params, state, jax.tree.map(lambda gap: gap[0], gaps)


def ask(llm: LLM, problems: list[Problem], params: SamplingParams) -> list[RequestOutput]:
    conversations = [problem.messages for problem in problems]
    return llm.chat(conversations, params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})


def held_out_accuracy(llm: LLM, problems: list[Problem]) -> float:
    """Right greedy answers in percent."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = ask(llm, problems, params)
    return 100 * float(np.mean([problem.is_right(out["text"]) for problem, out in zip(problems, outputs)]))


def sample(llm: LLM, problems: list[Problem], samples: int) -> tuple[list[RequestOutput], np.ndarray]:
    """A group of answers to each problem, and their rewards [problems, samples]: 1 for the right answer, else 0."""
    params = SamplingParams(n=samples, temperature=1, max_tokens=MAX_TOKENS, logprobs=0)
    outputs = ask(llm, problems, params)
    rewards = [[problem.is_right(text.text) for text in out.outputs] for problem, out in zip(problems, outputs)]
    return outputs, np.array(rewards, np.float32)


def to_rollouts(outputs: list[RequestOutput], rewards: np.ndarray, rng: Random) -> Rollouts:
    """Arrays of all answers, in random order, cut into minibatches."""
    spread = rewards.std(axis=1, keepdims=True)
    advantages = ((rewards - rewards.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-6)).ravel()
    texts = [(out.prompt_token_ids, text) for out in outputs for text in out.outputs]
    taught = np.flatnonzero(advantages)  # where a group did equally well, there is nothing to learn
    rows = max(FEWEST_ROWS, 1 << (len(taught) - 1).bit_length())
    longest = max(len(prompt) + len(text.token_ids) for prompt, text in texts)
    shape = rows, -(-longest // LENGTH_STEP) * LENGTH_STEP
    tokens, sampled, logprobs = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, index in enumerate(taught):
        prompt, text = texts[index]
        answer = slice(len(prompt), len(prompt) + len(text.token_ids))
        tokens[row, : answer.stop] = prompt + text.token_ids
        sampled[row, answer] = True
        logprobs[row, answer] = [entry[token].logprob for token, entry in zip(text.token_ids, text.logprobs)]
    order = np.array(rng.sample(range(rows), rows)).reshape(MINIBATCHES, -1)
    advantages = np.pad(advantages[taught], (0, rows - len(taught)))
    return Rollouts(*(array[order] for array in (tokens, sampled, logprobs, advantages)))


def train(options: argparse.Namespace) -> list[Step]:
    """Run until the steps or minutes are used up, printing the table; returns its lines."""
    config, on_gpu = ModelConfig.from_pretrained(TINY_MODEL), jax.default_backend() == "gpu"
    # The pool is small, for the trainer's arrays share the GPU with it.
    with refusals():
        llm = LLM(
            TINY_MODEL,
            max_model_len=128,
            block_size=16,
            max_num_seqs=min(options.prompts * options.samples, 1024 if on_gpu else 64),
            num_kvcache_blocks=8 * 1024,
            seed=options.seed,
        )
    mesh = make_mesh(1)
    graph, params = nnx.split(load_model(TINY_MODEL, config, dtype=jnp.float32, mesh=mesh))
    rate = optax.linear_schedule(0, options.learning_rate, WARM_UP)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    trainer = Trainer(graph, optimizer, jnp.bfloat16 if on_gpu else jnp.float32, options.kl)
    # On a mesh, like the parameters: a step's results are then of the same kind as what it began with.
    state = jax.device_put(optimizer.init(params), NamedSharding(mesh, PartitionSpec()))
    start, update = params, jax.jit(trainer.update)

    rng, held_out = Random(options.seed), held_out_problems(options.task, HELD_OUT)
    accuracy, steps, shown, begin = held_out_accuracy(llm, held_out), [], 0.0, time.monotonic()
    print(f"{accuracy:.0f} of {HELD_OUT} held-out questions of {options.task!r} are answered right before training\n")
    print(" step seconds reward held-out  sampled/s trained/s  gap: mean     max")
    while (progress := _progress(options, len(steps), begin)) < 1:
        problems = [draw(options.task, rng, held_out=False) for _ in range(options.prompts)]
        clock = time.monotonic()
        outputs, rewards = sample(llm, problems, options.samples)
        sampling = time.monotonic() - clock
        batches = to_rollouts(outputs, rewards, rng)
        clock = time.monotonic()
        params, state, gap = jax.block_until_ready(update(params, state, start, batches))
        training = time.monotonic() - clock
        llm.update_weights(nnx.merge(graph, params))
        if progress - shown >= 0.05:
            accuracy, shown = held_out_accuracy(llm, held_out), progress
        generated = sum(len(text.token_ids) for out in outputs for text in out.outputs)
        rates = generated / sampling, batches.tokens.size / training
        seconds = time.monotonic() - begin
        steps.append(Step(len(steps) + 1, seconds, float(rewards.mean()), accuracy, *rates, *map(float, gap)))
        _print(steps[-1])
    if not steps:  # the time was over before the first
        return steps
    accuracy = held_out_accuracy(llm, held_out)
    steps[-1] = steps[-1]._replace(held_out=accuracy)
    print(f"\n{accuracy:.0f} of {HELD_OUT} held-out questions are answered right after {seconds:.0f} seconds")
    return steps


def _progress(options: argparse.Namespace, steps: int, begin: float) -> float:
    return max(steps / options.steps, (time.monotonic() - begin) / (60 * options.minutes))


def _print(s: Step) -> None:
    rates = f"{s.rollout_rate:10.0f} {s.train_rate:9.0f}"
    print(
        f"{s.step:5} {s.seconds:7.1f} {s.reward:6.3f} {s.held_out:8.0f} {rates} {s.gap_mean:10.1e} {s.gap_max:.1e}",
        flush=True,
    )


def plot(steps: list[Step], path: Path, title: str) -> None:
    """Reward and accuracy, tokens per second, and the gap, by step."""
    from matplotlib.figure import Figure

    lines = Step(*map(np.array, zip(*steps)))
    figure = Figure(figsize=(8, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    top.plot(lines.step, 100 * lines.reward, lw=0.8, label="right samples, %")
    top.plot(lines.step, lines.held_out, lw=2, label="right held-out answers (greedy), %")
    middle.plot(lines.step, lines.rollout_rate, label="sampled tokens per second of sampling")
    middle.plot(lines.step, lines.train_rate, label="trained tokens per second of training")
    bottom.plot(lines.step, lines.gap_max, lw=0.8, label="largest |engine's - trainer's log probability|")
    bottom.plot(lines.step, lines.gap_mean, label="mean")
    for axes, scale in ((top, "linear"), (middle, "log"), (bottom, "log")):
        axes.set_yscale(scale)
        axes.grid(alpha=0.3)
        axes.legend()
    top.set_title(title)
    bottom.set_xlabel("step")
    with writing(path):
        figure.savefig(path, dpi=120)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*UNSEEN, *ROOM_TO_GROW], default="listed", help="what to learn")
    parser.add_argument("--minutes", type=above_zero, default=math.inf, help="stop after this time")
    parser.add_argument("--steps", type=above_zero, default=math.inf, help="stop after this many steps")
    parser.add_argument("--prompts", type=count, default=128 if on_gpu else 16, help="questions a step")
    parser.add_argument("--samples", type=int, default=16 if on_gpu else 8, help="answers to each")
    parser.add_argument("--learning-rate", type=above_zero, default=5e-5)
    parser.add_argument("--kl", type=from_zero, default=0.0, help="weight of the divergence from the first weights")
    parser.add_argument("--plot", type=picture, help="write a plot to this file")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(arguments)
    if not (options.minutes < math.inf or options.steps < math.inf):
        parser.error("say how long to train: --minutes or --steps")
    if options.samples < 2:
        parser.error(f"--samples must be 2 or more, to tell good from bad, not {options.samples}")
    return options


def main() -> None:
    options = parse_options()
    steps = train(options)
    if options.plot and steps:
        plot(steps, options.plot, f"GRPO on {options.task!r}, {jax.devices()[0].device_kind}")
        print(f"Plot written to {options.plot}")


if __name__ == "__main__":
    main()
