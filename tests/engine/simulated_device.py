"""A stand-in for the model and its paged cache, exact and cheap, that makes any scheduling mistake change a token.

It has two layers. Layer 0 stores what depends on a token and its position; layer 1 stores what depends on every layer-0
entry up to its own position; the next token depends on every layer-1 entry. All are read back from the cache cells that
the block table names, so a wrong table, a stale or missing cell, the wrong input token, or a block shared under another
prefix gives another token than `expected_completion`, which has no cache at all.
"""

from collections import deque
from collections.abc import Callable

from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Scored, Sequence, Status

FINISHED = Status.FINISHED  # looked up millions of times
VOCAB = 50
SIZE = 4  # tokens of a block, where a test does not choose
NAN = "nan"  # a cell that spreads as NaN does: to all that depends on it


def next_token(context: list[int]) -> int:
    return hash(tuple(context)) % VOCAB


def expected_completion(prompt: list[int], max_len: int, stop_token_ids: frozenset[int]) -> tuple[list[int], str]:
    """The completion of a request that runs alone, and its finish reason."""
    tokens, entries, context = list(prompt), [], []
    while True:
        for position in range(len(context), len(tokens)):
            entries.append(hash((position, tokens[position])))
            context.append(hash(tuple(entries)))
        tokens.append(next_token(context))
        if tokens[-1] in stop_token_ids:
            return tokens[len(prompt) :], "stop"
        if len(tokens) == max_len:
            return tokens[len(prompt) :], "length"


