# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_spo import DegreeHeads
from trl_spo.losses import degree_loss, removal_mask
from trl_spo.sspo import predict_degrees
from trl_spo.sspo.degree_heads import _INPUT_NORM, add_degree_heads, pool_states, sinusoidal_encoding


ARCHITECTURES = [
    "llama",
    "llama-tied",
    "gemma2-softcapping",
    "cohere-logit-scale",
    "granite-logits-scaling",
    "mixtral-experts",
    "phi-head-bias",
    "gptj-head-bias",
]


def encoding(position, size):
    """Of one position, written down number by number."""
    numbers = []
    for j in range(size):
        angle = position / 10_000 ** ((j - j % 2) / size)
        numbers.append(math.cos(angle) if j % 2 else math.sin(angle))
    return torch.tensor(numbers)


def mean_of_what_is_left(states, mask):
    """Each token that is left gets the encoding of its place among them; then the mean. One response, no padding tricks."""
    left = [state for state, kept in zip(states, mask, strict=True) if kept]
    return sum((state + encoding(i, len(state)) for i, state in enumerate(left)), torch.zeros(len(states[0]))) / max(
        len(left), 1
    )


@pytest.mark.parametrize("size", [8, 7])
def test_encoding(size):
    found = sinusoidal_encoding(5, size)
    for position in range(5):
        torch.testing.assert_close(found[position], encoding(position, size))


class TestPooling:
    @pytest.mark.parametrize("size", [6, 5])
    def test_is_the_mean_of_the_encoded_states(self, size):
        torch.manual_seed(0)
        states = torch.randn(3, 9, size)
        masks = torch.rand(3, 4, 9) < 0.6
        masks[1, 2] = False
        found = pool_states(states, masks)
        assert found.shape == (3, 4, size)
        for row in range(3):
            for level in range(4):
                expected = mean_of_what_is_left(states[row], masks[row, level])
                torch.testing.assert_close(found[row, level], expected)
        assert torch.all(found[1, 2] == 0)

    def test_gradient(self):
        torch.manual_seed(0)
        states = torch.randn(2, 6, 4, requires_grad=True)
        masks = torch.rand(2, 3, 6) < 0.5
        weights = torch.randn(2, 3, 4)
        found = torch.autograd.grad((pool_states(states, masks) * weights).sum(), states)[0]
        naive = sum(
            (mean_of_what_is_left(states[i], masks[i, k]) * weights[i, k]).sum() for i in range(2) for k in range(3)
        )
        torch.testing.assert_close(found, torch.autograd.grad(naive, states)[0])

    def test_keeps_nothing_of_the_size_of_the_states(self):
        states = torch.randn(2, 50, 64, requires_grad=True)
        masks = torch.rand(2, 3, 50) < 0.5
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            pool_states(states, masks)
        assert max(kept, default=0) < states.numel() // 2

    def test_low_precision_states(self):
        torch.manual_seed(0)
        states = torch.randn(2, 200, 8)
        masks = torch.rand(2, 3, 200) < 0.5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = pool_states(states.bfloat16(), masks)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, pool_states(states.bfloat16().float(), masks), rtol=1e-5, atol=1e-6)


@pytest.fixture
def with_heads(model_paths, load_model):
    def make(name="llama", removal="hidden_states", **kwargs):
        model = load_model(model_paths(name))
        add_fused_lm_head(model)
        torch.manual_seed(1)
        size = model.get_output_embeddings().in_features
        heads = DegreeHeads(size, **{"num_degrees": 3, "head_hidden_size": 8, **kwargs})
        add_degree_heads(model, heads, removal)
        return model, heads

    return make


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(8, 100, (4, 12))
    attention = torch.ones_like(ids)
    completion = torch.zeros_like(ids)
    for row, (start, end) in enumerate([(3, 12), (5, 10), (2, 8), (4, 12)]):
        attention[row, end:] = 0
        completion[row, start:end] = 1
    ids = ids.masked_fill(attention == 0, 0)
    degrees = torch.randint(0, 3, ids.shape) * completion
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "completion_mask": completion,
        "token_degrees": degrees,
        "levels": torch.arange(3).expand(4, -1),
        "is_chosen": torch.tensor([True, True, False, False]),
    }


