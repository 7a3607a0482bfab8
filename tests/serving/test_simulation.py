"""The scheduler against a simulated worker: planned ahead or not, by the rules of both model runners, in every need."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.helpers import SEED
from tests.serving.folders import folder_of
from tests.serving.simulation import (
    Setting,
    assert_right,
    look_scheduler_of,
    requests_of,
    simulate,
    write_script,
)

pytestmark = pytest.mark.unpoisoned
MEMORY = {"ample": (400, 2048, 8), "scarce": (80, 300, 6), "one conversation's": (66, 1100, 4)}
SEEDS = [SEED, SEED + 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of("dino", tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("second", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_every_client_is_told_its_conversation(folder, ahead, second, memory, seed):
    outcome = simulate(folder, Setting(seed, ahead, second, *MEMORY[memory]))
    assert_right(outcome)
    # With nothing to run a request that waits gives its blocks back; no more than a few steps pass until then.
    assert outcome.empty <= 4


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_every_token_passes_the_model_once(folder, ahead):
    outcome = simulate(folder, Setting(SEED, ahead, False, disturbed=0))
    assert_right(outcome)
    scripts = outcome.worker.scripts.values()
    tokens = sum(len(script.whole) + len(script.turns[-1]) - 1 for script in scripts)
    # What leads to an action is rewound, and a step that is planned ahead feeds the token that ends a turn.
    rewound = sum(
        len(turn) for script in scripts for turn in script.turns[:-1] if turn[-1] == outcome.worker.action_start
    )
    ahead_of = sum(len(script.turns) for script in scripts) if ahead else 0
    assert outcome.worker.fed <= tokens + rewound + ahead_of


@pytest.mark.parametrize("acts", [False, True])
def test_a_prompt_with_an_action_token_is_told(folder, acts):
    """Its embedding is a state of the model, which no prompt has."""
    scheduler = look_scheduler_of(folder, Setting(SEED, False, False))
    script = write_script(0, scheduler.perception, random.Random(SEED))
    prompt = [*script.prompt, *([scheduler.perception.tokenizer.ids.action] if acts else [])]
    scheduler.add_request(requests_of([replace(script, prompt=prompt)], scheduler.perception)[0])
    found = scheduler.conversations[script.name].notices
    assert any("the prompt holds an action token" in notice for notice in found) == acts
