# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
How many responses a second SSPO's extractors of key content take on one core, as the trainer runs them: extraction and the way
from phrases to tokens, in `datasets.map`.

    python examples/benchmarks/key_content.py --model STORIES260K --data DATA/hh_helpful_pairs.jsonl.gz
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

from datasets import Dataset, disable_caching, disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from trl_spo.sspo.degree_data import map_degrees


EXTRACTORS = ("rake", "yake", "position_rank", "random")


def tokenized(path: str, tokenizer, count: int) -> Dataset:
    """As many pairs as asked for, over and over again if there are fewer, as TRL leaves them for us."""
    pairs = load_dataset("json", data_files=path, split="train").select_columns(["prompt", "chosen", "rejected"])
    pairs = pairs.select([i % len(pairs) for i in range(count)])

    def tokenize(pair: dict) -> dict:
        row = {name: pair[name] + tokenizer.eos_token for name in ("chosen", "rejected")}
        ids = {name: tokenizer(pair["prompt"] + row[name]).input_ids for name in row}
        prompt = tokenizer(pair["prompt"]).input_ids
        start = min(
            next((i for i, (a, b) in enumerate(zip(prompt, x, strict=False)) if a != b), len(prompt))
            for x in ids.values()
        )
        return {**row, "prompt_ids": prompt[:start], **{f"{name}_ids": x[start:] for name, x in ids.items()}}

    return pairs.map(tokenize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a model, for its tokenizer")
    parser.add_argument("--data", required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--extractors", nargs="+", choices=EXTRACTORS, default=list(EXTRACTORS))
    args = parser.parse_args()

    disable_caching()
    disable_progress_bars()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = tokenized(args.data, tokenizer, args.pairs)
    tokens = [len(ids) for name in ("chosen", "rejected") for ids in data[f"{name}_ids"]]
    options = {"tokenizer": tokenizer, "columns": ("chosen", "rejected"), "num_degrees": 3}
    options |= {"language": "en", "stop_words": None, "seed": 0}
    machine = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        machine = next((line.split(":")[1].strip() for line in info.open() if "model name" in line), machine)
    print(f"{machine}, one core; {len(tokens)} responses, median {statistics.median(tokens):.0f} tokens\n")
    print("| extractor | responses / s | minutes for 100k | key content |")
    print("|---|---|---|---|")
    for extractor in args.extractors:
        map_degrees(data.select(range(2)), "warm-up", None, extractor=extractor, **options)
        start = time.process_time()
        found = map_degrees(data, "train", None, extractor=extractor, **options)
        rate = len(tokens) / (time.process_time() - start)
        key = sum(sum(found[f"{name}_key_tokens"]) for name in ("chosen", "rejected"))
        print(f"| {extractor} | {rate:.0f} | {100_000 / rate / 60:.1f} | {key / sum(tokens):.0%} |", flush=True)


if __name__ == "__main__":
    main()
