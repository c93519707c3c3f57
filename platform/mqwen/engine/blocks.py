"""Pages of the KV cache: who has which, and which hold the beginning of a prompt that may come again."""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Blocks 1 to count - 1, of `size` positions each. Block 0 is nobody's: padding points at it.

    A block that nobody holds keeps its content, and can be found by its key, until it is needed for something else:
    the one that was let go first goes first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.count = count - 1
        self._holders = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._by_key: dict[bytes, int] = {}
        self._free = OrderedDict.fromkeys(range(1, count))

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.size)

    def take(self, count: int) -> list[int]:
        """`count` <= `free` blocks with nothing worth keeping in them."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            if (key := self._keys[block]) is not None:
                del self._by_key[key]
                self._keys[block] = None
            self._holders[block] = 1
        return blocks

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The longest run of blocks, from the first, that hold what `keys` say. They are not held yet: see `hold`."""
        found: list[int] = []
        for key in keys:
            if (block := self._by_key.get(key)) is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)

    def let_go(self, blocks: Sequence[int]) -> None:
        """The end of a sequence goes before its beginning, which others are likelier to share."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=self._keys[block] is not None)

    def publish(self, block: int, key: bytes) -> None:
        """The block is full, and its content will stay what `key` stands for. The first of equal blocks is kept."""
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block
