"""The openai Python client against a server: python openai_client.py PORT IMAGE"""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path

import openai

port, image = sys.argv[1:]
settings = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_retries": 0}
client = openai.OpenAI(**settings)
url = "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
asked = {"model": "nano", "messages": [{"role": "user", "content": parts}]}
assert [model.id for model in client.models.list()] == ["nano"]
assert client.models.retrieve("nano").id == "nano"
whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, temperature=0, max_completion_tokens=16)
text = whole.choices[0].message.content
assert text
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
drawn = [client.chat.completions.create(**asked, n=3, temperature=1.0, seed=5) for _ in range(2)]
assert len(drawn[0].choices) == 3
assert [choice.message.content for choice in drawn[0].choices] == [choice.message.content for choice in drawn[1].choices]
stopped = client.chat.completions.create(**asked, stop=text[1:3])
assert text[1:3] not in stopped.choices[0].message.content
searched = client.chat.completions.create(**asked, n=2, extra_body={"beams": 3, "length_penalty": 0.0})
assert len(searched.choices) == 2
raw = client.completions.create(model="nano", prompt="a red", max_tokens=0, echo=True, logprobs=1)
assert raw.choices[0].text == "a red"
assert raw.choices[0].logprobs.token_logprobs[0] is None


def refusal(kind: type[openai.APIStatusError], **body: object) -> openai.APIStatusError:
    """What the client makes of a request that is refused."""
    try:
        client.chat.completions.create(**{**asked, **body})
    except kind as error:
        return error
    raise SystemExit(f"{kind.__name__} was expected")


assert refusal(openai.NotFoundError, model="none").code == "model_not_found"
assert refusal(openai.BadRequestError, tools=[{"type": "function"}]).code == "unsupported"
assert refusal(openai.UnprocessableEntityError, max_tokens="x").request_id


async def at_once() -> list[str]:
    """Several requests, one of them given up."""
    many = openai.AsyncOpenAI(**settings)
    stream = await many.chat.completions.create(**asked, stream=True)
    await stream.close()
    answers = await asyncio.gather(*(many.chat.completions.create(**asked) for _ in range(8)))
    return [answer.choices[0].message.content for answer in answers]


assert asyncio.run(at_once()) == [text] * 8
print(text)
