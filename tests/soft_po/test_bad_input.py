# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""What cannot be trained is refused before it is trained, by an error that names the option, its value and the remedy."""

import math
from dataclasses import fields, replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, ProcessorMixin, TrainerCallback
from trl import DPOConfig

from trl_spo import SoftPOConfig, SoftPOTrainer
from trl_spo.soft_po.checks import check_context
from trl_spo.soft_po.online_kl import OnlineKL
from trl_spo.soft_po.soft_po_config import _DPO_ONLY_OPTIONS


class Refused:
    """Expects an error whose message contains each of the given pieces."""

    def __init__(self, *pieces, error=ValueError):
        self.pieces = pieces
        self.error = error

    def __enter__(self):
        self._context = pytest.raises(self.error)
        self._info = self._context.__enter__()

    def __exit__(self, *exception):
        caught = self._context.__exit__(*exception)
        message = str(self._info.value)
        for piece in self.pieces:
            assert piece in message, f"{piece!r} is not in {message!r}"
        return caught


class TestNumbers:
    @pytest.mark.parametrize(
        ("option", "value", "bound"),
        [
            ("alpha", 0.0, "> 0"),
            ("alpha", -0.1, "> 0"),
            ("alpha", math.inf, "> 0"),
            ("alpha", math.nan, "> 0"),
            ("beta", -0.1, ">= 0"),
            ("beta", math.inf, ">= 0"),
            ("beta", math.nan, ">= 0"),
            ("gamma", -1e-6, ">= 0"),
            ("gamma", math.nan, ">= 0"),
            ("weighting_scale", 0.0, "> 0"),
            ("weighting_scale", -1.0, "> 0"),
            ("resample_steps", 0, ">= 1"),
            ("resample_steps", -8, ">= 1"),
            ("resample_steps", None, ">= 1"),
            ("alpha", None, "> 0"),
            ("online_samples_per_step", 0, ">= 1"),
            ("online_buffer_size", 0, ">= 1"),
            ("online_buffer_size", -8, ">= 1"),
            ("eval_online_samples", 0, ">= 1"),
            ("max_completion_length", 0, ">= 1"),
            ("importance_sampling_cap", 0.0, "> 0"),
            ("importance_sampling_cap", -1.0, "> 0"),
            ("importance_sampling_cap", math.nan, "> 0"),
        ],
    )
    def test_out_of_range(self, make_args, option, value, bound):
        with Refused(f"`{option}` must be finite and {bound}, got {value}: "):
            make_args(**{option: value})

    @pytest.mark.parametrize(
        "option",
        [
            "resample_steps",
            "online_samples_per_step",
            "online_buffer_size",
            "eval_online_samples",
            "max_completion_length",
        ],
    )
    def test_counts_are_whole_numbers(self, make_args, option):
        with Refused(f"`{option}` must be a whole number, got 2.5: "):
            make_args(**{option: 2.5})

    @pytest.mark.parametrize(
        ("option", "remedy"),
        [
            ("alpha", "try values from 0.05 to 0.3"),
            ("beta", "use 0 to switch it off"),
            ("gamma", "use 0 or `weighting='none'`"),
            ("resample_steps", "use 1 for each step"),
            ("online_samples_per_step", "set `beta=0`"),
            ("eval_online_samples", "set `beta=0`"),
            ("importance_sampling_cap", "use `None` for no correction"),
        ],
    )
    def test_remedy(self, make_args, option, remedy):
        with Refused(remedy):
            make_args(**{option: -1})

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"alpha": 1e-3},
            {"beta": 0.0},
            {"gamma": 0.0, "weighting": "power"},
            {"resample_steps": 1},
            {"importance_sampling_cap": 1e-3},
            {"online_samples_per_step": 1, "eval_online_samples": 1, "max_completion_length": 1},
        ],
    )
    def test_on_the_bound(self, make_args, kwargs):
        make_args(**kwargs)

    @pytest.mark.parametrize(("size", "remedy"), [(6, "use 8"), (3, "use 4"), (13, "use 12"), (1, "use 4")])
    def test_buffer_that_the_steps_do_not_divide(self, make_args, size, remedy):
        with Refused(f"`online_buffer_size` ({size})", "multiple of `online_samples_per_step` (4)", remedy):
            make_args(online_samples_per_step=4, online_buffer_size=size)

    def test_default_buffer_size(self, make_args):
        assert make_args(online_samples_per_step=3).online_buffer_size == 3


