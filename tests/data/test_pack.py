"""Best fit decreasing, against the rule written out."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mqwen.data.pack import pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """By the definition: longest first; each item looks at every bin."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        if lengths[item] > capacity:
            continue
        free = [capacity - sum(lengths[other] for other in bin_) for bin_ in bins]
        fitting = [number for number, space in enumerate(free) if space >= lengths[item]]
        if fitting:
            bins[min(fitting, key=lambda number: (free[number], number))].append(item)
        else:
            bins.append([item])
    return bins


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 32))
def test_pack(lengths: list[int], capacity: int) -> None:
    packs, too_long = pack(lengths, capacity)
    assert packs == best_fit_decreasing(lengths, capacity)
    assert too_long == [item for item, length in enumerate(lengths) if length > capacity]
    assert sorted([item for items in packs for item in items] + too_long) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= capacity for items in packs)
    assert pack(lengths, capacity) == (packs, too_long)


def test_nothing_and_exact_fits() -> None:
    assert pack([], 5) == ([], [])
    assert pack([5, 5, 6], 5) == ([[0], [1]], [2])
    assert pack([3, 2, 3, 2], 5) == ([[0, 1], [2, 3]], [])
