"""The judge against a real server on loopback that misbehaves in every way it knows."""

import json
import time

import pytest
from helpers.chat_server import ChatServer
from helpers.rows import encoded

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.pairs.judge import Answer, Asker, Asking, Endpoint, Judge, Prompt, Replies
from mmalign_jax.types import Media

COMPARE = Prompt.load("compare")


def judge(server, replies=None, both_orders=True, **options):
    waits = []
    endpoint = Endpoint(server.url, "critic", key="secret", timeout_s=3.0)  # not less: the machine may be busy
    asker = Asker(endpoint, Replies() if replies is None else replies, COMPARE.read, Asking(sleep=waits.append, **options))
    made = Judge(asker, COMPARE, both_orders=both_orders)
    made.waits = waits
    return made


def answers(count):
    """The first answer is the good one in even questions, the second in odd ones."""
    return [Answer(f"number {n}", *(("a good answer", "a bad answer") if n % 2 == 0 else ("a bad answer", "a good answer"))) for n in range(count)]


TROUBLE = ("500", "503", "429", "close", "slow", "no JSON", "odd JSON", "endless", "cut", "mute")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's own broken pipes
def test_every_trouble_is_survived_and_nothing_is_lost_or_asked_twice(tmp_path):
    """Each question meets two troubles before it is answered."""
    count = 2 * len(TROUBLE)

    def plan(question, before):
        start = int(question.split()[1])
        return TROUBLE[(start + 3 * before) % len(TROUBLE)] if before < 2 else "ok"

    with ChatServer(plan) as server:
        first = judge(server, Replies(tmp_path / "replies.jsonl"))
        verdicts = first(answers(count))
        assert [verdict.value for verdict in verdicts] == [float(n % 2 == 0) for n in range(count)]
        assert all(len(verdict.replies) == 2 and not verdict.problem for verdict in verdicts)
        assert set(server.asked.values()) == {3} and len(server.asked) == 2 * count  # twice in vain, once well, in each order
        assert first.counts.asked == 6 * count and first.counts.lost == 0 and sum(first.counts.failures.values()) == 4 * count
        names = {
            "status 500", "status 503", "status 429", "connection broken", "time-out", "reply in another form", "reply too long",
            "no verdict in the reply",
        }  # fmt: skip
        assert set(first.counts.failures) == names
        assert 7.0 in first.waits  # what the server wished
        again = judge(server, Replies(tmp_path / "replies.jsonl"))
        assert again(answers(count)) == verdicts
        assert again.counts.kept == 2 * count and again.counts.asked == 0 and set(server.asked.values()) == {3}


def test_what_fails_in_the_end_says_why_and_is_asked_again_later(tmp_path):
    broken = {"number 1": "500", "number 2": "mute"}
    with ChatServer(lambda question, before: broken.get(question, "ok")) as server:
        first = judge(server, Replies(tmp_path / "replies.jsonl"), attempts=3)
        verdicts = first(answers(4))
        assert [verdict.value for verdict in verdicts] == [1.0, None, None, 0.0]
        assert [verdict.problem for verdict in verdicts[1:3]] == ["status 500, 3 times", "no verdict in the reply, 3 times"]
        assert verdicts[2].replies == ("I cannot decide.",) * 2 and first.counts.lost == 4
        assert [wait for wait in first.waits if not 0.5 <= wait <= 2] == []
        broken.clear()
        before = sum(server.asked.values())
        assert [verdict.value for verdict in judge(server, Replies(tmp_path / "replies.jsonl"))(answers(4))] == [1.0, 0.0, 1.0, 0.0]
        assert sum(server.asked.values()) == before + 4


def test_a_judge_that_prefers_a_place_sees_ties():
    with ChatServer(lambda question, before: "always A") as server:
        assert [verdict.value for verdict in judge(server)(answers(3))] == [0.5] * 3
        assert [verdict.value for verdict in judge(server, both_orders=False)(answers(3))] == [1.0] * 3