class TestChoices:
    @pytest.mark.parametrize(
        ("option", "value", "choices"),
        [
            ("weighting", "sigmoidal", ["none", "power", "sigmoid"]),
            ("weighting", None, ["none", "power", "sigmoid"]),
            ("kl_estimator", "k1", ["token", "score"]),
            ("logp_reduction", "avg", ["sum", "mean"]),
            ("calibration", "ref", ["none", "reference"]),
            ("vllm_mode", "local", ["server", "colocate"]),
        ],
    )
    def test_unknown(self, make_args, option, value, choices):
        with Refused(f"`{option}` must be one of {choices}, got {value!r}"):
            make_args(**{option: value})


# Every field that `DPOConfig` adds to `TrainingArguments`, and that Soft PO reads
_READ = {
    "activation_offloading",
    "beta",
    "dataset_num_proc",
    "disable_dropout",
    "learning_rate",
    "max_length",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "pad_token",
    "precompute_ref_batch_size",
    "precompute_ref_log_probs",
    "router_aux_loss_coef",
    "trust_remote_code",
    "truncation_mode",
}


class TestOptionsOfDPO:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("loss_type", "ipo"),
            ("loss_type", ["sigmoid", "sft"]),
            ("loss_weights", [0.5]),
            ("label_smoothing", 0.1),
            ("f_divergence_type", "forward_kl"),
            ("f_alpha_divergence_coef", 0.3),
            ("ld_alpha", 0.5),
            ("use_weighting", True),
            ("discopop_tau", 0.1),
            ("padding_free", True),
        ],
    )
    def test_refused(self, make_args, option, value):
        shown = [value] if option == "loss_type" and isinstance(value, str) else value
        default = getattr(DPOConfig(output_dir="unused", bf16=False, use_cpu=True), option)
        with Refused(
            f"`{option}={shown!r}`", "Soft PO does not read", f"its default ({default!r})", "`trl.DPOTrainer`"
        ):
            make_args(**{option: value})

    @pytest.mark.parametrize(("option", "value"), [("ref_model_mixup_alpha", 0.9), ("ref_model_sync_steps", 64)])
    def test_options_of_a_reference_that_moves(self, make_args, option, value):
        with Refused(f"`{option}={value}`", "does not read"):
            make_args(**{option: value})

    def test_a_reference_that_moves(self, make_args):
        with Refused("`sync_ref_model=True` is not supported", "Set `sync_ref_model=False`"):
            make_args(sync_ref_model=True)

    def test_precompute_without_calibration(self, make_args):
        with Refused(
            "`precompute_ref_log_probs=True` is meaningless with `calibration='none'`", "`calibration='reference'`"
        ):
            make_args(precompute_ref_log_probs=True, calibration="none")

    def test_each_option_of_dpo_is_read_or_refused(self):
        # An option that a new TRL brings must be decided on
        own = {field.name for field in fields(DPOConfig) if field.name in DPOConfig.__annotations__}
        assert own == _READ | set(_DPO_ONLY_OPTIONS) | {"sync_ref_model"}

    def test_config_of_dpo(self, make_args, model_path, pairs, tmp_path):
        args = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
        with Refused("`args` must be a `SoftPOConfig`, got `DPOConfig`", error=TypeError):
            SoftPOTrainer(model=model_path, args=args, train_dataset=pairs)


