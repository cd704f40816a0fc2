"""The main job on real texts: memorize over HTTP, ask 20 questions at once, every quoted offset exact."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.chronicles import document
from tests.support.server import EXAMPLE, FIRST_ANSWER, FIRST_QUESTION, SHARED, Server, memorize, read_events

NOVEL = SHARED / "data" / "books" / "pride-and-prejudice.txt"
CHINESE = (
    "旧港的灯塔建于光绪三年,由一位名叫沈怀远的船匠出资修建。塔高二十一丈,夜里可以照亮整个海湾。"
    "第二年春天,海盗来袭,守塔人林阿福点燃烽火,救了全城的百姓。此后每逢三月初七,镇上的人都会带着米酒到塔下祭奠。"
    "民国初年,灯塔改用煤气灯,沈家的后人沈素梅成为第一位女守塔人。她在塔上住了四十年,留下七本日记。\n\n"
) * 12

QUESTIONS = [
    "Who is Mr. Bingley?", "What does Elizabeth think of Mr. Darcy at the ball?", "Who inherits Longbourn?",
    "Where does Mr. Collins live?", "Whom does Charlotte Lucas marry?", "What is Pemberley like?",
    "Why does Wickham dislike Darcy?", "Who elopes with Lydia?", "What does Lady Catherine demand of Elizabeth?",
    "How does Jane fall ill?", "Where do the Gardiners live?", "Who writes to Elizabeth after the first proposal?",
]  # fmt: skip
TOWN = [asked["question"] for asked in EXAMPLE["questions"][:: len(EXAMPLE["questions"]) // 8]][:8]


@pytest.fixture(scope="module")
def novel(server: Server) -> str:
    others = (document(seed, 150, "test")["text"] for seed in range(11, 16))
    text = (NOVEL.read_text(encoding="utf-8") if NOVEL.exists() else "\n\n".join(others))[:45_000]
    made = memorize(server, [{"id": "novel", "text": text}], id="novel", ratio=16)
    assert made["status"] == "ready" and made["documents"] == [
        {"id": "novel", "characters": len(text), "tokens": made["tokens"]}
    ]
    return text


def check_answer(answer: dict, texts: dict[str, str], task: str = "memorag", degraded: tuple[str, ...] = ()) -> None:
    """Everything an answer quotes is exactly what stands at those offsets; its parts fit together."""
    assert answer["task"] == task and answer["version"]
    assert answer["degraded"] == ["embedded-model", *degraded], answer["degraded"]
    for quoted in answer["passages"] + answer["evidence"]:
        assert texts[quoted["document"]][quoted["start"] : quoted["end"]] == quoted["text"]
    places = [(list(texts).index(p["document"]), p["start"]) for p in answer["passages"]]
    assert places == sorted(places), "passages come in document order"
    for citation in answer["citations"]:
        passage = answer["passages"][citation["n"] - 1]
        assert {key: passage[key] for key in ("document", "start", "end")} == {
            key: citation[key] for key in ("document", "start", "end")
        }
    timings = answer["timings_ms"]
    assert timings["total"] + 1 >= timings["recall"] + timings["retrieve"] + timings["generate"] > 0


def test_twenty_questions_at_once_on_two_texts(server, chronicle, novel):
    asked = [("novel", q, {"novel": novel}) for q in QUESTIONS] + [
        ("chronicle", q, {"chronicle.txt": EXAMPLE["text"]}) for q in TOWN
    ]
    assert len(asked) == 20
    with server.client() as client, ThreadPoolExecutor(20) as threads:
        answers = list(
            threads.map(
                lambda a: client.post(f"/v1/memories/{a[0]}/answer", json={"question": a[1], "max_tokens": 24}), asked
            )
        )
    for (memory, _, texts), response in zip(asked, answers, strict=True):
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["memory"] == memory and answer["answer"] and answer["passages"] and answer["evidence"]
        check_answer(answer, texts)


def test_the_passage_that_answers_is_found(server, chronicle):
    asked = next(asked for asked in EXAMPLE["questions"] if asked["kind"] == "event")
    with server.client() as client:
        answer = client.post(
            "/v1/memories/chronicle/answer", json={"question": asked["question"], "task": "rag"}
        ).json()
    assert asked["clues"][0] in " ".join(p["text"] for p in answer["passages"])
    assert any(asked["answers"][0] in e["text"] for e in answer["evidence"])


def test_memory_finds_what_the_question_alone_does_not(server, chronicle):
    """The first question of `make up`: it shares no content word with the sentence that answers it."""
    asked = next(asked for asked in EXAMPLE["questions"] if asked["question"] == FIRST_QUESTION)
    assert asked["answers"] == [FIRST_ANSWER]
    (start, end), *_ = asked["evidence"]
    with server.client() as client:
        answers = {
            task: client.post("/v1/memories/chronicle/answer", json={"question": FIRST_QUESTION, "task": task}).json()
            for task in ("memorag", "rag")
        }
    cited = {(citation["start"], citation["end"]) for citation in answers["memorag"]["citations"]}
    assert answers["memorag"]["answer"].partition("[")[0].strip() == FIRST_ANSWER
    assert any(first <= start and end <= last for first, last in cited)
    assert FIRST_ANSWER not in answers["rag"]["answer"] + " ".join(p["text"] for p in answers["rag"]["passages"])


@pytest.mark.parametrize("task", ["memorag", "rag", "memory", "summarize", "full", "hyde", "rewrite"])
def test_each_task(server, chronicle, task):
    with server.client() as client:
        answer = client.post(
            "/v1/memories/chronicle/answer", json={"question": TOWN[0], "task": task, "max_tokens": 16}
        ).json()
    check_answer(answer, {"chronicle.txt": EXAMPLE["text"]}, task)
    assert {clue["kind"] for clue in answer["clues"]} <= {
        "memorag": {"span", "question", "draft"}, "summarize": {"key_point"}, "hyde": {"draft"}, "rewrite": {"question"}
    }.get(task, set())  # fmt: skip
    assert bool(answer["passages"]) == (task not in ("memory", "full"))
    assert 0 < answer["usage"]["completion_tokens" if task != "memory" else "recall_completion_tokens"] <= 64


def test_a_text_beyond_the_window_is_cut_and_says_so(server, novel):
    body = {"question": "Who is Mr. Bingley?", "task": "full", "max_tokens": 16, "short": True}
    with server.client() as client:
        answer = client.post("/v1/memories/novel/answer", json=body).json()
    check_answer(answer, {"novel": novel}, "full", ("text-cut",))
    assert 8000 < answer["usage"]["prompt_tokens"] + 16 <= 8192, "the window is used"


def test_a_stream_tells_the_same_as_the_answer(server, chronicle):
    body = {"question": TOWN[1], "max_tokens": 20}
    with server.client() as client:
        whole = client.post("/v1/memories/chronicle/answer", json=body).json()
        with client.stream("POST", "/v1/memories/chronicle/answer", json=body | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = read_events(response)
    names = [name for name, _ in events]
    assert names[-1] == "done" and set(names) == {"clue", "passage", "token", "done"}
    assert names == sorted(names, key=["clue", "passage", "token", "done"].index)
    done = events[-1][1]
    assert "".join(data["text"] for name, data in events if name == "token").strip() == done["answer"].strip()
    assert [data for name, data in events if name == "clue"] == done["clues"]
    assert [data for name, data in events if name == "passage"] == done["passages"]
    same = ("memory", "version", "task", "passages", "clues", "answer")
    assert {k: done[k] for k in same} == {k: whole[k] for k in same}


def test_the_stages_on_their_own(server, chronicle):
    with server.client() as client:
        clues = client.post("/v1/memories/chronicle/clues", json={"question": TOWN[2]}).json()
        found = client.post("/v1/memories/chronicle/passages", json={"question": "the east pier"}).json()
        summary = client.post("/v1/memories/chronicle/summary", json={"max_tokens": 16}).json()
    assert clues["memory"] == "chronicle" and isinstance(clues["clues"], list) and clues["timings_ms"]["recall"] > 0
    assert "the east pier" in " ".join(p["text"] for p in found["passages"])
    assert all(EXAMPLE["text"][p["start"] : p["end"]] == p["text"] for p in found["passages"])
    assert summary["task"] == "summarize" and summary["answer"]


def test_chinese_and_several_documents(server):
    documents = [{"id": "deng-ta", "text": CHINESE}, {"text": "The lighthouse of Old Harbour.\r\n\r\nIt is tall. 🗼"}]
    made = memorize(server, documents, id="harbour")
    assert [d["id"] for d in made["documents"]] == ["deng-ta", "doc-2"]
    with server.client() as client:
        answer = client.post("/v1/memories/harbour/answer", json={"question": "谁是第一位女守塔人?"}).json()
        source = client.get("/v1/memories/harbour/documents/deng-ta").text
    assert source == CHINESE
    check_answer(answer, {"deng-ta": CHINESE, "doc-2": documents[1]["text"]})


def test_list_get_delete_and_create_again(server):
    made = memorize(server, [{"text": "A short text about a blue door in Lissow."}], id="short", title="Short")
    assert made["kind"] == "beacon" and made["slots"] > 0 and made["bytes"] > 0 and made["passages"] == 1
    with server.client() as client:
        listed = client.get("/v1/memories", params={"limit": 1}).json()
        ids = [m["id"] for m in listed["memories"]]
        while listed["next_cursor"]:
            listed = client.get("/v1/memories", params={"limit": 1, "cursor": listed["next_cursor"]}).json()
            ids += [m["id"] for m in listed["memories"]]
        assert "short" in ids and len(ids) == len(set(ids))
        before = client.post("/v1/memories/short/answer", json={"question": "What colour?", "task": "memory"}).json()
        assert client.delete("/v1/memories/short").status_code == 204
        assert client.get("/v1/memories/short").status_code == 404
        again = memorize(server, [{"text": "A short text about a grey gate in Ostrand."}], id="short")
        assert again["version"] != made["version"], "a version name is never used twice: caches are keyed by it"
        after = client.post("/v1/memories/short/answer", json={"question": "What colour?", "task": "memory"}).json()
        found = client.post("/v1/memories/short/passages", json={"question": "What colour is the door?"}).json()
    assert before["version"] != after["version"]
    assert "grey gate" in found["passages"][0]["text"]