def forward(model, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    model_inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**model_inputs, labels=labels, fused_lm_head=True, degree_inputs=batch)


def head_logits(heads, pooled, chosen):
    head = heads.chosen if chosen or heads.rejected is None else heads.rejected
    pooled = _INPUT_NORM * pooled / pooled.square().sum().sqrt().clamp(min=1e-12)
    hidden = pooled @ head[0].weight.T + head[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ head[2].weight.T + head[2].bias


class TestForward:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    @pytest.mark.parametrize("removal", ["hidden_states", "text"])
    def test_of_each_response_alone(self, with_heads, batch, name, removal):
        """Against plain forward passes of one response at a time, without padding."""
        model, heads = with_heads(name, removal)
        model.eval()
        outputs = forward(model, batch)
        for row in range(4):
            n = int(batch["attention_mask"][row].sum())
            ids, completion, degrees = (
                batch[key][row, :n] for key in ("input_ids", "completion_mask", "token_degrees")
            )
            for level in range(3):
                gone = (degrees > 0) & (degrees <= level)
                if removal == "text":
                    states = model.base_model(input_ids=ids[~gone][None]).last_hidden_state[0]
                    left = completion[~gone].bool()
                else:
                    states = model.base_model(input_ids=ids[None]).last_hidden_state[0]
                    left = completion.bool() & ~gone
                expected = head_logits(heads, mean_of_what_is_left(states, left), row < 2)
                torch.testing.assert_close(outputs.degree_logits[row, level], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("removal", ["hidden_states", "text"])
    def test_one_level(self, with_heads, batch, removal):
        model, _ = with_heads(removal=removal)
        every = forward(model, batch).degree_logits
        levels = torch.tensor([[0], [2], [1], [2]])
        one = forward(model, {**batch, "levels": levels}).degree_logits
        torch.testing.assert_close(one, every.gather(1, levels.unsqueeze(2).expand(-1, -1, 3)), rtol=1e-4, atol=1e-5)

    def test_texts_are_run_for_what_is_missing_only(self, with_heads, batch):
        """The whole responses have had their forward pass."""
        model, _ = with_heads(removal="text")
        rows = []
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len((args or (kwargs["input_ids"],))[0])), with_kwargs=True
        )
        forward(model, batch)
        forward(model, {**batch, "levels": torch.ones(4, 1, dtype=torch.long)})
        assert rows == [4, 8, 4, 4]

    def test_left_padding(self, with_heads, batch):
        model, _ = with_heads(removal="text")
        right = forward(model, batch).degree_logits
        order = torch.argsort(batch["attention_mask"], dim=1, stable=True)
        left = {name: x.gather(1, order) if x.shape == order.shape else x for name, x in batch.items()}
        positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        labels = left["input_ids"].masked_fill(left["completion_mask"] == 0, -100)
        found = model(
            input_ids=left["input_ids"],
            attention_mask=left["attention_mask"],
            position_ids=positions,
            labels=labels,
            fused_lm_head=True,
            degree_inputs=left,
        ).degree_logits
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)

    def test_the_rest_of_the_output_is_that_of_the_model(self, with_heads, batch):
        model, _ = with_heads()
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        plain = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
        assert torch.equal(forward(model, batch).log_probs, plain.log_probs)
        assert not hasattr(plain, "degree_logits")

    def test_a_shared_head(self, with_heads, batch):
        model, heads = with_heads(shared_head=True)
        logits = forward(model, batch).degree_logits
        other = forward(model, {**batch, "is_chosen": ~batch["is_chosen"]}).degree_logits
        assert heads.rejected is None and torch.equal(logits, other)

    def test_both_heads_always_take_part(self, with_heads, batch):
        """Else DDP waits for the gradient of one that a process has no responses for."""
        model, heads = with_heads()
        logits = forward(model, {**batch, "is_chosen": torch.ones(4, dtype=torch.bool)}).degree_logits
        degree_loss(logits, batch["levels"]).sum().backward()
        assert all(p.grad is not None for p in heads.parameters())
        assert all(torch.all(p.grad == 0) for p in heads.rejected.parameters())
        assert any(p.grad.abs().max() > 0 for p in heads.chosen.parameters())