class TestSampling:
    @pytest.mark.parametrize(
        ("option", "value", "neutral"),
        [
            ("temperature", 0.7, "1.0"),
            ("temperature", 0.0, "1.0"),
            ("top_p", 0.9, "1.0"),
            ("top_k", 50, "0"),
            ("min_p", 0.05, "0.0"),
            ("repetition_penalty", 1.1, "1.0"),
        ],
    )
    @pytest.mark.parametrize("through_kwargs", [False, True])
    def test_refused(self, make_args, option, value, neutral, through_kwargs):
        kwargs = {"generation_kwargs": {option: value}} if through_kwargs else {option: value}
        with Refused(f"`{option}={value}` is not supported", "another divergence", f"Set `{option}={neutral}`"):
            make_args(**kwargs)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("do_sample", False),
            ("num_beams", 4),
            ("typical_p", 0.9),
            ("frequency_penalty", 0.5),
            ("presence_penalty", 1.0),
        ],
    )
    def test_refused_in_generation_kwargs(self, make_args, option, value):
        with Refused(f"`{option}={value}` is not supported", "another divergence"):
            make_args(generation_kwargs={option: value})

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("suppress_tokens", [3]),
            ("bad_words_ids", [[3]]),
            ("no_repeat_ngram_size", 2),
            ("logit_bias", {3: 1.0}),
            ("epsilon_cutoff", 0.1),
            ("min_new_tokens", 4),
            ("max_new_tokens", 4),
            ("guidance_scale", 2.0),
            ("seed", 3),  # would make the draws of one resampling those of the others
        ],
    )
    def test_unknown_generation_kwargs(self, make_args, option, value):
        with Refused(f"`generation_kwargs` has `{option}={value!r}`", "Remove it", "use_cache"):
            make_args(generation_kwargs={option: value})

    def test_those_of_vllm(self, make_args):
        neutral = {"temperature": 1.0, "num_beams": 1}
        args = make_args(use_vllm=True, generation_kwargs={"skip_special_tokens": False, **neutral})
        assert args.generation_kwargs == {"skip_special_tokens": False}
        assert make_args(use_vllm=True, generation_kwargs=neutral).generation_kwargs is None
        with Refused("`generation_kwargs` has `use_cache=True`", "skip_special_tokens"):
            make_args(use_vllm=True, generation_kwargs={"use_cache": True})
        with Refused("`generation_kwargs` has `detokenize=False`", "use_cache"):
            make_args(generation_kwargs={"detokenize": False})

    def test_refused_in_json(self, make_args):
        # As it comes from the command line
        with Refused("`temperature=0.5` is not supported"):
            make_args(generation_kwargs='{"temperature": 0.5}')

    @pytest.mark.parametrize("option", ["top_k", "min_p"])
    def test_neutral_in_another_spelling(self, make_args, option):
        make_args(**{option: None})

    @pytest.mark.parametrize(
        "generation_kwargs",
        [
            {"temperature": 1.0},
            {"top_k": 0},
            {"top_k": -1},
            {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "typical_p": 1.0},
            {"do_sample": True, "num_beams": 1},
            {"use_cache": False},
            {"disable_compile": True},
        ],
    )
    def test_what_is_accepted_also_trains(self, make_trainer, generation_kwargs):
        make_trainer(generation_kwargs=generation_kwargs, max_steps=1).train()


def rows(n=3, **columns):
    return Dataset.from_dict({name: [value] * n for name, value in columns.items()})


PAIR = {"prompt": "the film", "chosen": " was good", "rejected": " was bad"}


def stream(dataset):
    return IterableDataset.from_generator(lambda: iter(dataset.to_list()))


