# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
A world so small that every completion can be listed, so that the policy, its KL to a reference, its entropy, its expected
reward and the optimal policies are exact.

How it departs from an ordinary tiny Llama: some of the weights are set by hand, inside the standard architecture, so that
the model can be saved, loaded and trained like any other.

- Ids that are no words (padding and the prompts) never get any probability: coordinate 0 of the residual stream holds a
  constant and their rows of the LM head read it with a large negative weight.
- In a *closed* world, the last position always ends the completion: the first layer counts the tokens since the prompt
  (uniform attention over a marker that only prompts carry gives 1/n, and one MLP unit compares it with a threshold) and
  writes the result to coordinate 2, which the end-of-sequence row of the LM head reads. The embeddings and the first layer
  are frozen, so that training cannot break the clock; at the last position the probability is 1 and the gradient 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# The first word ends the completion, so that no completion is empty.
WORDS = (".", "sun", "rain", "wind", "snow", "fog", "ice", "dew")
PROMPTS = ("Today", "Tonight", "Tomorrow")
PAD = "<pad>"

# Coordinates of the residual stream that are set by hand.
_CONSTANT, _MARKER, _END, _COUNT = range(4)
_CONSTANT_VALUE = 4.0
_MARKER_VALUE = 2.0
_SUPPRESS = -100.0
_FORCE_END = 20.0


