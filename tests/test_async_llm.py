"""AsyncLLM: many callers in one event loop, and what one of them or the engine may do to the others."""

import asyncio
import itertools
import math
import random
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest
from small_model import OPTIONS, SMALL, assert_idle, random_tensors, small_llm, whole, write_checkpoint

import nanovllm_jax
from nanovllm_jax import AsyncLLM, SamplingParams

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=100)
PROMPTS = [[seed, 3] * (1 + 3 * seed) for seed in range(12)]
WILD = [
    SamplingParams(temperature=2, max_tokens=5 + seed, ignore_eos=True, seed=seed, n=1 + seed % 2, logprobs=seed % 3)
    for seed in range(12)
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("async") / "model"))


@pytest.fixture(autouse=True)
def clean(engine):
    """Every test leaves an engine without requests, and no thread."""
    yield
    assert_idle(engine)
    assert engine.scheduler.block_manager.num_used_blocks == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("AsyncLLM")]


class Pace:
    """No request gets beyond so many tokens, however late the event loop is."""

    most = 40


@pytest.fixture
def pace(engine, monkeypatch):
    """How far requests get: LONG ones have not ended when the event loop acts, be the engine ever so fast."""
    step, pace = engine.step, Pace()

    def in_step():
        come = [request.num_generated for request in engine._requests.values()]
        room = 0 if all(come) else 30  # for the first tokens of others
        if all(number < pace.most + room for number in come):
            return step()
        time.sleep(0.001)
        return []

    monkeypatch.setattr(engine, "step", in_step, raising=False)
    return pace


def run(engine, main, seconds=120):
    """await main(llm), with an AsyncLLM of its own; a hang is an error."""

    async def start():
        async with asyncio.timeout(seconds), AsyncLLM(engine) as llm:
            return await main(llm)

    return asyncio.run(start())


async def complete(llm, prompt, params, **options):
    """All outputs joined, and how many they were."""
    first, count = None, 0
    async for output in llm.generate(prompt, params, **options):
        count += 1
        if first is None:
            first = output
        else:
            first.add(output)
    return first, count


async def started(stream):
    """The first output of a generator that stays open."""
    return await anext(stream)


def test_callers_get_what_generate_gives(engine):
    expected = engine.generate(PROMPTS, WILD, use_tqdm=False)

    async def main(llm):
        tasks = [complete(llm, *request, stream=i != 3) for i, request in enumerate(zip(PROMPTS, WILD, strict=True))]
        return await asyncio.gather(*tasks)

    done = run(engine, main)
    assert whole(output for output, _ in done) == whole(expected)
    for (output, count), alone in zip(done, expected, strict=True):
        assert output.finished
        for completion, whole_one in zip(output.outputs, alone.outputs, strict=True):
            assert [list(ids) for ids in completion.logprobs] == [list(ids) for ids in whole_one.logprobs]
            assert completion.cumulative_logprob == pytest.approx(whole_one.cumulative_logprob, rel=1e-5)
        assert output.metrics.arrival_time <= output.metrics.first_scheduled_time < output.metrics.finished_time
        assert 1 <= count <= sum(len(c.token_ids) for c in output.outputs)
    assert done[3][1] == 1


def test_a_model_of_its_own(tmp_path):
    async def main():
        async with await asyncio.to_thread(AsyncLLM, write_checkpoint(tmp_path), **OPTIONS) as llm:
            output, _ = await complete(llm, "7 + 8", None)
            assert llm.tokenizer.decode(output["token_ids"])
        return output

    assert asyncio.run(main()).prompt == "7 + 8"


