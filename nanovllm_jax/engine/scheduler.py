"""The policy: which sequences run in the next step, and how many tokens of each.

A step computes one token of every decoding sequence, then as many prompt tokens as the budget leaves, so that a long
prompt never stalls the others. `schedule()` may be called again before `update()` brings the tokens of earlier steps:
it counts on what the dispatched steps will have done. The device runs steps in order, so blocks and slots that are
freed while a step is in flight can be given to a later step at once.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.schedule import ONE_STEP, PrefillChunk, RunAhead, Schedule, all_of_them, in_order
from nanovllm_jax.engine.sequence import Sequence, Status

WAITING, PREFILL, DECODE, FINISHED = Status

# One block in so many stays free when a sequence is admitted beside others, for these to grow into. Without it, a full
# pool computes a fifth of all tokens twice: whoever was admitted last is preempted right away, again and again.
SPARE_SHARE = 50


class Scheduler:
    """Continuous batching with chunked prefill, prefix sharing, and preemption by recomputing.

    First come, first served: every admitted sequence arrived before every waiting one. The latest arrival is preempted
    first, so the oldest always advances, and every sequence finishes in the end.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        run_ahead: RunAhead = ONE_STEP,
        fitting: Callable[[int, int], int] = all_of_them,
    ):
        """`fitting`: called with how many sequences decode and how many tokens a step could compute, up to
        max_num_batched_tokens, it says how many are to be computed: of prompts one or more.
        """
        assert max_num_seqs > 0, max_num_seqs
        assert max_num_batched_tokens > 0, max_num_batched_tokens
        self.block_manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.run_ahead = run_ahead
        self.fitting = fitting
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()  # by seq_id, in arrival order
        self.running: dict[int, Sequence] = {}  # the admitted ones, by seq_id, in arrival order
        self.num_unfinished_prompt_tokens = 0  # of all waiting and running sequences
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0  # prompt tokens of admitted sequences,
        self.num_prefix_hit_tokens = 0  # and those of them found in the prefix cache
        self._last_added = -1  # the latest arrival's seq_id

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.running or self.waiting)

    @property
    def num_running(self) -> int:
        """Admitted sequences."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks: new, or preempted."""
        return len(self.waiting)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.block_manager.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return self.block_manager.num_free_blocks

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. The caller has refused what can never run, and numbers sequences as they come."""
        num_places = self.block_manager.num_blocks * self.block_manager.block_size
        assert 0 < seq.num_prompt_tokens < seq.max_len <= self.max_model_len, seq
        assert seq.max_len - 1 <= num_places, seq  # the last token is never computed, so it needs none
        assert seq.seq_id > self._last_added, seq
        self._last_added = seq.seq_id
        self.num_unfinished_prompt_tokens += seq.num_prompt_tokens
        self.waiting[seq.seq_id] = seq

    def abort_all(self) -> None:
        """End every sequence and begin anew: a failure or Ctrl-C may have come half way through anything here.

        Cached prefixes are forgotten: blocks published for a step that failed may hold garbage.
        """
        for seq in [*self.running.values(), *self.waiting.values()]:
            seq.status, seq.finish_reason, seq.block_table, seq.slot = FINISHED, "abort", [], -1
        self.running.clear()
        self.waiting.clear()
        self.num_unfinished_prompt_tokens = 0
        manager = self.block_manager
        self.block_manager = BlockManager(manager.num_blocks, manager.block_size, manager.enable_prefix_caching)
        self._free_slots = list(range(self.max_num_seqs - 1, -1, -1))

    def preempt_all(self) -> None:
        """Put every admitted sequence back to the queue and forget cached prefixes: all is computed again."""
        while self.running:
            self._preempt(self.running[next(reversed(self.running))])
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Raises RuntimeError while sequences own blocks."""
        self.block_manager.reset_prefix_cache()

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence in any state, unless it has ended. Tokens that dispatched steps deliver later are ignored."""
        if seq.status is FINISHED:
            return
        if seq.status is WAITING:
            del self.waiting[seq.seq_id]
        else:
            self._release(seq)
        self.num_unfinished_prompt_tokens -= seq.num_prompt_tokens
        seq.status = FINISHED
        seq.finish_reason = reason

    def fills_a_step(self) -> bool:
        """Whether the waiting prompts fill the next step: it is then the same, whatever is added after them.

        Of prompts that begin with the same block only the first is counted, as the others may share all they have.
        """
        num_tokens, first_blocks = 0, set()
        for seq in self.waiting.values():
            num_cached = self.block_manager.num_cached_tokens(seq)
            first_block = self.block_manager.first_block(seq)
            if first_block is None or first_block not in first_blocks:
                first_blocks.add(first_block)
                num_tokens += len(seq.token_ids) - num_cached
        return num_tokens >= self.max_num_batched_tokens

    def num_steps(self) -> int:
        """How many tokens of each sequence the next step may compute."""
        return self._num_steps(*self._phases())

    def schedule(self, most_steps: int | None = None) -> Schedule:
        """Choose the next step, which the caller dispatches before it calls anything else here.

        May be empty: nothing is left to do, or nothing can be done before the tokens of dispatched steps are read.
        `most_steps`: how many tokens of each sequence it may compute, where that is fewer than `num_steps()`.
        """
        decoding, prefilling = self._phases()
        num_steps = self._num_steps(decoding, prefilling)
        schedule = Schedule(num_steps=num_steps if most_steps is None else min(num_steps, most_steps))
        self._schedule_decodes(schedule, decoding)
        prefilling = [seq for seq in prefilling if seq.status is PREFILL]  # else a decode has preempted it
        # The budget is never short here. Whoever decodes had a token in the step before. So had the one sequence, at
        # most, that is in the middle of its prompt: it took what the step before had left.
        budget = self._prompt_budget(len(schedule.decodes), prefilling)
        for seq in prefilling:
            budget -= self._schedule_chunk(schedule, seq, budget)
        self._schedule_admissions(schedule, budget)
        schedule.decodes = in_order(schedule.decodes)
        return schedule

    def update(self, schedule: Schedule, decode_tokens: list[int], prefill_tokens: list[int]) -> list[Sequence]:
        """Take in the tokens of the oldest dispatched step; returns the sequences that finished with them.

        One token for each row of `schedule.decodes` and each of `schedule.prefills` (of no meaning where the chunk
        does not sample); -1, where the logits have none to draw, ends the sequence. To be called `schedule.num_steps`
        times, with each step's tokens in turn.
        """
        sampled = list(zip(schedule.decodes, decode_tokens, strict=True))
        for chunk, token in zip(schedule.prefills, prefill_tokens, strict=True):
            if chunk.samples:
                sampled.append((chunk.seq, token))
        finished = []
        for seq, token in sampled:
            if seq.status is not FINISHED:
                self._append_token(seq, token)
                if seq.status is FINISHED:
                    finished.append(seq)
        return finished

    def check(self) -> None:
        """Assert that sequences, slots and blocks agree. Costs the pool: for tests."""
        size = self.block_manager.block_size
        self.block_manager.check(self.running.values())
        for seq in self.waiting.values():
            assert (seq.status, seq.slot, seq.block_table, seq.num_computed) == (WAITING, -1, [], 0), seq
        for seq in self.running.values():
            known = len(seq.token_ids)
            assert seq.num_computed <= len(seq.block_table) * size, seq
            if seq.status is DECODE:
                assert known + seq.num_pending == seq.num_computed + 1 <= seq.max_len, seq
            else:
                assert (seq.status, seq.num_pending) == (PREFILL, 0), seq
                assert seq.num_computed < known, seq
        slots = [seq.slot for seq in self.running.values()]
        assert sorted(self._free_slots + slots) == list(range(self.max_num_seqs)), "each slot is free or owned"
        prompts = sum(seq.num_prompt_tokens for part in (self.running, self.waiting) for seq in part.values())
        assert prompts == self.num_unfinished_prompt_tokens, "the load is miscounted"
        order = [*self.running, *self.waiting]
        assert order == sorted(order), "arrival order is lost"

    def _phases(self) -> tuple[list[Sequence], list[Sequence]]:
        """The running sequences that decode a next token, and those that prefill."""
        decoding, prefilling = [], []
        for seq in self.running.values():
            if seq.status is PREFILL:
                prefilling.append(seq)
            elif seq.num_computed + 1 < seq.max_len:  # else the pending tokens complete it
                decoding.append(seq)
        return decoding, prefilling

    def _num_steps(self, decoding: list[Sequence], prefilling: list[Sequence]) -> int:
        """Several where nobody else has work, and each that decodes can do them without preemption or its end."""
        steps, manager = self.run_ahead.num_steps, self.block_manager
        if prefilling or self.waiting or not 0 < len(decoding) <= self.run_ahead.rows:
            return 1
        if sum(seq.num_computed for seq in decoding) > self.run_ahead.tokens:
            return 1
        if any(seq.num_computed + steps >= seq.max_len for seq in decoding):
            return 1
        missing = (-(-(seq.num_computed + steps) // manager.block_size) - len(seq.block_table) for seq in decoding)
        return steps if sum(missing) <= manager.num_free_blocks else 1

    def _schedule_decodes(self, schedule: Schedule, sequences: list[Sequence]) -> None:
        """The next token of each, in arrival order: a victim of preemption is then never one scheduled already."""
        decodes, block_size, steps = schedule.decodes, self.block_manager.block_size, schedule.num_steps
        for seq in sequences:
            if seq.status is not DECODE:  # preempted by one before it
                continue
            # The token computed now goes to position num_computed, counted from 0. A table of b blocks has room for
            # positions 0..b*block_size-1, so the sequence needs another block exactly when the two are equal. (Several
            # steps may need several blocks.)
            end = seq.num_computed + steps
            while end > len(seq.block_table) * block_size:
                if not self._grow(seq):
                    break
            else:
                seq.num_computed = end
                seq.num_pending += steps
                decodes.append(seq)

    def _prompt_budget(self, decodes: int, prefilling: list[Sequence]) -> int:
        """How many tokens of prompts the step may compute beside so many that decode."""
        most, tokens = self.max_num_batched_tokens, decodes
        tokens += sum(len(seq.token_ids) - seq.num_computed for seq in prefilling)
        for seq in islice(self.waiting.values(), len(self._free_slots)):
            if tokens >= most:
                break
            tokens += len(seq.token_ids)  # or fewer, if some are cached
        return self.fitting(decodes, min(tokens, most)) - decodes if tokens > decodes else 0

    def _grow(self, seq: Sequence) -> bool:
        """Add a block to a sequence, preempting later arrivals for it; False where it was itself the latest."""
        while not self.block_manager.append_block(seq):
            victim = self.running[next(reversed(self.running))]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Put the latest admitted sequence back to the front of the queue; its tokens will be computed again."""
        self._release(seq)
        seq.status = WAITING
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting[seq.seq_id] = seq
        self.waiting.move_to_end(seq.seq_id, last=False)

    def _schedule_admissions(self, schedule: Schedule, budget: int) -> None:
        """Admit waiting sequences in order while budget, slots and blocks last; nobody overtakes the first.

        A step that preempts admits nobody: its last victim is first in line, and needs more than what it freed.
        """
        while budget and self.waiting and self._free_slots:
            seq = next(iter(self.waiting.values()))
            if seq.num_pending or not self._admit(seq):  # preempted, and its last tokens are still on their way
                return
            schedule.admitted.append(seq)
            budget -= self._schedule_chunk(schedule, seq, budget)

    def _admit(self, seq: Sequence) -> bool:
        """Give the first waiting sequence blocks for all its known tokens, and a slot; False where blocks are short."""
        num_spare = self.block_manager.num_blocks // SPARE_SHARE if self.running else 0
        num_cached = self.block_manager.allocate(seq, num_spare)
        if num_cached is None:
            return False
        del self.waiting[seq.seq_id]
        self.running[seq.seq_id] = seq
        seq.slot = self._free_slots.pop()
        seq.status = PREFILL
        seq.num_computed = num_cached
        if not seq.num_preemptions:
            seq.num_cached_tokens = num_cached
            self.num_prefix_query_tokens += seq.num_prompt_tokens
            self.num_prefix_hit_tokens += num_cached
        return True

    def _schedule_chunk(self, schedule: Schedule, seq: Sequence, budget: int) -> int:
        """Schedule the next tokens of a prefilling sequence, at most `budget`; returns how many."""
        assert budget > 0, seq
        start, end = seq.num_computed, len(seq.token_ids)
        stop = min(end, start + budget)
        samples = stop == end
        if samples:
            seq.status = DECODE
            seq.num_pending += 1
        # Decode rows alone store their keys and values as they attend, in any order: so none of them completes a block,
        # which others may share at once. And no hidden states come back of them.
        completes_block = stop % self.block_manager.block_size == 0
        if samples and stop - start == 1 and not completes_block and seq.scored is None:
            schedule.decodes.append(seq)
        else:
            schedule.prefills.append(PrefillChunk(seq, stop - start, samples))
        seq.num_computed = stop
        # Others may share these blocks from now on, in this very step too: of a step with prompts each layer stores all
        # keys and values before anything attends to them.
        self.block_manager.publish(seq, start // self.block_manager.block_size, stop // self.block_manager.block_size)
        return stop - start

    def _append_token(self, seq: Sequence, token: int) -> None:
        """Add a token that a step sampled, and finish the sequence where it is the last."""
        seq.num_pending -= 1
        if token < 0:  # whatever made the logits NaN may lie in the cache: it ends with this sequence
            self.block_manager.withdraw(seq)
            self.finish(seq, "error")
            return
        tokens = seq.token_ids
        tokens.append(token)
        # All tokens but the newest are computed: with the first token of a new block, the block before it is complete.
        # (A preempted sequence has no blocks; it publishes them again when it prefills.)
        num_full, rest = divmod(len(tokens) - 1, self.block_manager.block_size)
        if rest == 0 and seq.status is DECODE:
            self.block_manager.publish(seq, num_full - 1, num_full)
        if token in seq.stop_token_ids and len(tokens) > seq.min_len:
            self.finish(seq, "stop")
        elif len(tokens) == seq.max_len:
            self.finish(seq, "length")

    def _release(self, seq: Sequence) -> None:
        """Take blocks and slot from an admitted sequence."""
        del self.running[seq.seq_id]
        self.block_manager.free(seq)
        self._free_slots.append(seq.slot)
        seq.slot = -1
