# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Responses in the format of AlpacaEval, for `alpaca_eval --model_outputs`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..synthetic.files import write_json


def export_alpaca_eval(
    samples: Iterable[dict[str, Any]], path: str | os.PathLike, generator: str, dataset: str = "trl_spo"
) -> Path:
    """
    Writes the first response to each prompt as AlpacaEval reads it: a list of `instruction`, `output`, `generator` and `dataset`.

    Args:
        samples (`Iterable[dict[str, Any]]`):
            Rows of [`~trl_spo.synthetic.generate_candidates`].
        path (`str` or `os.PathLike`):
            File to write, such as `"model_outputs.json"`.
        generator (`str`):
            Name of the model.
        dataset (`str`, *optional*, defaults to `"trl_spo"`):
            Name of the set of prompts.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: a prompt is a conversation of several turns, which an instruction cannot be.
    """
    rows = []
    for sample in samples:
        prompt = sample["prompt"]
        if not isinstance(prompt, str):
            if len(prompt) != 1 or prompt[0]["role"] != "user":
                raise ValueError(
                    f"The prompt {sample['prompt_id']!r} has the roles {[message['role'] for message in prompt]}, and AlpacaEval has single "
                    "instructions. Leave out such prompts."
                )
            prompt = prompt[0]["content"]
        output = sample["responses"][0]["text"]
        rows.append({"instruction": prompt, "output": output, "generator": generator, "dataset": dataset})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    return path