def test_the_rest_goes_on_when_a_caller_leaves(engine, pace):
    """By cancellation, by closing the generator, by leaving the loop, and before the request has begun."""
    pace.most = math.inf
    (expected,) = whole(engine.generate([PROMPTS[3]], LONG, use_tqdm=False))
    pace.most = 40

    async def main(llm):
        other = asyncio.create_task(complete(llm, PROMPTS[3], LONG))
        cancelled = asyncio.create_task(complete(llm, [1] * 60, LONG, request_id="mine"))
        closed = llm.generate([2] * 60, LONG)
        await started(closed)
        async with aclosing(llm.generate([3] * 60, LONG)) as stream:
            await started(stream)
            assert (await llm.stats()).num_running == 4
            early = asyncio.create_task(complete(llm, [4] * 60, LONG))
            await asyncio.sleep(0)
            early.cancel()
        cancelled.cancel()
        await asyncio.wait([cancelled, early])
        await closed.aclose()
        stats = await llm.stats()
        assert (stats.num_running, stats.num_waiting) == (1, 0)
        await llm._call(engine.scheduler.check)  # every block that is owned is the running one's
        pace.most = math.inf
        done = await asyncio.gather(other, cancelled, early, return_exceptions=True)
        assert [type(error) for error in done[1:]] == [asyncio.CancelledError] * 2
        again, _ = await complete(llm, [1], replace(GREEDY, max_tokens=1), request_id="mine")
        assert again.request_id == "mine", "the id is free again"
        async for _ in llm.generate([5] * 60, LONG):
            break  # the generator is dropped here, and so closed by the event loop
        while (await llm.stats()).num_running:
            await asyncio.sleep(0)
        return done[0][0]

    assert whole([run(engine, main)]) == [expected]


def test_callers_that_leave_at_any_moment(engine):
    rng = random.Random(0)

    async def caller(llm, i):
        await asyncio.sleep(rng.random() * 0.05)
        task = asyncio.create_task(complete(llm, PROMPTS[i % 12], LONG))
        await asyncio.sleep(rng.random() * 0.2)
        task.cancel()
        await asyncio.wait([task])

    async def main(llm):
        await asyncio.gather(*(caller(llm, i) for i in range(60)))
        stats = await llm.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        return (await complete(llm, PROMPTS[1], GREEDY))[0]["token_ids"]

    assert run(engine, main) == engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)[0]["token_ids"]


def test_a_caller_that_stops_holds_up_nobody(engine, pace):
    """And what comes for it meanwhile is one output."""
    pace.most = math.inf
    expected = engine.generate([[1]], replace(LONG, logprobs=1), use_tqdm=False)[0]
    pace.most = 40

    async def main(llm):
        stream = llm.generate([1], replace(LONG, logprobs=1))
        first = await started(stream)
        pace.most = math.inf
        await asyncio.gather(*(complete(llm, [i], LONG) for i in range(2, 8)))
        rest = [output async for output in stream]
        assert len(rest) == 1, "one output, joined"
        first.add(rest[0])
        return first

    output = run(engine, main)
    assert whole([output]) == whole([expected])
    assert len(output.outputs[0].logprobs) == 100
    assert output.finished


def test_who_comes_while_a_step_can_be_put_off_is_in_it(engine, monkeypatch):
    spare, lengths, schedule = [0.0], [], engine.scheduler.schedule

    def scheduled():
        found = schedule()
        lengths.append((len(found.decodes), len(found.prefills)))
        return found

    monkeypatch.setattr(engine, "spare_seconds", lambda: spare[0], raising=False)
    monkeypatch.setattr(engine.scheduler, "schedule", scheduled)

    async def main(llm):
        async with aclosing(llm.generate(PROMPTS[0], LONG)) as first:
            await anext(first)
            spare[0] = 0.1  # which the thread does not sleep through
            await llm.stats()
            before, others = len(lengths), [llm.generate(prompt, GREEDY) for prompt in PROMPTS[1:3]]
            tasks = [asyncio.create_task(anext(other)) for other in others]
            while len(llm._mailboxes) < 3:
                await asyncio.sleep(0.001)
            assert len(lengths) == before
            assert not any(task.done() for task in tasks)
            spare[0] = 0.0
            await asyncio.gather(*tasks)
            assert lengths[before] == (1, 2)
            for other in others:
                await other.aclose()

    run(engine, main)


def test_an_event_loop_that_stands_still_gets_one_message(engine, monkeypatch, pace):
    async def main(llm):
        stream, calls = llm.generate([1], LONG), []
        first = await started(stream)
        monkeypatch.setattr(llm._loop, "call_soon_threadsafe", lambda *call: calls.append(call), raising=False)
        pace.most = math.inf
        while llm._mailboxes:  # until the last output is delivered
            time.sleep(0.01)  # not asyncio's: nothing runs here meanwhile
        monkeypatch.undo()
        assert len(calls) <= 1
        llm._wake()
        (rest,) = [output async for output in stream]
        assert len(first["token_ids"]) + len(rest["token_ids"]) == LONG.max_tokens

    run(engine, main)


