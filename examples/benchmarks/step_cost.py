# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time, tokens per second and peak memory of an optimizer step: our trainers beside TRL's DPOTrainer.

Every method trains in a process of its own (so that peak memory is its own) on the same pairs of random tokens, from
the same random weights. The processes take turns, one block of steps each, so that drift of the machine hits all alike.
Two processes of the same method differ too, by where their memory lies, so all are started several times over, in another
order: a ratio is taken within each launch, and the intervals are over launches. A block is a whole number of resampling
periods: SoftPO's sampling is in its time, amortised as in training. Random weights hardly ever end a sample, so every
online sample has the full `--completion_length` tokens, as many as the pairs' completions.

On the CPU the time of the process itself is shown beside the time on the clock, and the ratio to DPO is that of the
former: other processes on the machine hardly disturb it. The C library is told to keep the memory that PyTorch frees,
which it would otherwise give back and be given anew several times a step, a third of the time and not the same from
process to process. The memory there is what PyTorch has allocated at the peak of one more resampling period, by its
profiler (what the process holds depends on how the C library hands memory back), with the weights and the optimizer's
state.

    python examples/benchmarks/step_cost.py --json step_cost_cpu.json
    python examples/benchmarks/step_cost.py --device cuda --size qwen2-0.5b --json step_cost_gpu.json
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path


