# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import os
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

from ._compat import get_config_model_id


def save_model_card(
    trainer: Trainer,
    model_name: str | None,
    dataset_name: str | None,
    tags: str | list[str] | None,
    settings: dict[str, Any],
) -> None:
    """
    Writes the model card of one of our trainers, `README.md` in its output folder.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer with TRL's `_name`, `_paper` and `_tag_names`.
        model_name (`str`, *optional*):
            Name of the model.
        dataset_name (`str`, *optional*):
            Name of the dataset used for training.
        tags (`str` or `list[str]`, *optional*):
            Tags besides the trainer's.
        settings (`dict[str, Any]`):
            Options of the method, for the card's table.
    """
    if not trainer.is_world_process_zero():
        return
    base_model = get_config_model_id(trainer.model.config)
    if not base_model or os.path.isdir(base_model):
        base_model = None
    if dataset_name and os.path.exists(dataset_name):  # not a dataset of the Hub, which its metadata wants
        dataset_name = None
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    tags = ["generated_from_trainer", *trainer._tag_names, *(tag for tag in tags if tag not in trainer._tag_names)]
    model_name = model_name or os.path.basename(os.path.normpath(trainer.args.output_dir))
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            datasets=dataset_name,
            library_name="transformers",
            model_name=model_name,
            tags=tags,
        ),
        template_path=str(files("trl_spo").joinpath("templates/model_card.md")),
        model_name=model_name,
        hub_model_id=trainer.hub_model_id or trainer.args.hub_model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        is_chat=trainer.processing_class.chat_template is not None,
        is_adapter=hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"),
        trainer_name=trainer._name,
        trainer_class=type(trainer).__name__,
        paper=trainer._paper,
        settings=settings,
        versions={
            name: version(name) for name in ("trl_spo", "trl", "transformers", "torch", "datasets", "tokenizers")
        },
    )
    card.save(os.path.join(trainer.args.output_dir, "README.md"))
