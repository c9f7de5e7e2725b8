"""Generate with a Qwen3: the embedded tiny one by default, or any checkpoint.

python scripts/example.py
python scripts/example.py --model Qwen/Qwen3-0.6B --prompt "introduce yourself"
"""

import argparse

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL

PROMPTS = ["Who are you?", "What is 214 + 382?", "Sort 9, 4, 7, 1.", "Reverse 3, 1, 4, 1, 5.", "Spell banana."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="a Hugging Face directory or Hub id")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    try:
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        llm = LLM(args.model)
        outputs = llm.chat(conversations, params, chat_template_kwargs={"enable_thinking": False})
    except ValueError as error:
        parser.error(str(error))
    for prompt, output in zip(args.prompt, outputs):
        print(f"\n{prompt}\n  {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
