"""What each step works on: which sequences, and how many positions of each."""

from collections import defaultdict, deque
from dataclasses import dataclass, field

from mqwen.engine.blocks import BlockPool
from mqwen.engine.sequence import Sequence


@dataclass(slots=True)
class Work:
    """Positions start to stop of a sequence. samples: the next token follows from the last of them."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool


@dataclass(slots=True)
class Step:
    """works: those of one position first. admitted: sequences that run from now on. grown: for sequences that ran
    before, the places of new blocks in their tables: (row, place, block). prompts, longest: pieces of prompts, and
    positions of the longest of these prompts."""

    works: list[Work] = field(default_factory=list)
    prompts: int = 0
    longest: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[tuple[int, int, int]] = field(default_factory=list)


class FairQueue:
    """Sequences that wait. The key that was served least is next; one that comes anew starts with the least served.

    Sheng et al. 2024, "Fairness in serving large language models" (arXiv:2401.00588), section 4.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}
        self._running: defaultdict[str, int] = defaultdict(int)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        self._queue(sequence.request.key).append(sequence)
        self._length += 1

    def push_back(self, sequence: Sequence) -> None:
        """It ran, and must wait again, before all others of its key."""
        self._queue(sequence.request.key).appendleft(sequence)
        self._length += 1
        self.ended(sequence)

    def first(self) -> Sequence:
        return self._queues[min(self._queues, key=lambda key: self._served[key])][0]

    def pop(self) -> None:
        """`first` runs from now on."""
        sequence = self.first()
        self._running[sequence.request.key] += 1
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        key = sequence.request.key
        self._queues[key].remove(sequence)
        self._length -= 1
        if not self._queues[key]:
            del self._queues[key]
        self._forget(key)

    def charge(self, key: str, positions: int) -> None:
        self._served[key] += positions

    def ended(self, sequence: Sequence) -> None:
        """It runs no more."""
        self._running[sequence.request.key] -= 1
        self._forget(sequence.request.key)

    def _queue(self, key: str) -> deque[Sequence]:
        if key not in self._queues:
            least = min(self._served.values(), default=0)
            self._served[key] = max(self._served.get(key, 0), least)
            self._queues[key] = deque()
        return self._queues[key]

    def _forget(self, key: str) -> None:
        if key not in self._queues and not self._running[key]:
            del self._served[key], self._running[key]


class Scheduler:
    """positions: most in one step. reach: most that its prompts see, each counted as the longest. rows: most sequences
    at once. width: positions of a picture."""

    def __init__(self, pool: BlockPool, *, positions: int, reach: int, rows: int, width: int) -> None:
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # positions
        self._pool, self._positions, self._reach, self._width = pool, positions, reach, width
        self._rows = list(range(rows - 1, -1, -1))

    def schedule(self) -> Step:
        """The next step; it counts as done from now on. Decoding goes before prompts, so that no prompt delays it."""
        step = Step()
        budget, before = self._positions, self.preemptions
        for sequence in self.running.copy():
            if budget and sequence.row is not None and sequence.decodes and self._grow(sequence, step):
                budget -= self._add(step, sequence, budget)
        for sequence in self.running:
            if budget and sequence.length - sequence.computed > 1 and self._fits(step, sequence):
                budget -= self._add_prompt(step, sequence, budget)
        while budget and self.preemptions == before and self._admit(step):
            budget -= self._add_prompt(step, self.running[-1], budget)
        step.works.sort(key=lambda work: work.stop - work.start > 1)
        return step

    def remove(self, sequence: Sequence) -> None:
        """It has ended, wherever it was."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence)
            self.waiting.ended(sequence)

    def publish(self, work: Work) -> None:
        """Blocks that this work has filled can be found from now on; their tokens must be known."""
        sequence = work.sequence
        for place in range(work.start // self._pool.size, work.stop // self._pool.size):
            sequence.extend_keys(place + 1, self._pool.size, self._width)
            self._pool.publish(sequence.blocks[place], sequence.keys[place])

    def _add(self, step: Step, sequence: Sequence, budget: int) -> int:
        start = sequence.computed
        stop = min(sequence.length, start + budget)
        samples = stop == sequence.length
        step.works.append(Work(sequence, start, stop, samples))
        sequence.computed = stop
        sequence.length += samples
        self.waiting.charge(sequence.request.key, stop - start)
        return stop - start

    def _fits(self, step: Step, sequence: Sequence) -> bool:
        """Prompts found in the prefix cache take few of a step's positions; what they see is gathered all the same."""
        return not step.prompts or (step.prompts + 1) * max(step.longest, sequence.length) <= self._reach

    def _add_prompt(self, step: Step, sequence: Sequence, budget: int) -> int:
        step.prompts, step.longest = step.prompts + 1, max(step.longest, sequence.length)
        return self._add(step, sequence, budget)

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Room for one position more; the youngest give theirs up if need be, at last the sequence itself."""
        if len(sequence.blocks) * self._pool.size >= sequence.length:
            return True
        while not self._pool.free:
            youngest = self.running[-1]
            self._stop(youngest)
            self.waiting.push_back(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        [block] = self._pool.take(1)
        assert sequence.row is not None
        step.grown.append((sequence.row, len(sequence.blocks), block))
        sequence.blocks.append(block)
        return True

    def _admit(self, step: Step) -> bool:
        """The next that waits, if there is room for all that is known of it, and a block for each that runs."""
        if not self._rows or not len(self.waiting):
            return False
        sequence = self.waiting.first()
        if not self._fits(step, sequence):
            return False
        sequence.extend_keys((sequence.length - 1) // self._pool.size, self._pool.size, self._width)
        found = self._pool.find(sequence.keys[: (sequence.length - 1) // self._pool.size])
        self._pool.hold(found)
        missing = self._pool.blocks_for(sequence.length) - len(found)
        if self._pool.free < missing + len(self.running):
            self._pool.let_go(found)
            return False
        self.waiting.pop()
        self.prefix_queries += sequence.length
        self.prefix_hits += len(found) * self._pool.size
        sequence.blocks = found + self._pool.take(missing)
        sequence.computed = len(found) * self._pool.size
        sequence.row = self._rows.pop()
        self.running.append(sequence)
        step.admitted.append(sequence)
        return True

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        self._pool.let_go(sequence.blocks)
        sequence.row, sequence.blocks, sequence.computed = None, [], 0
