# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reads the docstrings of the Hugging Face libraries for mkdocstrings: what their own documentation builder understands, in
Google's style.

    alpha (`float`, *optional*, defaults to `0.1`):       ->  alpha (float):
    > Parameters that control the preference loss         ->  (left out)
    [`~transformers.PreTrainedModel`], [`pair_weights`]   ->  `PreTrainedModel`, `pair_weights`
    Returns: `torch.Tensor` of shape `(B,)`: loss ...     ->  torch.Tensor of shape (B,): loss ...
"""

import re

import griffe


_LINK = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
_GROUP = re.compile(r"^ *> Parameters that .*\n\n?", re.MULTILINE)
_PARAMETER = re.compile(r"^( +\*{0,2}\w+(?:, \w+)*) \((.*)\):$", re.MULTILINE)
_RETURNS = re.compile(r"^(Returns:\n +)(.*?)(: .*|:)$", re.MULTILINE)


def _link(match: re.Match) -> str:
    name = match.group(2)
    return f"`{name.rsplit('.', 1)[-1] if match.group(1) else name}`"


def _type(text: str) -> str:
    return re.sub(r", (\*optional\*|defaults to .*)", "", text).replace("`", "")


class HuggingFaceDocstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is None:
            return
        text = _GROUP.sub("", obj.docstring.value)
        text = _LINK.sub(_link, text)
        text = _PARAMETER.sub(lambda match: f"{match.group(1)} ({_type(match.group(2))}):", text)
        obj.docstring.value = _RETURNS.sub(lambda m: m.group(1) + _type(m.group(2)) + m.group(3), text)