def test_the_same_question_is_asked_once():
    with ChatServer() as server:
        one = judge(server)
        assert [verdict.value for verdict in one(answers(1) * 5)] == [1.0] * 5
        assert one.counts.asked == 2 and one([]) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reply_that_drips_is_given_up():
    with ChatServer(lambda question, before: "ok" if before else "drip") as server:
        start = time.monotonic()
        one = judge(server, both_orders=False)
        assert one(answers(1))[0].value == 1.0 and one.counts.failures == {"time-out": 1}
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("status", ["400", "401", "404", "302"])
def test_a_refusal_for_good_stops(status):
    with ChatServer(lambda question, before: status) as server:
        with pytest.raises(UserError, match=f"{server.url}: the server refuses with status {status}"):
            judge(server, workers=1)(answers(30))
        assert sum(server.asked.values()) < 10


def test_no_server():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "critic", timeout_s=0.5)
    (verdict,) = Judge(Asker(endpoint, Replies(), COMPARE.read, Asking(attempts=2, sleep=lambda wait: None)), COMPARE)(answers(1))
    assert verdict.value is None and verdict.problem == "connection broken, 2 times" and verdict.replies == ("", "")
    with pytest.raises(UserError, match="no address of a server"):
        Judge(Asker(Endpoint("localhost:1/v1", "critic"), Replies(), COMPARE.read), COMPARE)(answers(1))


def test_what_the_server_is_sent(tmp_path):
    picture = Media("image", encoded((1, 2, 3), kind="PNG"))
    video = Media("video", frames=(encoded((4, 5, 6)), encoded((7, 8, 9))), times=(0.0, 1.0))
    with ChatServer() as server:
        replies = Replies(tmp_path / "replies.jsonl")
        judge(server, replies, both_orders=False)([Answer("{first} {nothing}?", "a good {second} answer", "bad", pictures=(picture, video))])
        ((path, body),) = server.requests
        (headers,) = server.headers
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("critic", 0.0)
    *pictures, text = body["messages"][0]["content"]
    assert [one["image_url"]["url"][:19] for one in pictures] == ["data:image/png;base6", *["data:image/jpeg;base"] * 2] or len(pictures) == 3
    # what stands in an answer is no place to fill
    assert "Question: {first} {nothing}?\n" in text["text"] and "Answer A: a good {second} answer\n" in text["text"]
    assert "secret" not in (tmp_path / "replies.jsonl").read_text() and "secret" not in repr(Endpoint("u", "m", key="secret"))
    with pytest.raises(UserError, match="a picture is in a format"):
        judge(server)([Answer("q", "a", "b", pictures=(Media("image", b"TIFF"),))])


def test_a_broken_last_line_is_cut_off_and_another_one_named(tmp_path):
    file = tmp_path / "deep" / "replies.jsonl"
    replies = Replies(file)
    replies.put("a", "first")
    replies.put("b", "zwei ü\n")
    with file.open("ab") as opened:
        opened.write(b'{"key": "c", "te')
    again = Replies(file)
    assert len(again) == 2 and again.get("b") == "zwei ü\n" and again.get("c") is None
    again.put("c", "third")
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(DataError, match="replies.jsonl, row 1: no reply"):
        Replies(file)


def test_runs_share_replies(tmp_path):
    one = Replies(tmp_path / "replies.jsonl")
    one.put("a", "first")
    other = Replies(tmp_path / "replies.jsonl")
    one.put("b", "second")
    other.put("c", "third")
    assert other.get("b") == "second" and one.get("c") == "third" and one.get("d") is None
    with (tmp_path / "replies.jsonl").open("ab") as broken:
        broken.write(b'{"key": "e"')
    again = Replies(tmp_path / "replies.jsonl")
    assert len(again) == 3 and (tmp_path / "replies.jsonl").read_bytes().endswith(b"\n")
