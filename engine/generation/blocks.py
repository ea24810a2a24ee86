"""BlockManager: which sequence owns which block of the KV cache. Pure bookkeeping: it never sees a
tensor.

A sequence's table lists the blocks that hold its tokens, block_size to a block, in order. A full
block may be shared: between sequences forked from one prompt, and with sequences that computed the
same tokens before (the prefix cache). Only the partial last block is ever written to, and it has a
single owner.

A full block is cached under the key (version, parent, tokens): the version of the weights that
computed it, the serial number of the content before it, and its tokens themselves. The empty prefix
has one serial number with an adapter and another without. Serial numbers are never reused and the
key is compared whole, so neither a hash collision nor a recycled block can give a wrong hit. A bump
of the version makes every earlier key unreachable at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_ROOTS = {True: 0, False: -1}  # serials of the empty prefix, with an adapter and without


@dataclass(slots=True)
class _Table:
    # version of the weights at allocation; after a bump, the table's blocks are not cached any more
    version: int
    root: int  # serial number of the empty prefix, with or without an adapter
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # leading blocks whose content has a serial number
    serial: int = 0  # serial number of the last of these blocks
    released: int = 0  # leading blocks that were given up, with the null block in their places


class BlockManager:
    """Owners of blocks 1 to num_blocks - 1 of a cache. Block 0 is the null block: it pads block
    tables and is never issued.

    Sequences are named by integers that the caller chooses. Every operation is O(1) per block
    touched. A call that fails changes nothing.

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
        """Number of blocks that can be issued."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Number of blocks that an allocation may take now: empty blocks, and cached blocks that no
        sequence uses."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def table(self, sequence: int) -> list[int]:
        """Return the blocks of a sequence, in order. The list is live: read it at once, do not keep
        it."""
        return self._table(sequence).blocks

    # ---- life of a sequence ----------------------------------------------------------------------
    def allocate(
        self, sequence: int, tokens: Sequence[int], *, keep: int = 0, adapted: bool = True
    ) -> int | None:
        """Give `sequence` a table for `tokens`, starting with the longest cached prefix.

        At least the last token is left to compute, since its hidden state is needed.

        Args:
            keep: number of blocks that must stay available afterwards.
            adapted: whether an adapter computes the keys and values; a cached prefix is reused only
                by sequences for which this is the same.
        Returns:
            The number of leading tokens that are in the cache already. If there are too few blocks,
            None, and nothing changes.
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
        """Make the table of `sequence` hold `num_tokens` tokens. If there are too few blocks,
        return False and change nothing."""
        blocks = self._table(sequence).blocks
        fresh = self.blocks_for(num_tokens) - len(blocks)
        if fresh > len(self._free):
            return False
        blocks.extend(self._take() for _ in range(fresh))
        return True

    def shrink(self, sequence: int, num_tokens: int) -> None:
        """Take back the blocks of `sequence` that `num_tokens` tokens do not need, such as those
        that `grow` gave in advance."""
        table, keep = self._table(sequence), self.blocks_for(num_tokens)
        if keep < table.cached:
            raise ValueError(
                f"BlockManager: cannot shrink sequence {sequence} to {num_tokens} tokens; its "
                f"first {table.cached} blocks are cached"
            )
        self._give_up(table.blocks[keep:])
        del table.blocks[keep:]

    def release(self, sequence: int, num_tokens: int) -> None:
        """Give up the blocks of `sequence` that hold nothing but its first `num_tokens` tokens,
        which it will not read again; the null block takes their places in its table. Those that
        `commit` has cached stay findable until they are evicted."""
        table, stop = self._table(sequence), num_tokens // self.block_size
        if stop > table.released:
            self._give_up(table.blocks[table.released : stop])
            table.blocks[table.released : stop] = [0] * (stop - table.released)
            table.released = stop

    def fork(self, parent: int, child: int, num_tokens: int) -> list[tuple[int, int]] | None:
        """Give `child` the first `num_tokens` tokens of `parent`. Full blocks are shared; a partial
        last block is new.

        Returns:
            The block copies (source, destination) that the caller must make before either sequence
            writes on. If there is no block for the partial one, None, and nothing changes.
        """
        table, full = self._table(parent), num_tokens // self.block_size
        if child in self._tables:
            raise ValueError(f"BlockManager: sequence {child} has a table already; free it first")
        if self.blocks_for(num_tokens) > len(table.blocks):
            raise ValueError(
                f"BlockManager: cannot fork {num_tokens} tokens of sequence {parent}, whose "
                f"{len(table.blocks)} blocks hold fewer"
            )
        if full < table.released:
            raise ValueError(
                f"BlockManager: cannot fork {num_tokens} tokens of sequence {parent}, whose first "
                f"{table.released} blocks were released"
            )
        partial = num_tokens > full * self.block_size
        if partial and not self._free:
            return None
        shared = table.blocks[:full]
        for block in shared[table.released :]:
            self._references[block] += 1
        known = (table.cached, table.serial) if table.cached <= full else (0, table.root)
        self._tables[child] = _Table(
            table.version,
            table.root,
            [*shared, self._take()] if partial else shared,
            *known,
            table.released,
        )
        return [(table.blocks[full], self._tables[child].blocks[full])] if partial else []

    def commit(self, sequence: int, tokens: Sequence[int]) -> None:
        """Make the full blocks of `tokens`, whose keys and values have been computed, available as
        cached prefixes."""
        table, size = self._table(sequence), self.block_size
        if table.version != self.version:
            return
        for index in range(table.cached, len(tokens) // size):
            key = (self.version, table.serial, tuple(tokens[index * size : (index + 1) * size]))
            block = table.blocks[index]
            if key not in self._cache:
                if not block or self._keys[block] is not None:
                    # released; or shared, and already cached after an equal prefix with another
                    # serial number
                    return
                self._last_serial += 1
                self._keys[block] = key
                self._cache[key] = (block, self._last_serial)
            table.serial, table.cached = self._cache[key][1], index + 1

    def free(self, sequence: int) -> None:
        """Give up the table of `sequence`. Cached blocks stay findable until they are evicted; the
        ends of prefixes are evicted first."""
        table = self._table(sequence)
        del self._tables[sequence]
        self._give_up(table.blocks[table.released :])

    def bump(self) -> None:
        """Note that the weights changed, so that no block cached so far is found again. Among
        unused blocks, those cached last are issued first, because their memory is warm."""
        self.version += 1
        for block, _ in list(self._cache.values()):
            if not self._references[block]:  # blocks in use are forgotten when they are freed
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
        """Return the blocks of the longest cached prefix that leaves a token to compute, and the
        serial number of the last of these blocks."""
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
        """Remove one owner from each of these blocks."""
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
