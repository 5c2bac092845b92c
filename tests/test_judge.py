"""The judge against a server of our own that answers, refuses, fails for a while, or talks nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import call

from harness.evaluation.judge import Case, Judge, judge_rows
from results.store import StoreError, judge_lines, read_ratings, read_rows


class Server(ThreadingHTTPServer):
    """Rates by what the answer says. Counts what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.failures = 0  # of the next questions
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.keys.append(self.headers.get("Authorization"))
            fails = self.server.failures > 0
            self.server.failures -= fails
        text = asked["messages"][0]["content"]
        time.sleep(0.02)
        answer: dict = {"message": {"content": "Fair. The form is Rating: [[5.00]].\nRating: [[7.25]]"}, "finish_reason": "stop"}
        if "REFUSE" in text:
            answer = {"message": {"content": None, "refusal": "I would rather not."}, "finish_reason": "stop"}
        elif "NONSENSE" in text:
            answer["message"]["content"] = "Ten out of ten!"
        elif "ELEVEN" in text:
            answer["message"]["content"] = "Rating: [[11.00]]"
        if "STRANGE" in text:
            self.wfile.write(b"SSH-2.0-hello\r\n")
            self.close_connection = True
            return
        answer = "hi" if "ODD" in text else answer  # type: ignore[assignment]
        body = b"oops" if "BROKEN" in text else json.dumps({"choices": [answer]}).encode()
        with self.server.lock:
            self.server.at_once -= 1  # before the answer: whoever has read it may ask again at once
        self.send_response(503 if fails else 401 if "FORBIDDEN" in text else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def case(row: str, answer: str) -> Case:
    return Case(row, "What is it?", "A thing.", answer)


def judge(server: Server, **more) -> Judge:
    return Judge(server.url, "a/judge", wait_s=0.01, **more)


def test_ratings_refusals_and_nonsense_are_kept_apart(server: Server, tmp_path: Path) -> None:
    answers = {"1": "good", "2": "REFUSE", "3": "NONSENSE", "4": "ELEVEN", "5": "good", "6": "BROKEN", "7": ""}
    seen: list[int] = []
    tally = judge_rows(judge(server, attempts=2), [case(row, text) for row, text in answers.items()], tmp_path, seen.append)
    assert tally.statuses == {"ok": 3, "refused": 1, "unparsable": 2, "unreachable": 1}
    assert sum(seen) == 7
    assert read_ratings(tmp_path) == {"a-judge": {"1": 7.25, "5": 7.25, "7": 7.25}}
    assert sum("good" in asked["messages"][0]["content"] for asked in server.asked) == 1 + 6, (
        "the word is in the wording, once each"
    )
    assert server.asked[0]["temperature"] == 0.7 and server.asked[0]["model"] == "a/judge"


def test_whatever_a_judge_sends_is_a_verdict_and_never_shows_the_key(server: Server) -> None:
    for text in ("STRANGE", "ODD", "BROKEN"):
        assert judge(server, attempts=1).rate(case("1", text)).status == "unreachable"
    bad = Judge("http://[broken/v1", "m", attempts=1, wait_s=0.01, key="s3cret\r")
    assert "s3cret" not in bad.rate(case("1", "x")).text
    assert "s3cret" not in Judge(server.url, "m", attempts=1, key="s3cret\r").rate(case("1", "x")).text


def test_nothing_is_asked_twice(server: Server, tmp_path: Path) -> None:
    cases = [case(str(n), f"answer {n % 5}") for n in range(20)]
    judge_rows(judge(server), cases[:15], tmp_path, lambda _: None)
    assert len(server.asked) == 5
    with (tmp_path / "judge" / "a-judge.jsonl").open("a") as handle:
        handle.write('{"row": "torn')
    tally = judge_rows(judge(server), cases, tmp_path, lambda _: None)
    assert len(server.asked) == 5 and tally.again == 20
    assert set(read_ratings(tmp_path)["a-judge"]) == {str(n) for n in range(20)}
    judge_rows(judge(server, temperature=0.0), cases[:1], tmp_path, lambda _: None)
    assert len(server.asked) == 6, "another temperature is another question"


def test_a_judge_that_is_busy_is_asked_again_and_never_by_too_many(server: Server, tmp_path: Path) -> None:
    server.failures = 3
    cases = [case(str(n), f"answer {n}") for n in range(12)]
    tally = judge_rows(judge(server, workers=3), cases, tmp_path, lambda _: None)
    assert tally.statuses == {"ok": 12}
    assert len(server.asked) == 15 and 1 < server.most_at_once <= 3


def test_a_judge_that_is_down_or_forbids_loses_nothing(server: Server, tmp_path: Path) -> None:
    judge_rows(judge(server), [case("0", "fine")], tmp_path, lambda _: None)
    down = Judge("http://127.0.0.1:9/v1", "a/judge", attempts=2, wait_s=0.01)
    with pytest.raises(StoreError, match=r"does not answer: .*answers are stored"):
        judge_rows(down, [case(str(n), f"more {n}") for n in range(30)], tmp_path, lambda _: None)
    with pytest.raises(StoreError, match="HTTP 401"):
        judge_rows(judge(server), [case("9", "FORBIDDEN")], tmp_path, lambda _: None)
    assert sum("FORBIDDEN" in asked["messages"][0]["content"] for asked in server.asked) == 1, "asking again would not help"
    assert len(judge_lines(tmp_path / "judge" / "a-judge.jsonl")) == 1


def test_a_slow_judge_is_a_counted_miss(tmp_path: Path) -> None:
    class Slow(Handler):
        def do_POST(self) -> None:
            time.sleep(0.5)

    slow = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    slow.daemon_threads = True
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    asked = Judge(f"http://127.0.0.1:{slow.server_port}/v1", "m", timeout_s=0.1, attempts=1)
    assert asked.rate(case("1", "x")).status == "unreachable"
    slow.shutdown()


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    made = judge(server)
    judge_rows(made, [case("1", "x")], tmp_path, lambda _: None)
    assert server.keys == ["Bearer s3cret"] and "s3cret" not in repr(made)
    assert "s3cret" not in (tmp_path / "judge" / "a-judge.jsonl").read_text()


def test_a_run_with_a_judge_fills_its_column(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"Say {n}", "prompt": f"Say {n}. Answer:", "output": "nothing"} for n in range(2)]
    folder = tmp_path / "data" / "instruct"
    folder.mkdir(parents=True)
    (folder / "dolly_eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["run", "--benchmarks", "dolly(new_tokens=4),recall(length=300)", "--methods", "full,snapkv", "--budgets", "10"]
    asked += ["--prompt", "question_in", "--limit", "2", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "o")]
    assert call(*asked, "--judge-url", server.url) == 2
    assert "needs both --judge-url and --judge-model" in capsys.readouterr().err
    assert call(*asked, "--judge-url", server.url, "--judge-model", "m", "--judge-workers", "0") == 2
    assert call(*asked, "--judge-url", server.url, "--judge-model", "m") == 0
    assert set(read_ratings(tmp_path / "o")["m"]) == {
        r.key.id for r in read_rows(tmp_path / "o") if r.key.benchmark.startswith("dolly")
    }
    text = (tmp_path / "o" / "report" / "scores.md").read_text()
    assert "those of m, of 4 answers" in text and "| judge |" in text and "7.25 [7.25, 7.25]" in text
    assert text.count("| judge |") == 1, "only where there are ratings"
