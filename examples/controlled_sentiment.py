# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The controlled sentiment experiment: preference pairs whose true reward is known.

`prepare` makes everything from a small language model and a file of labelled film reviews, without a download:

1. The model is fine-tuned with TRL's [`~trl.SFTTrainer`] on "Review: " + text. That is the base model and the reference.
2. A bag-of-words classifier is trained on all labelled reviews. Its log-odds, scaled to a standard deviation of 2 over
   the base model's samples, are the *true reward* of a review.
3. The base model continues the first 8 tokens of reviews twice, at temperature 1. A Bradley-Terry annotator prefers one
   of the two with probability P(i > j) = sigmoid(r_i - r_j). (Labels by the sign of the reward would be noiseless: then
   no finite reward explains them.)
4. 560 reviews are held out from 1 and 3: their prefixes are the prompts on which `evaluate` samples, and the test pairs.

Completions have at most 64 tokens. Those that have not ended by then are cut, and training has to cut them too, so that
they get no EOS that was not sampled: `--max_length 81` (a prompt is BOS, "Review:" and 8 tokens: 17 in all).

`evaluate` measures a trained model on the held-out prefixes: true reward, sequence KL to the base model, entropy, ...

    python examples/controlled_sentiment.py prepare --model ../shared/data/stories260K \
        --reviews ../shared/data/movie_review_polarity.jsonl.gz --output_dir sentiment
    python examples/soft_po.py --model_name_or_path sentiment/sft --dataset_name sentiment/pairs \
        --max_length 81 --max_completion_length 64 --learning_rate 1e-4 --output_dir aligned
    python examples/controlled_sentiment.py evaluate --data sentiment --model aligned
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed
from transformers.utils import logging


PREFIX = "Review: "
PREFIX_TOKENS = 8  # of the review, after "Review:"
MAX_NEW_TOKENS = 64  # longer samples are cut, here, in the pairs and in the evaluation
WORD = re.compile(r"\w\w+")  # what scikit-learn's CountVectorizer takes for a word


class SentimentReward:
    """
    The true reward: log-odds of "positive" of a bag-of-words classifier, from the JSON file that `prepare` writes.

    A word counts once however often it occurs, so that repeating it does not pay.
    """

    def __init__(self, path: str | Path):
        content = json.loads(Path(path).read_text())
        self.intercept: float = content["intercept"]
        self.weights: dict[str, float] = content["weights"]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        words = [set(WORD.findall(text.removeprefix(PREFIX).lower())) for text in texts]
        return torch.tensor([self.intercept + sum(self.weights.get(word, 0.0) for word in ws) for ws in words])


