# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
`trl-spo stable-po`: trains with StablePOTrainer. Takes every field of StablePOConfig, of TRL's ScriptArguments, ModelConfig
and DatasetMixtureConfig, and a YAML file of them; and `--sft_dataset_name`, the data of the lower level.

    trl-spo stable-po --config examples/stable_po.yaml --accelerate_config zero3 --num_processes 2

What runs in each process is `main`, below; `examples/stable_po.py` is the same as a script to copy and change.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl import ScriptArguments


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_spo import StablePOConfig


@dataclass
class StablePOScriptArguments(ScriptArguments):
    """
    Those of TRL, and the data of the lower level.

    Args:
        sft_dataset_name (`str`, *optional*):
            Dataset for the lower level: what `dataset_name` may be. Defaults to the chosen responses.
        sft_dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Its split.
    """

    sft_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset for the lower level. Defaults to the chosen responses."}
    )
    sft_dataset_train_split: str = field(default="train", metadata={"help": "Split of `sft_dataset_name`."})


def make_parser(prog: str | None = None) -> "TrlParser":
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_spo import StablePOConfig

    return TrlParser((StablePOScriptArguments, StablePOConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


def main(
    script_args: StablePOScriptArguments,
    training_args: "StablePOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    from trl import get_peft_config, get_quantization_config

    from trl_spo import StablePOTrainer

    from .training import get_model_init_kwargs, get_sft_dataset, get_splits, load_dataset, train

    training_args.model_init_kwargs = get_model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = get_splits(load_dataset(script_args, dataset_args), script_args, training_args)
    trainer = StablePOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        sft_dataset=get_sft_dataset(script_args),
    )
    train(trainer, script_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
