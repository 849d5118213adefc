"""The order of examples: a function of seed and epoch alone, complete, and with batches of similar length."""

import pytest
import torch

from bert_of_theseus.sampling import LengthGrouped

LENGTHS = torch.randint(3, 40, (64,), generator=torch.Generator().manual_seed(0)).tolist()


def order(seed: int = 5, epoch: int = 0) -> list[int]:
    return list(LengthGrouped(LENGTHS, 4, seed, lambda: epoch))


@pytest.mark.parametrize("epoch", [0, 3])
def test_two_ranks_have_one_order_in_every_epoch_whatever_they_drew_before(epoch):
    torch.manual_seed(1)
    first = order(epoch=epoch)
    torch.manual_seed(2)
    assert order(epoch=epoch) == first


def test_a_pass_takes_the_order_of_the_epoch_that_it_starts_in():
    epoch = [1]
    sampler = LengthGrouped(LENGTHS, 4, 5, lambda: epoch[0])
    first, again = list(sampler), list(sampler)
    epoch[0] = 2
    assert first == again == order(epoch=1)
    assert list(sampler) == order(epoch=2) != first


def test_seeds_have_orders_of_their_own():
    assert order(seed=5) != order(seed=7)
    assert order(seed=5, epoch=1) != order(seed=6, epoch=0)


def test_drawing_an_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    order()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_example_comes_once_and_batches_are_of_similar_length():
    indices = order()
    assert len(LengthGrouped(LENGTHS, 4, 5, lambda: 0)) == len(indices) == 64
    assert sorted(indices) == list(range(64))
    lengths = torch.tensor(LENGTHS)
    spread = [batch.max() - batch.min() for batch in lengths[indices].split(4)]
    free = [batch.max() - batch.min() for batch in lengths.split(4)]
    assert sum(spread) < 0.7 * sum(free)