class TestEmptyDatasets:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("name", ["train", "eval", "regularization"])
    def test_empty(self, make_trainer, name, streaming):
        empty = IterableDataset.from_generator(lambda: iter(())) if streaming else rows(0, **PAIR)
        with Refused(f"The {name} dataset is empty", "at least one row"):
            make_trainer({f"{name}_dataset": empty})

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("name", ["train", "eval", "regularization"])
    def test_empty_after_dropping(self, make_trainer, name, streaming):
        # The prompt has three tokens with BOS, so it leaves no room for a completion
        dataset = rows(**PAIR)
        with Refused(f"The {name} dataset is empty after dropping", "`max_length=3`", "Set a larger `max_length`"):
            make_trainer(
                {
                    "train_dataset": rows(prompt="", chosen=" good", rejected=" bad"),
                    f"{name}_dataset": stream(dataset) if streaming else dataset,
                },
                max_length=3,
            )

    def test_empty_lists_after_dropping(self, make_trainer, lists):
        with Refused("The train dataset is empty after dropping", "`max_length=2`"):
            make_trainer({"train_dataset": lists}, max_length=2)

    @pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
    def test_kept_with_keep_end(self, make_trainer):
        make_trainer({"train_dataset": rows(**PAIR)}, max_length=3, truncation_mode="keep_end", max_steps=1).train()

    def test_missing(self, make_trainer):
        with Refused("`train_dataset` is required"):
            make_trainer({"train_dataset": None})


