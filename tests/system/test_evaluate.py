"""`memorag evaluate` against the real server: two small texts, every method, taken up and repeated."""

import json

import pytest

from tests.support.server import EXAMPLE, Server

TOWN = EXAMPLE["text"]


def record(id: str, text: str, questions: dict[str, str]) -> dict:
    asked = []
    for question, answer in questions.items():
        place = text.index(answer)
        asked.append({"question": question, "answers": [answer], "evidence": [[place, place + len(answer)]]})
    return {"id": id, "title": id, "language": "en", "text": text, "questions": asked}


@pytest.mark.long
def test_two_texts_by_every_method(server: Server, tmp_path):
    half = TOWN.index("\n", len(TOWN) // 2)
    event = next(asked for asked in EXAMPLE["questions"] if asked["kind"] == "event")
    texts = [
        record("first", TOWN[:half], {event["question"]: event["answers"][0]}),
        record("second", "Bread costs two coins.\n\nThe gate is blue.", {"What colour is the gate?": "blue"}),
    ]
    dataset = tmp_path / "town.jsonl"
    dataset.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    methods = ["memorag", "rag", "hyde", "rewrite", "memory", "full", "passages"]
    command = ["evaluate", str(dataset), str(tmp_path / "run"), "--url", server.url, "--max-tokens", "8", "--json"]

    found = json.loads(server.memorag(*command, "--tasks", ",".join(methods)).stdout)
    assert found["baseline"] == "rag" and list(found["methods"]) == methods
    for method, costs in found["methods"].items():
        assert (costs["asked"], costs["failed"], costs["kinds"]) == (2, 0, ["beacon"]), costs["errors"]
        assert method == "passages" or (costs["ms_median"] > 0 and costs["tokens"] > 0)
    assert found["methods"]["hyde"]["clues"] == 1 and found["methods"]["full"]["clues"] == 0
    figures = found["parts"]["town"]
    assert list(figures["f1"]) == methods[:-1] and figures["evidence@1"]["passages"]["mean"] == 1.0
    assert figures["answer@1"]["rag"]["mean"] == 1.0

    rows = (tmp_path / "run" / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 14
    again = server.memorag(*command, "--tasks", ",".join(methods))
    assert json.loads(again.stdout) == found and (tmp_path / "run" / "rows.jsonl").read_text() == rows
    other = tmp_path / "again"
    server.memorag(*command[:2], str(other), *command[3:], "--tasks", "memorag,rag,full")
    kept = [json.loads(line) for line in rows.splitlines()]
    repeated = [json.loads(line) for line in (other / "rows.jsonl").read_text().splitlines()]
    answers = {(row["example"], row["method"]): (row["answer"], row["clues"], row["passages"]) for row in repeated}
    assert answers == {
        (row["example"], row["method"]): (row["answer"], row["clues"], row["passages"])
        for row in kept
        if row["method"] in ("memorag", "rag", "full")
    }, "at temperature 0 the same is answered"
    assert (other / "report.svg").read_text().startswith("<svg")
    refused = server.memorag(*command, "--max-tokens", "9", check=False)
    assert refused.returncode == 1 and "another max_tokens" in refused.stderr