class SimulatedDevice:
    """Runs schedules in the order of dispatch, and keeps what the real device keeps: the cache and the last tokens."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int):
        self.block_size = block_size
        self.layers = [[None] * (num_blocks * block_size) for _ in range(2)]
        self.owners = [None] * max_num_seqs
        self.last_tokens = [None] * max_num_seqs
        self.is_faulty: Callable[[], bool] = lambda: False  # asked for each token: whether its cell becomes NaN
        self.spoiled: set[int] = set()  # seq_ids of those that sampled from NaN

    def run(self, schedule: Schedule) -> list[tuple[list[int], list[int]]]:
        """For each step: tokens of the decode rows and of the prefill chunks (-1: from NaN, or none is sampled)."""
        for seq in schedule.admitted:
            self.owners[seq.slot], self.last_tokens[seq.slot] = seq, None
        return [self._run_step(schedule, behind) for behind in reversed(range(schedule.num_steps))]

    def _run_step(self, schedule: Schedule, behind: int) -> tuple[list[int], list[int]]:
        """The step that ends `behind` tokens before what the sequences count as computed."""
        rows = [(seq, seq.num_computed - behind - 1) for seq in schedule.decodes]
        rows += [(chunk.seq, chunk.seq.num_computed - chunk.num_tokens) for chunk in schedule.prefills]
        assert all(self.owners[seq.slot] is seq for seq, _ in rows), "a sequence in a slot that nobody announced"
        cells = [self._cells(seq, seq.num_computed - behind) for seq, _ in rows]
        first, second = self.layers
        written = [cell for (_, start), row in zip(rows, cells) for cell in row[start:]]
        assert len(written) == len(set(written)), "two rows of one step write the same cell"
        if not schedule.prefills:  # each row is then stored by what attends for it, in any order
            read = {cell for (_, start), row in zip(rows, cells) for cell in row[:start]}
            assert read.isdisjoint(written), "a row reads what another row of its step may not have written yet"
        for (seq, start), row in zip(rows, cells):  # each layer stores a step with prompts before it attends
            for position in range(start, len(row)):
                token = self._input_token(seq, position)
                first[row[position]] = NAN if self.is_faulty() else hash((position, token))
        for (_, start), row in zip(rows, cells):
            entries = tuple(map(first.__getitem__, row))
            for position in range(start, len(row)):
                before = entries[: position + 1]
                second[row[position]] = NAN if NAN in before else hash(before)
        contexts = [list(map(second.__getitem__, row)) for row in cells]
        sampled = [-1 if NAN in context else next_token(context) for context in contexts]
        num_decodes = len(schedule.decodes)
        samples = [True] * num_decodes + [chunk.samples for chunk in schedule.prefills]
        tokens = [token if keep else -1 for token, keep in zip(sampled, samples)]
        for (seq, _), token, keep in zip(rows, tokens, samples):
            if keep:
                self.last_tokens[seq.slot] = max(token, 0)
                self.spoiled |= {seq.seq_id} if token < 0 else set()
        return tokens[:num_decodes], tokens[num_decodes:]

    def _cells(self, seq: Sequence, end: int) -> list[int]:
        """Where the positions 0..end-1 of a sequence lie."""
        size = self.block_size
        assert end <= len(seq.block_table) * size, f"no cell for the last token of {seq}"
        return [cell for block in seq.block_table for cell in range(block * size, (block + 1) * size)][:end]

    def _input_token(self, seq: Sequence, position: int) -> int:
        known = position < len(seq.token_ids)
        return seq.token_ids[position] if known else self.last_tokens[seq.slot]


class Simulation:
    """A scheduler that drives a simulated device, checked after every call."""

    def __init__(self, **options):
        self.scheduler = Scheduler(**options)
        self.block_size = options["block_size"]
        self.budget = options["max_num_batched_tokens"]
        self.device = SimulatedDevice(options["num_blocks"], self.block_size, options["max_num_seqs"])
        self.in_flight: deque = deque()
        self.sequences: list[Sequence] = []
        self._live: list[Sequence] = []  # and those that have finished since this was asked for
        self.cut_short: list[Sequence] = []  # ended, with work on the device that nobody will look at
        self.num_steps = 0
        self.num_steps_ahead = 0  # those dispatched together with one before them
        self.num_failures = 0
        self.num_errors = 0
        self.stall = (None, 0)  # the oldest sequence's progress, and for how many steps it has not changed

    @property
    def live(self) -> list[Sequence]:
        self._live = [seq for seq in self._live if seq.status is not FINISHED]
        return self._live

    def add(self, prompt: list[int], max_tokens: int, stop_token_ids: frozenset[int] = frozenset()) -> Sequence:
        seq_id = len(self.sequences)
        max_len = min(len(prompt) + max_tokens, self.scheduler.max_model_len)
        seq = Sequence(seq_id, f"r{seq_id}", prompt, None, stop_token_ids=stop_token_ids, max_len=max_len)
        self.sequences.append(seq)
        self._live.append(seq)
        self.scheduler.add(seq)
        self.check()
        return seq

    def score_prompt(self, seq: Sequence) -> None:
        """Want something of each of its prompt's tokens, as prompt_logprobs does: to be called right after `add`."""
        seq.scored = Scored(1, seq.prompt_token_ids[1:], 0)

    def end(self, seq: Sequence) -> None:
        """A stop string is found in what was read of it."""
        self._note_unread(seq)
        self.scheduler.finish(seq, "stop")
        assert (seq.slot, seq.block_table) == (-1, [])
        expected, _ = expected_completion(seq.prompt_token_ids, seq.max_len, seq.stop_token_ids)
        assert seq.completion_token_ids == expected[: seq.num_completion_tokens], seq
        self.check()

    def _note_unread(self, seq: Sequence) -> None:
        preempted = seq.status is Status.WAITING and seq.num_preemptions
        if seq.status is Status.PREFILL or seq.num_pending or preempted:
            self.cut_short.append(seq)

    def abort(self, seq: Sequence) -> None:
        self._note_unread(seq)
        self.scheduler.finish(seq, "abort")
        assert (seq.is_finished, seq.slot, seq.block_table) == (True, -1, [])
        self.check()

    def fail(self) -> None:
        """The device fails: what it had is lost, and so is every request."""
        lost, is_faulty = self.live, self.device.is_faulty
        self.in_flight.clear()
        self.scheduler.abort_all()
        self.device = SimulatedDevice(self.scheduler.block_manager.num_blocks, self.block_size, len(self.device.owners))
        self.device.is_faulty = is_faulty
        assert all((seq.finish_reason, seq.slot, seq.block_table) == ("abort", -1, []) for seq in lost)
        assert not self.scheduler.has_unfinished
        assert self.scheduler.block_manager.num_used_blocks == 0
        self.num_failures += 1
        self.check()

    def dispatch(self) -> Schedule:
        """Schedule a step and send it to the device; its tokens stay there until `collect`."""
        live = self.live
        oldest = live[0] if live else None
        preempted = oldest.num_preemptions if oldest else 0
        schedule = self.scheduler.schedule()
        self.check_schedule(schedule)
        assert schedule or self.in_flight or not live, "nothing runs, and nothing ever will"
        assert live or not schedule, "nobody is left, and somebody runs"
        if oldest:
            assert oldest.num_preemptions == preempted, f"the oldest sequence was preempted: {oldest}"
        if schedule:
            self._check_progress(oldest)
            self.in_flight.append((schedule, self.device.run(schedule), self._scored(schedule)))
            self.num_steps += 1
            self.num_steps_ahead += schedule.num_steps - 1
        self.check()
        return schedule

    def collect(self) -> list[Sequence]:
        """Read the tokens of the oldest step in flight."""
        schedule, steps, parts = self.in_flight.popleft()
        for scored, start, tokens in parts:
            assert not tokens or start <= scored.next, "a prompt token was never computed"
            scored.logprobs += tokens[scored.next - start :]
        finished = [seq for tokens in steps for seq in self.scheduler.update(schedule, *tokens)]
        for seq in finished:
            expected = expected_completion(seq.prompt_token_ids, seq.max_len, seq.stop_token_ids)
            assert seq.scored is None or seq.scored.logprobs == seq.scored.token_ids, seq
            if seq.finish_reason == "error":
                self.num_errors += 1
                assert seq.seq_id in self.device.spoiled, seq
                assert seq.completion_token_ids == expected[0][: seq.num_completion_tokens], seq
            else:
                assert (seq.completion_token_ids, seq.finish_reason) == expected, seq
        self.check()
        return finished

    def step(self, depth: int = 0) -> None:
        """Dispatch one step, then read so many that at most `depth` stay in flight."""
        idle = not self.dispatch()
        while len(self.in_flight) > (0 if idle else depth):
            self.collect()

    def run_until(self, condition: Callable[[], bool], depth: int = 0) -> None:
        """Run until something happens, which must be while work is left."""
        while not condition():
            assert self.scheduler.has_unfinished, "it never happened"
            self.step(depth)

    def drain(self, depth: int = 0) -> None:
        """Run until every sequence has finished, then see that nothing is left behind."""
        while self.scheduler.has_unfinished or self.in_flight:
            self.step(depth)
        for seq in self.sequences:  # also those that `live` no longer looks at: an end is for good
            self._check_end(seq)
            assert seq.is_finished, seq
        assert self.scheduler.block_manager.num_used_blocks == 0
        # What depends on NaN is published before anyone samples from it: an abort or end may come between.
        unread = {digest for seq in self.cut_short for digest in seq.block_hashes}
        for digest, block in self.scheduler.block_manager._published.items():
            assert digest in unread or not self._holds_nan(block), block

    @staticmethod
    def _scored(schedule: Schedule) -> list[tuple[Scored, int, list[int]]]:
        """Of the prompts that want it: the tokens that the chunks predict, and the first one's position."""
        parts = []
        for chunk in schedule.prefills:
            seq, start = chunk.seq, chunk.seq.num_computed - chunk.num_tokens + 1
            if seq.scored is not None:
                parts.append((seq.scored, start, seq.prompt_token_ids[start : seq.num_computed + 1]))
        return parts

    def _holds_nan(self, block: int) -> bool:
        cells = slice(block * self.block_size, (block + 1) * self.block_size)
        return any(NAN in layer[cells] for layer in self.device.layers)

    def check(self) -> None:
        """Books that balance; and no sequence may write into a block that another one holds or that is published."""
        self.scheduler.check()
        manager = self.scheduler.block_manager
        for seq in self.scheduler.running.values():
            for block in seq.block_table[seq.num_computed // self.block_size :]:
                assert manager._ref_counts[block] == 1, f"a shared block will be written by {seq}"
                assert manager._hashes[block] is None, f"a published block will be written by {seq}"
        for seq in self._live:
            self._check_end(seq)
        assert len(self.live) == self.scheduler.num_running + self.scheduler.num_waiting, "one is lost, or comes back"

    @staticmethod
    def _check_end(seq: Sequence) -> None:
        assert (seq.status is FINISHED) == (seq.finish_reason is not None)
        assert seq.num_cached_tokens < seq.num_prompt_tokens

    def check_schedule(self, schedule: Schedule) -> None:
        rows = [*schedule.decodes, *(chunk.seq for chunk in schedule.prefills)]
        assert len({seq.seq_id for seq in rows}) == len(rows) <= self.scheduler.max_num_seqs
        assert len({seq.slot for seq in rows}) == len(rows)
        assert all(self.scheduler.running.get(seq.seq_id) is seq for seq in rows)
        assert len(schedule.decodes) + schedule.num_prefill_tokens <= self.budget
        assert all(seq.status is Status.DECODE and seq.num_pending >= schedule.num_steps for seq in schedule.decodes)
        assert schedule.num_steps == 1 or not schedule.prefills
        for chunk in schedule.prefills:
            decodes_alone = chunk.samples and chunk.seq.scored is None and chunk.seq.num_computed % self.block_size
            assert chunk.num_tokens > (1 if decodes_alone else 0)
            assert chunk.samples == (chunk.seq.num_computed == len(chunk.seq.token_ids))
        assert {seq.seq_id for seq in schedule.admitted} <= {seq.seq_id for seq in rows}

    def _check_progress(self, oldest: Sequence) -> None:
        """The oldest sequence is in every step, but for those in flight behind its last one.

        (That none preempts it is checked elsewhere: here a preemption is one of all, asked for from outside.)
        """
        progress = (
            oldest.seq_id,
            oldest.num_preemptions,
            len(oldest.token_ids) + oldest.num_pending + oldest.num_computed,
        )
        self.stall = (progress, self.stall[1] + 1 if self.stall[0] == progress else 0)
        assert self.stall[1] <= len(self.in_flight) + 1, f"starved: {oldest}"


def simulate(**options) -> Simulation:
    defaults = {
        "num_blocks": 40,
        "block_size": SIZE,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 60,
    }
    return Simulation(**(defaults | options))


def chunks(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(seq_id, first position, end position) of each prefill chunk."""
    return [(c.seq.seq_id, c.seq.num_computed - c.num_tokens, c.seq.num_computed) for c in schedule.prefills]


def rows(schedule: Schedule) -> list[int]:
    return [seq.seq_id for seq in schedule.decodes]


def prompt(number: int, length: int) -> list[int]:
    """A prompt that shares no prefix with another number's."""
    return [number] * length
