# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The models of the documentation that judge, behind an endpoint on loopback: all of them prefer the longer response. Prints its port."""

import asyncio
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "synthetic"))
import scripted_server  # noqa: E402 - found by the path above


_answer = scripted_server.answer


async def answer(body: dict, key: str) -> tuple[int, dict | bytes, dict[str, str]]:
    return await _answer({**body, "model": "longer"}, key)


if __name__ == "__main__":
    scripted_server.answer = answer
    asyncio.run(scripted_server.main(0))