def test_an_engine_that_fails_tells_every_caller(engine, monkeypatch, pace):
    """Those that wait for tokens, those that wait for a place in the batch, and those that do not look yet."""
    dispatch, steps = engine.runner.dispatch, []

    def fails(*args):
        steps.append(1)
        if len(steps) == 5:
            raise MemoryError("no device")
        return dispatch(*args)

    async def main(llm):
        idle = llm.generate([9], LONG)
        await started(idle)
        tasks = [asyncio.create_task(complete(llm, [i] * 20, LONG)) for i in range(9)]
        while len(llm._mailboxes) < 10:
            await asyncio.sleep(0)
        monkeypatch.setattr(engine.runner, "dispatch", fails)
        pace.most = math.inf
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(RuntimeError, match="the engine failed"):
            async for _ in idle:  # what came before the failure, and then the failure
                pass
        assert len({id(error) for error in errors}) == 9
        for error in errors:
            assert isinstance(error, RuntimeError)
            assert "the engine failed, and all its requests were aborted" in str(error)
            assert isinstance(error.__cause__, MemoryError)
        return (await complete(llm, PROMPTS[1], GREEDY))[0]["token_ids"]  # the engine is usable again

    assert run(engine, main) == engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)[0]["token_ids"]


def test_a_bad_request_is_its_callers_alone(engine, pace):
    async def main(llm):
        good = asyncio.create_task(complete(llm, PROMPTS[2], LONG, request_id="good"))
        await asyncio.sleep(0)
        for prompt, params, request_id, error, message in (
            ([600], GREEDY, None, ValueError, "token id 600 is not in the vocabulary"),
            (None, GREEDY, None, TypeError, "a prompt is a string"),
            ([1], {"n": 2}, None, TypeError, "must be a SamplingParams"),
            ([1], GREEDY, "good", ValueError, "request_id 'good' is in use"),
        ):
            with pytest.raises(error, match=message):
                await complete(llm, prompt, params, request_id=request_id)
        pace.most = math.inf
        output, _ = await good
        return output["token_ids"]

    assert len(run(engine, main)) == 100


def test_scores_beside_texts(engine):
    """Many callers' pairs, while others generate; a bad one is its caller's alone."""
    completions = [[7 * i % 500, 3, i] for i in range(8)]

    async def main(llm):
        texts = [asyncio.create_task(complete(llm, prompt, LONG)) for prompt in PROMPTS[:3]]
        with pytest.raises(ValueError, match="token id 600 is not in the vocabulary"):
            await llm.score([1], [600])
        left = asyncio.create_task(llm.score([5] * 90, [6] * 30))
        await asyncio.sleep(0)
        left.cancel()
        scores = await asyncio.gather(*map(llm.score, PROMPTS[:8], completions))
        return scores, [(await text)[0]["token_ids"] for text in texts]

    scores, texts = run(engine, main)
    assert texts == [output["token_ids"] for output in engine.generate(PROMPTS[:3], LONG, use_tqdm=False)]
    for ours, theirs in zip(scores, engine.score(PROMPTS[:8], completions, use_tqdm=False), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_other_weights(engine, tmp_path, pace):
    """Who runs is told nothing: it is run to its end on the old weights, or goes on with the new ones."""
    old, model = engine.model, small_llm(write_checkpoint(tmp_path, tensors=random_tensors(SMALL, seed=1))).model
    pace.most = math.inf
    before = engine.generate([PROMPTS[3]], LONG, use_tqdm=False)[0]["token_ids"]

    async def main(llm):
        async def beside(in_flight, weights):
            pace.most = math.inf if in_flight == "finish" else 40
            stream = llm.generate(PROMPTS[3], LONG)
            first = await started(stream)
            await llm.update_weights(weights, in_flight)
            pace.most = math.inf
            async for output in stream:
                first.add(output)
            return first["token_ids"]

        with pytest.raises(TypeError, match="weights must be"):
            await llm.update_weights(3)
        finished = await beside("finish", model)
        after = (await complete(llm, PROMPTS[3], LONG))[0]["token_ids"]
        recomputed = await beside("recompute", old)
        pace.most = 40
        running = asyncio.create_task(complete(llm, PROMPTS[3], LONG))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="say what becomes of them"):
            await llm.update_weights(model)
        pace.most = math.inf
        assert (await running)[0]["token_ids"] == before
        return finished, after, recomputed

    finished, after, recomputed = run(engine, main)
    assert finished == before
    assert after != before
    assert recomputed[0] == after[0]
    assert len(recomputed) == 100
    assert recomputed != after