class TestColumns:
    @pytest.mark.parametrize("missing", ["chosen", "rejected"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_pairs(self, make_trainer, missing, streaming):
        dataset = rows(**{name: value for name, value in PAIR.items() if name != missing})
        with Refused(f"The train dataset lacks the columns ['{missing}']", "Pass pairs"):
            make_trainer({"train_dataset": stream(dataset) if streaming else dataset})

    def test_neither_pairs_nor_lists(self, make_trainer):
        with Refused("lacks the columns ['chosen', 'rejected']", "['completion', 'prompt']"):
            make_trainer({"train_dataset": rows(prompt="a", completion="b")})

    def test_names_the_dataset(self, make_trainer):
        with Refused("The eval dataset lacks the columns ['rejected']"):
            make_trainer({"eval_dataset": rows(prompt="a", chosen="b")})
        with Refused("The held_out dataset lacks the columns ['rejected']"):
            make_trainer({"eval_dataset": {"held_out": rows(prompt="a", chosen="b")}})

    def test_lists_without_prompt(self, make_trainer):
        with Refused("needs `prompt` and exactly one of ['best', 'ranking', 'scores']"):
            make_trainer({"train_dataset": rows(completions=[" a", " b"], best=0)})

    def test_lists_without_order(self, make_trainer):
        with Refused("exactly one of ['best', 'ranking', 'scores']", "['completions', 'prompt']"):
            make_trainer({"train_dataset": rows(prompt="a", completions=[" a", " b"])})

    def test_lists_with_two_orders(self, make_trainer):
        with Refused("exactly one of", "Add or remove columns"):
            make_trainer({"train_dataset": rows(prompt="a", completions=[" a", " b"], best=0, ranking=[0, 1])})

    def test_regularization_without_prompt(self, make_trainer):
        with Refused("`regularization_dataset` needs a `prompt` column", "['text']"):
            make_trainer({"regularization_dataset": rows(text="a")})

    def test_regularization_without_regularizer(self, make_trainer):
        with Refused("`regularization_dataset` is given but `beta=0`", "Set `beta`"):
            make_trainer({"regularization_dataset": rows(prompt="a")}, beta=0)


GOOD_LIST = {"prompt": "a", "completions": [" a", " b", " c"], "ranking": [1, 0, 2]}


class TestRows:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("bad", "message", "remedy"),
        [
            ({"completions": [" a"], "ranking": [0]}, "it has 1 completions", "remove the row"),
            ({"completions": [], "ranking": []}, "it has 0 completions", "remove the row"),
            ({"completions": [" a", " b", ""]}, "one of its `completions` is empty", "Remove the completion"),
            ({"completions": None}, "it has 0 completions", "remove the row"),
            ({"ranking": [0, 1]}, "`ranking=[0, 1]` is not a permutation", "0 to 2, best first"),
            ({"ranking": [1, 2, 3]}, "`ranking=[1, 2, 3]` is not a permutation", "0 to 2, best first"),
            ({"ranking": [0, 0, 1]}, "`ranking=[0, 0, 1]` is not a permutation", "0 to 2, best first"),
            ({"ranking": None}, "its `ranking` is missing", "Remove the row"),
        ],
    )
    def test_lists(self, make_trainer, bad, message, remedy, streaming):
        data = [GOOD_LIST, {**GOOD_LIST, **bad}]
        if streaming:
            trainer = make_trainer({"train_dataset": IterableDataset.from_generator(lambda: iter(data))})
            with Refused("A row of the train dataset cannot be used: ", message, remedy):
                trainer.train()
        else:
            with Refused("Row 1 of the train dataset cannot be used: ", message, remedy):
                make_trainer({"train_dataset": Dataset.from_list(data)})

    @pytest.mark.parametrize("best", [-1, 3, 0.5, None, math.nan])
    def test_best(self, make_trainer, best):
        data = [{"prompt": "a", "completions": [" a", " b", " c"], "best": best} for best in (0, best)]
        with Refused("Row 1 of the train dataset", "`best" if best is None else f"`best={best}`"):
            make_trainer({"train_dataset": Dataset.from_list(data)})

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([1.0, math.nan, 0.0], "`scores=[1.0, nan, 0.0]` are not all finite"),
            ([1.0, math.inf, 0.0], "`scores=[1.0, inf, 0.0]` are not all finite"),
            ([1.0, None, 0.0], "are not all finite"),
            ([1.0, 0.0], "3 completions and 2 `scores`"),
            ([1.0, 1.0, 1.0], "`scores` are all 1.0, so that nothing is preferred"),
            (None, "its `scores` is missing"),
        ],
    )
    def test_scores(self, make_trainer, scores, message):
        data = [{"prompt": "a", "completions": [" a", " b", " c"], "scores": s} for s in ([3.0, 2.0, 1.0], scores)]
        with Refused("Row 1 of the train dataset", message):
            make_trainer({"train_dataset": Dataset.from_list(data)})

    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    @pytest.mark.parametrize("empty", ["", None])
    def test_empty_response(self, make_trainer, column, empty):
        with Refused("Row 1 of the train dataset", f"its `{column}` is empty", "Remove the row"):
            make_trainer({"train_dataset": Dataset.from_list([PAIR, {**PAIR, column: empty}])})

    @pytest.mark.parametrize("empty", [[], [{"role": "assistant", "content": ""}]])
    def test_empty_conversational_response(self, make_trainer, conversations, empty):
        data = conversations.to_list()
        data[2]["rejected"] = empty
        with Refused("Row 2 of the train dataset", "its `rejected` is empty"):
            make_trainer({"train_dataset": Dataset.from_list(data)})

    def test_empty_response_with_implicit_prompt(self, make_trainer, conversations):
        data = [
            {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
            for row in conversations.to_list()
        ]
        data[1]["chosen"][-1]["content"] = ""
        with Refused("Row 1 of the train dataset", "its `chosen` is empty"):
            make_trainer({"train_dataset": Dataset.from_list(data)})

    def test_bad_row_of_a_list_is_found_in_the_eval_dataset(self, make_trainer, lists):
        bad = lists.add_column("index", range(4)).map(lambda row: {"best": 9 if row["index"] == 3 else row["best"]})
        with Refused("Row 3 of the eval dataset", "`best=9`", "Use 0 to 2"):
            make_trainer({"train_dataset": lists, "eval_dataset": bad})


class TestPromptsWithoutTokens:
    @pytest.fixture
    def without_bos(self, tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        return tokenizer

    def test_refused(self, make_trainer, without_bos):
        dataset = Dataset.from_list([PAIR, {**PAIR, "prompt": ""}])
        with Refused("The prompt of row 1 has no tokens", "adds a BOS token, or set `beta=0`"):
            make_trainer({"train_dataset": dataset, "processing_class": without_bos})
        with Refused("The prompt of row 1 has no tokens"):
            make_trainer({"regularization_dataset": dataset, "processing_class": without_bos})

    def test_nothing_to_sample(self, make_trainer, without_bos):
        dataset = Dataset.from_list([PAIR, {**PAIR, "prompt": ""}])
        make_trainer({"train_dataset": dataset, "processing_class": without_bos}, beta=0.0).train()

    def test_with_bos(self, make_trainer):
        make_trainer({"train_dataset": Dataset.from_list([PAIR, {**PAIR, "prompt": ""}])}).train()


class TestIdenticalResponses:
    def test_in_every_row(self, make_trainer):
        with Refused("`chosen` and `rejected` are identical in every row of the train dataset", "Check how"):
            make_trainer({"train_dataset": rows(prompt="a", chosen=" b", rejected=" b")})

    def test_in_some_rows(self, make_trainer, pairs, caplog):
        data = pairs.to_list()
        for i in (2, 5):
            data[i]["rejected"] = data[i]["chosen"]
        make_trainer({"train_dataset": Dataset.from_list(data)})
        assert "identical in 2 of the 8 rows of the train dataset (25.0%)" in caplog.text

    def test_in_no_row(self, make_trainer, caplog):
        make_trainer()
        assert "identical" not in caplog.text


class TestModels:
    def test_reference_with_another_vocabulary(self, make_trainer, tokenizer):
        reference = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=77
            )
        )
        with Refused(
            "`ref_model` has a vocabulary of 77 tokens", f"`model` one of {len(tokenizer)}", "Pass a `ref_model`"
        ):
            make_trainer({"ref_model": reference})

    def test_reference_that_is_the_model(self, make_trainer, model):
        with Refused("`model` and `ref_model` cannot be the same object"):
            make_trainer({"model": model, "ref_model": model})

    def test_reference_that_nothing_reads(self, make_trainer, model_path, load_model):
        with Refused("`ref_model` is given", "`beta=0` and `calibration='none'`", "Leave it out, or set `beta`"):
            make_trainer({"ref_model": load_model(model_path)}, beta=0.0, calibration="none")

    def test_adapter_on_the_head(self, make_trainer):
        config = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        with Refused("PEFT adapter to `lm_head` is not supported", "Remove `'lm_head'` from your `target_modules`"):
            make_trainer({"peft_config": config})

    @pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
    def test_prompt_learning(self, make_trainer, config):
        config = config(task_type="CAUSAL_LM", num_virtual_tokens=2)
        name = config.peft_type.value
        with Refused("`beta=0.1` is not supported", name, "Use LoRA, or set `beta=0`"):
            make_trainer({"peft_config": config}, beta=0.1)

    def test_prompt_learning_without_the_regularizer(self, make_trainer, train_log):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        log = train_log(make_trainer({"peft_config": config}, beta=0.0))
        assert log[0]["rewards/chosen"] != 0  # the reference is the model without the learned prompt

    def test_context_too_short(self, make_trainer):
        with Refused("`max_completion_length=124`", "context of 128 tokens", "at most 119"):
            make_trainer(max_completion_length=124)

    @pytest.mark.parametrize(
        ("lengths", "way_out"),
        [
            (
                [5, 30],
                "set `max_completion_length` to at most 98, or remove the 1 of 2 prompts that have more than 28 tokens.",
            ),
            ([29, 30], "To go on, set `max_completion_length` to at most 98."),  # to remove both leaves none
            ([5, 128], "To go on, remove the 1 of 2 prompts that have more than 28 tokens."),  # no length leaves room
            ([29, 128], "To go on, remove the longest prompts and set a smaller `max_completion_length`."),
        ],
    )
    def test_what_is_advised_helps(self, tmp_path, lengths, way_out):
        dataset = Dataset.from_dict({"prompt_ids": [[4] * length for length in lengths], "row_id": [0, 1]})
        args = SoftPOConfig(str(tmp_path), max_completion_length=100, bf16=False, use_cpu=True)
        with Refused(f"The longest prompt ({lengths[1]} tokens) and `max_completion_length=100`", way_out):
            check_context(dataset, LlamaConfig(max_position_embeddings=128), args)


