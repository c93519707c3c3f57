"""The feature cache: bounded in bytes, the least recently used leaves first, and nothing more is kept alive."""

import torch

from mqwen.engine.pictures import FeatureCache

ONE = torch.zeros(36, 128)  # 18,432 bytes


def test_the_bound_holds_and_the_least_recently_used_leaves() -> None:
    cache = FeatureCache(3 * ONE.nbytes)
    for key in "abc":
        cache.put(key, ONE + ord(key))
    assert cache.get("a") is not None
    cache.put("d", ONE)
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    assert cache.bytes == 3 * ONE.nbytes
    feature = cache.get("a")
    assert feature is not None
    assert feature[0, 0] == ord("a")


def test_an_entry_does_not_keep_its_batch_alive() -> None:
    cache = FeatureCache(10 * ONE.nbytes)
    cache.put("a", torch.zeros(32, 36, 128)[3])
    feature = cache.get("a")
    assert feature is not None
    assert feature.untyped_storage().nbytes() == ONE.nbytes


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = FeatureCache(ONE.nbytes - 1)
    cache.put("a", ONE)
    assert cache.get("a") is None
    assert cache.bytes == 0


def test_putting_twice_counts_once() -> None:
    cache = FeatureCache(10 * ONE.nbytes)
    cache.put("a", ONE)
    cache.put("a", ONE)
    assert cache.bytes == ONE.nbytes
