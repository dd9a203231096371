"""Scorers that ask somebody: a chat model behind an endpoint, a reward model, a critic of claims."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checkpoints
from helpers.chat_server import ChatServer
from helpers.tiny import batch_of, record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, DataConfig, JudgeConfig, SamplesConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.errors import UserError
from mmalign_jax.evaluation.generate import Generator
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs import experts
from mmalign_jax.pairs.answers import scorers_of
from mmalign_jax.pairs.claims import Claims
from mmalign_jax.pairs.judge import Question
from mmalign_jax.pairs.judge.local import LocalAsker
from mmalign_jax.pairs.selectors import Candidate

RECORDS = (record("a", "Which one?", "A good cat.", images=[1]), record("b", "And this?", "A dog.", images=[2]))
ANSWERS = (("a good one", "a bad one", "no"), ("bad", "good"))


def candidates(answers):
    return [[Candidate(text, "policy") for text in texts] for texts in answers]




@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    directory = checkpoints.tiny_llava(tmp_path_factory.mktemp("critic"), seed=5)
    return Pretrained.read(directory, mesh_lib.make_mesh(devices=jax.devices()[:1]), "float32")


@pytest.fixture
def judged(critic, tmp_path):
    def scorers(server, prompt, **options):
        judge = JudgeConfig(**{"url": server.url, "model": "critic", "prompt": prompt, "attempts": 2} | options)
        config = Config(samples=SamplesConfig(scorers=("judge(2)", "missing_end")), judge=judge)
        opened = experts.with_experts(scorers_of(config), critic, config, tmp_path / "replies.jsonl")
        for one in RECORDS:
            opened.check(one)
        return opened

    return scorers


def totals(found):
    return [[one.total for one in each] for each in found]


def test_a_judge_that_scores_and_its_replies_are_kept(judged):
    with ChatServer() as server:
        first = judged(server, "score")
        assert totals(first(RECORDS, candidates(ANSWERS))) == [[1.6, 0.4, 0.4], [0.4, 1.6]]
        assert first.counts == {"judge/asked": 5, "judge/kept": 0, "judge/failed": 0, "judge/lost": 0}
        again = judged(server, "score")
        again(RECORDS, candidates(ANSWERS))
        assert again.counts["judge/kept"] == 5 and again.counts["judge/asked"] == 0
        assert len(server.requests) == 5 and all(len(body["messages"][0]["content"]) == 2 for _, body in server.requests)  # the picture is shown


def test_a_judge_that_compares(judged):
    """An answer's score is the share of the others that it wins against, in both orders."""
    with ChatServer() as server:
        found = judged(server, "compare")(RECORDS, candidates(ANSWERS))
        # of two bad ones the server prefers whichever stands first: half each
        assert totals(found) == [[2.0, 0.5, 0.5], [0.0, 2.0]]
        assert len(server.requests) == 2 * (3 + 1)


def test_verdicts_that_are_lost_are_told(judged):
    with ChatServer(lambda question, before: "mute" if question == "And this?" else "ok") as server:
        scorers = judged(server, "score")
        assert totals(scorers(RECORDS, candidates(ANSWERS))) == [[1.6, 0.4, 0.4], [None, None]]
        assert scorers.counts == {"judge/asked": 7, "judge/kept": 0, "judge/failed": 4, "judge/lost": 2}


def test_a_server_that_does_not_answer_stops_the_run(judged):
    with ChatServer(lambda question, before: "503" if question == "And this?" else "ok") as server:
        with pytest.raises(UserError, match=r"did not answer 2 of 5 questions \(status 503, 2 times\)"):
            judged(server, "score", attempts=2)(RECORDS, candidates(ANSWERS))
        server.plan = lambda question, before: "ok"
        again = judged(server, "score")  # what was answered is kept
        assert totals(again(RECORDS, candidates(ANSWERS))) == [[1.6, 0.4, 0.4], [0.4, 1.6]] and again.counts["judge/kept"] == 3


def test_replies_that_never_say_anything_stop_the_run(judged):
    with ChatServer(lambda question, before: "mute") as server, pytest.raises(UserError, match="not one of 8 replies .* 'I cannot decide.'"):
        judged(server, "score")(RECORDS, candidates([[f"answer {n}" for n in range(6)], ["a", "b"]]))


def test_equal_answers_are_even_and_unreadable_ones_have_no_verdict(judged):
    with ChatServer() as server:
        scorers = judged(server, "compare", both_orders=False)
        assert totals(scorers(RECORDS[:1], candidates([["bad", "bad", "bad"]]))) == [[1.0, 1.0, 1.0]] and not server.requests
        found = scorers(RECORDS[:1], candidates([["a good <image>", "good", "bad"]]), lambda text: "<" not in text)
        assert totals(found) == [[None, 2.0, 0.0]] and len(server.requests) == 1


