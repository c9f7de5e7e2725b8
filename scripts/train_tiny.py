"""Train the tiny Qwen3 that the package ships, on text that it makes itself, and write a Hugging Face directory.

    python scripts/train_tiny.py --out tiny-qwen3 --minutes 4        (a GPU)
    python scripts/train_tiny.py --out tiny-qwen3 --minutes 240      (a CPU)

Shapes: S steps of one dispatch, R rows, T tokens of a row, N query heads, K kv heads, G = N / K, H head_dim, V vocab.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from options import above_zero, count, new_directory, refusals, seed
from tokenizers import Tokenizer

from nanovllm_jax.checkpoints.huggingface import make_target, save_pretrained
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.layers.attention import split_norm_rope
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.tiny.conversations import chat_segments, training_conversation
from nanovllm_jax.tiny.data import Batch, batches_ahead, encode, pack
from nanovllm_jax.tiny.tasks import ALL_TASKS, held_out_problems
from nanovllm_jax.tiny.tokenizer import END_OF_MESSAGE, END_OF_TEXT, save_tokenizer, train_tokenizer
from nanovllm_jax.training import cast

VOCAB_SIZE = 512
TOKENIZER_TEXTS = 20_000  # conversations that the tokenizer is trained on
ROW_LENGTH = 256
STEPS_PER_DISPATCH = 8  # a step is shorter than its dispatch
WARM_UP_STEPS = 200
EVALUATIONS = 10


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within each conversation of a packed row."""

    conversations: jax.Array
    """[R, T] int32: equal where tokens belong together."""

    def __call__(self, qkv, q_norm, k_norm, cos, sin, cache: None) -> tuple[jax.Array, None]:
        """qkv [R, T, K, G + 2, H] -> [R, T, N, H]; as layers.attention.CausalAttention."""
        q, k, v = split_norm_rope(qkv, q_norm, k_norm, cos, sin)
        same = self.conversations[:, None, :, None] == self.conversations[:, None, None, :]  # (R, 1, T, T)
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True), None


class Trainer(NamedTuple):
    """The model's structure and the optimizer: what stays the same from step to step."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    compute_dtype: jnp.dtype

    def logits(self, params: nnx.State, batch: Batch) -> jax.Array:
        """The prediction at each token of what follows it: [R, T, V] float32."""
        model = nnx.merge(self.graph, cast(params, self.compute_dtype))
        attend = PackedAttention(jnp.cumsum(batch.positions == 0, axis=-1))
        hidden, _ = model(batch.tokens.astype(jnp.int32), batch.positions.astype(jnp.int32), None, attend)
        return model.logits(hidden)

    def loss(self, params: nnx.State, batch: Batch) -> jax.Array:
        """Mean cross-entropy in nats of the learned tokens."""
        logits, targets = self.logits(params, batch)[:, :-1], batch.tokens[:, 1:].astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        learned = batch.learned[:, 1:]
        return jnp.sum(losses * learned) / jnp.maximum(jnp.sum(learned), 1)

    def steps(self, state: tuple, batches: Batch, learning_rate: jax.Array) -> tuple[tuple, jax.Array]:
        """S optimizer steps on batches of [S, R, T]: the new state (params, optimizer state) and the mean loss."""

        def step(state, batch):
            params, optimizer_state = state
            loss, gradients = jax.value_and_grad(self.loss)(params, batch)
            updates, optimizer_state = self.optimizer.update(gradients, optimizer_state, params)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
            return (params, optimizer_state), loss

        state, losses = jax.lax.scan(step, state, batches)
        return state, jnp.mean(losses)

    def mistakes(self, params: nnx.State, batch: Batch) -> jax.Array:
        """[R, T] bool: learned tokens that are not the model's first choice."""
        wrong = jnp.argmax(self.logits(params, batch)[:, :-1], axis=-1) != batch.tokens[:, 1:]
        return jnp.pad(wrong, ((0, 0), (1, 0))) & batch.learned


class HeldOut(NamedTuple):
    """Held-out problems of every task, packed."""

    batches: list[Batch]
    tasks: list[str]
    """Each problem's task, in packed order."""

    @classmethod
    def of_every_task(cls, tokenizer: Tokenizer, count: int, rows: int) -> "HeldOut":
        """`count` problems a task, every second one with the empty think block before its answer."""
        tasks, conversations = [], []
        for task in ALL_TASKS:
            for i, problem in enumerate(held_out_problems(task, count)):
                *prompt, answer = chat_segments(problem.turns, None, thinking=i % 2 == 0)
                conversations.append([*(segment._replace(learned=False) for segment in prompt), answer])
                tasks.append(task)
        packed = pack(iter(encode(tokenizer, conversations)), len(conversations), ROW_LENGTH)
        used = math.ceil(packed.learned.any(axis=1).sum() / rows) * rows
        return cls([Batch(*(x[i : i + rows] for x in packed)) for i in range(0, used, rows)], tasks)

    def accuracy(self, mistakes: Callable[[Batch], jax.Array]) -> dict[str, float]:
        """Right answers of each task, in percent.

        An answer is right when each of its tokens is the first choice after the right ones before it: then, and only
        then, greedy decoding writes just this answer.
        """
        wrong = np.concatenate([np.asarray(mistakes(batch)).ravel() for batch in self.batches])
        _, positions, learned = (np.concatenate(parts).ravel() for parts in zip(*self.batches))
        conversation = np.cumsum(positions == 0) - 1
        is_problem = np.bincount(conversation, learned) > 0  # padding tokens count as conversations of their own
        right = (np.bincount(conversation, wrong) == 0)[is_problem]
        tasks = np.array(self.tasks)
        return {task: 100 * float(right[tasks == task].mean()) for task in ALL_TASKS}


