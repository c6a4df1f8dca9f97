# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
`trl-spo sspo-kto`: trains with SSPOKTOTrainer, on responses with a label each. Takes every field of SSPOKTOConfig, of TRL's
ScriptArguments, ModelConfig and DatasetMixtureConfig, and a YAML file of them.

    trl-spo sspo-kto --config examples/sspo_kto.yaml --accelerate_config zero3 --num_processes 2

What runs in each process is `main`, below; `examples/sspo_kto.py` is the same as a script to copy and change.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_spo import SSPOKTOConfig


def make_parser(prog: str | None = None) -> "TrlParser":
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_spo import SSPOKTOConfig

    return TrlParser((ScriptArguments, SSPOKTOConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


def main(
    script_args: "ScriptArguments",
    training_args: "SSPOKTOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    from trl import get_peft_config, get_quantization_config

    from trl_spo import SSPOKTOTrainer

    from .training import get_model_init_kwargs, get_splits, load_dataset, train

    training_args.model_init_kwargs = get_model_init_kwargs(model_args, training_args)
    train_dataset, eval_dataset = get_splits(load_dataset(script_args, dataset_args), script_args, training_args)
    trainer = SSPOKTOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    train(trainer, script_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
