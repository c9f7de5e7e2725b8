"""Requests run in company: they come, stream, are aborted and refused, in a pool that is too small for all of them."""

import random
from collections import Counter

from nanovllm_jax import LLM
from soaking.compare import Result
from soaking.requests import Case, RequestMaker


class Company:
    """Drives an engine as a server with bad clients would, and counts what happens."""

    def __init__(self, llm: LLM, maker: RequestMaker, rng: random.Random):
        self.llm, self.maker, self.rng = llm, maker, rng
        self.counts: Counter[str] = Counter()
        self.live: dict[str, tuple[Case, Result]] = {}

    def run(self, number: int) -> list[tuple[Case, Result]]:
        """Start so many requests; returns those that ended by themselves."""
        scheduler, finished, started = self.llm.scheduler, [], 0
        before = scheduler.num_preemptions, scheduler.num_prefix_hit_tokens
        while started < number or self.llm.has_unfinished_requests():
            crowd = len(scheduler.waiting) + len(scheduler.running)
            if started < number and crowd < 2 * scheduler.max_num_seqs and self.rng.random() < 0.7:
                self._start()
                started += 1
                continue
            if self.live and self.rng.random() < 0.03:
                self._abort()
            if self.rng.random() < 0.02:
                self._refuse()
            finished += self._step()
        self.counts["preemptions"] += scheduler.num_preemptions - before[0]
        self.counts["prompt tokens found in the cache"] += scheduler.num_prefix_hit_tokens - before[1]
        self._leave_streams_open()
        return finished

    def _start(self) -> None:
        case = self.maker.good()
        request_id = self.llm.add_request(case.prompt, case.params, stream=case.stream)
        self.live[request_id] = case, Result()
        self.counts["requests"] += 1

    def _step(self) -> list[tuple[Case, Result]]:
        finished = []
        for output in self.llm.step():
            case, result = self.live[output.request_id]
            result.add(output)
            if output.finished:
                finished.append(self.live.pop(output.request_id))
                self.counts["tokens"] += result.num_tokens
                self.maker.remember(result.prompt + result.texts[0].tokens)
            else:
                assert case.stream, "a request that does not stream tells something before its end"
        return finished

    def _abort(self) -> None:
        request_id = self.rng.choice(list(self.live))
        case, result = self.live.pop(request_id)
        self.llm.abort_request(request_id)
        self.counts["streams left" if case.stream and result.texts else "aborts"] += 1

    def _refuse(self) -> None:
        prompt, make_params = self.maker.bad()
        try:
            self.llm.add_request(prompt, make_params())
        except (TypeError, ValueError):
            self.counts["refused"] += 1
        else:
            raise AssertionError(f"this was not refused: {prompt!r}")

    def _leave_streams_open(self) -> None:
        """Iterators of `stream`, closed at some point or dropped."""
        for _ in range(2):
            cases = [self.maker.good() for _ in range(4)]
            stream = self.llm.stream([case.prompt for case in cases], [case.params for case in cases])
            for _ in range(self.rng.randint(0, 20)):
                next(stream, None)
            if self.rng.random() < 0.5:
                stream.close()
            del stream
            self.counts["requests"] += 4
            self.counts["streams left"] += 1
            while self.llm.has_unfinished_requests():  # what was in flight for them
                assert not self.llm.step()
