import dataclasses
import re

import pytest
import yaml

from mmalign_jax.config import Config, from_mapping
from mmalign_jax.report.model_card import Facts, front_matter, licence_of, model_card
from mmalign_jax.report.records import Score, ScoreRow

CONFIG = from_mapping({
    "model": {"freeze": ("vision_tower",)}, "objective": {"name": "dpo", "beta": 0.25}, "pairs": {"maker": "bdhs", "rho_th": 0.95},
    "data": {"path": "/sets/mine.parquet", "format": "rlaif_v"}, "scenes": {"test": 40}, "eval": {"max_new_tokens": 48},
    "train": {"steps": 30, "batch_size": 16, "seed": 7}, "optimizer": {"learning_rate": 2e-5, "warmup_fraction": 0.1},
})  # fmt: skip
SCORES = (
    ScoreRow("CHAIR_i", Score(0.336, 0.3, 0.37), Score(0.043, 0.02, 0.06), "lower", group="Broken | habits"),
    ScoreRow("Words per caption", Score(22.1), Score(18.5), percent=False, group="Broken | habits"),
    ScoreRow("POPE accuracy", None, Score(0.658), "higher", group="Usual"),
)
FACTS = Facts(
    trained="projector, decoder; as in the base: vision_tower",
    base="org/model-7b",
    step=30,
    hyperparameters={"beta": 0.25, "nll_weight": 1.0},
    paper="2305.18290",
    licence={"license": "other", "license_name": "theirs"},
    dataset="org/set",
    on_hub=True,
    records=123,
    skipped={"no_answer": 2},
    pairs={"pairs": 117, "unchanged": 6},
    scores=SCORES,
    environment={"jax": "0.10.2", "mmalign_jax": "0.1.0"},
)


def card(config=CONFIG, **changes):
    """Front matter, as YAML reads it, and the text behind it."""
    text = model_card(config, dataclasses.replace(FACTS, **changes))
    empty, front, body = re.split(r"^---\n", text, flags=re.MULTILINE)
    assert empty == "" and front_matter(text) == yaml.safe_load(front)
    return yaml.safe_load(front), body


def cells(body):
    """Rows of all tables, by their first cell."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 2  # of two columns and of four
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_front_matter():
    front, _ = card()
    assert front == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "base_model": "org/model-7b",
        "base_model_relation": "finetune", "datasets": ["org/set"], "license": "other", "license_name": "theirs",
        "tags": ["mmalign_jax", "dpo", "preference-alignment", "bdhs"],
    }  # fmt: skip
    sft = Config(objective=dataclasses.replace(CONFIG.objective, name="sft", hyperparameters={}))
    front, body = card(sft, base="", licence={}, on_hub=False, preferences=False)
    assert front == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["mmalign_jax", "sft"]}
    assert "Random weights, fine-tuned on answers" in body
    awkward = {"base": "a: b #c - [d]", "licence": {"license": "yes"}}  # YAML's own marks, and what it would take for a truth value
    assert card(**awkward)[0]["license"] == "yes" and card(**awkward)[0]["base_model"] == awkward["base"]


def test_what_was_trained_how():
    _, body = card()
    rows = cells(body)
    assert rows["objective"] == ["[dpo](https://arxiv.org/abs/2305.18290)"] and rows["objective.beta"] == ["0.25"]
    assert rows["objective.nll_weight"] == ["1"] and rows["steps"] == ["30, of 16 rows each"] and rows["seed"] == ["7"]
    assert rows["learning rate"] == ["2e-05, cosine behind a warm-up over 10% of the steps, to 0 of the peak"]
    assert rows["trained parts"] == ["projector, decoder; as in the base: vision_tower"]
    assert rows["data"] == ["org/set (format rlaif_v), 123 records; rows left out on import: 2 no_answer"]
    (pairs,) = rows["rejected answers"]
    assert "rho_th 0.95, noise_steps 0, guided True, n_iter 5" in pairs and pairs.endswith("; 117 pairs, 6 unchanged")
    assert rows["jax"] == ["0.10.2"] and 'AutoProcessor.from_pretrained("' in body
    assert "rejected answers" not in cells(card(Config())[1])


def test_scores_with_their_caveats():
    _, body = card()
    rows = cells(body)
    assert rows["CHAIR_i"] == ["33.6% [30.0, 37.0]", "4.3% [2.0, 6.0]", "-29.3 pp"]
    assert rows["Words per caption"] == ["22.1", "18.5", "-3.6"] and rows["POPE accuracy"] == ["-", "65.8%", "-"]
    assert body.index("### Broken") < body.index("CHAIR_i") < body.index("### Usual") < body.index("POPE accuracy")
    for words in ("at most 48 tokens", "40 pictures of each split", "nothing about photographs", "95 % intervals", "one run", "step 30"):
        assert words in body
    assert "did not measure" not in body
    _, earlier = card(step=10)
    assert "those of step 10, which the run did not measure" in earlier and cells(earlier)["steps"] == ["10 of the run's 30, of 16 rows each"]
    _, none = card(scores=())
    assert "The run measured nothing." in none and "pictures" not in none


@pytest.mark.parametrize(
    "text, licence",
    [
        ("---\nlicense: llama2\ntags: [a]\n---\n# Model\n", {"license": "llama2"}),
        ("---\nlicense: [mit, apache-2.0]\nlicense_link: https://x.org\n---\n", {"license": ["mit", "apache-2.0"], "license_link": "https://x.org"}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\njust words\n---\n", {}),
        ("# Model\n\nlicense: mit\n\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_a_licence_is_stated_only_as_the_base_states_it(text, licence):
    assert licence_of(text) == licence


def test_a_reward_model_says_how_it_is_read_and_what_it_does_on_held_out_pairs():
    held_out = (ScoreRow("Accuracy (50 pairs)", None, Score(0.92, 0.85, 0.98), "higher", group="Held-out pairs"),)
    _, body = card(scores_answers=True, scores=(), held_out=held_out)
    assert "trained to score answers" in body and "score_head.safetensors" in body and "RewardModel.read(" in body
    assert cells_of("Accuracy (50 pairs)", body) == "92.0% [85.0, 98.0]" and "The run measured nothing" not in body
    assert "score_head" not in card()[1]


def cells_of(name, body):
    (line,) = (line for line in body.splitlines() if line.startswith(f"| {name} |"))
    return line.split("|")[2].strip()
