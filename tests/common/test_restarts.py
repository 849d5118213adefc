"""Processes that torchrun starts again find each other, whatever earlier starts have left in its store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from common.run.restarts import meet, resumes_after_restart, start_group


@pytest.fixture
def client():
    """Makes a client of one store, as every process has one."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    how = {"is_master": False, "wait_for_workers": False, "timeout": timedelta(seconds=10)}
    return lambda: TCPStore("localhost", server.port, **how)


def meetings(client, counts, first_rank=0):
    """What each process comes to, of which one starts first."""
    order = sorted(range(len(counts)), key=lambda rank: rank != first_rank)
    with ThreadPoolExecutor(len(counts)) as pool:
        waiting = {rank: pool.submit(meet, client(), rank, len(counts), counts[rank], 10) for rank in order}
        return [waiting[rank].result() for rank in range(len(counts))]


def test_all_processes_of_a_start_have_one_name_that_no_other_start_has(client):
    starts = [meetings(client, (0, 0, 0), first_rank) for first_rank in (0, 1, 2, 0)]
    assert [len(set(start)) for start in starts] == [1, 1, 1, 1]
    assert len({start[0].name for start in starts}) == 4


def test_a_process_does_not_go_along_with_a_start_whose_first_process_is_dead(client):
    meetings(client, (0, 0))
    with pytest.raises(TimeoutError, match="have not come"):
        meet(client(), 1, 2, 1, patience=0.3)


def test_a_first_process_waits_for_the_living(client):
    with pytest.raises(TimeoutError, match="have not come"):  # killed once its first process has named a meeting
        meet(client(), 0, 2, 0, patience=0.3)
    with pytest.raises(TimeoutError, match="have not come"):  # one that signed up for it and was killed
        meet(client(), 1, 2, 0, patience=0.3)
    with pytest.raises(TimeoutError, match="have not come"):
        meet(client(), 0, 2, 0, patience=0.3)
    assert len(set(meetings(client, (1, 1)))) == 1


def test_a_restart_that_one_agent_alone_counts_is_known_to_all(client):
    assert [meeting.restarts for meeting in meetings(client, (0, 2, 1))] == [2, 2, 2]


def test_without_torchrun_nothing_is_waited_for(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    start_group()
    (tmp_path / "config.json").write_text("{}")
    assert not resumes_after_restart(tmp_path)


@pytest.mark.parametrize(("count", "config", "resumes"), [("1", True, True), ("1", False, False), ("0", True, False)])
def test_a_single_process_that_was_started_again_resumes_the_run_that_is_there(
    tmp_path, monkeypatch, capsys, count, config, resumes
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    if config:
        (tmp_path / "config.json").write_text("{}")
    assert resumes_after_restart(tmp_path) == resumes
    assert capsys.readouterr().out.count("started again by torchrun") == resumes