@pytest.mark.parametrize(
    ("samples", "judge", "message"),
    [
        ({"scorers": ("judge",)}, {}, "config.judge.url: the scorer judge asks a chat model"),
        ({"scorers": ("judge",)}, {"url": "u", "model": "m", "key_variable": "NO_SUCH_KEY"}, "the environment has no NO_SUCH_KEY"),
        ({"scorers": ("judge",)}, {"url": "http://me:secret@here/v1", "model": "m"}, "config.judge.url: it holds a user's name"),
        ({"scorers": ("judge",)}, {"url": "u", "directory": "policy"}, "leave it or config.judge.url empty"),
        ({"scorers": ("judge",)}, {"url": "u", "model": "m", "prompt": "inject"}, "edits answers and gives no verdict"),
        ({"scorers": ("reward_model",)}, {}, "config.samples.reward_model: a directory goes with"),
        ({"scorers": ("exact",), "critic": "somewhere"}, {}, "config.samples.critic: a model goes with"),
        ({"scorers": ("claims",), "claim": "True?"}, {}, "the question has {claim}"),
        ({"scorers": ("format",), "pattern": "("}, {}, "no regular expression"),
        ({"scorers": ("format",)}, {}, "goes with the scorer format"),
    ],
)
def test_settings_that_are_missing_are_named(samples, judge, message):
    with pytest.raises(UserError, match=message):
        scorers_of(Config(samples=SamplesConfig(**samples), judge=JudgeConfig(**judge)))


def test_a_prompt_with_the_true_answer_asks_for_one(judged):
    with ChatServer() as server:
        scorers = judged(server, "sima")
        with pytest.raises(UserError, match="record bare has none"):
            scorers.check(dataclasses.replace(RECORDS[0], id="bare", responses=()))


def test_a_model_of_ours_is_asked_in_this_process(critic):
    """Its replies are the likeliest ones, as the evaluation's generator writes them; equal questions are asked once."""
    asks = LocalAsker(critic, lambda reply: None if "e" in reply else reply, JudgeConfig(max_tokens=6), DataConfig())
    questions = [Question("Which one?", RECORDS[0].media), Question("Say it."), Question("Which one?", RECORDS[0].media)]
    found = asks(questions)
    generator = Generator(critic.model, critic.processor, critic.mesh, batch_size=2, max_new_tokens=6, data=DataConfig())
    with jax.set_mesh(critic.mesh):
        expected = [one.text for one in generator(critic.params("float32"), [record("x", "Which one?", images=[1]), record("y", "Say it.")])]
    assert [text for text, _ in found] == [*expected, expected[0]]
    assert [problem for _, problem in found] == ["no verdict in the reply" if "e" in text else "" for text, _ in found]
    assert asks.counts.asked == 2 and asks.counts.lost == sum("e" in text for text in expected)


def test_the_policy_judges_itself(critic, tmp_path):
    prompt = tmp_path / "any.toml"
    prompt.write_text("kind = 'compare'\ntext = '{first} or {second}?'\nverdict = '(?P<first>[a-m])|(?P<second>.)'\n")
    config = Config(samples=SamplesConfig(scorers=("judge",)), judge=JudgeConfig(directory="policy", prompt=str(prompt), max_tokens=4))
    scorers = experts.with_experts(scorers_of(config), critic, config, tmp_path / "replies.jsonl")
    found = totals(scorers(RECORDS, candidates(ANSWERS)))
    assert sum(found[0]) == pytest.approx(1.5) and sum(found[1]) == pytest.approx(1.0)  # what one wins the other loses
    assert scorers.counts["judge/asked"] == 8 and not (tmp_path / "replies.jsonl").exists()


def test_claims_are_denied_where_no_is_likelier_than_yes(critic):
    claims = Claims(critic, "Is this true? {claim}", batch_size=4)
    answers = (("There is a cat. There is a dog.", "A cup.", ""), ("There is a cat.",))
    found = claims(RECORDS, answers)
    assert found[0][2] == 0 and all(score <= 0 and score == int(score) for each in found for score in each)
    # the same, one question at a time
    sentences = [(RECORDS[0], "There is a cat."), (RECORDS[0], "There is a dog."), (RECORDS[0], "A cup."), (RECORDS[1], "There is a cat.")]
    alone = [Claims(critic, "Is this true? {claim}", batch_size=1)([one], [[text]])[0][0] for one, text in sentences]
    assert [alone[0] + alone[1], alone[2], alone[3]] == [found[0][0], found[0][1], found[1][0]]


@pytest.mark.nightly
def test_claims_follow_the_models_logits(critic):
    """Against the log-probs of the next token, by hand."""
    claims, model, params = Claims(critic, "{claim}", batch_size=1), critic.model, critic.params("float32")
    first = {word: int(critic.processor.answer_ids(word)[0][0]) for word in ("Yes", "yes", "No", "no")}
    seen = set()
    for number in range(3):
        text = "There is a cat" + "!" * number
        batch = batch_of([record("q", text, "-", images=[1])], critic.processor, answers=0)
        with jax.set_mesh(critic.mesh):
            batch = to_device(jax.device_get(batch), critic.mesh, batch_axis=0)
            hidden = jax.device_get(model.hidden(params, model.encode_images(params, batch.images, batch.patches), batch))
        hidden = jnp.asarray(hidden)
        last = int(np.flatnonzero(np.asarray(batch.role)[0] == 1)[-1])
        probs = np.exp(np.asarray(jax.nn.log_softmax(hidden[0, last] @ jnp.asarray(jax.device_get(model.head(params))))).astype(np.float64))
        yes, no = (sum(probs[list({first[word] for word in words})]) for words in (("Yes", "yes"), ("No", "no")))
        denied = no > yes
        seen.add(denied)
        assert claims([RECORDS[0]], [[text]]) == [[-float(denied)]]
