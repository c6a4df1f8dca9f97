# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What goes wrong between texts and token ids: truncation, the end-of-sequence token, chat templates. Findings say what
the trainers do.

Of TRL 1.16's trainers: a row whose prompt alone fills `max_length` is dropped, a sequence that is longer is cut at its
end (`keep_start`), with its end-of-sequence token; plain texts get the tokenizer's EOS, conversations what the chat
template ends a message with; a response starts where prompt and prompt with response part.
"""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .findings import Finding, percent, wilson
from .models import ModelFacts
from .plan import Plan
from .rows import Rows
from .tokens import TemplateFails, TokenCounts, count_tokens


# Shares from which on it is worth a warning. Our rules of thumb
_DROPPED, _CUT, _TEMPLATE = 0.01, 0.05, 0.01


def tokenizer_findings(tokenizer: PreTrainedTokenizerBase, rows: Rows, model: ModelFacts) -> list[Finding]:
    """
    What is wrong with the tokenizer for this dataset and model, without tokenizing anything.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        rows ([`Rows`]):
            Rows of the train split.
        model ([`ModelFacts`]):
            What the model's files say.

    Returns:
        `list[Finding]`
    """
    findings = []
    if rows.shape.conversational and not tokenizer.chat_template:
        findings.append(
            Finding(
                "chat_template_missing",
                "error",
                "No chat template",
                "The dataset is conversational, and the tokenizer has no chat template to write messages as text with: the training would stop.",
                "Use the tokenizer of the instruct version, set `tokenizer.chat_template` (`trl.clone_chat_template`), or make the dataset plain text.",
            )
        )
    if not rows.shape.conversational and tokenizer.chat_template:
        findings.append(
            Finding(
                "chat_template_unused",
                "warning",
                "Plain text for a model with a chat template",
                "The tokenizer has a chat template, but the dataset is plain text, to which none is applied: the model would be trained on text without "
                "the markers of its turns, and be asked with them later.",
                'Make it conversational: `[{"role": "user", "content": ...}]`. (Leave it if the texts have the markers in them.)',
            )
        )
    if not rows.shape.conversational and tokenizer.eos_token is None:
        findings.append(
            Finding(
                "eos_missing",
                "error",
                "No end-of-sequence token",
                "The tokenizer has no EOS, which the trainers append to each response: the training would stop.",
                "Set `tokenizer.eos_token`.",
            )
        )
    eos = tokenizer.eos_token_id
    if eos is not None and model.stop_ids and eos not in model.stop_ids:
        findings.append(
            Finding(
                "eos_differs",
                "warning",
                "Tokenizer and model end with different tokens",
                f"The tokenizer's EOS is {tokenizer.eos_token!r} ({eos}), but generation stops at {sorted(model.stop_ids)}: "
                + (
                    "responses are trained to end with what does not stop them."
                    if not rows.shape.conversational
                    else "whatever the chat template ends a message with has to be among the latter."
                ),
                "Put both into `eos_token_id` of the generation config.",
                {"tokenizer": eos, "generation": sorted(model.stop_ids)},
            )
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == eos:
        which = (
            "There is no padding token, so that TRL pads with EOS"
            if tokenizer.pad_token_id is None
            else "Padding is EOS"
        )
        findings.append(
            Finding(
                "pad_is_eos",
                "info",
                "Padding is the end-of-sequence token",
                f"{which}. That is harmless here: what counts in the loss is told by masks. Code that masks by the padding token never learns to stop.",
            )
        )
    return findings


def can_tokenize(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> bool:
    """Whether there is any point in trying."""
    return bool(tokenizer.chat_template) if rows.shape.conversational else tokenizer.eos_token is not None


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, rows: Rows, plan: Plan, model: ModelFacts, seed: int = 0
) -> tuple[TokenCounts | None, list[Finding]]:
    """
    Tokenizes rows as the trainer would, and says what is wrong with what comes out.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        dataset ([`~datasets.Dataset`]):
            The train split.
        rows ([`Rows`]):
            Its rows.
        plan ([`Plan`]):
            The training.
        model ([`ModelFacts`]):
            What the model's files say.
        seed (`int`, *optional*, defaults to `0`):
            Of the rows that are drawn.

    Returns:
        `tuple[TokenCounts | None, list[Finding]]`: no counts if the chat template fails.
    """
    try:
        counts = count_tokens(
            tokenizer, dataset, rows, model.stop_ids, plan.max_length, plan.truncation_mode, plan.takes_apart, seed
        )
    except TemplateFails as error:
        finding = Finding(
            "chat_template_fails",
            "error",
            "The chat template fails",
            f"{error}. The training would stop there.",
            "Check roles and their order in this row, or use another template.",
        )
        return None, [finding]
    if len(counts.owners) == 0:
        return None, []
    findings = [_summary(counts, len(rows)), *_template_findings(counts, rows, tokenizer, plan)]
    findings += [*_truncation_findings(counts, plan, model), *_context_findings(counts, plan, model)]
    return counts, findings


def _of_rows(flags: np.ndarray, counts: TokenCounts) -> tuple[dict[str, Any], str]:
    """The share of rows that have a response of which something is true, and the same in words."""
    hit = np.bincount(counts.owners[flags], minlength=len(counts.rows)) > 0
    share = wilson(int(hit.sum()), len(hit))
    return share, percent(share, counts.exact)


def _summary(counts: TokenCounts, number: int) -> Finding:
    responses = counts.lengths - counts.starts
    figures = {
        name: {"median": float(np.median(values)), "p95": float(np.quantile(values, 0.95)), "max": int(values.max())}
        for name, values in (("prompt", counts.prompts), ("response", responses), ("both", counts.lengths))
    }
    which = f"all {number}" if counts.exact else f"{len(counts.rows)} of {number}, drawn at random"
    text = "; ".join(f"{name} {of['median']:.0f}, {of['p95']:.0f}, {of['max']}" for name, of in figures.items())
    return Finding(
        "tokens",
        "info",
        "Tokens",
        f"Median, 95th percentile and maximum: {text}. Rows that were tokenized: {which}.",
        "",
        {**figures, "rows": len(counts.rows), "exact": counts.exact},
    )


def _template_findings(
    counts: TokenCounts, rows: Rows, tokenizer: PreTrainedTokenizerBase, plan: Plan
) -> list[Finding]:
    findings = []
    share, text = _of_rows(counts.starts < counts.prompts[counts.owners], counts)
    if share["rate"] > 0:
        example = next(iter(counts.lost))
        why = (
            "The chat template writes the prompt in another way when an answer follows"
            if rows.shape.conversational
            else "Tokens merge where the prompt ends and the response begins"
        )
        findings.append(
            Finding(
                "prompt_not_prefix",
                "warning" if share["rate"] >= _TEMPLATE else "info",
                "Prompts are tokenized differently with an answer",
                f"In {text} of the rows, the tokens of the prompt alone are not those that prompt and answer together begin with. {why}; the end of the "
                f"prompt ({example!r}, for example) is not trained with, though the model sees it when it is asked.",
                "Use a chat template that writes the prompt in the same way in both cases."
                if rows.shape.conversational
                else "End the prompts on a token boundary, such as a line break, or make them conversational.",
                {"share": share, "example": example},
            )
        )
    for code, flags, title, detail, remedy in (
        (
            "double_bos",
            counts.double_bos,
            "Two beginning-of-sequence tokens",
            f"begin with {tokenizer.bos_token!r} twice: the texts have it, or the chat template writes it, and the tokenizer adds it.",
            "Take it out of the texts or of the template.",
        ),
        (
            "double_eos",
            counts.double_eos,
            "Two end-of-sequence tokens",
            f"end with {tokenizer.eos_token!r} twice: the trainers append it, and the tokenizer or the texts do.",
            "Set `add_eos_token=False` for the tokenizer, or take it out of the texts.",
        ),
    ):
        share, text = _of_rows(flags, counts)
        if share["rate"] > 0:
            findings.append(
                Finding(code, "warning", title, f"In {text} of the rows, sequences {detail}", remedy, {"share": share})
            )
    missing, text = _of_rows(~counts.ends, counts)
    if missing["rate"] > 0:
        findings.append(
            Finding(
                "eos_missing",
                "warning",
                "Answers without an end-of-sequence token",
                f"In {text} of the rows, an answer has neither the tokenizer's EOS nor another token that stops generation at its end: the model is not "
                "taught when to stop.",
                "Use a chat template that ends messages with such a token, and name it in `eos_token_id` of the generation config."
                if rows.shape.conversational
                else "The tokenizer does not read its own EOS at the end of a text: check its settings.",
                {"share": missing},
            )
        )
    return findings


def _truncation_findings(counts: TokenCounts, plan: Plan, model: ModelFacts) -> list[Finding]:
    limit = plan.max_length
    if limit is None:
        return []
    findings = []
    keep_start = plan.truncation_mode == "keep_start"
    dropped = (counts.starts >= limit) & keep_start
    share, text = _of_rows(dropped, counts)
    if share["rate"] > 0:
        all_of_them = share["rate"] == 1
        findings.append(
            Finding(
                "prompts_dropped",
                "error" if all_of_them else "warning" if share["rate"] >= _DROPPED else "info",
                "Rows are dropped",
                f"In {text} of the rows, the prompt alone fills `max_length={limit}`: they are dropped without a word"
                + (", all of them, and nothing is left to train on." if all_of_them else "."),
                "Raise `max_length`, or shorten the prompts.",
                {"share": share, "max_length": limit},
            )
        )
    cut = (counts.lengths > limit) & ~dropped
    share, text = _of_rows(cut, counts)
    if share["rate"] > 0:
        of_responses = wilson(int(cut.sum()), len(cut))
        tokens = (counts.lengths - counts.starts)[~dropped].sum()
        lost = (counts.lengths - counts.kept)[cut].sum() / tokens
        needed = int(np.quantile(counts.lengths, 0.95, method="higher"))
        beyond = model.context is not None and needed > model.context
        what = (
            f"{percent(of_responses, counts.exact)} of the responses are cut at `max_length={limit}`, with their end-of-sequence token; "
            f"{lost:.1%} of all response tokens are lost. The model learns from answers that break off."
            if keep_start
            else f"{percent(of_responses, counts.exact)} of the sequences are longer than `max_length={limit}` and lose their beginning, prompts first."
        )
        findings.append(
            Finding(
                "completions_cut",
                "warning" if share["rate"] >= _CUT else "info",
                "Responses are cut" if keep_start else "Prompts are cut",
                f"In {text} of the rows; {what}",
                f"`max_length={needed}` would do for 95% of the sequences"
                + (
                    f", but the model's context is {model.context}: drop or shorten them."
                    if beyond
                    else ". Or drop these rows."
                ),
                {
                    "rows": share,
                    "responses": of_responses,
                    "tokens_lost": float(lost),
                    "p95": needed,
                    "max_length": limit,
                },
            )
        )
    gone = np.zeros(len(counts.rows), dtype=bool)
    gone[counts.owners[dropped]] = True
    alike = wilson(int((counts.alike & ~gone).sum()), len(counts.rows))
    if alike["rate"] > 0:
        findings.append(
            Finding(
                "identical_after_cut",
                "warning",
                "Pairs that are the same once they are cut",
                f"In {percent(alike, counts.exact)} of the rows, chosen and rejected differ only beyond `max_length={limit}`: they teach nothing.",
                "Raise `max_length`, or drop these rows.",
                {"share": alike, "max_length": limit},
            )
        )
    return findings


def _context_findings(counts: TokenCounts, plan: Plan, model: ModelFacts) -> list[Finding]:
    findings = []
    if model.context is not None and (longest := int(counts.kept.max())) > model.context:
        share, text = _of_rows(counts.kept > model.context, counts)
        findings.append(
            Finding(
                "beyond_context",
                "error",
                "Sequences beyond the model's context",
                f"In {text} of the rows, sequences of up to {longest} tokens are longer than the model's context of {model.context}: it fails there, or "
                "has never learned anything.",
                f"Set `max_length` to at most {model.context}.",
                {"share": share, "longest": longest, "context": model.context},
            )
        )
    if model.vocabulary is not None and counts.largest >= model.vocabulary:
        findings.append(
            Finding(
                "vocabulary",
                "error",
                "Tokens that the model does not have",
                f"The tokenizer gives the id {counts.largest}, and the model has {model.vocabulary} tokens: the training would stop, on a GPU without a "
                "readable error.",
                "Use the tokenizer of the model, or `model.resize_token_embeddings(len(tokenizer))`.",
                {"largest": counts.largest, "vocabulary": model.vocabulary},
            )
        )
    if plan.method == "soft_po" and plan.get("beta") > 0:
        used = counts.prompts if plan.max_length is None else counts.prompts[counts.prompts < plan.max_length]
        length, longest = plan.get("max_completion_length"), int(used.max(initial=0))
        if model.context is not None and longest + length > model.context:
            if longest < model.context:
                way_out = (
                    f"Set `max_completion_length` to at most {model.context - longest}, or remove the longest prompts."
                )
            else:
                way_out = (
                    "Remove the longest prompts, and set a smaller `max_completion_length` if that is not enough."
                )
            findings.append(
                Finding(
                    "no_room_for_samples",
                    "error",
                    "No room for online samples",
                    f"The longest prompt has {longest} tokens, and with `max_completion_length={length}` is longer than the model's context of "
                    f"{model.context}: SoftPOTrainer refuses that.",
                    way_out,
                    {"longest": longest, "max_completion_length": length, "context": model.context},
                )
            )
        if (counts.prompts == 0).any():
            findings.append(
                Finding(
                    "empty_prompts",
                    "error",
                    "Prompts without tokens",
                    f"{int((counts.prompts == 0).sum())} prompts have no tokens, so that no online sample can answer them: SoftPOTrainer refuses that.",
                    "Remove these rows, use a tokenizer that adds a BOS token, or set `beta=0`.",
                )
            )
    return findings