class TestFiles:
    def test_round_trip(self, tmp_path):
        heads = DegreeHeads(6, 4, 5, shared_head=True).to(torch.bfloat16)
        heads.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["sspo_heads.json", "sspo_heads.safetensors"]
        loaded = DegreeHeads.from_pretrained(tmp_path)
        assert loaded.config == heads.config == json.loads((tmp_path / "sspo_heads.json").read_text())
        for name, value in heads.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value) and loaded.state_dict()[name].dtype == torch.bfloat16

    def test_none_there(self, tmp_path):
        with pytest.raises(OSError, match="sspo_heads.json"):
            DegreeHeads.from_pretrained(tmp_path)

    def test_the_model_is_an_ordinary_one(self, with_heads, model_path, load_model, tmp_path):
        model, _ = with_heads()
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == load_model(model_path).state_dict().keys()
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    def test_merged(self, with_heads, load_model, model_path, tmp_path):
        model, _ = with_heads()
        peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        peft_model.save_pretrained(tmp_path / "adapter")
        assert not any("degree" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
        peft_model.merge_and_unload().save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == load_model(model_path).state_dict().keys()


def learned(features, labels, held_out, held_out_labels, n):
    """Accuracy on held-out rows of a head that has been trained on others."""
    torch.manual_seed(0)
    heads = DegreeHeads(features.size(2), n, 32)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    for _ in range(150):
        loss = degree_loss(heads(features)[0], labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (heads(held_out)[0].argmax(2) == held_out_labels).float().mean().item()


class TestLearning:
    @pytest.fixture
    def data(self):
        """Responses of different lengths whose states say, in one of their numbers each, which level drops the token."""
        torch.manual_seed(0)
        rows, length, n = 400, 30, 3
        lengths = torch.randint(12, length + 1, (rows, 1))
        completion = torch.arange(length).expand(rows, -1) < lengths
        # As many tokens of each kind in every response
        degrees = torch.stack([torch.arange(length) % 3 for _ in range(rows)]) * completion
        states = 0.3 * torch.randn(rows, length, 16)
        for degree in range(n):
            states[..., degree] += 2.0 * (degrees == degree)
        levels = torch.arange(n).expand(rows, -1)
        return states, completion, degrees, levels

    def test_states_that_encode_the_words_are_told_apart_perfectly(self, data):
        states, completion, degrees, levels = data
        pooled = pool_states(states, removal_mask(degrees, completion, levels))
        assert learned(pooled[:300], levels[:300], pooled[300:], levels[300:], 3) == 1.0

    @pytest.mark.parametrize("scale", [0.1, 3.0])
    def test_of_a_large_model(self, scale):
        """With Adam at the default learning rate: neither do the heads blow up, nor does their gradient fill the norm for clipping."""
        torch.manual_seed(0)
        size, rows = 4096, 64
        classes = torch.randn(3, size)
        pooled = scale * (0.5 * classes.expand(rows, -1, -1) + torch.randn(rows, 3, size))
        levels = torch.arange(3).expand(rows, -1)
        heads = DegreeHeads(size)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            loss = 0.2 * degree_loss(heads(pooled)[0], levels).mean()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in heads.parameters() if p.grad is not None])
            assert loss < 0.2 * 1.2 and norm < 0.5
            optimizer.step()
        assert (heads(pooled)[0].argmax(2) == levels).float().mean() > 0.95

    def test_shuffled_labels_stay_at_chance(self, data):
        states, completion, degrees, levels = data
        pooled = pool_states(states, removal_mask(degrees, completion, levels))
        shuffled = torch.stack([torch.randperm(3) for _ in range(400)])
        accuracy = learned(pooled[:300], shuffled[:300], pooled[300:], shuffled[300:], 3)
        # 300 answers: four standard deviations of a coin of three sides
        assert abs(accuracy - 1 / 3) < 4 * math.sqrt(2 / 9 / 300)