@torch.no_grad()
def sample(model, prompt_ids: list[list[int]], seed: int, batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Samples one completion of each prompt at temperature 1. All prompts have the same number of tokens.

    Returns prompt + completion ids, right-padded, and the mask of completion tokens with EOS included.
    """
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    prompts = torch.tensor(prompt_ids, device=model.device)
    width = prompts.shape[1] + MAX_NEW_TOKENS
    ids = torch.full((len(prompts), width), model.config.pad_token_id, device=model.device)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        out = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=config)
        ids[start : start + batch_size, : out.shape[1]] = out
    torch.random.set_rng_state(generator_state)  # evaluation in the middle of training must not disturb it
    is_eos = ids[:, prompts.shape[1] :] == model.config.eos_token_id
    mask = torch.zeros_like(ids)
    mask[:, prompts.shape[1] :] = is_eos.cumsum(dim=1) - is_eos.long() == 0
    return ids[:, : mask.any(dim=0).nonzero().max() + 1], mask[:, : mask.any(dim=0).nonzero().max() + 1]


@torch.no_grad()
def log_distributions(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities over the vocabulary of the tokens from the second one on, `(B, L - 1, V)`."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)


@torch.no_grad()
def pair_logps(model, tokenizer, pairs: Dataset, batch_size: int = 64) -> dict[str, torch.Tensor]:
    """Log-probabilities of the chosen and of the rejected completions, `(len(pairs),)` each, EOS included."""
    length = len(tokenizer(pairs[0]["prompt"])["input_ids"])
    result = {}
    for side in ("chosen", "rejected"):
        texts = [p + c + tokenizer.eos_token for p, c in zip(pairs["prompt"], pairs[side], strict=True)]
        rows = [row[: length + MAX_NEW_TOKENS] for row in tokenizer(texts)["input_ids"]]
        logps = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # a batch then has little padding
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [model.config.pad_token_id] * (width - len(rows[i])) for i in batch])
            mask = torch.tensor([[length <= t < len(rows[i]) for t in range(1, width)] for i in batch])
            ids, mask = ids.to(model.device), mask.to(model.device)
            taken = log_distributions(model, ids).gather(-1, ids[:, 1:, None]).squeeze(-1)
            logps[batch] = (taken * mask).sum(dim=1).cpu()
        result[side] = logps
    return result


def prompt_ids_of(tokenizer, prompts: list[str]) -> list[list[int]]:
    return tokenizer(prompts)["input_ids"]


def decode_review(tokenizer, ids: torch.Tensor, mask: torch.Tensor, prompt_length: int) -> list[str]:
    lengths = (prompt_length + mask.sum(dim=1)).tolist()
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------- prepare


def fine_tune(args: argparse.Namespace, texts: list[str], output_dir: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    training_args = SFTConfig(
        output_dir=str(output_dir),
        num_train_epochs=args.sft_epochs,
        per_device_train_batch_size=32,
        learning_rate=args.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_length=256,
        train_sampling_strategy="group_by_length",  # less padding
        disable_tqdm=True,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SFTTrainer(
        model=str(args.model),
        args=training_args,
        # SFTTrainer appends the EOS token, which this model has never seen
        train_dataset=Dataset.from_dict({"text": [PREFIX + text for text in texts]}),
        processing_class=tokenizer,
    )
    trainer.train()
    # The original stops at BOS too, since its stories were delimited by it; from here on there is a proper ending.
    trainer.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    trainer.model.config.eos_token_id = tokenizer.eos_token_id
    trainer.save_model(str(output_dir))
    tokenizer.save_pretrained(str(output_dir))


def fit_classifier(texts: list[str], labels: list[int]) -> tuple[dict[str, float], float, float]:
    """Word weights and intercept of the log-odds, and the accuracy in 5-fold cross-validation."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(
        CountVectorizer(binary=True, min_df=3, token_pattern=WORD.pattern), LogisticRegression(C=0.3, max_iter=1000)
    )
    accuracy = cross_val_score(pipeline, texts, labels, cv=5).mean()
    pipeline.fit(texts, labels)
    vectorizer, regression = pipeline[0], pipeline[1]
    weights = dict(zip(vectorizer.get_feature_names_out().tolist(), regression.coef_[0].tolist(), strict=True))
    return weights, float(regression.intercept_[0]), float(accuracy)


def make_pairs(
    model, tokenizer, prompts: list[str], reward: SentimentReward, seed: int
) -> tuple[list[dict[str, str]], dict[str, float], torch.Tensor]:
    """
    Draws two completions of each prompt and labels them. Dropped are pairs of which either is empty, or is not tokenized
    again as it was sampled: the trainer tokenizes the text of prompt + completion.
    """
    prompt_ids = prompt_ids_of(tokenizer, prompts)
    length = len(prompt_ids[0])
    sides = []
    for side in range(2):
        ids, mask = sample(model, prompt_ids, seed=seed + side)
        texts = decode_review(tokenizer, ids, mask, length)
        # As the trainer sees it: EOS is appended, and a completion that did not end is cut before it by `max_length`
        again = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
        same = [
            row[: length + n] == tokens[: length + MAX_NEW_TOKENS]
            for row, n, tokens in zip(ids.tolist(), mask.sum(dim=1).tolist(), again, strict=True)
        ]
        ended = [tokenizer.eos_token_id in row[length:] for row in ids.tolist()]
        filled = [len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True)]
        sides.append({"texts": texts, "rewards": reward(texts), "ended": ended, "same": same, "filled": filled})
    first, second = sides
    generator = torch.Generator().manual_seed(seed)
    first_wins = torch.rand(len(prompts), generator=generator) < torch.sigmoid(first["rewards"] - second["rewards"])
    pairs = []
    for i, prompt in enumerate(prompts):
        if all(side[key][i] for side in sides for key in ("same", "filled")):
            completions = [side["texts"][i][len(prompt) :] for side in sides]
            chosen, rejected = completions if first_wins[i] else completions[::-1]
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    shares = {
        key: sum(first[key] + second[key]) / (2 * len(prompts)) for key in ("ended", "same", "filled")
    }  # of the samples
    agreement = (first_wins == (first["rewards"] > second["rewards"])).float().mean().item()
    shares |= {"pairs_kept": len(pairs) / len(prompts), "label_agrees_with_reward": agreement}
    return pairs, shares, torch.cat([first["rewards"], second["rewards"]])


