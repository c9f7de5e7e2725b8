"""How far a rollout's log probabilities are from the trainer's, by the way in which the engine computed them.

python scripts/measure_gap.py --model DIRECTORY [--load-format dummy] [--options '{"deterministic": true}']
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from options import checkpoint, count, json_object, refusals

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.training import token_logprobs

LENGTHS = (5, 100, 256, 300, 700)  # of the prompts, over and over
NEW_TOKENS = 100
SHARED = 256  # tokens that every other prompt begins with
LONGEST = SHARED + max(LENGTHS) + NEW_TOKENS


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    """Random prompts, of which every other one begins as the one before it does."""
    rng, prompts = np.random.default_rng(0), []
    for i in range(count):
        prompt = rng.integers(0, vocab, LENGTHS[i % len(LENGTHS)]).tolist()
        prompts.append(prompts[-1][:SHARED] + prompt if i % 2 else prompt)
    return prompts


class Trainer:
    """The training forward with the engine's own weights."""

    def __init__(self, llm: LLM):
        self.model = llm.model
        self.logprobs = jax.jit(lambda model, tokens: token_logprobs(model, tokens[None])[0])

    def __call__(self, prompt: list[int], completion: list[int]) -> np.ndarray:
        """[len(completion)] float32."""
        length = len(prompt) + len(completion)
        padded = np.zeros(LONGEST, np.int32)
        padded[:length] = [*prompt, *completion]
        return np.asarray(self.logprobs(self.model, padded))[len(prompt) : length]


def measure(llm: LLM, count: int = 32) -> dict[str, np.ndarray]:
    """For each path, its log probabilities less the trainer's, token by token."""
    trainer, prompts = Trainer(llm), prompts_of(count, llm.model_config.vocab_size)
    params = SamplingParams(temperature=1, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    gaps: dict[str, list[np.ndarray]] = {}

    def sample(name: str, prompts: list[list[int]]) -> list[list[int]]:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        for prompt, output in zip(prompts, outputs):
            own = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids)]
            gaps.setdefault(name, []).append(np.array(own) - trainer(prompt, output.token_ids))
        return [output.token_ids for output in outputs]

    def score(name: str, prompts: list[list[int]], completions: list[list[int]]) -> None:
        for prompt, completion, own in zip(prompts, completions, llm.score(prompts, completions, use_tqdm=False)):
            gaps.setdefault(name, []).append(np.array(own) - trainer(prompt, completion))

    for prompt in prompts[:4]:
        sample("sampled alone", [prompt])
    completions = sample(f"sampled in a batch of {count}", prompts)
    llm.reset_prefix_cache()
    score("scored together", prompts, completions)
    score("scored, prefixes cached", prompts, completions)
    llm.reset_prefix_cache()
    for prompt, completion in zip(prompts[:8], completions):
        score("scored one by one", [prompt], [completion])
    return {name: np.concatenate(parts) for name, parts in gaps.items()}


def table(gaps: dict[str, np.ndarray]) -> str:
    """A line a path; the ratio is what importance sampling sees of a token: exp(trainer - engine)."""
    lines = ["| path | tokens | mean gap | mean abs. | 99 in 100 below | largest | ratio, mean |", "|---" * 7 + "|"]
    for name, gap in gaps.items():
        size = np.abs(gap)
        numbers = gap.mean(), size.mean(), np.quantile(size, 0.99), size.max()
        columns = " | ".join(f"{number:.2e}" for number in numbers)
        lines.append(f"| {name} | {len(gap)} | {columns} | {np.exp(-gap).mean():.6f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=checkpoint, default=TINY_MODEL)
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--prompts", type=count, default=32)
    parser.add_argument("--options", type=json_object, default={}, help="more options of LLM, as JSON")
    args = parser.parse_args()
    options = dict(load_format=args.load_format, max_model_len=2048, gpu_memory_utilization=0.7)  # room for the trainer
    with refusals():
        llm = LLM(**dict(model=args.model) | options | args.options)
    print(jnp.dtype(llm.runner.dtype).name, jax.devices()[0].device_kind, f"jax {jax.__version__}")
    print(table(measure(llm, args.prompts)))


if __name__ == "__main__":
    main()