def test_callers_have_what_comes_while_requests_finish_and_may_leave(engine, pace):
    aborted = engine.metrics.num_aborted_requests

    async def main(llm):
        kept, left = llm.generate(PROMPTS[2], LONG), llm.generate(PROMPTS[3], LONG)
        text = await started(kept)
        await started(left)
        update = asyncio.create_task(llm.update_weights(engine.model, "finish"))
        await asyncio.sleep(0)
        await left.aclose()
        pace.most = 80
        text.add(await anext(kept))
        assert len(text["token_ids"]) < 90, "a piece came before the end"
        assert not update.done()
        pace.most = math.inf
        async for output in kept:
            text.add(output)
        await update
        assert (await llm.stats()).num_aborted_requests == aborted + 1
        return text["token_ids"]

    assert run(engine, main) == engine.generate([PROMPTS[2]], LONG, use_tqdm=False)[0]["token_ids"]


def test_shutdown_while_requests_finish(engine, pace):
    async def main():
        llm = AsyncLLM(engine)
        text = asyncio.create_task(complete(llm, PROMPTS[2], LONG))
        while not (await llm.stats()).num_running:
            pass
        update = asyncio.create_task(llm.update_weights(engine.model, "finish"))
        await asyncio.sleep(0)
        await asyncio.to_thread(llm.shutdown)
        for task in (update, text):
            with pytest.raises(RuntimeError, match="was shut down"):
                await task

    asyncio.run(main())


def test_who_comes_while_others_finish(engine, pace):
    """Increments of many steps are delivered together: whoever was queued meanwhile goes on."""

    async def main(llm):
        first = asyncio.create_task(complete(llm, PROMPTS[2], LONG))
        while not (await llm.stats()).num_running:
            pass
        update = asyncio.create_task(llm.update_weights(engine.model, "finish"))
        second = asyncio.create_task(complete(llm, PROMPTS[3], GREEDY))
        await asyncio.sleep(0)
        pace.most = math.inf
        return [(await task)[0]["token_ids"] for task in (first, second)], await update

    texts, _ = run(engine, main)
    for tokens, prompt, params in zip(texts, PROMPTS[2:], (LONG, GREEDY), strict=False):
        assert tokens == engine.generate([prompt], params, use_tqdm=False)[0]["token_ids"]


def test_an_engine_that_fails_when_a_request_starts(engine, monkeypatch, pace):
    """All callers are told, not the new one alone."""

    async def main(llm):
        task = asyncio.create_task(complete(llm, PROMPTS[1], LONG))
        while not (await llm.stats()).num_running:
            pass
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "add", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await complete(llm, PROMPTS[2], GREEDY)
        pace.most = math.inf
        with pytest.raises(RuntimeError, match="the engine failed, and all its requests were aborted"):
            await task
        return (await complete(llm, PROMPTS[1], GREEDY))[0]["token_ids"]

    assert run(engine, main) == engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)[0]["token_ids"]


def test_an_engine_that_fails_while_weights_change(engine, monkeypatch, pace):
    async def main(llm):
        tasks = [asyncio.create_task(complete(llm, [i] * 20, LONG)) for i in range(6)]
        while (await llm.stats()).num_running < 4:
            pass
        with monkeypatch.context() as patch:
            # From then on, so that no step before it fails.
            fails = partial(patch.setattr, engine.runner, "dispatch", lambda *_: 1 / 0)
            patch.setattr(engine.runner.weights, "check", lambda _: fails() or setattr(pace, "most", math.inf))
            with pytest.raises(ZeroDivisionError):
                await llm.update_weights(engine.model, "finish")
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, RuntimeError)
            assert isinstance(error.__cause__, ZeroDivisionError)
        return (await complete(llm, PROMPTS[1], GREEDY))[0]["token_ids"]

    assert run(engine, main) == engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)[0]["token_ids"]


