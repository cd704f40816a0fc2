"""OpenAI's own client on the server: what its users do first."""

import openai
import pytest

from tests.support.server import Server

QUESTION = "Who lit lamp 3?"


@pytest.fixture
def client(server: Server, chronicle: dict):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, memory: dict, question: str = QUESTION, **arguments):
    """By `rag`: which clue comes first, and so which of two equal passages is kept, load decides."""
    messages = arguments.pop("messages", [{"role": "user", "content": question}])
    return client.chat.completions.create(
        model=f"memorag/{memory['id']}", messages=messages, max_tokens=8, extra_body={"task": "rag"}, **arguments
    )


def test_a_memory_is_a_model(client: openai.OpenAI, chronicle: dict) -> None:
    name = f"memorag/{chronicle['id']}"
    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).owned_by == "memorag"


def test_a_completion_is_what_the_servers_own_route_answers(
    server: Server, client: openai.OpenAI, chronicle: dict
) -> None:
    with server.client() as http:
        own = http.post(
            f"/v1/memories/{chronicle['id']}/answer", json={"question": QUESTION, "max_tokens": 8, "task": "rag"}
        ).json()
    made = ask(client, chronicle)
    message = made.choices[0].message
    assert message.content == own["answer"] and made.choices[0].finish_reason == own["finish_reason"]
    beside = message.model_extra["memorag"]
    assert [p["text"] for p in beside["passages"]] == [p["text"] for p in own["passages"]] and beside["passages"]
    assert made.usage and made.usage.completion_tokens > 0
    pieces = list(ask(client, chronicle, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == own["answer"]


def test_a_stop_a_seed_and_a_temperature_are_honoured(client: openai.OpenAI, chronicle: dict) -> None:
    whole = ask(client, chronicle).choices[0].message.content
    assert whole and len(whole) > 3
    assert ask(client, chronicle, stop=whole[2:4]).choices[0].message.content == whole[:2]
    drawn = [ask(client, chronicle, temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1, "the same seed draws the same, others something else"


def test_a_question_that_leans_on_the_conversation_is_made_whole_first(client: openai.OpenAI, chronicle: dict) -> None:
    before = [{"role": "user", "content": "Who lit lamp 2?"}, {"role": "assistant", "content": "The keeper."}]

    def usage(question: str, messages: list[dict[str, str]]) -> int:
        made = ask(client, chronicle, messages=[*messages, {"role": "user", "content": question}])
        return made.choices[0].message.model_extra["memorag"]["usage"]["recall_prompt_tokens"]

    assert usage("And when did she light it?", before) > usage("And when did she light it?", [])
    assert usage(QUESTION, before) == usage(QUESTION, []), "a question that stands alone costs no more"


def test_what_is_not_there_is_not_found(client: openai.OpenAI, chronicle: dict) -> None:
    with pytest.raises(openai.NotFoundError, match="no memory"):
        ask(client, {"id": "nothing"})
    with pytest.raises(openai.BadRequestError, match="n: 2 is not supported"):
        ask(client, chronicle, n=2)
