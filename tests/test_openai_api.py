"""The routes under /v1, asked by OpenAI's own client: what it sends is understood, and it understands the answers."""

import asyncio
import json

import openai
import pytest
from served import CONTEXT, running, save_random_model

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "解释什么是机器学习"},
    {"role": "assistant", "content": "学习。"},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "learning?"}]},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running service that wants a key and has two names."""
    folder = tmp_path_factory.mktemp("served")
    path = save_random_model(folder / "sft_best.pth")
    options = ["--served_model_name", "mine", "gpt", "--api_key", "first", "second", "--requests_per_minute", "100000"]
    with running(folder / "log", "--model_path", str(path), *options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    """The official client."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="second", max_retries=0) as client:
        yield client


def chat(client, **settings):
    settings = {"model": "mine", "messages": MESSAGES, "max_tokens": 12, "seed": 1, **settings}
    return client.chat.completions.create(**settings)


def test_a_conversation_is_answered(client):
    answer = chat(client, n=2, temperature=0)
    assert answer.object == "chat.completion" and answer.model == "mine" and answer.id.startswith("chatcmpl-")
    first, second = answer.choices
    assert (first.index, second.index, first.finish_reason) == (0, 1, "length")
    assert first.message.role == "assistant" and first.message.content == second.message.content != ""
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert chat(client, n=1, temperature=0, model="gpt").choices[0].message.content == first.message.content


def test_a_seed_makes_it_repeatable_and_samples_differ(client):
    def texts(**settings):
        return [choice.message.content for choice in chat(client, n=3, **settings).choices]

    assert texts() == texts() and len(set(texts())) == 3 and texts(seed=2) != texts()


def test_a_stream_has_the_role_first_then_the_text_then_the_reason_then_the_usage(client):
    plain = chat(client, n=2)
    chunks = list(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    for index in range(2):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(delta.delta.content or "" for delta in deltas) == plain.choices[index].message.content
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_raw_stream_ends_with_done(server):
    body = {"messages": MESSAGES, "max_tokens": 2, "stream": True}
    content = server.post("/v1/chat/completions", body, Authorization="Bearer first")[2]
    events = content.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_many_asynchronous_streams_at_once(server):
    async def ask(client, number):
        stream = await chat(client, stream=True, seed=number)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all(numbers):
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="first") as client:
            return await asyncio.gather(*(ask(client, number) for number in numbers))

    together = asyncio.run(ask_all(range(8)))
    assert [asyncio.run(ask_all([number]))[0] for number in range(3)] == together[:3]


