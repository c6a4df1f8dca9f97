# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What nobody should read is left out of files, cards and errors."""

import re
from typing import Any


_SECRET = re.compile(
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)token$|api_?key$|(^|[_-])keys?$|secret$|passw(or)?d$|credentials?$|auth(orization)?$|cookie$",
    re.IGNORECASE,
)
_USER = re.compile(r"\A(\w[\w+.-]*://)[^/@\s]*@")
_QUERY = re.compile(r"\A(https?://[^?\s]*\?)\S+\Z")
LEFT_OUT = "(left out)"


def without_secrets(value: Any, name: str = "", hidden: bool = False) -> Any:
    """
    Settings without what nobody should read: values of options such as `token`, and the user and the query of a URL. The names of
    environment variables stay.
    """
    secret = _SECRET.search(name) is not None
    hidden = hidden or secret
    if isinstance(value, dict):
        return {key: without_secrets(some, str(key), hidden) for key, some in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(some, name, hidden) for some in value]
    if isinstance(value, str):
        return LEFT_OUT if hidden else _QUERY.sub(rf"\1{LEFT_OUT}", _USER.sub(r"\1", value))
    return LEFT_OUT if secret and isinstance(value, int | float) and not isinstance(value, bool) else value
