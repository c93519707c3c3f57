"""The pool of blocks: what is shared, what is found again, what goes first."""

from random import Random

from mqwen.engine.blocks import BlockPool


def test_a_block_is_free_when_nobody_holds_it_and_found_until_it_is_taken() -> None:
    pool = BlockPool(4, 16)  # blocks 1 to 3
    first = pool.take(2)
    assert pool.free == 1
    pool.publish(first[0], b"a")
    pool.publish(first[1], b"b")
    pool.hold(first[:1])
    pool.let_go(first)
    assert pool.free == 2
    assert pool.find([b"a", b"b", b"c"]) == first
    assert pool.find([b"b"]) == first[1:]
    assert pool.find([b"x", b"a"]) == []
    pool.let_go(first[:1])
    assert pool.free == 3
    pool.take(1)  # the one that never held anything worth finding
    assert pool.find([b"a", b"b"]) == first
    pool.take(1)  # the end of what was let go, before its beginning
    assert pool.find([b"a", b"b"]) == first[:1]
    pool.take(1)
    assert pool.find([b"a", b"b"]) == []


def test_the_first_of_equal_blocks_is_found() -> None:
    pool = BlockPool(4, 16)
    one, other = pool.take(2)
    pool.publish(one, b"a")
    pool.publish(other, b"a")
    assert pool.find([b"a"]) == [one]
    pool.let_go([one, other])
    assert pool.free == 3


def test_random_use_leaks_nothing() -> None:
    random = Random(0)
    pool = BlockPool(20, 16)
    held: list[list[int]] = []
    for number in range(3000):
        if held and random.random() < 0.5:
            pool.let_go(held.pop(random.randrange(len(held))))
        else:
            found = pool.find([b"%d" % random.randrange(30)])
            pool.hold(found)
            blocks = found + pool.take(min(pool.free, random.randrange(4)))
            if blocks:
                pool.publish(blocks[-1], b"%d" % (number % 30))
            held.append(blocks)
        holders = [block for blocks in held for block in blocks]
        assert 0 not in holders
        assert pool.free == 19 - len(set(holders))
    for blocks in held:
        pool.let_go(blocks)
    assert pool.free == pool.count == 19