def test_callers_of_an_engine_that_fails_while_their_requests_finish(engine, monkeypatch, pace):
    """One has increments of the last steps before it: they do not make it wait for more."""
    collect, steps = engine.runner.collect, itertools.count(1)

    async def main(llm):
        task = asyncio.create_task(complete(llm, PROMPTS[1], LONG))
        while not (await llm.stats()).num_running:
            pass
        with monkeypatch.context() as patch:
            fails = partial(
                patch.setattr, engine.runner, "collect", lambda step: collect(step) if next(steps) < 4 else 1 / 0
            )
            patch.setattr(engine.runner.weights, "check", lambda _: fails() or setattr(pace, "most", math.inf))
            with pytest.raises(ZeroDivisionError):
                await llm.update_weights(engine.model, "finish")
        with pytest.raises(RuntimeError, match="the engine failed, and all its requests were aborted"):
            await task
        return (await complete(llm, PROMPTS[1], GREEDY))[0]["token_ids"]

    assert run(engine, main) == engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)[0]["token_ids"]


def test_shutdown(engine, pace):
    """Callers get an exception, those that come later too, and a second call does nothing."""

    async def main():
        llm = AsyncLLM(engine)
        tasks = [asyncio.create_task(complete(llm, [i] * 20, LONG)) for i in range(9)]
        while (await llm.stats()).num_running < 4:
            pass
        late = asyncio.create_task(complete(llm, [1], LONG))
        await asyncio.sleep(0)
        await asyncio.to_thread(llm.shutdown)
        llm.shutdown()
        errors = await asyncio.gather(*tasks, late, return_exceptions=True)
        assert {type(error) for error in errors} == {RuntimeError}
        assert all(str(error).startswith("this AsyncLLM was shut down") for error in errors)
        for call in (lambda: complete(llm, [1], GREEDY), llm.stats, llm.__aenter__):
            with pytest.raises(RuntimeError, match="this AsyncLLM was shut down: make a new one"):
                await call()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_request_that_comes_in_the_middle_of_a_shutdown(engine, monkeypatch):
    async def main(llm):
        check = llm._check_usable

        def then_another_thread_is_quicker():
            check()
            llm._is_shut_down = True
            llm._thread.submit(llm._finish)

        monkeypatch.setattr(llm, "_check_usable", then_another_thread_is_quicker)
        with pytest.raises(RuntimeError, match="was shut down"):
            await complete(llm, [1], GREEDY)

    run(engine, main, seconds=20)


def test_a_shutdown_just_before_the_next_step(engine, monkeypatch):
    """Its callers are told of the shutdown, not of an engine that failed."""

    async def main(llm):
        submit, shutdowns = llm._thread.submit, []

        def then_another_thread_is_quicker(function, *args):
            if function == llm._step and not shutdowns:
                shutdowns.append(threading.Thread(target=llm.shutdown))
                shutdowns[0].start()
                time.sleep(0.3)
            return submit(function, *args)

        monkeypatch.setattr(llm._thread, "submit", then_another_thread_is_quicker)
        with pytest.raises(RuntimeError, match="was shut down"):
            await complete(llm, [1], LONG)
        await asyncio.to_thread(shutdowns[0].join)

    run(engine, main, seconds=20)


def test_arrival_is_when_the_caller_comes(engine):
    """Not when the engine's thread has time for it."""

    async def main(llm):
        busy = threading.Event()
        llm._thread.submit(busy.wait)
        task = asyncio.create_task(complete(llm, [1], GREEDY))
        await asyncio.sleep(0)  # it has come
        await asyncio.sleep(0.3)
        busy.set()
        return (await task)[0].metrics

    assert run(engine, main).time_in_queue > 0.25


def test_an_exception_in_its_block_ends_it(engine):
    async def main(llm):
        await started(llm.generate([1], LONG))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(engine, main)


