"""The demo models' tokenizer, text and training: seeded, held-out prompts never seen, saved as trained."""

import json
from pathlib import Path

import pytest
import torch

from tl_neuron_circuits.demo import _evaluation as evaluation
from tl_neuron_circuits.demo import _states as states
from tl_neuron_circuits.demo import _text as text
from tl_neuron_circuits.demo._models import DEMO_MODELS, demo_model_path
from tl_neuron_circuits.demo.train_models import Recipe, load, main, round_to_half, save, train
from tl_neuron_circuits.tasks import _english as english

TOKENIZER = text.build_tokenizer()
SENTENCES = [text.sentence(chance) for chance in [text.Chance(3)] for _ in range(4000)]


def test_every_sentence_is_known_and_comes_back() -> None:
    for sentence in SENTENCES:
        ids = TOKENIZER(sentence)["input_ids"]
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == sentence


def test_towns_are_two_pieces_and_everything_else_one() -> None:
    for city in states.CITIES:
        assert TOKENIZER.tokenize(city.name) == [city.first, f"##{city.second}"]
    for state in states.STATES:
        for word in (state.name, *map(state.attribute, states.ATTRIBUTES)):
            assert TOKENIZER.tokenize(word) == [word]
    assert TOKENIZER.tokenize("1732") == ["17", "##32"]


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_the_saved_tokenizer_is_the_one_that_is_built(name: str) -> None:
    saved = json.loads((demo_model_path(name) / "tokenizer.json").read_text())
    assert saved["model"]["vocab"] == TOKENIZER.get_vocab()


def test_no_piece_gives_the_state_alone() -> None:
    assert len({city.name for city in states.CITIES}) == 6 * 50
    for pieces in ([c.first for c in states.CITIES], [c.second for c in states.CITIES]):
        for piece in set(pieces):
            owners = [c.state.name for c, p in zip(states.CITIES, pieces, strict=True) if p == piece]
            assert max(owners.count(owner) for owner in owners) <= len(owners) / 3
    dallas = next(c for c in states.CITIES if c.name == "Dallas")
    assert (dallas.state.name, dallas.state.capital) == ("Texas", "Austin")


def test_held_out_combinations_cover_every_state_and_attribute() -> None:
    combinations = states.held_out_combinations()
    owner = {city.name: city.state.name for city in states.CITIES}
    covered = {(owner[city], attribute) for city, attribute in combinations}
    assert covered == {(state.name, a) for state in states.STATES for a in states.ATTRIBUTES}
    assert combinations == states.held_out_combinations()
    assert combinations != states.held_out_combinations(seed=1)


def test_what_is_held_out_is_never_in_the_text() -> None:
    two_hop = [s for s in SENTENCES if "the state containing " in s or "the state with " in s]
    assert len(two_hop) > 500
    for city, attribute in states.held_out_combinations():
        assert not any(f" {city} " in s.replace(",", " ") and f"{attribute} " in s for s in two_hop)
    for i, a in enumerate(english.NAMES):
        for j, b in enumerate(english.NAMES):
            if text.held_out("names", i, j):
                assert not any(f"{a} and {b}" in s for s in SENTENCES)


def test_interchanges_ask_for_the_donors_state_and_never_for_what_is_held_out() -> None:
    owner = {city.name: city.state for city in states.CITIES}
    held_out, chance, left_out = states.held_out_combinations(), text.Chance(5), 0
    for _ in range(6):
        swaps = text.interchange(TOKENIZER, chance, 32)
        prompts = TOKENIZER.batch_decode(swaps.input_ids, skip_special_tokens=True)
        asked = [
            next((c, a) for c in owner for a in states.ATTRIBUTES if f" {c}" in prompt and f"he {a} " in prompt)
            for prompt in prompts
        ]
        for i, (donor, target) in enumerate(zip(swaps.donor.tolist(), swaps.targets.tolist(), strict=True)):
            (town, attribute), combination = asked[i], (asked[donor][0], asked[i][1])
            assert donor != i
            assert (town, attribute) not in held_out
            assert TOKENIZER.convert_ids_to_tokens(swaps.answers[i].item()) == owner[town].attribute(attribute)
            if combination in held_out:
                left_out += 1
                assert target == -100
            else:
                assert TOKENIZER.convert_ids_to_tokens(target) == owner[combination[0]].attribute(attribute)
    assert left_out > 0


def test_documents_are_packed_whole_and_apart() -> None:
    packed = text.batch(TOKENIZER, text.Chance(0), rows=8, length=40)
    starts = packed.input_ids == TOKENIZER.bos_token_id
    assert torch.equal(packed.position_ids[starts], torch.zeros(int(starts.sum()), dtype=torch.long))
    owner = starts.cumsum(1)
    mask = packed.attention_mask[:, 0]
    real = packed.input_ids != TOKENIZER.pad_token_id
    pairs = real[:, :, None] & real[:, None, :]
    expected = (owner[:, :, None] == owner[:, None, :]).tril()
    assert torch.equal(mask[pairs], expected[pairs])
    asked = packed.targets >= 0
    assert torch.equal(packed.targets[:, :-1][asked[:, :-1]], packed.input_ids[:, 1:][asked[:, :-1]])
    assert not (packed.targets == TOKENIZER.bos_token_id).any()
    assert not (packed.targets == TOKENIZER.pad_token_id).any()


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_training_is_seeded_and_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (
        train(name, Recipe(steps=3, rows=2, seed=seed), verbose=False).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_what_is_saved_is_what_was_trained(name: str, tmp_path: Path) -> None:
    model = train(name, Recipe(steps=2, rows=2), verbose=False)
    round_to_half(model)
    save(model, TOKENIZER, tmp_path)
    loaded, _ = load(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_the_command_writes_a_model_its_card_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SWAPS", 4)
    monkeypatch.setattr(evaluation, "TASKS", {"IOI": evaluation.TASKS["IOI"]})
    page = tmp_path / "page.md"
    main(["--name", "demo-gelu", "--steps", "2", "--out", str(tmp_path), "--documentation", str(page)])
    folder = tmp_path / "demo-gelu"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["recipe"]["steps"] == 2
    assert f"| {metrics['tasks']['IOI']['accuracy']:.3f} |" in (folder / "README.md").read_text()
    assert f"| {metrics['tasks']['IOI']['accuracy']:.3f} |" in page.read_text()
