# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""What the training subcommands and the scripts under `examples/` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from transformers import Trainer, TrainingArguments
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments


# Suffix of a local file -> the builder of `datasets` that reads it
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_dataset(
    script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig | None" = None
) -> "DatasetDict | IterableDatasetDict":
    """
    Load the dataset that a command line names.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            Its `dataset_name` is one of
                - the name of a dataset on the Hub, or a folder of data files: whatever [`~datasets.load_dataset`] takes,
                - a folder written by [`~datasets.Dataset.save_to_disk`] or [`~datasets.DatasetDict.save_to_disk`],
                - a file: `.json`, `.jsonl`, `.parquet` or `.csv`, also compressed (`.gz`, `.zst`, ...).
            What has no splits of its own becomes the split `dataset_train_split`.
        dataset_args ([`~trl.DatasetMixtureConfig`], *optional*):
            A mixture of datasets, from the `datasets` section of a YAML file. Excludes `dataset_name`.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]:
            The splits by name.
    """
    import datasets

    name = script_args.dataset_name
    if dataset_args is not None and dataset_args.datasets:
        if name:
            raise ValueError(
                f"`dataset_name` is {name!r}, but the config has a `datasets` mixture too. Remove one of them."
            )
        from trl import get_dataset

        return get_dataset(dataset_args)
    if not name:
        raise ValueError("Neither `dataset_name` nor `datasets` is set: pass `--dataset_name`.")

    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        if script_args.dataset_streaming:
            raise ValueError(
                f"`dataset_streaming` is set, but {name} was written by `save_to_disk` and is memory-mapped: it needs no "
                "streaming. Leave the option out."
            )
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, datasets.Dataset):
            dataset = datasets.DatasetDict({script_args.dataset_train_split: dataset})
        return dataset
    if path.is_file():
        builder = next((_BUILDERS[suffix] for suffix in path.suffixes[-2:] if suffix in _BUILDERS), None)
        if builder is None:
            raise ValueError(f"`dataset_name` is the file {name}, which is none of {', '.join(_BUILDERS)}.")
        return datasets.load_dataset(
            builder,
            data_files={script_args.dataset_train_split: str(path)},
            streaming=script_args.dataset_streaming,
        )
    return datasets.load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def get_splits(
    dataset: "DatasetDict | IterableDatasetDict", script_args: "ScriptArguments", training_args: "TrainingArguments"
) -> "tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]":
    """
    Return the split to train on, and the one to evaluate on if `eval_strategy` asks for evaluation.
    """

    def get(option: str) -> "Dataset | IterableDataset":
        split = getattr(script_args, option)
        if split not in dataset:
            remedy = f"Pass `--{option}` with one of them"
            if option == "dataset_test_split":
                remedy += ", or `--eval_strategy no`"
            raise ValueError(f"`{option}` is {split!r}, but the dataset has only: {', '.join(dataset)}. {remedy}.")
        return dataset[split]

    evaluate = training_args.eval_strategy != "no"
    return get("dataset_train_split"), get("dataset_test_split") if evaluate else None


def get_sft_dataset(script_args: "ScriptArguments") -> "Dataset | None":
    """
    Load the dataset for the lower level that a command line names, if it does.
    """
    if script_args.sft_dataset_name is None:
        return None
    from trl import ScriptArguments

    split = script_args.sft_dataset_train_split
    dataset = load_dataset(ScriptArguments(dataset_name=script_args.sft_dataset_name, dataset_train_split=split))
    if split not in dataset:
        raise ValueError(
            f"`sft_dataset_train_split` is {split!r}, but the dataset has only: {', '.join(dataset)}. Pass "
            "`--sft_dataset_train_split` with one of them."
        )
    return dataset[split]


def get_model_init_kwargs(model_args: "ModelConfig", training_args: "TrainingArguments") -> dict[str, Any]:
    """
    Return the keyword arguments of `from_pretrained`: those of the model options, overridden by `model_init_kwargs`.
    """
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def get_checkpoint(training_args: "TrainingArguments") -> str | None:
    """
    Return the checkpoint to resume from, or `None`.

    `resume_from_checkpoint` is the path of a checkpoint, or `last` for the newest one in `output_dir`. With `last`, a run
    that has no checkpoint yet starts from the beginning, so that the same command serves for each restart of a job.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if training_args.resume_from_checkpoint != "last":
        return training_args.resume_from_checkpoint
    return get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None


def train(trainer: "Trainer", script_args: "ScriptArguments") -> None:
    """
    Train, resuming if `resume_from_checkpoint` says so, then save and, with `push_to_hub`, push.
    """
    if script_args.ignore_bias_buffers:
        import torch

        # DDP cannot broadcast boolean buffers, see huggingface/transformers#22482
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]

    trainer.train(resume_from_checkpoint=get_checkpoint(trainer.args))

    trainer.save_model(trainer.args.output_dir)
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # transformers >= 5.18: finishes the trackers and the process group
        trainer.end()