class EnumerableWorld:
    """
    A tokenizer of a few words, a tiny Llama, and the list of all completions that it can write.

    Two forms, chosen by `closed`:

    - `True`: every completion ends with the end-of-sequence word within `max_tokens` tokens, because the model gives it
      probability 1 at the last position. These are the completions that preference pairs are made of (TRL's trainers
      append the end-of-sequence token to a completion that lacks it), so the pairs can cover the whole support.
    - `False`: an ordinary model. The completions are those that end within `max_tokens` tokens *and* those of
      `max_tokens` tokens that do not, which is what `generate(max_new_tokens=max_tokens)` returns.

    Args:
        num_words (`int`, *optional*, defaults to `8`):
            Number of words, the end-of-sequence word included; between 2 and 8.
        max_tokens (`int`, *optional*, defaults to `4`):
            Largest number of tokens of a completion, the end-of-sequence word included.
        closed (`bool`, *optional*, defaults to `True`):
            Whether the model ends each completion within `max_tokens` tokens.
        num_prompts (`int`, *optional*, defaults to `2`):
            Number of prompts, each of one token; between 1 and 3.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Word-level tokenizer; the padding token and the prompts have ids of their own.
        prompts (`list[str]`):
            The prompts.
        completions (`list[str]`):
            All completions as text with a leading space, so that `prompt + completion` tokenizes as it should.
        completion_ids (`torch.Tensor` of shape `(S, max_tokens)`):
            All completions as ids, padded on the right.
        completion_mask (`torch.Tensor` of shape `(S, max_tokens)`):
            1 on the completions' tokens.
        terminated (`torch.Tensor` of shape `(S,)`):
            Whether a completion ends with the end-of-sequence word.

    Example:

    ```python
    >>> world = EnumerableWorld(num_words=4, max_tokens=3)
    >>> len(world.completions)
    13
    >>> model = world.model(seed=0).double()
    >>> world.log_probs(model).exp().sum(-1)
    tensor([1.0000, 1.0000], dtype=torch.float64, grad_fn=<SumBackward1>)
    ```
    """

    def __init__(self, num_words: int = 8, max_tokens: int = 4, closed: bool = True, num_prompts: int = 2):
        if not 2 <= num_words <= len(WORDS):
            raise ValueError(f"`num_words` must be between 2 and {len(WORDS)}, got {num_words}.")
        if not 1 <= num_prompts <= len(PROMPTS):
            raise ValueError(f"`num_prompts` must be between 1 and {len(PROMPTS)}, got {num_prompts}.")
        if max_tokens < 2:
            raise ValueError(
                f"`max_tokens` must be at least 2 (with 1 there is a single completion), got {max_tokens}."
            )
        self.num_words = num_words
        self.max_tokens = max_tokens
        self.closed = closed
        self.prompts = list(PROMPTS[:num_prompts])
        self.tokenizer = _word_tokenizer([*WORDS[:num_words], PAD, *self.prompts])
        self.eos_token_id = self.tokenizer.eos_token_id
        self.pad_token_id = self.tokenizer.pad_token_id
        self.prompt_ids = torch.tensor([self.tokenizer.convert_tokens_to_ids(prompt) for prompt in self.prompts])

        others = [i for i in range(num_words) if i != self.eos_token_id]
        rows = [(*p, self.eos_token_id) for k in range(max_tokens) for p in itertools.product(others, repeat=k)]
        num_terminated = len(rows)
        if not closed:
            rows += itertools.product(others, repeat=max_tokens)
        self.completion_ids = torch.full((len(rows), max_tokens), self.pad_token_id)
        for i, row in enumerate(rows):
            self.completion_ids[i, : len(row)] = torch.tensor(row)
        self.completion_mask = (self.completion_ids != self.pad_token_id).long()
        self.terminated = torch.arange(len(rows)) < num_terminated
        self.completions = ["".join(" " + WORDS[i] for i in row) for row in rows]
        self._index = {row: i for i, row in enumerate(rows)}

        # The distribution after each of these prefixes is all that there is to know about a model: the forward pass over
        # the longest ones covers the shorter ones too. `_prefix_row[i]` is one that starts like completion i.
        self._prefixes = torch.tensor(list(itertools.product(others, repeat=max_tokens - 1)), dtype=torch.long)
        base = len(others)
        digits = {i: d for d, i in enumerate(others)}
        self._prefix_row = torch.tensor(
            [
                sum(digits.get(i, 0) * base ** (max_tokens - 2 - t) for t, i in enumerate(r[: max_tokens - 1]))
                for r in rows
            ]
        )

    def __len__(self) -> int:
        return len(self.completions)

    def model(self, seed: int = 0, scale: float = 1.0, hidden_size: int = 32, num_layers: int = 2) -> LlamaForCausalLM:
        """
        A random model of this world, in float32.

        Args:
            seed (`int`, *optional*, defaults to `0`):
                Seed of the weights; leaves the global random state alone.
            scale (`float`, *optional*, defaults to `1.0`):
                Standard deviation of the logits: how far from uniform the model is.
            hidden_size (`int`, *optional*, defaults to `32`):
                Width, a multiple of 8.
            num_layers (`int`, *optional*, defaults to `2`):
                Number of layers, at least 2. In a closed world the first one is frozen.
        """
        if num_layers < 2:
            raise ValueError(f"`num_layers` must be at least 2 (the first one counts the tokens), got {num_layers}.")
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 8,
            num_key_value_heads=hidden_size // 8,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the constructor initializes from the global random state
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.size(1) ** -0.5, generator=generator)
            _set_by_hand(model, self.prompt_ids, self.pad_token_id, scale)
            if self.closed:
                _set_clock(model, self.max_tokens, self.eos_token_id)
        model.eval()
        return self.freeze(model)

    def freeze(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        """Freeze what makes a closed world closed. Only needed for a model that was loaded by other means than `load`."""
        if self.closed:
            model.model.embed_tokens.requires_grad_(False)
            model.model.layers[0].requires_grad_(False)
        return model

    def save(self, model: LlamaForCausalLM, folder: str | Path) -> str:
        """Save the model and the tokenizer, as a trainer wants them; returns the folder."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return str(folder)

    def load(self, folder: str | Path) -> LlamaForCausalLM:
        """
        Load a model of this world.

        Saved with `save`, loaded with `load` and passed to a trainer without `ref_model`, a model gets the saved one as
        its reference. (A trainer that is given the folder itself would train the frozen layer.)
        """
        return self.freeze(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))

    def index(self, completion: str | Sequence[int] | torch.Tensor) -> int:
        """
        Position of a completion in `completions`, from its text or its ids; whatever follows the end is ignored. Raises
        `KeyError` for what is not in the support.
        """
        if isinstance(completion, str):
            completion = self.tokenizer(completion)["input_ids"]
        ids = [int(i) for i in completion]
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id) + 1]
        return self._index[tuple(ids)]

    # -- exact quantities

    def token_log_probs(self, model: torch.nn.Module) -> torch.Tensor:
        """
        Log-probability of each token of each completion under each prompt, in the model's precision, differentiable.

        Returns:
            `torch.Tensor` of shape `(num_prompts, S, max_tokens)`, 0 on padding.
        """
        device = next(model.parameters()).device
        num_prompts, num_prefixes = len(self.prompts), len(self._prefixes)
        input_ids = torch.cat(
            [
                self.prompt_ids[:, None, None].expand(-1, num_prefixes, 1),
                self._prefixes[None].expand(num_prompts, -1, -1),
            ],
            dim=-1,
        ).flatten(0, 1)
        logits = model(input_ids=input_ids.to(device), use_cache=False).logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        tables = logits.log_softmax(-1).unflatten(0, (num_prompts, num_prefixes))
        tables = tables[:, self._prefix_row.to(device)]  # (num_prompts, S, max_tokens, vocabulary)
        index = self.completion_ids.to(device)[None, :, :, None].expand(num_prompts, -1, -1, -1)
        return tables.gather(-1, index).squeeze(-1) * self.completion_mask.to(device)

    def log_probs(self, model: torch.nn.Module) -> torch.Tensor:
        """
        Log-probability of each completion under each prompt, in the model's precision, differentiable.

        Returns:
            `torch.Tensor` of shape `(num_prompts, S)`; its exponentials sum to 1 over the last dimension.
        """
        return self.token_log_probs(model).sum(-1)

    def fit(
        self, model: LlamaForCausalLM, target_logps: torch.Tensor, steps: int = 500, learning_rate: float = 1e-2
    ) -> float:
        """
        Train `model` in place to have the given distribution, by gradient descent on the exact `KL(target || model)`.

        Args:
            model ([`~transformers.LlamaForCausalLM`]):
                A model of this world.
            target_logps (`torch.Tensor` of shape `(S,)` or `(num_prompts, S)`):
                Log-probabilities of the target.
            steps (`int`, *optional*, defaults to `500`):
                Number of steps of Adam; the learning rate falls to zero.
            learning_rate (`float`, *optional*, defaults to `1e-2`):
                Learning rate at the start.

        Returns:
            `float`: the largest total variation that is left over the prompts.
        """
        target = target_logps.detach().expand(len(self.prompts), -1)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            kl_divergence(target, self.log_probs(model)).mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return total_variation(target, self.log_probs(model)).max().item()

    def rewards(self, seed: int = 0, scale: float = 1.0, same: bool = True) -> torch.Tensor:
        """
        Random rewards with the given standard deviation, in float64: of shape `(S,)`, or `(num_prompts, S)` with
        `same=False`, one vector a prompt.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self),) if same else (len(self.prompts), len(self))
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    # -- data

    def uniform(self, subset: Sequence[int] | None = None) -> torch.Tensor:
        """
        Uniform proposal over the completions that end with the end-of-sequence word, or over those of `subset`
        (positions in `completions`).
        """
        weights = torch.zeros(len(self), dtype=torch.float64)
        weights[self.terminated if subset is None else torch.as_tensor(list(subset))] = 1.0
        return weights / weights.sum()

    def preference_pairs(
        self, rewards: torch.Tensor, num_pairs: int, proposal: torch.Tensor | None = None, seed: int = 0
    ) -> Dataset:
        """
        Preference pairs: two different completions drawn from the proposal, labelled by Bradley-Terry,
        P(i > j) = σ(r_i - r_j).

        Args:
            rewards (`torch.Tensor` of shape `(S,)` or `(num_prompts, S)`):
                True reward of each completion.
            num_pairs (`int`):
                Number of pairs; the prompts take turns.
            proposal (`torch.Tensor` of shape `(S,)` or `(num_prompts, S)`, *optional*):
                Probabilities from which the completions are drawn: `uniform()` (the default), `uniform(subset)`, or a
                model's `log_probs(model).exp()`.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the draw.

        Returns:
            [`~datasets.Dataset`] with columns `prompt`, `chosen` and `rejected`.
        """
        lists = self._draw(rewards, num_pairs, 2, 2, proposal, seed)
        return self._pairs([(prompt, ids[order[0]], ids[order[1]]) for prompt, ids, order in lists])

    def population_pairs(
        self, rewards: torch.Tensor, copies: int = 20, subset: Sequence[int] | None = None
    ) -> Dataset:
        """
        The population instead of a sample: each unordered pair of different completions `copies` times under each prompt,
        of which i wins `copies · σ(r_i - r_j)`, rounded. The rounding is the only error: it moves each label's
        probability by at most `1 / (2 · copies)`.

        Args:
            rewards (`torch.Tensor` of shape `(S,)` or `(num_prompts, S)`):
                True reward of each completion.
            copies (`int`, *optional*, defaults to `20`):
                Number of rows for each unordered pair.
            subset (`Sequence[int]`, *optional*):
                Positions of the completions to use; defaults to all that end with the end-of-sequence word.
        """
        rewards = rewards.detach().double().cpu().expand(len(self.prompts), -1)
        members = self.uniform(subset).nonzero().flatten().tolist()
        self._check_terminated(torch.tensor(members))
        rows = []
        for prompt in range(len(self.prompts)):
            for i, j in itertools.combinations(members, 2):
                wins = round(copies * torch.sigmoid(rewards[prompt, i] - rewards[prompt, j]).item())
                rows += [(prompt, i, j)] * wins + [(prompt, j, i)] * (copies - wins)
        return self._pairs(rows)

    def ranked_lists(
        self,
        rewards: torch.Tensor,
        num_lists: int,
        min_size: int = 4,
        max_size: int | None = None,
        proposal: torch.Tensor | None = None,
        seed: int = 0,
    ) -> Dataset:
        """
        Lists of different completions drawn from the proposal, with a ranking drawn from Plackett-Luce: the best is i
        with probability softmax(r)_i, then the best of those left, and so on.

        Args:
            rewards (`torch.Tensor` of shape `(S,)` or `(num_prompts, S)`):
                True reward of each completion.
            num_lists (`int`):
                Number of lists; the prompts take turns.
            min_size (`int`, *optional*, defaults to `4`):
                Smallest length of a list.
            max_size (`int`, *optional*):
                Largest length of a list; each length in between is as likely. Defaults to `min_size`.
            proposal (`torch.Tensor` of shape `(S,)` or `(num_prompts, S)`, *optional*):
                Probabilities from which the completions are drawn; defaults to `uniform()`.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the draw.

        Returns:
            [`~datasets.Dataset`] with columns `prompt`, `completions` and `ranking` (indices into `completions`, best
            first).
        """
        lists = self._draw(rewards, num_lists, min_size, max_size or min_size, proposal, seed)
        return Dataset.from_dict(
            {
                "prompt": [self.prompts[prompt] for prompt, _, _ in lists],
                "completions": [[self.completions[i] for i in ids] for _, ids, _ in lists],
                "ranking": [order for _, _, order in lists],
            }
        )

    def best_of_n(
        self,
        rewards: torch.Tensor,
        num_lists: int,
        min_size: int = 4,
        max_size: int | None = None,
        proposal: torch.Tensor | None = None,
        seed: int = 0,
    ) -> Dataset:
        """
        As [`ranked_lists`], with only the best of each list known: column `best` (an index into `completions`) instead of
        `ranking`.
        """
        dataset = self.ranked_lists(rewards, num_lists, min_size, max_size, proposal, seed)
        return dataset.add_column("best", [ranking[0] for ranking in dataset["ranking"]]).remove_columns("ranking")

    def _draw(
        self,
        rewards: torch.Tensor,
        num_lists: int,
        min_size: int,
        max_size: int,
        proposal: torch.Tensor | None,
        seed: int,
    ) -> list[tuple[int, list[int], list[int]]]:
        """Triples (prompt, completions, order from best to worst)."""
        generator = torch.Generator().manual_seed(seed)
        num_prompts = len(self.prompts)
        rewards = rewards.detach().double().cpu().expand(num_prompts, -1)
        proposal = self.uniform() if proposal is None else proposal.detach().double().cpu()
        proposal = proposal.expand(num_prompts, -1)
        self._check_terminated(proposal.nonzero()[:, 1])
        if not 2 <= min_size <= max_size <= (proposal > 0).sum(-1).min():
            raise ValueError(
                f"Lists of {min_size} to {max_size} different completions cannot be drawn from a proposal over "
                f"{(proposal > 0).sum(-1).min()}: choose sizes from 2 to that number."
            )
        prompts = torch.arange(num_lists) % num_prompts
        # Without replacement: the first n of a Plackett-Luce order with weights `proposal`
        keys = proposal.log()[prompts] + _gumbel((num_lists, len(self)), generator)
        candidates = keys.topk(max_size, dim=-1).indices
        sizes = torch.randint(min_size, max_size + 1, (num_lists,), generator=generator)
        # Plackett-Luce again, with weights exp(r): for two completions this is Bradley-Terry
        scores = rewards[prompts].gather(1, candidates) + _gumbel(candidates.shape, generator)
        lists = []
        for prompt, ids, score, size in zip(prompts.tolist(), candidates, scores, sizes.tolist(), strict=True):
            lists.append((prompt, ids[:size].tolist(), score[:size].argsort(descending=True).tolist()))
        return lists

    def _pairs(self, rows: list[tuple[int, int, int]]) -> Dataset:
        return Dataset.from_dict(
            {
                "prompt": [self.prompts[prompt] for prompt, _, _ in rows],
                "chosen": [self.completions[chosen] for _, chosen, _ in rows],
                "rejected": [self.completions[rejected] for _, _, rejected in rows],
            }
        )

    def _check_terminated(self, indices: torch.Tensor) -> None:
        if not self.terminated[indices].all():
            raise ValueError(
                f"Preference data can hold only completions that end with {WORDS[0]!r}, because trainers append it to "
                "those that do not: draw from `uniform()`, or use a closed world, where all of them do."
            )


