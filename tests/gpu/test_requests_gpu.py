"""Many callers on a GPU: the engine in a thread of its own, streams, aborts, and the figures it gives."""

import asyncio
import random

import pytest

from nanovllm_jax import LLM, AsyncLLM, SamplingParams
from nanovllm_jax.chat import chat_prompt

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=32)


def test_callers_come_and_go():
    """The embedded model adds; rounding may change a text in another batch, but hardly ever does."""
    llm = LLM(block_size=16, max_num_seqs=32, max_num_batched_tokens=512, max_model_len=1024, num_kvcache_blocks=2048)
    rng = random.Random(0)
    numbers = [(rng.randint(10, 499), rng.randint(10, 499)) for _ in range(120)]
    options = dict(chat_template_kwargs={"enable_thinking": False})
    messages = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in numbers]
    expected = [output["text"] for output in llm.chat(messages, GREEDY, use_tqdm=False, **options)]
    right = sum(f"= {a + b}" in text for (a, b), text in zip(numbers, expected))
    assert right >= 60, f"{right} of 120 sums are right"

    async def ask(server, i):
        """Every third caller leaves after the first increment."""
        text = ""
        async for output in server.generate(chat_prompt(server.tokenizer, messages[i], **options), GREEDY):
            text += output["text"]
            if i % 3 == 0 and not output.finished:
                return None
        m = output.metrics
        assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
        return text

    async def main():
        async with asyncio.timeout(120), AsyncLLM(llm) as server:
            texts = await asyncio.gather(*(ask(server, i) for i in range(120)))
            while (await server.stats()).num_running:
                await asyncio.sleep(0.01)
            return texts, await server.stats()

    texts, stats = asyncio.run(main())
    whole = [(text, alone) for text, alone in zip(texts, expected) if text is not None]
    assert 80 <= len(whole) < 120
    assert sum(text == alone for text, alone in whole) >= 0.95 * len(whole)
    assert (stats.num_waiting, stats.num_free_blocks) == (0, 2048)
    # Some texts end before their callers' leaving is heard of.
    assert 0 < stats.num_aborted_requests <= 120 - len(whole)
    assert stats.num_finished_requests + stats.num_aborted_requests == 240
    assert stats.prefix_cache_hit_rate > 0.3
    assert stats.decode_tokens_per_second > 0
