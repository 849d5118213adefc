"""Imports without garbage collection."""

import gc

import pytest

from common.run.imports import uncollected


@pytest.fixture
def collections():
    """Gives what Python collects while a test runs."""
    seen = []

    def note(phase, _):
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.unfreeze()


def test_nothing_is_collected_inside(collections):
    with uncollected():
        [[each] for each in range(100_000)]
    assert collections == []
    [[each] for each in range(100_000)]
    assert collections


def test_what_was_made_inside_is_left_out_of_later_collections(collections):
    frozen = gc.get_freeze_count()
    with uncollected():
        kept = [[each] for each in range(1000)]
    assert gc.get_freeze_count() >= frozen + len(kept)


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_before_even_after_an_error(enabled):
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ImportError), uncollected():
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
