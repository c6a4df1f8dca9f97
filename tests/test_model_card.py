# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card that is saved with each checkpoint and pushed to the Hub."""

import os
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig


@pytest.fixture
def card_of(tmp_path):
    def card(trainer, **kwargs):
        os.makedirs(trainer.args.output_dir, exist_ok=True)
        trainer.create_model_card(**kwargs)
        return ModelCard.load(Path(trainer.args.output_dir, "README.md"))

    return card


class TestModelCard:
    def test_metadata(self, make_trainer, card_of):
        card = card_of(make_trainer(), model_name="my-model", dataset_name="trl-lib/some-pairs", tags=["mine", "dpo"])
        data = card.data.to_dict()
        assert data["model_name"] == "my-model"
        assert data["library_name"] == "transformers"
        assert data["datasets"] == "trl-lib/some-pairs"
        assert data["tags"] == ["generated_from_trainer", "trl", "dpo", "trl-spo", "soft-po", "mine"]
        assert "base_model" not in data  # a folder on this machine is of no use to others

    def test_one_tag(self, make_trainer, card_of):
        assert card_of(make_trainer(), tags="mine").data.tags[-1] == "mine"

    def test_method_and_citations(self, make_trainer, card_of):
        text = card_of(make_trainer()).text
        assert "Soft PO" in text and "`SoftPOTrainer`" in text
        assert "https://huggingface.co/papers/2405.00747" in text
        assert "@article{sharifnassab2024soft," in text and "arXiv:2405.00747" in text
        assert "@software{vonwerra2020trl," in text

    def test_settings(self, make_trainer, card_of):
        trainer = make_trainer(
            alpha=0.25,
            beta=0.075,
            resample_steps=3,
            calibration="none",
            weighting="power",
            gamma=0.02,
            kl_estimator="score",
        )
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", card_of(trainer).text, re.M))
        assert rows == {
            "alpha": "0.25",
            "beta": "0.075",
            "calibration": "none",
            "logp_reduction": "sum",
            "weighting": "power",
            "gamma": "0.02",
            "kl_estimator": "score",
            "resample_steps": "3",
            "online_samples_per_step": "4",
            "online_buffer_size": "4",
            "max_completion_length": "6",
        }

    def test_versions(self, make_trainer, card_of):
        from importlib.metadata import version

        text = card_of(make_trainer()).text
        for name in ("trl_spo", "trl", "transformers", "torch", "datasets", "tokenizers"):
            assert f"- {name}: {version(name)}\n" in text

    def test_how_to_load(self, make_trainer, card_of):
        trainer = make_trainer(hub_model_id="me/my-model")
        text = card_of(trainer, model_name="my-model").text
        code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
        assert 'pipeline("text-generation", model="me/my-model", device_map="auto")' in code
        assert '"role": "user"' in code  # the tokenizer has a chat template
        compile(code, "card", "exec")

    def test_how_to_load_without_a_chat_template(self, make_trainer, card_of, tokenizer):
        tokenizer.chat_template = None
        text = card_of(make_trainer({"processing_class": tokenizer})).text
        code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
        assert '"role"' not in code
        compile(code, "card", "exec")

    @pytest.mark.parametrize("peft", [False, True])
    def test_adapter(self, make_trainer, card_of, peft):
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if peft else None
        text = card_of(make_trainer({"peft_config": config})).text
        assert ("PEFT adapter" in text) == peft

    def test_base_model_of_the_hub(self, make_trainer, card_of, model):
        model.config._name_or_path = "org/base"
        trainer = make_trainer({"model": model}, beta=0.0, calibration="none")
        card = card_of(trainer)
        assert card.data.base_model == "org/base"
        assert "fine-tuned version of [org/base](https://huggingface.co/org/base)" in card.text

    def test_dataset_in_the_text(self, make_trainer, card_of):
        assert (
            "on the [org/pairs](https://huggingface.co/datasets/org/pairs) dataset"
            in card_of(make_trainer(), dataset_name="org/pairs").text
        )

    def test_saved_with_each_checkpoint(self, make_trainer):
        trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=1)
        trainer.train()
        card = ModelCard.load(Path(trainer.args.output_dir, "README.md"))
        assert "soft-po" in card.data.tags

    def test_model_tags(self, make_trainer):
        assert make_trainer().model.model_tags == ["trl", "dpo", "trl-spo", "soft-po"]

    def test_name_defaults_to_the_folder(self, make_trainer, card_of):
        trainer = make_trainer()
        trainer.args.output_dir += "/"
        assert card_of(trainer).data.model_name == "output"


class TestOfSSPO:
    OPTIONS = {
        "stop_words": ["was", "a", "and", "with", "the", "is", "my", "not", "it"],
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 1,
    }

    @pytest.fixture
    def card_of_sspo(self, card_of, model_path, pairs, tmp_path):
        import trl_spo

        def card(name, dataset=pairs, **options):
            args = getattr(trl_spo, f"{name}Config")(str(tmp_path / "output"), **{**self.OPTIONS, **options})
            return card_of(getattr(trl_spo, f"{name}Trainer")(model_path, args=args, train_dataset=dataset))

        return card

    @pytest.mark.parametrize(
        ("name", "tags"), [("SSPO", ["dpo", "trl-spo", "sspo"]), ("SSPOKTO", ["kto", "trl-spo", "sspo-kto"])]
    )
    def test_method_and_citations(self, card_of_sspo, name, tags):
        card = card_of_sspo(name)
        assert card.data.tags == ["generated_from_trainer", "trl", *tags]
        assert f"with {name.replace('OKTO', 'O-KTO')}, a method" in card.text and f"`{name}Trainer`" in card.text
        assert "https://huggingface.co/papers/2409.17791" in card.text
        assert "@inproceedings{li2024selfsupervised," in card.text and "@software{vonwerra2020trl," in card.text

    @pytest.mark.parametrize(("name", "loss_type"), [("SSPO", "['ipo']"), ("SSPOKTO", "kto")])
    def test_settings(self, card_of_sspo, name, loss_type):
        options = {"num_degrees": 4, "chosen_weight": 0.3, "shared_head": True, "removal": "text", "extractor": "yake"}
        options |= {"loss_type": ["ipo"]} if name == "SSPO" else {}
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", card_of_sspo(name, **options).text, re.M))
        expected = {
            "loss_type": loss_type,
            "beta": "0.1",
            "num_degrees": "4",
            "chosen_weight": "0.3",
            "rejected_weight": "0.2",
            "removal": "text",
            "extractor": "yake",
            "language": "en",
            "shared_head": "True",
        }
        assert expected.items() <= rows.items()