# The shapes: a small Llama for the CPU, and that of Qwen2-0.5B. The weights are random.
SIZES = {
    "tiny": {
        "architecture": "llama",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "qwen2-0.5b": {
        "architecture": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
METHODS = {
    "DPO": {},
    "SoftPO": {"calibration": "none"},
    "SoftPO calibrated": {"calibration": "reference"},
    "SoftPO calibrated, precomputed": {"calibration": "reference", "precompute_ref_log_probs": True},
    "StablePO penalty": {},
    "StablePO alternating": {"bilevel": "alternating"},
    "StablePO unrolled": {"bilevel": "unrolled"},
    "StablePO unrolled, finite difference": {"bilevel": "unrolled", "hypergradient": "finite_difference"},
    "StablePO unrolled, exact": {"bilevel": "unrolled", "hypergradient": "exact"},
    "SSPO": {},
    "SSPO, one level": {"degree_sampling": "one"},
    "SSPO text": {"removal": "text"},
    "SSPO text, one level": {"removal": "text", "degree_sampling": "one"},
}
DEFAULTS = {
    "cpu": {"batch_size": 8, "prompt_length": 32, "completion_length": 96},
    "cuda": {"batch_size": 16, "prompt_length": 256, "completion_length": 256},
}
# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TIMEOUT = 1800  # seconds that a process waits for its turn
KEPT_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
}  # of glibc, which others ignore


def make_model(folder: Path, size: str, device: str, max_positions: int) -> None:
    """A folder with a model of random weights and a tokenizer of one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    shape = dict(SIZES[size])
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[shape.pop("architecture")]
    words = ["<pad>", "</s>"] + [f"w{i}" for i in range(2, shape["vocab_size"])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = config_class(
        **shape,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = model_class(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.save_pretrained(folder)


def make_pairs(count: int, vocab_size: int, prompt_length: int, completion_length: int) -> list[dict[str, str]]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, vocab_size, (length,), generator=generator).tolist())

    # One token fewer, since the trainer appends EOS
    return [
        {
            "prompt": words(prompt_length),
            "chosen": " " + words(completion_length - 1) + " ",
            "rejected": " " + words(completion_length - 1) + " ",
        }
        for _ in range(count)
    ]


def work(name: str, args: argparse.Namespace, folder: str, ready, mine, following, results) -> None:
    """One process: trains with one method, whenever it is its turn."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    from trl_spo import SoftPOConfig, SoftPOTrainer, SSPOConfig, SSPOTrainer, StablePOConfig, StablePOTrainer

    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"

    def held(trainer) -> int:
        """Bytes of the weights and the optimizer's state."""
        tensors = [*trainer.model.parameters(), *(trainer.ref_model.parameters() if trainer.ref_model else ())]
        tensors += [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        return sum(tensor.nbytes for tensor in tensors)

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds, cpu_seconds, peaks = [], [], []
    timed_steps = args.block_steps * (args.rounds + 1)  # the first round warms up

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            ready.wait(TIMEOUT)

        def on_step_begin(self, _, state, control, **kwargs):
            if state.global_step >= timed_steps:
                self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profiler.start()
            elif state.global_step % args.block_steps == 0:
                if not mine.acquire(timeout=TIMEOUT):
                    raise TimeoutError(f"{name}: the other processes do not come to an end.")
                self.start, self.cpu_start = now(), time.process_time()

        def on_step_end(self, _, state, control, **kwargs):
            if state.global_step > timed_steps:
                self.profiler.stop()
                trace = os.path.join(folder, f"{name}.json")
                self.profiler.export_chrome_trace(trace)
                with open(trace) as file:
                    events = [event["args"] for event in json.load(file)["traceEvents"] if event["name"] == "[memory]"]
                # Counted from the profiler's start
                peaks.append(max(event["Total Allocated"] for event in events if event["Device Type"] == 0))
            elif state.global_step % args.block_steps == 0:
                seconds.append((now() - self.start) / args.block_steps)
                cpu_seconds.append((time.process_time() - self.cpu_start) / args.block_steps)
                following.release()

    options = dict(METHODS[name])
    common = {
        "output_dir": os.path.join(folder, "output"),
        "max_steps": timed_steps + (0 if cuda else args.block_steps),
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": 1e-6,
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    if name == "DPO":
        trainer_class, training_args = DPOTrainer, DPOConfig(**common)
    elif name.startswith("StablePO"):
        trainer_class, training_args = StablePOTrainer, StablePOConfig(**common, **options)
    elif name.startswith("SSPO"):
        # Every third word, so that there are phrases: two thirds of the tokens are key content
        options["stop_words"] = [f"w{i}" for i in range(2, SIZES[args.size]["vocab_size"], 3)]
        trainer_class, training_args = SSPOTrainer, SSPOConfig(**common, **options)
    else:
        options |= {"max_completion_length": args.completion_length}
        for field in ("resample_steps", "online_samples_per_step", "online_buffer_size"):
            if getattr(args, field) is not None:
                options[field] = getattr(args, field)
        trainer_class, training_args = SoftPOTrainer, SoftPOConfig(**common, **options)
    pairs = make_pairs(
        args.batch_size * 64, SIZES[args.size]["vocab_size"], args.prompt_length, args.completion_length
    )
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the trainer prints its log
        trainer = trainer_class(
            folder, args=training_args, train_dataset=Dataset.from_list(pairs), callbacks=[Turns()]
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else held(trainer) + max(peaks)
    results.put(
        {
            "method": name,
            "seconds": statistics.mean(seconds[1:]),
            "cpu_seconds": statistics.mean(cpu_seconds[1:]),
            "peak_mib": peak / 2**20,
        }
    )


def machine(device: str, threads: int) -> str:
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {threads} thread(s) used, torch {torch.__version__}"


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval."""
    if len(values) < 2:
        return values[0], math.inf
    quantile = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def launch(methods: list[str], args: argparse.Namespace, folder: str) -> dict[str, dict]:
    """Starts the processes, which take turns in the order of the methods, and waits for their results."""
    context = multiprocessing.get_context("spawn")
    turns = [context.Semaphore(0) for _ in methods]
    ready, results = context.Barrier(len(methods)), context.Queue()
    processes = [
        context.Process(
            target=work,
            args=(name, args, folder, ready, turns[i], turns[(i + 1) % len(turns)], results),
            daemon=True,
        )
        for i, name in enumerate(methods)
    ]
    for process in processes:
        process.start()
    turns[0].release()
    found = {}
    while len(found) < len(processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.terminate()
            raise SystemExit("A process failed, see above.")
        while not results.empty():
            result = results.get()
            found[result["method"]] = result
        time.sleep(0.5)
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batch_size", type=int, help="pairs per step (default: 8, on a GPU 16)")
    parser.add_argument("--prompt_length", type=int, help="tokens (default: 32, on a GPU 256)")
    parser.add_argument("--completion_length", type=int, help="tokens (default: 96, on a GPU 256)")
    parser.add_argument("--launches", type=int, default=5, help="processes per method, one after the other")
    parser.add_argument("--rounds", type=int, default=2, help="blocks per process, after one to warm up")
    parser.add_argument(
        "--block_steps", type=int, help="steps per block; a multiple of resample_steps, and the default"
    )
    parser.add_argument("--resample_steps", type=int, help="default: SoftPOConfig's, and so for the next two")
    parser.add_argument("--online_samples_per_step", type=int)
    parser.add_argument("--online_buffer_size", type=int)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    for option, value in DEFAULTS[args.device].items():
        if getattr(args, option) is None:
            setattr(args, option, value)

    from trl_spo import SoftPOConfig

    period = args.resample_steps or SoftPOConfig.resample_steps
    args.block_steps = args.block_steps or period
    if args.block_steps % period:
        parser.error(f"--block_steps ({args.block_steps}) must be a multiple of the resampling period ({period})")

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args.size, args.device, 2 * (args.prompt_length + args.completion_length))
        os.environ.update(KEPT_MEMORY)
        launches = [
            launch(args.methods[i % len(args.methods) :] + args.methods[: i % len(args.methods)], args, folder)
            for i in range(args.launches)
        ]

    # Both responses of each pair, with their prompts
    tokens = 2 * args.batch_size * (args.prompt_length + args.completion_length)
    where = machine(args.device, args.threads)
    samples = args.online_samples_per_step or SoftPOConfig.online_samples_per_step
    print(f"\n{where}\n{args.size}, {'bfloat16' if args.device == 'cuda' else 'float32'}, random weights")
    print(
        f"{args.batch_size} pairs a step, prompts of {args.prompt_length} and completions of {args.completion_length} "
        f"tokens; {samples} online samples a step, {args.online_buffer_size or samples} drawn every {period} steps; "
        f"{args.launches} launches, {args.rounds} rounds of {args.block_steps} steps each; ± 95 % over launches\n"
    )
    print("| method | ms / step | CPU ms / step | pair tokens / s | peak memory (MiB) | time / DPO | memory / DPO |")
    print("|---|---|---|---|---|---|---|")
    base = "DPO" if "DPO" in args.methods else args.methods[0]
    compared = "seconds" if args.device == "cuda" else "cpu_seconds"
    results = []
    for name in args.methods:
        mean, half = interval([1000 * found[name]["seconds"] for found in launches])
        cpu, cpu_half = interval([1000 * found[name]["cpu_seconds"] for found in launches])
        ratio, ratio_half = interval([found[name][compared] / found[base][compared] for found in launches])
        peak = statistics.mean(found[name]["peak_mib"] for found in launches)
        result = {
            "method": name,
            "launches": [found[name] for found in launches],
            "ms_per_step": mean,
            "cpu_ms_per_step": cpu,
            "tokens_per_second": tokens / mean * 1000,
            "peak_mib": peak,
            "time_ratio": ratio,
            "time_ratio_half_width": ratio_half,
            "memory_ratio": peak / statistics.mean(found[base]["peak_mib"] for found in launches),
        }
        results.append(result)
        print(
            f"| {result['method']} | {mean:.1f} ± {half:.1f} | {cpu:.1f} ± {cpu_half:.1f} | "
            f"{result['tokens_per_second']:.0f} | {result['peak_mib']:.0f} | {ratio:.2f} ± {ratio_half:.2f} | "
            f"{result['memory_ratio']:.2f} |"
        )
    if args.json:
        content = {"machine": where, "options": vars(args), "results": results}
        Path(args.json).write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
