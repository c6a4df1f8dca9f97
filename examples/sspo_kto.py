# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains a model with SSPOKTOTrainer on responses that are labelled one by one: a script to copy and change. `trl-spo sspo-kto` does
the same without one.

One GPU:

```bash
accelerate launch examples/sspo_kto.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/kto-mix-14k \
    --output_dir Qwen2.5-0.5B-SSPO-KTO
```

Recipe: `--config examples/sspo_kto.yaml`. Several GPUs, with the parameters sharded: `accelerate launch --config_file
trl_spo/accelerate_configs/zero3.yaml --num_processes 8 ...`. After an interruption: `--resume_from_checkpoint last`.

`--dataset_name` is a dataset on the Hub, a folder written by `save_to_disk`, a folder of data files or one such file, with
the columns `prompt`, `completion` and `label` (`true` for a desirable response), or with pairs, which are taken apart. The responses
have to be text: their key phrases are extracted from it. KTO takes the rows in the order of the file: see that those with
both labels are mixed.
"""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_spo import SSPOKTOConfig, SSPOKTOTrainer
from trl_spo.cli.training import get_checkpoint, get_model_init_kwargs, get_splits, load_dataset


def main() -> None:
    parser = TrlParser((ScriptArguments, SSPOKTOConfig, ModelConfig, DatasetMixtureConfig))
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config()

    dataset = load_dataset(script_args, dataset_args)
    train_dataset, eval_dataset = get_splits(dataset, script_args, training_args)

    training_args.model_init_kwargs = get_model_init_kwargs(model_args, training_args)
    trainer = SSPOKTOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    trainer.train(resume_from_checkpoint=get_checkpoint(training_args))

    trainer.save_model(training_args.output_dir)  # the heads too
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()  # finishes the trackers and the process group


if __name__ == "__main__":
    main()
