# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What SSPOTrainer and SSPOKTOTrainer share: all of it besides the losses that they align with."""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import HubStrategy, get_last_checkpoint

from .. import losses
from ..metrics import MetricTotals
from ..model_card import save_model_card
from .degree_data import DegreeCollator, draw_levels, map_degrees
from .degree_heads import ATTRIBUTE, CONFIG_FILE, WEIGHTS_FILE, DegreeHeads, add_degree_heads


logger = get_logger(__name__)


def check_texts(dataset: Dataset | IterableDataset | None, name: str, args: Any) -> None:
    """Raises a `ValueError` if there is no text to extract key content from."""
    if not isinstance(dataset, Dataset | IterableDataset) or not args.trains_heads:
        return
    columns = set(next(iter(dataset), {}))
    if {"image", "images"} & columns:
        raise ValueError(
            f"The {name} dataset has images, and the key content of a response is extracted before the training, which is not "
            "possible for vision datasets. Remove the images, or use the trainer of TRL."
        )
    texts = {"chosen", "rejected", "completion"}
    if columns and not texts & columns and {f"{text}_ids" for text in texts} & columns:
        raise ValueError(
            f"The {name} dataset has token ids only ({sorted(columns)}), and the key content is extracted from the text. Pass the "
            "text, and let the trainer tokenize it."
        )


class PolicyWithDegrees:
    """The policy as the parent's loss calls it, which asks for the degrees on the way and keeps them."""

    def __init__(self, model: nn.Module, degree_inputs: dict[str, torch.Tensor]):
        self.model = model
        self.degree_inputs = degree_inputs
        self.degree_logits: torch.Tensor | None = None

    def __call__(self, **kwargs):
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        outputs = self.model(**kwargs, degree_inputs=self.degree_inputs)
        self.degree_logits = outputs.degree_logits
        return outputs


