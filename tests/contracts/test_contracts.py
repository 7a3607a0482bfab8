"""A change of another library is named by one sentence, before a hundred tests fail of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.contracts.contracts import CONTRACTS, Contract
from tests.helpers import require

ROOT = Path(__file__).resolve().parents[2]


def broken(contract: Contract) -> str | None:
    """The sentence of the contract with what was raised, or None if it holds."""
    try:
        return None if contract.holds() else contract.broken
    except Exception as error:  # noqa: BLE001  (a missing name, another signature, another shape: each breaks it)
        return f"{contract.broken} ({type(error).__name__}: {error})"


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.holds.__name__)
def test_contract(contract: Contract) -> None:
    if importlib.util.find_spec(contract.needs) is None:
        require(contract.needs, "it is not installed")
    problem = broken(contract)
    assert problem is None, problem


def test_a_break_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.dinov2 import modeling_dinov2

    class Renamed(modeling_dinov2.Dinov2Attention):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.quarrel = self._modules.popitem()[1]

    monkeypatch.setattr(modeling_dinov2, "Dinov2Attention", Renamed)
    assert broken(CONTRACTS[0]) == CONTRACTS[0].broken
    assert "(ModuleNotFoundError: " in broken(Contract("gone: see x", lambda: __import__("a_library_that_is_gone")))


def test_every_sentence_names_a_file_that_is_there() -> None:
    for contract in CONTRACTS:
        sentence, _, place = contract.broken.partition(": see ")
        assert sentence and place, contract.broken
        name = place.split(",")[0].replace("the launches in ", "")
        assert list(ROOT.glob(f"**/{name}")), name