def test_one_event_loop(engine):
    llm = AsyncLLM(engine)
    output, _ = asyncio.run(complete(llm, [1], GREEDY))
    assert output.finished
    for call in (lambda: complete(llm, [1], GREEDY), llm.stats, llm.__aenter__):
        with pytest.raises(RuntimeError, match="belongs to another event loop, the first that used it"):
            asyncio.run(call())
    llm.shutdown()


def test_an_event_loop_that_ends_first(engine, pace):
    """asyncio.run cancels its tasks; with a loop that just stops, the requests are aborted by the next message."""
    llm = AsyncLLM(engine)

    async def leave_one_running():
        task = asyncio.create_task(complete(llm, [1], LONG))
        while not (await llm.stats()).num_running:
            pass
        return task

    asyncio.run(leave_one_running())
    llm.shutdown()
    llm = AsyncLLM(engine)
    loop = asyncio.new_event_loop()
    stream = llm.generate([1], replace(LONG, max_tokens=120))
    loop.run_until_complete(started(stream))
    loop.close()
    llm.shutdown()


def test_an_engine_is_taken_as_it_is(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "num_processes", 2)
    with pytest.raises(ValueError, match="AsyncLLM runs in one process"):
        AsyncLLM(engine)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="an engine is taken as it is"):
        AsyncLLM(engine, block_size=16)
    engine.add_request([1], GREEDY, "mine")
    with pytest.raises(ValueError, match="with no request under way"):
        AsyncLLM(engine)
    engine.abort_request("mine")
    (expected,) = engine.generate([1], GREEDY, use_tqdm=False)
    engine.generate([1], replace(GREEDY, stop_token_ids=expected["token_ids"][:1]), use_tqdm=False)
    assert engine.has_unfinished_requests(), "a step that was dispatched before the end was seen"
    output, _ = run(engine, lambda llm: complete(llm, [1], GREEDY))
    assert output["token_ids"] == expected["token_ids"]


def test_where_it_lives():
    assert nanovllm_jax.AsyncLLM is AsyncLLM


def test_shutdown_from_several_threads(engine, monkeypatch, pace):
    """The one that comes second, between the first one's lines, ends the callers as well."""

    async def main():
        llm = AsyncLLM(engine)
        task = asyncio.create_task(complete(llm, PROMPTS[1], LONG))
        while not (await llm.stats()).num_running:
            pass
        submit = llm._thread.submit

        def submit_later(function, *args):
            if function == llm._finish:
                time.sleep(0.3 if threading.current_thread().name == "slow" else 0)
            return submit(function, *args)

        monkeypatch.setattr(llm._thread, "submit", submit_later)
        slow = threading.Thread(target=llm.shutdown, name="slow")
        slow.start()
        await asyncio.sleep(0.05)
        await asyncio.to_thread(llm.shutdown)
        await asyncio.to_thread(slow.join)
        with pytest.raises(RuntimeError, match="this AsyncLLM was shut down"):
            await task

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_engine_that_is_served_is_for_nobody_else(engine):
    """Another thread's step would take callers' outputs, and its request an answer that nobody waits for."""

    async def main(llm):
        callers = [asyncio.create_task(complete(llm, prompt, LONG)) for prompt in PROMPTS]
        await asyncio.sleep(0.05)
        for call in (engine.step, lambda: engine.add_request([1]), lambda: engine.abort_request("0")):
            with pytest.raises(RuntimeError, match="another thread is using this engine"):
                call()
        outputs = await asyncio.gather(*callers)
        with pytest.raises(ValueError, match="this engine is at work for another thread, or for another AsyncLLM"):
            AsyncLLM(engine)
        return [output["token_ids"] for output, _ in outputs]

    served = run(engine, main)
    assert [output["token_ids"] for output in engine.generate(PROMPTS, LONG, use_tqdm=False)] == served  # ours again


def test_an_engine_is_free_when_its_thread_has_ended(engine):
    """Whoever forgets shutdown() has not lost the engine."""
    llm = AsyncLLM(engine)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("AsyncLLM")]
    assert threads
    with pytest.raises(RuntimeError, match="another thread is using this engine"):
        engine.generate([1], GREEDY, use_tqdm=False)
    del llm
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert engine.generate([1], GREEDY, use_tqdm=False)
    assert run(engine, lambda llm: complete(llm, [1], GREEDY))
