"""Two processes share the work of a refresh and end with the same bits, those of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from losses import make_loss
from torch import Tensor, nn

from dskd.processes import collect, share

# three pairs of one shape (a share each and one over), one alone (a rank without a share), and a transposed one
SHAPES = {"a": (6, 4), "b": (6, 4), "c": (4, 6), "alone": (5, 5), "conv": (3, 2, 2, 2)}


CASES = {basis: {"basis": basis} for basis in ("own", "update")} | {
    "curvature": {"basis": "curvature", "rank": 0},
    "released": {"direction": "released"},
    "shuffled": {"direction": "shuffled"},
    "shrink": {"direction": "shrink"},
    "random": {"score": "random", "span": "interval"},
    "random gradient": {"direction": "random"},
}


def run(case: str) -> dict[str, Tensor]:
    """Five steps with refreshes after 2 and 4, the latter skipping a pair; all numbers that ranks must share."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # of which nothing may depend
    generator = torch.Generator().manual_seed(5)

    def draw(shape) -> Tensor:
        return torch.randn(shape, generator=generator)

    students = {name: nn.Parameter(draw(shape)) for name, shape in SHAPES.items()}
    pairs = [(name, weight, draw(weight.shape)) for name, weight in students.items()]
    dskd = make_loss(pairs, **{"rank": 3, "svd_steps": 2, "seed": 1, **CASES[case]})
    optimizer = torch.optim.SGD(students.values(), lr=0.05)
    numbers = {}
    for step in range(5):
        optimizer.zero_grad()
        loss = dskd()
        task = sum((weight * draw(weight.shape) - 1).square().sum() for weight in students.values())
        (task + loss).backward()
        numbers[f"loss {step}"] = loss.detach()
        with dskd.observe(progress=step / 5, skip=["b"] if step == 3 else []):
            optimizer.step()
    gradients = torch.autograd.grad(dskd(), list(students.values()))
    for name, weight, gradient in zip(students, students.values(), gradients, strict=True):
        numbers |= {f"{name}": weight.detach(), f"{name} gradient": gradient}
    return numbers | {f"{name} directions": row.clone() for name, row in dskd.direction_weights().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        torch.save(run(case), f"{folder}/{case}{rank}.pt")
    shared = {"share": share(range(5))}
    for count in (1, 5):  # of one item rank 1 has no share
        shared[f"collect {count}"] = collect(torch.tensor([[10.0 * i] for i in share(range(count))]).view(-1, 1), count)
    torch.save(shared, f"{folder}/shared{rank}.pt")
    dist.barrier()  # neither closes its connection while the other still reads
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_the_same_bits(two_ranks, case):
    first, second = load(two_ranks, f"{case}0"), load(two_ranks, f"{case}1")
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_result_of_one_process(two_ranks, case):
    torch.testing.assert_close(load(two_ranks, f"{case}0"), run(case), rtol=1e-6, atol=1e-6)


def test_ranks_take_every_second_item(two_ranks):
    assert [load(two_ranks, f"shared{rank}")["share"] for rank in range(2)] == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("count", [1, 5])
def test_ranks_collect_the_results_of_all_in_order(two_ranks, count):
    for rank in range(2):
        assert load(two_ranks, f"shared{rank}")[f"collect {count}"].flatten().tolist() == [
            10.0 * i for i in range(count)
        ]


def test_one_process_collects_its_own():
    assert collect(torch.tensor([1.0, 2.0]), 2).tolist() == [1.0, 2.0]


def test_one_process_takes_everything():
    assert share([4, 7, 9]) == [4, 7, 9]
