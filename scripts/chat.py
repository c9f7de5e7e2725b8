"""Chat in the terminal: with the embedded tiny Qwen3 by default, or any checkpoint.

    python scripts/chat.py
    python scripts/chat.py --model Qwen/Qwen3-8B --system "Be brief." --think

/reset forgets the conversation, /exit or Ctrl-D ends the program, Ctrl-C stops an answer. After each answer stands how
fast it came, and how much of the conversation so far was found in the prefix cache and not computed again.
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.chat import chat_prompt
from nanovllm_jax.checkpoints.load import TINY_MODEL


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event: an exception in the middle of a step would cost the engine its prefix cache."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def show(text: str) -> None:
    print(text, end="", flush=True)


class Chat:
    """A conversation with a model."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None, think: bool = False):
        self.llm, self.params, self.think = llm, params, think
        self.start = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.start)

    def ask(self, question: str) -> None:
        """Show the answer as it comes, and remember both, or neither where the model cannot take them."""
        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            prompt = chat_prompt(self.llm.tokenizer, messages, chat_template_kwargs={"enable_thinking": self.think})
            stream = self.llm.stream(prompt, self.params)
        except ValueError as error:
            show(f"{error}\n(/reset starts a new conversation)\n")
            return
        answer, times, count = "", [time.perf_counter()], 0
        with interrupts() as interrupted, closing(stream):
            for output in stream:
                times.append(time.perf_counter())
                count += len(output["token_ids"])
                answer += output["text"]
                show(output["text"])
                if interrupted.is_set():
                    break
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        start, first, *_, last = [*times, times[-1]]
        rate = f", {(count - 1) / (last - first):.0f} tokens/s" if last > first else ""
        cached = f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens from the prefix cache"
        stopped = "stopped; " if interrupted.is_set() else ""
        show(f"\n[{stopped}{count} tokens, the first after {first - start:.2f} s{rate}; {cached}]\n")

    def run(self) -> None:
        """Read questions until the end."""
        while True:
            try:
                line = input("\n> ").strip()
                if line == "/exit":
                    return
                if line == "/reset":
                    self.reset()
                elif line.startswith("/"):
                    show("(the commands are /reset and /exit)\n")
                elif line:
                    self.ask(line)
            except KeyboardInterrupt:
                show("\n(/exit or Ctrl-D ends the program)\n")
            except EOFError:
                show("\n")
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="a Hugging Face directory or Hub id")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--think", action="store_true", help="let the model reason before it answers")
    parser.add_argument("--temperature", type=float, help="the model's own by default; 0 is greedy")
    parser.add_argument("--max-tokens", type=int, help="longest answer; by default as far as the model goes")
    # Only full blocks are found again, and turns are short.
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block of the prefix cache")
    args = parser.parse_args()
    if sys.stdin is None:
        parser.error("standard input is closed: there is nobody to chat with")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text in its encoding is refused as a question is

    asked = {"max_tokens": args.max_tokens}
    if args.temperature is not None:
        asked["temperature"] = args.temperature
    try:
        SamplingParams(**asked)  # refused before the model is loaded
        llm = LLM(args.model, block_size=args.block_size, max_num_seqs=1)
    except ValueError as error:
        parser.error(str(error))
    params = replace(llm.get_default_sampling_params(), **asked)
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history)
    Chat(llm, params, args.system, args.think).run()


if __name__ == "__main__":
    main()