class TestPrediction:
    PROMPTS = ["the film", "a good story", "he said that the dog"]
    RESPONSES = [" was great and well", " ends well", " finds the way home</s>"]

    def test_of_each_response_alone(self, model, tokenizer, model_path):
        torch.manual_seed(0)
        heads = DegreeHeads(16, 3, 8)
        found = predict_degrees(model, tokenizer, heads, self.PROMPTS, self.RESPONSES, batch_size=2)
        assert found.chosen.shape == found.rejected.shape == (3, 3)
        torch.testing.assert_close(found.chosen.sum(1), torch.ones(3))
        for i, (prompt, response) in enumerate(zip(self.PROMPTS, self.RESPONSES, strict=True)):
            start = len(tokenizer(prompt).input_ids)
            ids = tokenizer(prompt + response.removesuffix("</s>") + "</s>", return_tensors="pt").input_ids
            states = model.base_model(ids).last_hidden_state[0]
            pooled = mean_of_what_is_left(states, [place >= start for place in range(len(states))])
            for chosen, probabilities in ((True, found.chosen[i]), (False, found.rejected[i])):
                torch.testing.assert_close(probabilities, head_logits(heads, pooled, chosen).softmax(0))

    def test_conversations(self, model, tokenizer):
        heads = DegreeHeads(16, 3, 8)
        prompts = [[{"role": "user", "content": prompt}] for prompt in self.PROMPTS]
        responses = [[{"role": "assistant", "content": "was great"}]] * 3
        found = predict_degrees(model, tokenizer, heads, prompts, responses)
        assert found.chosen.shape == (3, 3)

    def test_tools(self, model, tokenizer):
        prompts, responses = (
            [[{"role": "user", "content": "the film"}]],
            [[{"role": "assistant", "content": "was great"}]],
        )
        heads, tools = DegreeHeads(16, 3, 8), [{"name": "w"}]
        plain = predict_degrees(model, tokenizer, heads, prompts, responses)
        assert not torch.equal(
            predict_degrees(model, tokenizer, heads, prompts, responses, tools=tools).chosen, plain.chosen
        )

    def test_mistakes(self, model, tokenizer):
        with pytest.raises(ValueError, match="0 `prompts` and 0 `responses`"):
            predict_degrees(model, tokenizer, DegreeHeads(16), [], [])
        with pytest.raises(ValueError, match="are in different formats. Pass two texts"):
            predict_degrees(model, tokenizer, DegreeHeads(16), ["a"], [[{"role": "assistant", "content": "b"}]])
        with pytest.raises(ValueError, match="3 `prompts` and 2 `responses`"):
            predict_degrees(model, tokenizer, DegreeHeads(16), self.PROMPTS, self.RESPONSES[:2])
        with pytest.raises(ValueError, match="hidden states of size 8, and those of the model have 16"):
            predict_degrees(model, tokenizer, DegreeHeads(8), self.PROMPTS, self.RESPONSES)
        length = len(tokenizer(self.PROMPTS[2]).input_ids)
        message = f"'{self.PROMPTS[2]}' has {length} tokens, so that `max_length={length}` leaves nothing"
        with pytest.raises(ValueError, match=message):
            predict_degrees(model, tokenizer, DegreeHeads(16), self.PROMPTS, self.RESPONSES, max_length=length)
        predict_degrees(model, tokenizer, DegreeHeads(16), self.PROMPTS, self.RESPONSES, max_length=length + 1)

    def test_leaves_the_model_as_it_was(self, model, tokenizer):
        model.train()
        predict_degrees(model, tokenizer, DegreeHeads(16), self.PROMPTS, self.RESPONSES)
        assert model.training and not model.base_model._forward_hooks