def prepare(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    reviews = load_dataset("json", data_files=str(args.reviews), split="train").shuffle(seed=args.seed)
    texts, labels = list(reviews["text"]), [int(label) for label in reviews["label"]]
    held_out, training = texts[: args.num_held_out], texts[args.num_held_out :]

    sft_dir = out / "sft"
    if not (sft_dir / "model.safetensors").exists() or args.overwrite:
        fine_tune(args, training, sft_dir)
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    model = AutoModelForCausalLM.from_pretrained(sft_dir).to(args.device).eval()

    def prefixes(texts: list[str]) -> list[str]:
        """The first tokens of the reviews, as text; those that are not tokenized again as they were are left out."""
        start = len(tokenizer(PREFIX.rstrip())["input_ids"])
        ids = [row[: start + PREFIX_TOKENS] for row in tokenizer([PREFIX + text for text in texts])["input_ids"]]
        prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        again = tokenizer(prompts)["input_ids"]
        kept = [p for p, a, b in zip(prompts, ids, again, strict=True) if a == b and len(a) == start + PREFIX_TOKENS]
        return list(dict.fromkeys(kept))

    train_prompts, test_prompts = prefixes(training), prefixes(held_out)
    test_prompts = [prompt for prompt in test_prompts if prompt not in set(train_prompts)]

    # The true reward, scaled over the base model's samples
    weights, intercept, accuracy = fit_classifier(texts, labels)
    reward_file = out / "reward.json"
    reward_file.write_text(json.dumps({"intercept": intercept, "weights": weights}))
    scale_prompts = train_prompts[:1024]
    prompt_ids = prompt_ids_of(tokenizer, scale_prompts)
    ids, mask = sample(model, prompt_ids, seed=args.seed)
    raw = SentimentReward(reward_file)(decode_review(tokenizer, ids, mask, len(prompt_ids[0])))
    scale = args.reward_std / raw.std().item()
    weights = {word: round(weight * scale, 5) for word, weight in weights.items()}
    reward_file.write_text(json.dumps({"intercept": round(intercept * scale, 5), "weights": weights}))
    reward = SentimentReward(reward_file)

    train_pairs, train_shares, rewards = make_pairs(model, tokenizer, train_prompts, reward, seed=args.seed + 10)
    for i in range(1, args.pairs_per_prompt):
        train_pairs += make_pairs(model, tokenizer, train_prompts, reward, seed=args.seed + 10 + 100 * i)[0]
    test_pairs, test_shares, _ = make_pairs(model, tokenizer, test_prompts, reward, seed=args.seed + 20)
    dataset = DatasetDict({"train": Dataset.from_list(train_pairs), "test": Dataset.from_list(test_pairs)})
    dataset.save_to_disk(str(out / "pairs"))
    (out / "prompts.json").write_text(json.dumps(test_prompts, indent=0))
    report = {
        "reviews": len(texts),
        "reviews_sft": len(training),
        "reviews_held_out": len(held_out),
        "prompts_train": len(train_prompts),
        "prompts_held_out": len(test_prompts),
        "pairs_train": len(train_pairs),
        "pairs_test": len(test_pairs),
        "max_length": len(prompt_ids[0]) + MAX_NEW_TOKENS,
        "classifier_accuracy_5fold": accuracy,
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "train": train_shares,
        "test": test_shares,
        "base": evaluate(model, model, tokenizer, reward, test_prompts, dataset["test"]),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


# --------------------------------------------------------------------------------------------------------- evaluate


@torch.no_grad()
def evaluate(
    model,
    ref_model,
    tokenizer,
    reward: SentimentReward,
    prompts: list[str],
    pairs: Dataset | None = None,
    samples_per_prompt: int = 1,
    seed: int = 1234,
    batch_size: int = 64,
) -> dict[str, float]:
    """
    Quality and distance of `model` on held-out prompts, from its own samples.

    KL and entropy are sums over the sequence of the exact token-level quantities over the full vocabulary
    (Rao-Blackwellised: unbiased, with far less variance than the log-ratio of the sample). `*_se` are standard errors.
    """
    was_training = model.training
    model.eval()
    prompt_ids = prompt_ids_of(tokenizer, prompts) * samples_per_prompt
    ids, mask = sample(model, prompt_ids, seed)
    rewards = reward(decode_review(tokenizer, ids, mask, len(prompt_ids[0])))
    kls, entropies = [], []
    # Sorted by length, a batch has little padding
    order = mask.sum(dim=1).argsort()
    for rows in order.split(batch_size):
        width = mask[rows].any(dim=0).nonzero().max() + 1
        m = mask[rows, 1:width]
        logps = log_distributions(model, ids[rows, :width])
        ref_logps = log_distributions(ref_model, ids[rows, :width])
        probs = logps.exp()
        kls.append(((probs * (logps - ref_logps)).sum(dim=-1) * m).sum(dim=1))
        entropies.append((-(probs * logps).sum(dim=-1) * m).sum(dim=1))
    kl, entropy = torch.cat(kls), torch.cat(entropies)
    lengths = mask.sum(dim=1).float()
    count = len(rewards)
    result = {
        "reward": rewards.mean().item(),
        "reward_se": rewards.std().item() / math.sqrt(count),
        "reward_std": rewards.std().item(),
        "kl": kl.mean().item(),
        "kl_se": kl.std().item() / math.sqrt(count),
        "entropy": entropy.mean().item(),
        "entropy_se": entropy.std().item() / math.sqrt(count),
        "length": lengths.mean().item(),
        "terminated": (ids == model.config.eos_token_id).any(dim=1).float().mean().item(),
        "samples": count,
    }
    if pairs is not None:
        policy, reference = (pair_logps(m, tokenizer, pairs, batch_size) for m in (model, ref_model))
        changes = {side: policy[side] - reference[side] for side in policy}
        result |= {
            "chosen_change": changes["chosen"].mean().item(),
            "rejected_change": changes["rejected"].mean().item(),
            "accuracy": (changes["chosen"] > changes["rejected"]).float().mean().item(),
        }
    model.train(was_training)
    return result


def load(data: str | Path, device: str = "cpu") -> dict:
    """The base model, tokenizer, reward, held-out prompts and pairs of a folder that `prepare` wrote."""
    data = Path(data)
    return {
        "ref_model": AutoModelForCausalLM.from_pretrained(data / "sft").to(device).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(data / "sft"),
        "reward": SentimentReward(data / "reward.json"),
        "prompts": json.loads((data / "prompts.json").read_text()),
        "pairs": load_from_disk(str(data / "pairs")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="fine-tune the base model and make the pairs")
    command.add_argument("--model", required=True, help="folder of a small causal language model")
    command.add_argument("--reviews", required=True, help="JSON lines with text and label (1 positive, 0 negative)")
    command.add_argument("--output_dir", required=True)
    command.add_argument("--num_held_out", type=int, default=560)
    command.add_argument("--sft_epochs", type=float, default=4)
    command.add_argument("--sft_learning_rate", type=float, default=2e-3)
    command.add_argument("--reward_std", type=float, default=2.0)
    command.add_argument("--pairs_per_prompt", type=int, default=1, help="to train on")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--overwrite", action="store_true", help="fine-tune again although the folder has a model")
    command = commands.add_parser("evaluate", help="measure a trained model on the held-out prefixes")
    command.add_argument("--data", required=True, help="folder that `prepare` wrote")
    command.add_argument("--model", required=True, help="folder of the trained model")
    command.add_argument("--samples_per_prompt", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster for models of this size
    logging.set_verbosity_error()

    if args.command == "prepare":
        prepare(args)
    else:
        content = load(args.data, args.device)
        model = AutoModelForCausalLM.from_pretrained(args.model).to(args.device)
        pairs = content.pop("pairs")["test"]
        result = evaluate(model, **content, pairs=pairs, samples_per_prompt=args.samples_per_prompt)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