class _Processor(ProcessorMixin):
    attributes = []

    def __init__(self):
        pass


class TestVision:
    def test_processor(self, make_trainer):
        with Refused("trains text models", "`processing_class` is a `_Processor`", "`trl.DPOTrainer`"):
            make_trainer({"processing_class": _Processor()})

    @pytest.mark.parametrize("column", ["image", "images"])
    def test_dataset(self, make_trainer, column):
        with Refused("trains text models", f"the train dataset has the columns ['{column}']"):
            make_trainer({"train_dataset": rows(**PAIR, **{column: [0]})})


class TestPrecompute:
    def test_lists(self, make_trainer, lists):
        with Refused("`precompute_ref_log_probs=True` supports pairs only", "Set `precompute_ref_log_probs=False`"):
            make_trainer({"train_dataset": lists}, precompute_ref_log_probs=True)

    def test_lists_in_the_eval_dataset(self, make_trainer, lists):
        with Refused("`precompute_ref_log_probs=True` supports pairs only", "the eval dataset"):
            make_trainer({"eval_dataset": lists}, precompute_ref_log_probs=True)

    def test_stream(self, make_trainer, pairs):
        with Refused("`precompute_ref_log_probs=True` is not supported with IterableDataset"):
            make_trainer({"train_dataset": stream(pairs)}, precompute_ref_log_probs=True)