def schedule(step: int, progress: float) -> float:
    """The learning rate's factor: a linear warm-up in steps, a cosine to 1 % over the run's steps or minutes."""
    return min((step + 1) / WARM_UP_STEPS, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the clock."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )


def train(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, batches: Iterator[Batch], options: argparse.Namespace
) -> dict[str, float]:
    """Train the model in place until the steps or minutes are used up; returns the held-out accuracies."""
    graph, params = nnx.split(model)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    trainer = Trainer(graph, make_optimizer(), dtype)
    state = (params, trainer.optimizer.init(params))
    run_steps, mistakes = jax.jit(trainer.steps, donate_argnums=0), jax.jit(trainer.mistakes)
    held_out = HeldOut.of_every_task(tokenizer, options.problems, options.rows)
    print(f"{'done':>5} {'steps':>6} {'Mtok/s':>6} {'loss':>7}", *(f"{task:>8}" for task in ALL_TASKS))

    start, step, progress, shown, losses = time.monotonic(), 0, 0.0, 0.0, []
    while progress < 1:
        stacked = Batch(*map(np.stack, zip(*(next(batches) for _ in range(STEPS_PER_DISPATCH)))))
        state, loss = run_steps(state, stacked, options.learning_rate * schedule(step, progress))
        losses.append(loss)
        losses[:-1] = map(float, losses[:-1])  # waits for the dispatch before this one: the device is one ahead
        step += STEPS_PER_DISPATCH
        elapsed = time.monotonic() - start
        progress = max(step / options.steps, elapsed / (60 * options.minutes))
        if progress >= 1 or progress - shown >= 1 / EVALUATIONS:
            accuracy = held_out.accuracy(partial(mistakes, state[0]))
            rate = step * options.rows * ROW_LENGTH / elapsed / 1e6
            columns = (f"{accuracy[task]:8.0f}" for task in ALL_TASKS)
            recent = np.mean([float(loss) for loss in losses])
            print(f"{min(progress, 1):5.0%} {step:6} {rate:6.2f} {recent:7.4f}", *columns, flush=True)
            shown, losses = progress, []
    nnx.update(model, state[0])
    return accuracy


def model_config(options: argparse.Namespace) -> ModelConfig:
    """The tiny model's shape."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def write_checkpoint(model: Qwen3ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the Hugging Face directory, in bfloat16."""
    save_pretrained(model, directory, jnp.bfloat16)
    save_tokenizer(tokenizer, directory, model.config.max_position_embeddings)
    end_of_text, end_of_message = map(tokenizer.token_to_id, (END_OF_TEXT, END_OF_MESSAGE))
    generation = {
        "do_sample": True,
        "eos_token_id": [end_of_message, end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=new_directory, required=True, help="directory to write")
    parser.add_argument("--minutes", type=above_zero, default=math.inf, help="stop training after this time")
    parser.add_argument(
        "--steps",
        type=above_zero,
        default=math.inf,
        help=f"stop after so many, a multiple of {STEPS_PER_DISPATCH}",
    )
    parser.add_argument("--rows", type=count, default=128 if on_gpu else 16, help=f"rows of {ROW_LENGTH} tokens a step")
    parser.add_argument("--workers", type=int, default=8 if on_gpu else 0, help="processes that make batches")
    parser.add_argument("--problems", type=count, default=100 if on_gpu else 20, help="held-out questions a task")
    parser.add_argument("--learning-rate", type=above_zero, default=1.5e-3, help="its peak")
    parser.add_argument("--hidden", type=count, default=384, help="hidden size")
    parser.add_argument("--layers", type=count, default=3, help="decoder layers")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args()
    if not (options.minutes < math.inf or options.steps < math.inf):
        parser.error("say how long to train: --minutes or --steps")
    if options.workers < 0:
        parser.error(f"--workers must be 0 or more, not {options.workers}")
    try:  # rather now than after the training
        make_target(options.out)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be a directory: {error}")
    except ValueError as error:
        parser.error(f"--out {error}")
    return options


def main() -> None:
    options = parse_options()
    with refusals():
        config = model_config(options)
    rng = Random(options.seed)
    texts = [segment.text for _ in range(TOKENIZER_TEXTS) for segment in training_conversation(rng)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    model = Qwen3ForCausalLM(config, rngs=nnx.Rngs(options.seed))
    print(f"{model.config.num_parameters:,} parameters on {jax.devices()[0].device_kind}")
    with batches_ahead(tokenizer, options.seed, options.rows, ROW_LENGTH, options.workers) as batches:
        accuracy = train(model, tokenizer, batches, options)
    write_checkpoint(model, tokenizer, options.out)
    print(f"\nRight answers of {options.problems} held-out questions, in percent:")
    for task, percent in accuracy.items():
        print(f"  {task:10} {percent:5.1f}")
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
