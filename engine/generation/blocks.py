"""BlockManager: who owns which block of the KV cache. Pure bookkeeping: it never sees a tensor.

A sequence's table lists the blocks that hold its tokens, block_size to a block, in order. A full
block may be shared: between sequences forked from one prompt, and with whoever computed the same
tokens before (the prefix cache). Only the partial last block is ever written to, and that one has
one owner.

A full block is cached under (version, parent, tokens): the weights it was computed with, the serial
number of the content before it (that of the empty prefix says whether an adapter was on), and its
tokens themselves. Serial numbers are never reused and the key is compared whole, so neither a hash
collision nor a recycled block can give a wrong hit. A bump of the version makes every earlier key
unreachable at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_ROOTS = {True: 0, False: -1}  # serials of the empty prefix, with an adapter and without


@dataclass(slots=True)
class _Table:
    # of the weights when it was allocated: a table that lived through a bump is cached no more
    version: int
    root: int  # serial of its empty prefix
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # leading blocks whose content has a serial number
    serial: int = 0  # of the last of them


class BlockManager:
    """Blocks 1 to num_blocks - 1 of a cache; block 0 is the null block that pads block tables and
    is never issued.

    Sequences are named by integers of the caller's choice. Everything is O(1) per block touched. A
    call that fails changes nothing.

    Raises:
        ValueError: fewer than two blocks, or a block size below one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                "BlockManager: expected num_blocks >= 2 (one is the null block) and block_size >= "
                f"1, got {num_blocks} and {block_size}"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.version = 0
        # eviction order: empty blocks, then cached ones, oldest first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._keys: list[tuple[int, int, tuple[int, ...]] | None] = [None] * num_blocks
        # key -> (block, serial)
        self._cache: dict[tuple[int, int, tuple[int, ...]], tuple[int, int]] = {}
        self._last_serial = 0
        self._tables: dict[int, _Table] = {}

    # ---- sizes -----------------------------------------------------------------------------------
    @property
    def total(self) -> int:
        """Blocks that can be issued."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that an allocation may take now: empty ones and cached ones that nobody uses."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def table(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order. The list is live: read it, do not keep it."""
        return self._table(sequence).blocks

    # ---- life of a sequence ----------------------------------------------------------------------
    def allocate(
        self, sequence: int, tokens: Sequence[int], *, keep: int = 0, adapted: bool = True
    ) -> int | None:
        """Give `sequence` a table for `tokens`, starting with the longest cached prefix.

        At least the last token is left to compute, since its hidden state is wanted. With `keep`,
        so many blocks must stay available. `adapted`: whether an adapter computes its keys and
        values; they are found again by the like alone.

        Returns:
            How many leading tokens are in the cache already; None (and nothing changed) where there
            are too few blocks.
        """
        if sequence in self._tables:
            raise ValueError(
                f"BlockManager: sequence {sequence} has a table already; free it first"
            )
        hits, serial = self._match(tokens, _ROOTS[adapted])
        fresh = self.blocks_for(len(tokens)) - len(hits)
        if fresh + keep > len(self._free) - sum(not self._references[block] for block in hits):
            return None
        for block in hits:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        self._tables[sequence] = _Table(
            self.version,
            _ROOTS[adapted],
            [*hits, *(self._take() for _ in range(fresh))],
            len(hits),
            serial,
        )
        return len(hits) * self.block_size

    def grow(self, sequence: int, num_tokens: int) -> bool:
        """Make the table of `sequence` hold `num_tokens` tokens; False (and nothing changed) where
        there are too few blocks."""
        blocks = self._table(sequence).blocks
        fresh = self.blocks_for(num_tokens) - len(blocks)
        if fresh > len(self._free):
            return False
        blocks.extend(self._take() for _ in range(fresh))
        return True

    def shrink(self, sequence: int, num_tokens: int) -> None:
        """Make the table of `sequence` hold no more than `num_tokens` tokens need: take back what
        `grow` gave ahead of them."""
        table, keep = self._table(sequence), self.blocks_for(num_tokens)
        if keep < table.cached:
            raise ValueError(
                f"BlockManager: cannot shrink sequence {sequence} to {num_tokens} tokens; its "
                f"first {table.cached} blocks are cached"
            )
        self._give_up(table.blocks[keep:])
        del table.blocks[keep:]

    def fork(self, parent: int, child: int, num_tokens: int) -> list[tuple[int, int]] | None:
        """Give `child` the first `num_tokens` tokens of `parent`: full blocks are shared, a partial
        last one is the child's own.

        Returns:
            The (source, destination) block copies that the caller has to make before either writes
            on; None (and nothing changed) where there is no block for the partial one.
        """
        table, full = self._table(parent), num_tokens // self.block_size
        if child in self._tables:
            raise ValueError(f"BlockManager: sequence {child} has a table already; free it first")
        if self.blocks_for(num_tokens) > len(table.blocks):
            raise ValueError(
                f"BlockManager: cannot fork {num_tokens} tokens of sequence {parent}, whose "
                f"{len(table.blocks)} blocks hold fewer"
            )
        partial = num_tokens > full * self.block_size
        if partial and not self._free:
            return None
        shared = table.blocks[:full]
        for block in shared:
            self._references[block] += 1
        known = (table.cached, table.serial) if table.cached <= full else (0, table.root)
        self._tables[child] = _Table(
            table.version, table.root, [*shared, self._take()] if partial else shared, *known
        )
        return [(table.blocks[full], self._tables[child].blocks[full])] if partial else []

    def commit(self, sequence: int, tokens: Sequence[int]) -> None:
        """Offer the full blocks of `tokens`, whose keys and values have been computed, to later
        allocations."""
        table, size = self._table(sequence), self.block_size
        if table.version != self.version:
            return
        for index in range(table.cached, len(tokens) // size):
            key = (self.version, table.serial, tuple(tokens[index * size : (index + 1) * size]))
            block = table.blocks[index]
            if key not in self._cache:
                if self._keys[block] is not None:
                    # shared, and cached already after an equal prefix that has a number of its own
                    return
                self._last_serial += 1
                self._keys[block] = key
                self._cache[key] = (block, self._last_serial)
            table.serial, table.cached = self._cache[key][1], index + 1

    def free(self, sequence: int) -> None:
        """Give up the table of `sequence`. Cached blocks stay findable until they are evicted, the
        ends of prefixes first."""
        blocks = self._table(sequence).blocks
        del self._tables[sequence]
        self._give_up(blocks)

    def bump(self) -> None:
        """The weights changed: nothing cached so far will be found again. Of what nobody uses, what
        was cached last is issued first: its memory is warm."""
        self.version += 1
        for block, _ in list(self._cache.values()):
            if not self._references[block]:  # the others are forgotten when they are freed
                self._forget(block)
                self._free.move_to_end(block, last=False)

    # ---- parts -----------------------------------------------------------------------------------
    def _table(self, sequence: int) -> _Table:
        if sequence not in self._tables:
            raise ValueError(
                f"BlockManager: sequence {sequence} has no table; it was never allocated, or freed "
                "before"
            )
        return self._tables[sequence]

    def _match(self, tokens: Sequence[int], serial: int) -> tuple[list[int], int]:
        """Blocks of the longest cached prefix that leaves a token to compute, and the serial number
        of its last block."""
        hits: list[int] = []
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            found = self._cache.get(
                (self.version, serial, tuple(tokens[start : start + self.block_size]))
            )
            if found is None:
                break
            hits.append(found[0])
            serial = found[1]
        return hits, serial

    def _give_up(self, blocks: list[int]) -> None:
        """One owner less of each."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._free[block] = None
            key = self._keys[block]
            if key is None or key[0] != self.version:
                self._forget(block)
                self._free.move_to_end(block, last=False)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._cache[key]
            self._keys[block] = None