def test_log_probabilities_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob
    text = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert text.startswith(answer.choices[0].message.content)
    chunks = list(chat(client, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6, stream=True))
    streamed = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_texts_are_continued(client):
    def complete(**settings):
        settings = {"model": "mine", "prompt": "machine", "max_tokens": 8, "seed": 1, **settings}
        return client.completions.create(**settings)

    answer = complete(prompt=["machine", "学习"], n=2, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 32
    for choice in answer.choices:
        probabilities = choice.logprobs
        assert len(probabilities.tokens) == len(probabilities.token_logprobs) == len(probabilities.text_offset) == 8
        assert all(len(alternatives) <= 2 for alternatives in probabilities.top_logprobs)
    assert complete(echo=True).choices[0].text == "machine" + complete().choices[0].text
    streamed = list(complete(stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == complete().choices[0].text
    assert streamed[-1].choices[0].finish_reason == "length"
    ids = client.post("/../tokenize", cast_to=object, body={"prompt": "machine"})["tokens"]
    assert complete(prompt=ids).choices[0].text == complete().choices[0].text


def test_a_prompt_is_scored_as_programs_that_evaluate_models_ask(client, server):
    """With echo and logprobs; each token of the prompt has an entry, and one follows for each that was generated."""
    asked = {"model": "mine", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    texts = ["machine learning", "What", "machine learning is"]
    ids = [server.post("/tokenize", {"prompt": text}, Authorization="Bearer first")[2]["tokens"] for text in texts]
    by_text, by_ids = (client.completions.create(prompt=prompt, **asked).choices for prompt in (texts, ids))
    for text, tokens, choice, same in zip(texts, ids, by_text, by_ids, strict=True):
        scores = choice.logprobs
        assert choice.text.startswith(text) and scores == same.logprobs
        assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
        assert len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.tokens) == len(tokens) + 1
        pairs = list(zip(scores.token_logprobs, scores.top_logprobs, strict=True))[1:]
        assert all(len(top) == 1 and value <= max(top.values()) < 0 for value, top in pairs)
        assert "".join(scores.tokens[1:-1]) == text and scores.text_offset[1] == 0
    # A token has the probability that it would be chosen with
    (chosen,) = client.completions.create(prompt=ids[0][:-1], **{**asked, "echo": False}).choices
    last = by_ids[0].logprobs.top_logprobs[-2]
    assert chosen.logprobs.top_logprobs[0] == pytest.approx(last, abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="is not streamed"):
        client.completions.create(prompt="x", stream=True, **asked)
    with pytest.raises(openai.BadRequestError, match="5 at most"):
        client.completions.create(prompt="x", **{**asked, "logprobs": 6})


def test_biases_stops_and_extensions_shape_the_text(client, server):
    text = {"prompt": "xy", "add_special_tokens": False}
    x, y = server.post("/tokenize", text, Authorization="Bearer first")[2]["tokens"]
    assert chat(client, logit_bias={str(x): 100}, max_tokens=3).choices[0].message.content == "xxx"
    stopped = chat(client, logit_bias={str(x): 100}, stop=["xx"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("", "stop")
    only = chat(client, extra_body={"top_k": 1, "banned_tokens": [y]}, max_completion_tokens=4, max_tokens=None)
    assert only.usage.completion_tokens == 4


def test_null_means_absent_in_every_field(server):
    from inference.service.requests import ChatRequest

    body = {**dict.fromkeys(ChatRequest.model_fields), "messages": MESSAGES, "max_tokens": 2}
    assert server.post("/v1/chat/completions", body, Authorization="Bearer first")[0] == 200


def test_models_and_tokens(client, server):
    assert [model.id for model in client.models.list()] == ["mine", "gpt"]
    assert client.models.retrieve("gpt").id == "gpt"

    def ask(path, body):
        return server.post(path, body, Authorization="Bearer first")[2]

    tokens = ask("/tokenize", {"prompt": "解释 <s>"})
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == CONTEXT
    assert ask("/detokenize", {"tokens": tokens["tokens"]})["prompt"] == "<s>解释 <s>"
    chat_tokens = ask("/tokenize", {"messages": MESSAGES})["tokens"]
    assert "### 指令:" in ask("/detokenize", {"tokens": chat_tokens})["prompt"]


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        (dict(model="gpt-5"), openai.NotFoundError, "serves mine, gpt"),
        (dict(messages=[]), openai.BadRequestError, "messages"),
        (dict(messages=[{"role": "robot", "content": "x"}]), openai.BadRequestError, "messages"),
        (dict(messages=[{"role": "user", "content": "x" * 5000}]), openai.BadRequestError, str(CONTEXT)),
        (dict(temperature=3), openai.BadRequestError, "temperature"),
        (dict(n=0), openai.BadRequestError, "n: "),
        (dict(logit_bias={"hello": 1}), openai.BadRequestError, "logit_bias"),
        (dict(top_logprobs=2), openai.BadRequestError, "logprobs"),
        (dict(extra_body={"nonsense": 1}), openai.BadRequestError, "nonsense"),
        (dict(extra_headers={"Authorization": "Bearer third"}), openai.AuthenticationError, "API key"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_the_clients_own_exceptions(client, settings, error, expected):
    with pytest.raises(error) as raised:
        chat(client, **settings)
    assert expected in raised.value.body["message"]
    assert set(raised.value.body) == {"message", "type", "param", "code"}


# --- forms and tools -------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


def test_answers_are_json_where_that_is_asked_for(client):
    schema = WEATHER["function"]["parameters"]
    for form in ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, {"type": "json_object"}):
        answer = chat(client, response_format=form, max_tokens=60, n=4)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert form["type"] == "json_object" or 1 <= json.loads(choice.message.content)["days"] <= 9
            assert isinstance(json.loads(choice.message.content), dict)


def test_a_tool_that_has_to_be_called_is_called_streamed_or_not(client):
    settings = dict(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=100)
    (choice,) = chat(client, **settings).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "weather")
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **settings)]
    (delta,) = [chunk.delta.tool_calls for chunk in chunks if chunk.delta.tool_calls]
    assert delta[0].index == 0 and delta[0].function.arguments == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    again = [*MESSAGES, choice.message.model_dump(exclude_none=True)]
    again.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    assert chat(client, messages=again, tools=[WEATHER]).choices[0].message.content is not None
    with pytest.raises(openai.BadRequestError, match="no tool 'rain'"):
        chat(client, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "rain"}})