class DegreeMixin:
    """Degree heads for a preference trainer of TRL, which says two things of its batches."""

    _columns: Sequence[str]  # of the responses, in the order of a batch's rows
    _is_chosen: Callable[[dict[str, Any]], torch.Tensor]  # which rows are chosen, or desirable, of shape (R,)

    def _init_degrees(self) -> None:
        """At the end of the constructor."""
        args = self.args
        self._totals = {"train": MetricTotals(), "eval": MetricTotals()}
        self._eval_prefix = "eval"
        self.degree_heads: DegreeHeads | None = None
        if not args.trains_heads:
            return
        self._check_setup()
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        size = getattr(base.get_output_embeddings(), "in_features", base.config.get_text_config().hidden_size)
        # With draws of its own, so that all others are those of the parent
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(args.seed)
            heads = DegreeHeads(size, args.num_degrees, args.head_hidden_size, args.shared_head)
        # Sharded parameters are of one precision; otherwise the heads, new and small, are trained in full precision
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            heads.to(next(p.dtype for p in self.model.parameters() if p.requires_grad))
        for head, weight in ((heads.chosen, args.chosen_weight), (heads.rejected, args.rejected_weight)):
            if head is not None and weight == 0 and not args.shared_head:
                head.requires_grad_(False)
        self.degree_heads = heads.to(base.get_output_embeddings().weight.device)
        add_degree_heads(base, heads, args.removal)
        truncation_mode = getattr(args, "truncation_mode", "keep_start")
        self.data_collator = DegreeCollator(self.data_collator, self._columns, truncation_mode)

    def _check_setup(self) -> None:
        args = self.args
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "`fsdp_version: 1` is not supported with the degree heads, which it flattens together with the model. Set "
                "`fsdp_version: 2` in the accelerate config, as `--accelerate_config fsdp2` does."
            )
        for name, what in (
            ("cp_size", "it splits the sequences that the degree heads take the mean of"),
            ("sp_size", "it splits the sequences that the degree heads take the mean of"),
            ("tp_size", "it splits the model, and the degree heads are whole"),
        ):
            size = getattr(self.accelerator.parallelism_config, name, 1)
            if size > 1:
                raise ValueError(
                    f"`{name}={size}` is not supported: {what}. Use data parallelism, DeepSpeed ZeRO or FSDP version 2."
                )
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        for name, option in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
            if plugin is not None and name in plugin.deepspeed_config:
                raise ValueError(
                    f"The DeepSpeed config has a section `{name}`, whose learning rate would be that of the degree heads too, and not "
                    f"`head_learning_rate={args.head_learning_rate}`. Remove it from the DeepSpeed config, and set `{option}`."
                )
        if is_peft_model(self.model) and getattr(self.model.active_peft_config, "bias", "none") == "all":
            raise ValueError(
                "`bias='all'` in the PEFT config is not supported: PEFT would write the degree heads' biases into the adapter's file. "
                "Set `bias='none'` or `bias='lora_only'`."
            )
        if self.lr_scheduler is not None:
            raise ValueError(
                "`optimizers` has a scheduler, which knows the optimizer's groups of parameters and not that of the degree heads, "
                "which is added to them. Pass `optimizers=(optimizer, None)`, and set `lr_scheduler_type`."
            )
        spread = self.is_deepspeed_enabled or self.accelerator.num_processes > 1
        reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if args.removal == "text" and reentrant and spread:
            raise ValueError(
                "`removal='text'` runs the model twice before each backward pass, and the gradients of reentrant gradient "
                "checkpointing then come in twice, which DDP and DeepSpeed do not admit. Set `use_reentrant` to `False` in "
                "`gradient_checkpointing_kwargs`. With PEFT and ZeRO-3, where TRL sets it to `True`, use ZeRO-2, "
                "`gradient_checkpointing=False` or `removal='hidden_states'`."
            )
        if args.removal == "text" and is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "`removal='text'` is not supported with prompt-learning PEFT, whose virtual tokens the shortened texts would not "
                "have. Use `removal='hidden_states'`, or LoRA."
            )

    # Data

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if not args.trains_heads:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"`{type(self._tokenizer).__name__}` is not a fast tokenizer, and only those know the places of their tokens in the "
                "text. Convert it to a fast one, or set `chosen_weight=0` and `rejected_weight=0`."
            )
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if next(iter(dataset), None) is None:
            raise ValueError(
                f"The {dataset_name} dataset is empty after dropping the prompts that fill `max_length={args.max_length}`. Set a "
                "larger `max_length`."
            )
        dataset = map_degrees(
            dataset,
            dataset_name,
            args.dataset_num_proc,
            tokenizer=self._tokenizer,
            columns=self._columns,
            num_degrees=args.num_degrees,
            extractor=args.extractor,
            language=args.language,
            stop_words=args.stop_words,
            seed=args.seed,
        )
        if isinstance(dataset, Dataset):
            empty = sum(count == 0 for column in self._columns for count in dataset[f"{column}_key_tokens"])
            responses = len(self._columns) * len(dataset)
            if empty > 0:
                logger.warning(
                    f"{empty} of the {responses} responses of the {dataset_name} dataset ({empty / responses:.1%}) have no key "
                    f"content with `extractor={args.extractor!r}` and `language={args.language!r}`: they take part in the alignment "
                    "loss only."
                )
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        new = [f"{column}_degrees" for column in self._columns]
        self._signature_columns += [name for name in new if name not in self._signature_columns]

    # Loss

    def _compute_loss(self, model, inputs, return_outputs):
        if self.degree_heads is None:
            return super()._compute_loss(model, inputs, return_outputs)
        args, mode = self.args, "train" if self.model.training else "eval"
        token_degrees = inputs["token_degrees"]
        inputs = {name: value for name, value in inputs.items() if name != "token_degrees"}  # unknown to the model
        mask, is_chosen = inputs["completion_mask"], self._is_chosen(inputs)
        if mode == "train" and args.degree_sampling == "one":
            levels = draw_levels(
                inputs["input_ids"], inputs["attention_mask"], args.num_degrees, args.seed, self.state.global_step
            )
        else:
            levels = torch.arange(args.num_degrees, device=mask.device).expand(len(mask), -1)
        policy = PolicyWithDegrees(
            model,
            {
                "input_ids": inputs["input_ids"],
                "attention_mask": inputs["attention_mask"],
                "completion_mask": mask,
                "token_degrees": token_degrees,
                "levels": levels,
                "is_chosen": is_chosen,
            },
        )
        result = super()._compute_loss(policy, inputs, return_outputs)
        alignment, outputs = result if return_outputs else (result, None)

        is_key = (token_degrees > 0) & mask.bool()
        degree = losses.degree_loss(policy.degree_logits, levels)
        weights = torch.where(is_chosen, args.chosen_weight, args.rejected_weight) * is_key.any(dim=1)
        # The mean over the examples of the batch, whether or not they have key content, so that accumulation and processes add up
        loss = alignment + (weights * degree).sum() / (len(mask) // len(self._columns))
        self._add_degree_metrics(mode, alignment, policy.degree_logits, levels, degree, is_chosen, is_key, mask)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _add_degree_metrics(self, mode, alignment, logits, levels, degree, is_chosen, is_key, mask) -> None:
        n = self.args.num_degrees
        seen = nn.functional.one_hot(levels, n)  # (R, K, N)
        hits = seen * (logits.argmax(dim=2) == levels).unsqueeze(2)
        columns = [
            alignment.expand(len(mask)),
            degree,
            is_chosen,
            is_key.any(dim=1),
            is_key.sum(dim=1),
            mask.sum(dim=1),
        ]
        table = torch.cat([torch.stack([c.float() for c in columns], dim=1), seen.sum(1), hits.sum(1)], dim=1)
        # By example, since that is what the last batch of an evaluation, padded with others, is cut to
        table = torch.stack(table.chunk(len(self._columns)), dim=1)
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        table = gather(table.contiguous()).flatten(0, 1).cpu()
        totals = self._totals[mode]
        totals.add("loss/alignment", table[:, 0])
        totals.add("degree/key_share", table[:, 4], table[:, 5])
        totals.add("degree/empty", 1 - table[:, 3])
        for name, of_head, weight in (
            ("chosen", table[:, 2] == 1, self.args.chosen_weight),
            ("rejected", table[:, 2] == 0, self.args.rejected_weight),
        ):
            rows = table[of_head & (table[:, 3] == 1)]
            if weight == 0 or len(rows) == 0:
                continue
            seen, hits = rows[:, 6 : 6 + n], rows[:, 6 + n :]
            totals.add(f"loss/degree_{name}", rows[:, 1])
            totals.add(f"degree/{name}_accuracy", hits, seen)
            for level in range(n):
                totals.add(f"degree/{name}_recall_{level}", hits[:, level], seen[:, level])

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._eval_prefix = metric_key_prefix
        self._totals["eval"] = MetricTotals()
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", f"{self._eval_prefix}_")
        logs.update({prefix + name: value for name, value in self._totals[mode].pop().items()})
        super().log(logs, start_time)

    # Optimizer

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        heads = {id(p): p for name, p in named if f"{ATTRIBUTE}." in name and p.requires_grad}
        if not heads or any({id(p) for p in group["params"]} == heads.keys() for group in optimizer.param_groups):
            return optimizer
        for group in optimizer.param_groups:  # in which the parent has put them
            group["params"] = [p for p in group["params"] if id(p) not in heads]
        optimizer.add_param_group(
            {
                "params": list(heads.values()),
                "lr": self.args.head_learning_rate,
                "weight_decay": self.args.head_weight_decay,
            }
        )
        return optimizer

    # Files

    def _gathered_heads(self) -> dict[str, torch.Tensor]:
        """The weights of the heads, on every process that asks; all of them must."""
        parameters = dict(self.degree_heads.named_parameters())
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(parameters.values())):
                return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        return {
            name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def _load_heads(self, folder: str) -> None:
        saved = DegreeHeads.from_pretrained(folder)
        if saved.config != self.degree_heads.config:
            differs = [name for name, value in saved.config.items() if value != self.degree_heads.config[name]]
            raise ValueError(
                f"The degree heads in {folder} were made with "
                + ", ".join(f"`{name}={saved.config[name]}`" for name in differs)
                + ", and now "
                + ", ".join(f"`{name}={self.degree_heads.config[name]}`" for name in differs)
                + ". Resume with the options and the model of the run that wrote it."
            )
        values = saved.state_dict()
        for name, parameter in self.degree_heads.named_parameters():
            if hasattr(parameter, "ds_id"):  # of ZeRO-3, whose engine has restored it
                continue
            value = values[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if self.degree_heads is not None and resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)
            if folder is not None and os.path.isdir(folder):  # else the parent says what is wrong
                for name in (CONFIG_FILE, WEIGHTS_FILE):
                    if not os.path.isfile(os.path.join(folder, name)):
                        raise ValueError(
                            f"{folder} has no {name}, so that the degree heads cannot be resumed: it was not written by this trainer, "
                            "or with `chosen_weight=0` and `rejected_weight=0`. Pass a checkpoint of the same kind of run, or start "
                            "a new run from its model."
                        )
                # Before anything is sharded. DeepSpeed's engine brings its own copy, in full precision, afterwards
                self._load_heads(folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self):
        super()._load_best_model()
        if self.degree_heads is not None and not self.is_deepspeed_enabled:
            self._load_heads(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if self.degree_heads is not None:
            weights = self._gathered_heads()
            if self.args.should_save:  # before the parent, which may push the folder
                self.degree_heads.save_pretrained(output_dir or self.args.output_dir, weights)
        super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # The parent copies the files that it knows from the checkpoint into the folder that it pushes
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if self.degree_heads is not None and pushes:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copy(os.path.join(checkpoint_folder, name), os.path.join(self.args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        settings = ("loss_type", "beta", "num_degrees", "chosen_weight", "rejected_weight", "degree_sampling")
        settings += ("removal", "extractor", "language", "shared_head")
        save_model_card(self, model_name, dataset_name, tags, {name: getattr(self.args, name) for name in settings})
