"""The pool of KV-cache blocks: reference counts, and a prefix cache of full blocks found by their hash.

Every operation costs the blocks that it touches, never the pool. The idea is vLLM's and nano-vllm's: a block whose
tokens are all known is *published* under a hash of these tokens and of everything before them. A freed block keeps
its hash, and can be found by it, until the block is taken for new content.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import compress

from xxhash import xxh3_128_digest

from nanovllm_jax.engine.sequence import Sequence


class BlockManager:
    """Hands out blocks 0..num_blocks-1 of `block_size` tokens each to sequences' block tables."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks  # what each block is published under
        self._published: dict[bytes, int] = {}  # the inverse of _hashes
        # Free blocks are of two kinds. Blank ones are taken first. Cached ones may still be hit, and are evicted in
        # the order they were freed. (An OrderedDict: finding the first key of a dict scans the deleted ones.)
        self._free_blank = list(range(num_blocks - 1, -1, -1))
        self._free_cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns, those that still hold a cached prefix included."""
        return len(self._free_blank) + len(self._free_cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that at least one sequence owns."""
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that a prefix lookup can hit, owned or free."""
        return len(self._published)

    def allocate(self, seq: Sequence, num_spare: int = 0) -> int | None:
        """Fill an empty block table for all of the sequence's known tokens, from the prefix cache where it can.

        Returns the number of tokens found in the cache, or None, with nothing changed, where fewer than `num_spare`
        blocks would be left free.
        """
        assert not seq.block_table, seq
        hits = self._lookup(seq)
        # Hits that another sequence owns cost nothing; hits among the free blocks leave the free pool.
        num_owned = sum(self._ref_counts[block] > 0 for block in hits)
        num_blocks = -(-len(seq.token_ids) // self.block_size)
        if num_blocks - num_owned + num_spare > self.num_free_blocks:
            return None
        for block in hits:  # all of them before any fresh block, which could evict one
            if self._ref_counts[block] == 0:
                del self._free_cached[block]
            self._ref_counts[block] += 1
        seq.block_table = hits + [self._take() for _ in range(num_blocks - len(hits))]
        return len(hits) * self.block_size

    def num_cached_tokens(self, seq: Sequence) -> int:
        """How many of the sequence's tokens `allocate` would find in the prefix cache."""
        return len(self._lookup(seq)) * self.block_size

    def first_block(self, seq: Sequence) -> bytes | None:
        """The hash of the sequence's first block; None where it has no whole one, or none are shared."""
        if not self.enable_prefix_caching or len(seq.token_ids) < self.block_size:
            return None
        return self._hash_blocks(seq, 1)[0]

    def append_block(self, seq: Sequence) -> bool:
        """Add one fresh block to the sequence's table; False, with nothing changed, where none is free."""
        if not self.num_free_blocks:
            return False
        seq.block_table.append(self._take())
        return True

    def free(self, seq: Sequence) -> None:
        """Give up all blocks of a sequence, last one first, so that a cached prefix is evicted from its end."""
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free_blank.append(block)
                else:
                    self._free_cached[block] = None
        seq.block_table = []

    def publish(self, seq: Sequence, start: int, stop: int) -> None:
        """Let others find blocks start..stop-1 of the sequence's table.

        All tokens of these blocks must be known, and their keys and values computed by a dispatched step. Where the
        same content is published already, a block that others own stays, and they share it; one that nobody owns gives
        its place to the latest, as it may depend on NaN.
        """
        if not self.enable_prefix_caching:
            return
        digests = self._hash_blocks(seq, stop)
        for i in range(start, stop):
            block, digest = seq.block_table[i], digests[i]
            before = self._published.get(digest)
            if before is None or not self._ref_counts[before]:
                self._forget(digest)
                self._published[digest] = block
                self._hashes[block] = digest

    def withdraw(self, seq: Sequence) -> None:
        """Let nobody find the blocks of a sequence's full blocks of tokens from now on, whoever published them."""
        for digest in seq.block_hashes:
            self._forget(digest)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix.

        Raises:
            RuntimeError: sequences own blocks. What they compute next would be found under hashes that also stand
                for what they computed before the reset.
        """
        if self.num_used_blocks:
            raise RuntimeError(
                f"the prefix cache cannot be reset while requests hold {self.num_used_blocks} blocks: "
                "let them finish, or abort them"
            )
        for block in list(self._free_cached):
            self._forget(self._hashes[block])

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the books balance, given every sequence that may own blocks. Costs the pool: for tests."""
        owners = [0] * self.num_blocks  # how many own a block: tests ask after each call, and lists compare quickly
        for seq in sequences:
            for block in seq.block_table:
                owners[block] += 1
        assert self._ref_counts == owners, "wrong ref count"
        free, hash_of = [*self._free_blank, *self._free_cached], self._hashes.__getitem__
        owned = compress(range(self.num_blocks), owners)
        assert sorted([*free, *owned]) == list(range(self.num_blocks)), "each block is free or owned, and once"
        assert not any(map(hash_of, self._free_blank)), "a blank block is published"
        assert all(map(hash_of, self._free_cached)), "a cached block is not published"
        hashes: list[bytes | None] = [None] * self.num_blocks
        for digest, block in self._published.items():
            hashes[block] = digest
        assert hashes == self._hashes, "hash table and blocks disagree"
        assert len(self._published) == self.num_blocks - hashes.count(None), "a block is published twice"

    def _forget(self, digest: bytes) -> None:
        """Let nobody find the block that is published under this hash, if one is."""
        block = self._published.pop(digest, None)
        if block is not None:
            self._hashes[block] = None
            if block in self._free_cached:
                del self._free_cached[block]
                self._free_blank.append(block)

    def _lookup(self, seq: Sequence) -> list[int]:
        """Blocks that hold the longest cached prefix of the sequence's tokens."""
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        for digest in self._hash_blocks(seq, seq.first_needed // self.block_size):
            block = self._published.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def _hash_blocks(self, seq: Sequence, count: int) -> list[bytes]:
        """Hashes of the first `count` blocks, each of its tokens and all before them; every block is hashed once."""
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), count):
            parent = hashes[-1] if hashes else seq.prefix_salt
            hashes.append(xxh3_128_digest(parent + seq.token_ids[i * size : (i + 1) * size].tobytes()))
        return hashes[:count]

    def _take(self) -> int:
        """A free block for new content, owned once. The prefix it may have held is forgotten here, not earlier."""
        if self._free_blank:
            block = self._free_blank.pop()
        else:
            block, _ = self._free_cached.popitem(last=False)
            self._forget(self._hashes[block])
        self._ref_counts[block] = 1
        return block
