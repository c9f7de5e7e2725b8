"""Planted faults: the property tests must catch every one of them, or they would not catch a real one either."""

import inspect
import sys
import textwrap

import pytest
from test_scheduler_properties import run_random_workloads

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.scheduler import Scheduler

SEEDS, STEPS = range(300, 360), 60  # of those of `test_random_workloads`: the rarest fault shows in one of 200

# name: (method, a part of its source, what stands there instead)
POOL_FAULTS = {
    "hits in the free pool are not charged": ("allocate", "num_blocks - num_owned", "num_blocks - len(hits)"),
    "a hit block stays in the free pool": ("allocate", "del self._free_cached[block]", "pass"),
    "a shared block counts one owner": ("allocate", "self._ref_counts[block] += 1", "self._ref_counts[block] = 1"),
    "a shared block is freed with its first owner": ("free", "if self._ref_counts[block] == 0:", "if True:"),
    "a cached block goes to the blank ones": ("free", "if self._hashes[block] is None:", "if True:"),
    "a finished sequence keeps its table": ("free", "seq.block_table = []", "pass"),
    "two blocks under one hash": ("publish", "self._forget(digest)", "pass"),
    "a published block does not know its hash": ("publish", "self._hashes[block] = digest", "pass"),
    "a block withdrawn is still found": ("_forget", "self._published.pop(", "self._published.get("),
    "a block withdrawn keeps its hash": ("_forget", "self._hashes[block] = None", "pass"),
    "a block withdrawn stays among the cached ones": ("_forget", "self._free_blank.append(block)", "pass"),
    "the cache survives a reset": ("reset_prefix_cache", "self._forget(self._hashes[block])", "pass"),
    "a reused block is still found": ("_take", "self._forget(self._hashes[block])", "pass"),
    "a prompt is found whole": ("_lookup", "seq.first_needed //", "len(seq.token_ids) //"),
    "a prompt that is scored is found": ("_lookup", "seq.first_needed", "(len(seq.token_ids) - 1)"),
    "a gap in the prefix is skipped": ("_lookup", "break", "continue"),
    "a block's hash ignores what is before it": ("_hash_blocks", "parent + seq", "seq"),
    "a block's hash ignores its last token": ("_hash_blocks", "(i + 1) * size]", "(i + 1) * size - 1]"),
}
POLICY_FAULTS = {
    "one token beyond the end": ("_phases", "seq.num_computed + 1 < seq.max_len", "seq.num_computed < seq.max_len"),
    "decodes cost no budget": ("_prompt_budget", " - decodes if", " if"),
    "a step has room for all prompts": ("_prompt_budget", "min(tokens, most)", "tokens"),
    "the rest of a prompt is forgotten": ("_prompt_budget", "len(seq.token_ids) - seq.num_computed", "0"),
    "a chunk costs no budget": ("schedule", "budget -= self._schedule_chunk", "self._schedule_chunk"),
    "an admission costs no budget": ("_schedule_admissions", "budget -= self._schedule_chunk", "self._schedule_chunk"),
    "several steps while others wait": ("_num_steps", "prefilling or self.waiting or ", ""),
    "several steps beyond the end": ("_num_steps", "seq.num_computed + steps >= seq.max_len", "False"),
    "no new block at the boundary": ("_schedule_decodes", "while end > len", "while end > 1 + len"),
    "several steps, one token pending": ("_schedule_decodes", "seq.num_pending += steps", "seq.num_pending += 1"),
    "the oldest is preempted first": ("_grow", "next(reversed(self.running))", "next(iter(self.running))"),
    "who preempts itself runs on": ("_grow", "return False", "return True"),
    "a preempted sequence counts as computed": ("_preempt", "seq.num_computed = 0", "pass"),
    "a preempted sequence goes to the end": ("_preempt", "last=False", "last=True"),
    "a preempted sequence keeps its phase": ("_preempt", "seq.status = WAITING", "pass"),
    "admission before the tokens are read": ("_schedule_admissions", "seq.num_pending or ", ""),
    "admission without a slot": ("_schedule_admissions", " and self._free_slots", ""),
    "a slot for two": ("_admit", "self._free_slots.pop()", "self._free_slots[-1]"),
    "cached tokens are computed again": ("_admit", "seq.num_computed = num_cached", "pass"),
    "chunks of any size": ("_schedule_chunk", "min(end, start + budget)", "end"),
    "a block that is completed is shared as it is stored": ("_schedule_chunk", " and not completes_block", ""),
    "every chunk samples": ("_schedule_chunk", "samples = stop == end", "samples = True"),
    "a block is published before it is full": (
        "_schedule_chunk",
        "stop // self.block_manager.block_size",
        "-(-stop // self.block_manager.block_size)",
    ),
    "a block is published before its last token": ("_append_token", "len(tokens) - 1", "len(tokens)"),
    "NaN stays in the cache": ("_append_token", "self.block_manager.withdraw(seq)", "pass"),
    "NaN is a token": ("_append_token", "token < 0", "False"),
    "a preempted sequence publishes": ("_append_token", " and seq.status is DECODE", ""),
    "a stop token does not stop": ("_append_token", 'self.finish(seq, "stop")', "pass"),
    "the end is not seen": ("_append_token", "len(tokens) == seq.max_len", "False"),
    "tokens after the end": ("update", "if seq.status is not FINISHED:", "if True:"),
    "tokens of unfinished prompts": ("update", "if chunk.samples:", "if True:"),
    "a finished sequence keeps its blocks": ("_release", "self.block_manager.free(seq)", "pass"),
    "a finished sequence keeps its slot": ("_release", "self._free_slots.append(seq.slot)", "pass"),
    "an aborted sequence stays in line": ("finish", "del self.waiting[seq.seq_id]", "pass"),
    "a failure leaves the cache": ("abort_all", "BlockManager(manager", "manager if True else (manager"),
    "a failure leaves the slots taken": ("abort_all", "list(range(self.max_num_seqs - 1, -1, -1))", "self._free_slots"),
    "a failure leaves sequences in line": ("abort_all", "self.waiting.clear()", "pass"),
}
MUTANTS = [
    pytest.param(owner, *fault, id=name)
    for owner, faults in ((BlockManager, POOL_FAULTS), (Scheduler, POLICY_FAULTS))
    for name, fault in faults.items()
]


def mutate(monkeypatch, owner, method, old, new):
    """Compile a method anew with one part of its source replaced."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert source.count(old) == 1, (
        f"{old!r} is {source.count(old)} times in {owner.__name__}.{method}: adapt the mutant"
    )
    namespace = dict(vars(sys.modules[owner.__module__]))
    exec(source.replace(old, new), namespace)
    monkeypatch.setattr(owner, method, namespace[method])


def test_without_a_fault():
    assert run_random_workloads(SEEDS, STEPS)["steps"] > 1000


@pytest.mark.parametrize(("owner", "method", "old", "new"), MUTANTS)
def test_a_mutant_is_caught(monkeypatch, owner, method, old, new):
    mutate(monkeypatch, owner, method, old, new)
    with pytest.raises((AssertionError, LookupError, TypeError, ValueError)):
        run_random_workloads(SEEDS, STEPS)
