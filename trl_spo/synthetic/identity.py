# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Which weights a model has: a name, a branch and a folder can all come to hold others."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from torch import nn


def weights_identity(model: str | nn.Module, revision: str | None = None) -> dict[str, Any]:
    """
    What tells the weights of a model from others, in JSON, without loading it.

    Args:
        model (`str` or [`~torch.nn.Module`]):
            Name on the Hub, folder, or a model.
        revision (`str`, *optional*):
            Of the model on the Hub.

    Returns:
        `dict[str, Any]`: `weights`, a hash of those in a folder or of a model, so that the same ones elsewhere are the same. Of a model
        on the Hub, `model` and `commit`, by which it can be loaded; of an adapter there, `model` and `adapter`, the commit of its own.
    """
    if not isinstance(model, str):
        return {"weights": weights_of_parameters(model)}
    if Path(model).is_dir():
        return {"weights": weights_of_folder(model)}
    commit = commit_of(model, revision)
    if commit is not None:
        return {"model": model, "commit": commit}
    return {"model": model, "adapter": commit_of(model, revision, "adapter_config.json") or revision}


def commit_of(name: str, revision: str | None, file: str = "config.json", **kwargs: Any) -> str | None:
    """
    The commit of a model on the Hub, by which all of it is then loaded. `None` of a folder, and where there is no such file: an
    adapter has no config.
    """
    if Path(name).is_dir():
        return None
    try:
        path = hf_hub_download(name, file, revision=revision, **kwargs)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None  # if it is no adapter, `from_pretrained` says what is wrong
    return Path(path).parent.name


def local_folder(model: str, revision: str | None = None) -> str:
    """The folder of a model, which is downloaded if it is on the Hub, so that it stays the same for as long as it is used."""
    if Path(model).is_dir():
        return model
    others = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pth", "onnx/*", "original/*", "consolidated*"]
    return snapshot_download(model, revision=revision, ignore_patterns=others)


def weights_of_folder(name: str) -> str:
    """A hash of the weights in a folder, and if they are an adapter, of what it adapts."""
    digest = hashlib.sha256()
    for file in sorted(Path(name).iterdir()):
        if file.suffix in (".safetensors", ".bin") and file.name != "training_args.bin":
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    adapter = Path(name, "adapter_config.json")
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else None
    if base is not None:
        digest.update(json.dumps(weights_identity(base), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def weights_of_parameters(
    model: nn.Module, gather: Callable[[list[nn.Parameter]], AbstractContextManager] = nullcontext
) -> str:
    """A hash of the weights in memory, each of which is there in the context of `gather`."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
