"""Buckets cover the shapes of pictures, and mixtures are exact at every moment: arithmetic, checked by counting."""

import numpy as np
import pytest

from dreamlite_jax.data.buckets import Plan, Stream, bucket_sizes, nearest_bucket, pattern, permuted
from dreamlite_jax.data.config import BucketConfig
from dreamlite_jax.errors import UserError


@pytest.mark.parametrize(("size", "step", "ratio"), [(256, 32, 2.0), (512, 64, 2.0), (1024, 64, 4.0), (1024, 32, 2.0)])
def test_buckets_have_the_area_the_multiple_and_the_ratio(size, step, ratio):
    sizes = bucket_sizes(BucketConfig(size, step, ratio))
    assert (size, size) in sizes and len(set(sizes)) == len(sizes) > 4
    for width, height in sizes:
        assert width % step == 0 == height % step and (height, width) in sizes
        assert max(width, height) <= ratio * min(width, height)
        assert abs(width * height / size**2 - 1) < step / min(width, height)
    ratios = [width / height for width, height in sizes]
    assert ratios == sorted(ratios, reverse=True)


def test_a_ratio_of_1_leaves_the_square():
    assert bucket_sizes(BucketConfig(256)) == ((256, 256),)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 250}, "^size is 250; it must be .*multiple 32, such as 256"),
        ({"size": -32}, "^size is -32"),
        ({"size": 256, "multiple": 0}, "^multiple is 0"),
        ({"size": 256, "max_ratio": 0.5}, "^max_ratio is 0.5; it must be at least 1"),
    ],
)
def test_buckets_that_cannot_be_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        BucketConfig(**options)


def test_a_picture_goes_where_its_shape_is_nearest():
    sizes = [(512, 256), (256, 256), (256, 512)]
    pictures = np.asarray([(2000, 1000), (100, 99), (30, 300), (1400, 1000), (1420, 1000)])  # the border is √2 : 1
    assert nearest_bucket(sizes, pictures).tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [3, 1], [0.5, 0.3, 0.2], [1, 1, 1, 7.5], [0.7, 1.3], [5, 4, 3, 2, 1], [1e-4, 1]]
)
def test_a_mixture_is_exact_to_within_one_item_at_every_moment(weights):
    order = np.tile(pattern(weights), 3)
    shares = np.asarray(weights) / sum(weights)
    counts = np.stack([np.cumsum(order == source) for source in range(len(weights))], 1)
    assert np.abs(counts - np.arange(1, len(order) + 1)[:, None] * shares).max() < 1


def test_two_sources_are_exact_over_any_window():
    order = np.tile(pattern([3.0, 1.7]), 2)
    total = np.concatenate([[0], np.cumsum(order == 1)])
    start, stop = np.triu_indices(len(total), 1)
    assert np.abs(total[stop] - total[start] - (stop - start) * 1.7 / 4.7).max() < 1 + 1e-9


@pytest.mark.parametrize("length", [1, 2, 3, 17, 256, 257, 5000])
def test_every_epoch_is_a_permutation_of_its_own(length):
    stream = Stream((length,), (1.0,), seed=4)
    epochs = stream.samples(np.arange(3 * length))[:, 1].reshape(3, length)
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs.tolist())
    if length > 10:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
        other = Stream((length,), (1.0,), seed=5).samples(np.arange(length))[:, 1]
        assert not np.array_equal(other, epochs[0])


def test_a_permutation_looks_random():
    """Neighbours are no nearer than chance has them, and every place gets every index about as often."""
    length, tries = 1000, 400
    keys = np.random.default_rng(0).integers(0, 2**64, (tries, 6), np.uint64)
    where = np.stack([permuted(np.arange(length), length, np.tile(key, (length, 1))) for key in keys])
    distance = np.abs(np.diff(where, axis=1)).mean()
    assert distance == pytest.approx(length / 3, rel=0.01)
    assert np.abs(where.mean(0) / (length / 2) - 1).max() < 6 / np.sqrt(12 * tries) * 2
    assert np.bincount(where[:, 7] // 100, minlength=10).min() > tries / 10 * 0.5


def test_any_part_of_the_stream_is_the_same_alone():
    stream = Stream((50, 7), (1.0, 2.0), seed=1)
    whole = stream.samples(np.arange(1000))
    assert (stream.samples(np.arange(900, 1000)) == whole[900:]).all()
    assert (stream.samples(np.asarray([3, 500, 4])) == whole[[3, 500, 4]]).all()
    assert (whole[:999, 0] == 1).sum() == 666


def plans(batch_size=6):
    table = np.arange(60) % 4
    stream = Stream((60, 10), (2.0, 1.0), seed=0)
    return Plan(stream, [table, None], batch_size), table


def test_batches_of_several_buckets_are_complete_and_of_one():
    plan, table = plans()
    for bucket, samples in (plan.next() for _ in range(50)):
        assert [bucket] * 6 == [table[index] if source == 0 else 0 for source, index in samples.tolist()]


def test_with_one_bucket_batches_are_the_stream():
    stream = Stream((60, 10), (2.0, 1.0), seed=0)
    plan = Plan(stream, [None, None], 6)
    found = np.concatenate([plan.next()[1] for _ in range(20)])
    assert (found == stream.samples(np.arange(120))).all() and plan.state()["waiting"] == []


@pytest.mark.parametrize("taken", [0, 1, 7, 30])
def test_a_plan_goes_on_from_its_state(taken):
    plan, _ = plans()
    for _ in range(taken):
        plan.next()
    again, _ = plans()
    again.restore(plan.state())
    assert again.state() == plan.state()
    for _ in range(20):
        (bucket, samples), (other, others) = plan.next(), again.next()
        assert bucket == other and (samples == others).all()


def test_a_state_of_other_data_is_refused():
    plan, _ = plans()
    with pytest.raises(UserError, match=r"have \[60, 10\] records, and had \[61, 10\] when this run was saved"):
        plan.restore({"records": [61, 10], "next": 0, "waiting": []})