# -- quantities of distributions that are given by log-probabilities over the last dimension


def kl_divergence(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """KL(π || π_ref) = Σ_y π(y) (log π(y) - log π_ref(y))."""
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def entropy(logps: torch.Tensor) -> torch.Tensor:
    """-Σ_y π(y) log π(y)."""
    return -(logps.exp() * logps).sum(-1)


def expectation(logps: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ_y π(y) values(y): the expected reward, for example."""
    return (logps.exp() * values).sum(-1)


def total_variation(logps: torch.Tensor, other_logps: torch.Tensor) -> torch.Tensor:
    """½ Σ_y |π(y) - π'(y)|."""
    return 0.5 * (logps.exp() - other_logps.exp()).abs().sum(-1)


def optimal_policy(
    rewards: torch.Tensor,
    entropy_weight: float = 0.0,
    kl_weight: float = 0.0,
    ref_logps: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Log-probabilities of the policy that maximises E[r] + a · entropy - b · KL(π || π_ref):
    π ∝ exp( (r + b log π_ref) / (a + b) ).

    - `entropy_weight=alpha`: softmax(r/α), the minimiser of Soft PO's preference term;
    - `kl_weight=beta, ref_logps=...`: π_ref exp(r/β), the minimiser of DPO, and of reference-calibrated Soft PO at α = β.
    """
    if entropy_weight < 0 or kl_weight < 0 or entropy_weight + kl_weight == 0:
        raise ValueError(
            "`entropy_weight` and `kl_weight` must be non-negative and not both zero, got "
            f"{entropy_weight} and {kl_weight}."
        )
    if kl_weight > 0:
        if ref_logps is None:
            raise ValueError("`kl_weight` needs `ref_logps`, the reference's log-probabilities.")
        rewards = rewards + kl_weight * ref_logps
    return (rewards / (entropy_weight + kl_weight)).log_softmax(-1)


# -- construction


def _word_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokens[0],
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _gumbel(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
    return -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()


def _set_by_hand(model: LlamaForCausalLM, prompt_ids: torch.Tensor, pad_token_id: int, scale: float) -> None:
    """Reserve the first coordinates of the residual stream, and take the probability from ids that are no words."""
    size = model.config.hidden_size
    embeddings = model.model.embed_tokens.weight
    embeddings[:, : _COUNT + 1] = 0
    embeddings[:, _CONSTANT] = _CONSTANT_VALUE
    embeddings[prompt_ids, _MARKER] = _MARKER_VALUE
    # Each row gets root mean square 1, so that the first RMSNorm changes nothing and the marker keeps its value
    free = embeddings[:, _COUNT + 1 :]
    room = size - embeddings[:, : _COUNT + 1].square().sum(-1, keepdim=True)
    free.mul_(room.sqrt() / free.norm(dim=-1, keepdim=True))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[: _COUNT + 1] = 0
        layer.mlp.down_proj.weight[: _COUNT + 1] = 0
    head = model.lm_head.weight
    head[:, : _COUNT + 1] = 0
    head.mul_(scale)
    head[[pad_token_id, *prompt_ids.tolist()], _CONSTANT] = _SUPPRESS


def _set_clock(model: LlamaForCausalLM, max_tokens: int, eos_token_id: int) -> None:
    """Give the end-of-sequence word probability 1 once the prompt's token and `max_tokens - 1` others have been read."""
    layer, head_dim = model.model.layers[0], model.config.hidden_size // model.config.num_attention_heads
    # Head 0 attends to all positions alike and reads the marker: 1/n after n tokens, the prompt's included
    layer.self_attn.q_proj.weight[:head_dim] = 0
    layer.self_attn.k_proj.weight[:head_dim] = 0
    layer.self_attn.v_proj.weight[0] = 0
    layer.self_attn.v_proj.weight[0, _MARKER] = 1 / _MARKER_VALUE
    layer.self_attn.o_proj.weight[_COUNT, 0] = 1
    # Unit 0 of the MLP opens below a threshold between 1/(max_tokens - 1) and 1/max_tokens. The RMSNorm before it scales
    # both sides alike. Open, it writes a number that dwarfs all other coordinates.
    low, high = 1 / max_tokens, 1 / (max_tokens - 1)
    threshold, gain = (low + high) / 2, 200 / (high - low)
    layer.mlp.gate_proj.weight[0] = 0
    layer.mlp.gate_proj.weight[0, _CONSTANT] = gain * threshold / _CONSTANT_VALUE
    layer.mlp.gate_proj.weight[0, _COUNT] = -gain
    layer.mlp.up_proj.weight[0] = 0
    layer.mlp.up_proj.weight[0, _CONSTANT] = 1
    layer.mlp.down_proj.weight[:, 0] = 0
    layer.mlp.down_proj.weight[_END, 0] = 100
    model.lm_head.weight[eos_token_id, _END] = _FORCE_END
