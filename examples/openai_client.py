"""A running server asked by OpenAI's own client: a chat, a stream, several at once.

kangaroo serve &
python examples/openai_client.py [http://localhost:8123/v1]
"""

import asyncio
import os
import sys

from openai import APIConnectionError, AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8123/v1"
KEY = os.environ.get("KANGAROO_API_KEY", "none")
QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Can you help me to book a table for two tonight?"}
]


def chat(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=64,
        temperature=0,
        extra_body={"speculation": {"statistics": True}},
    )
    print(answer.choices[0].message.content)
    print((answer.model_extra or {})["speculation"], "\n")


def stream(client: OpenAI, model: str) -> None:
    for chunk in client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=64, temperature=0.8, seed=7, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print("\n")


async def several(model: str) -> None:
    async with AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        openings = ("Once upon a time", "The fox", "Long ago")
        asked = [client.completions.create(model=model, prompt=text, max_tokens=24, seed=1) for text in openings]
        for opening, answer in zip(openings, await asyncio.gather(*asked), strict=True):
            print(opening + answer.choices[0].text)


def main() -> None:
    client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        sys.exit(f"no server answers at {URL}: start one with `kangaroo serve`, or name its address")
    chat(client, model)
    stream(client, model)
    asyncio.run(several(model))


if __name__ == "__main__":
    main()
