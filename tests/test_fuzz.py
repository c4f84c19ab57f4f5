"""A few of the mistakes of `fuzz.py` in every shipped config, and of `fuzz_checkpoints.py` in every checkpoint."""

import pytest

import fuzz
import fuzz_checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.prepare(folder)
    return folder


@pytest.mark.parametrize("config", fuzz.shipped())
def test_mistakes_are_refused_by_one_sentence_or_train(config, place):
    results = fuzz.check(config, place, 3)
    assert len(results) == 3
    for words, result in results:
        assert result.outcome in ("refused", "runs"), f"{' '.join(words)}: {result.note}"


def test_shipped_configs_train(place):
    """They are what the mistakes are made in."""
    for config in ("experiment=mnist_small", "data=folder", "model=relative", "callbacks=points"):
        assert fuzz.attempt(fuzz.needed(config, place)).outcome == "runs"


@pytest.mark.parametrize("name", fuzz_checkpoints.shipped())
def test_changed_checkpoints_are_refused_by_one_sentence_or_load(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for said, result in fuzz_checkpoints.check(name, tmp_path, 16):
        assert result.outcome in ("refused", "runs"), f"{said}: {result.note}"
