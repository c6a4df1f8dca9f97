# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
An OpenAI-compatible server on loopback whose models do what their names say: `python scripted_server.py`.

The name of a model is a character and some misfortunes, such as `longer+429:0.2+cut:0.1`. The server prints its port, and answers
`GET /log` with the number of times that each request was answered, by a hash of its body.
"""

import asyncio
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter


RESPONSES = re.compile(r"<response_a>\n(.*)\n</response_a>.*<response_b>\n(.*)\n</response_b>", re.DOTALL)
answered: Counter[str] = Counter()
seen: Counter[str] = Counter()


def quality(text: str) -> int:
    """What the critics who are right go by."""
    found = re.search(r"quality (-?\d+)", text)
    return int(found[1]) if found else 0


def judge(character: str, content: str, rng: random.Random) -> str:
    first, second = RESPONSES.search(content).groups()
    verdict = "tie"
    if character == "first":
        verdict = "A"
    elif character == "second":
        verdict = "B"
    elif character == "longer" and len(first) != len(second):
        verdict = "A" if len(first) > len(second) else "B"
    elif character == "random":
        verdict = rng.choice("AB")
    elif character == "obedient" and (found := re.search(r"the verdict is (A|B|tie)", first + second)):
        verdict = found[1]
    elif character in (
        "right",
        "wrong",
        "prose",
        "fenced",
        "malformed",
        "chatty",
        "truncated",
        "obedient",
        "unlikely",
    ):
        better = quality(first) - quality(second)
        better = -better if character == "wrong" else better
        verdict = "A" if better > 0 else "B" if better < 0 else "tie"
    elif character.startswith("errs"):  # `errs0.3` is right in 7 of 10 pairs, in whichever order
        better = quality(first) - quality(second)
        pair = "".join(sorted((first, second))) + content[:1] + character
        if random.Random(pair).random() < float(character[4:].split("#")[0]):
            better = -better
        verdict = "A" if better > 0 else "B" if better < 0 else "tie"
    text = json.dumps({"rationale": f"Because of {len(first)} and {len(second)}.", "verdict": verdict})
    return {
        "prose": f"I think that response {verdict} is better.",
        "fenced": f"```json\n{text}\n```",
        "malformed": text[:-2],
        "chatty": f"Here it is: {text}",
        "truncated": text[:20],
    }.get(character, text)


def logprobs(text: str, character: str) -> dict:
    """Tokens of the text, with what the likeliest ones are where the verdict is: it is one of them, but not for who is `unlikely`."""
    share = 0.2 if character == "unlikely" else 0.8
    tokens = []
    for token in re.findall(r"\w+|\W", text):
        top = [{"token": token, "logprob": -0.1}]
        if token in ("A", "B", "tie"):
            other = "B" if token == "A" else "A"
            top = [{"token": token, "logprob": math.log(share)}, {"token": other, "logprob": math.log(1 - share)}]
        tokens.append({"token": token, "logprob": -0.1, "bytes": None, "top_logprobs": top})
    return {"content": tokens, "refusal": None}


async def answer(body: dict, key: str) -> tuple[int, dict | bytes, dict[str, str]]:
    character, *misfortunes = body["model"].split("+")
    seen[key] += 1
    rng = random.Random(f"{key} {seen[key]}")
    for misfortune in misfortunes:
        kind, _, value = misfortune.partition(":")
        if kind == "slow":
            await asyncio.sleep(float(value) * rng.random())
        elif kind == "hang" and rng.random() < float(value):
            await asyncio.sleep(60)
        elif rng.random() < float(value or 1):
            if kind == "cut":
                raise ConnectionAbortedError
            if kind == "garbage":
                return 200, b"<html>Bad gateway</html>", {}
            if kind in ("nousage", "nullusage", "nologprobs"):
                continue
            if kind == "detail":
                return 422, {"detail": "Unexpected fields in the request: {'top_k'}"}, {}
            error = {"message": f"scripted {kind} of {body['model']}", "type": "scripted", "code": None}
            return int(kind), {"error": error}, {"Retry-After": "0.01"} if kind == "429" else {}
    if character == "unknown":
        return 404, {"error": {"message": "The model does not exist", "code": "model_not_found"}}, {}
    content = body["messages"][-1]["content"]
    text = judge(character, content, rng) if RESPONSES.search(content) else f"I am {character}."
    answered[key] += 1
    choice = {
        "index": 0,
        "finish_reason": "length" if character == "truncated" else "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs(text, character) if body.get("logprobs") and "nologprobs" not in misfortunes else None,
    }
    usage = {"prompt_tokens": len(content) // 4, "completion_tokens": 20, "total_tokens": len(content) // 4 + 20}
    if "nullusage" in misfortunes:
        usage = dict.fromkeys(usage)
    return (
        200,
        {
            "id": key,
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": None if "nousage" in misfortunes else usage,
        },
        {},
    )


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            method, path, _ = line.decode().split()
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            data = await reader.readexactly(int(headers.get("content-length", 0)))
            if method == "GET":
                status, content, extra = 200, {"answered": answered, "requests": sum(seen.values())}, {}
            elif (key := headers.get("authorization", "")) == "Bearer wrong-key":
                status, content, extra = (
                    401,
                    {"error": {"message": f"Incorrect API key: {key[7:]}", "code": "invalid_api_key"}},
                    {},
                )
            else:
                status, content, extra = await answer(json.loads(data), hashlib.sha256(data).hexdigest())
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            head = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **extra}
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            writer.write(f"HTTP/1.1 {status} -\r\n{lines}\r\n".encode() + payload)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        writer.transport.abort()
    finally:
        writer.close()


async def main(port: int) -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