class _SetWeights(TrainerCallback):
    """Spoils the model after the first step."""

    def __init__(self, value):
        self.value = value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.get_output_embeddings().weight.fill_(self.value)


class TestNonFinite:
    """Stops with the step, the rows and what to try."""

    def test_loss(self, make_trainer):
        trainer = make_trainer({"callbacks": [_SetWeights(math.nan)]}, beta=0.0, max_steps=3, data_seed=0)
        with Refused(
            "The loss is not finite at step 1", "rows [", "Try a smaller `learning_rate`", error=FloatingPointError
        ):
            trainer.train()
        assert trainer.state.global_step == 1

    def test_names_the_rows_of_the_batch(self, make_trainer, pairs):
        seen = []
        trainer = make_trainer({"callbacks": [_SetWeights(math.nan)]}, beta=0.0, per_device_train_batch_size=2)
        collate = trainer.data_collator

        def watch(examples):
            seen.append([example["row_id"] for example in examples])
            return collate(examples)

        trainer.data_collator = watch
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        assert f"on the rows {seen[1]} of the dataset" in str(error.value)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_kl(self, make_trainer, value, monkeypatch):
        trainer = make_trainer(beta=0.1, resample_steps=8, max_steps=3)
        measure = OnlineKL.__call__

        def spoilt(self, model, samples):
            output = measure(self, model, samples)
            return replace(output, loss=output.loss * (value if trainer.state.global_step == 1 else 1.0))

        monkeypatch.setattr(OnlineKL, "__call__", spoilt)
        with Refused(
            "The KL of the online samples is not finite at step 1", "rows [", "learning_rate", error=FloatingPointError
        ):
            trainer.train()

    def test_while_sampling(self, make_trainer):
        # Samples are due when the weights are spoilt already
        trainer = make_trainer({"callbacks": [_SetWeights(math.nan)]}, beta=0.1, resample_steps=1, max_steps=3)
        with Refused("is not finite at step 1", "rows [", "learning_rate", error=FloatingPointError):
            trainer.train()

    @pytest.mark.parametrize("beta", [0.0, 0.1])
    @pytest.mark.parametrize("resample_steps", [1, 8])
    def test_exploding_learning_rate(self, make_trainer, beta, resample_steps):
        trainer = make_trainer(learning_rate=1e30, beta=beta, resample_steps=resample_steps, max_steps=5)
        with Refused("is not finite at step 1", "rows [", error=FloatingPointError):
            trainer.train()

    def test_config_is_a_softpo_config(self):
        # `_check_finite` speaks of these options
        assert {"learning_rate", "max_grad_norm", "bf16", "fp16"} <= {field.name for field in fields(SoftPOConfig)}
