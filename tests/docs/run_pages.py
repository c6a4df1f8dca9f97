# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the code blocks of the documentation: `python run_pages.py OUT [PAGE ...]`, where a page is one of docs/ or the path of another.

Each page has a process that forks from this one, which has imported everything, a folder OUT/PAGE to work in, and leaves OUT/PAGE.jsonl
with what came of each block. There is a Hub on loopback with tiny models and datasets (`world.py`), and a server of the models that
judge; nothing else is reached. `make_cheap` below has all that is less than what the pages say.
"""

import ast
import functools
import gc
import importlib.metadata
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import traceback
import urllib.request
from importlib import import_module
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

from blocks import ROOT, Block, blocks_of, pages  # noqa: E402 - found by the path above
from commands import MEASURED, NOT_RUN, Shell, fork  # noqa: E402 - found by the path above


TOKEN = "hf_of_the_test"  # of hub_server.py
# What the reader of a page has: files of his own that it speaks of, and models that other pages train
GIVEN = {
    "README.md": ("labelled_by_us.jsonl",),
    "compare.md": ("rewards.py",),
    "evaluation.md": ("Qwen2.5-0.5B-SoftPO",),
    "synthetic.md": ("labelled_by_us.jsonl", "held_out.jsonl", "my_evals.py"),
}
# What reads the YAML of a page, where it is not a command of the page
READERS = {
    "compare.md": "trl_spo.comparison:ComparisonConfig",
    "synthetic.md": "trl_spo.synthetic:SynthesisConfig",
}
# What the pages import sooner or later, once for all of them
MODULES = (
    "openai",
    "sklearn.feature_extraction.text",
    "sklearn.model_selection",
    "trl_spo.advisor.advice",
    "trl_spo.comparison.comparison",
    "accelerate.commands.launch",
    "deepspeed",
    "peft",
    "trl_spo.cli.launch",
    "trl_spo.cli.training",
    "trl_spo.sandbox",
)
NAMES = {
    "trl": ("DPOTrainer", "KTOTrainer", "LogCompletionsCallback", "RewardTrainer", "SFTTrainer"),
    "trl_spo": ("SoftPOTrainer", "SSPOKTOTrainer", "SSPOTrainer", "StablePOTrainer"),
    "trl_spo.synthetic": ("Rounds", "Synthesis"),
}
JUDGES = "localhost:8000"  # where the pages say that a server of models is


def start(*command: str) -> tuple[subprocess.Popen, str]:
    """A server, and where it is."""
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    return server, f"127.0.0.1:{int(server.stdout.readline())}"


def set_environment(out: Path, hub: str, judges: str) -> None:
    """Before anything is imported that reads it once."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "ACCELERATE_")):
            del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": f"http://{hub}",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
        "HF_HOME": str(out / "hf"),
        "HF_HUB_DISABLE_XET": "1",  # whose storage is another server
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_SPO_CACHE": str(out / "cache"),
        "CUDA_VISIBLE_DEVICES": "",  # which a process that forks cannot share
        "OPENAI_BASE_URL": f"http://{judges}/v1",
        "OPENAI_API_KEY": "sk-of-the-test",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }


def make_cheap() -> None:
    """
    All that is less than what the pages say: no training is on a GPU, in bfloat16 or of more than two steps, and the sandbox's models
    are smaller and hardly trained.
    """
    import torch
    from transformers import TrainingArguments

    from trl_spo.sandbox import arithmetic, stories

    torch.set_num_threads(1)
    post_init = TrainingArguments.__post_init__

    def cheap_post_init(self):
        self.use_cpu, self.bf16 = True, False
        self.max_steps = min(self.max_steps, 2) if self.max_steps > 0 else 1
        post_init(self)

    TrainingArguments.__post_init__ = cheap_post_init
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "pretrain_steps": 2, "pretrain_batch_size": 4}
    small = stories.StoriesConfig(**sizes, num_train_prompts=16, num_eval_prompts=8, max_tokens=12)
    stories.StoriesWorld.__init__.__defaults__ = (small, False)
    small = arithmetic.ArithmeticConfig(**sizes, num_train_pairs=16, num_eval_sums=8)
    arithmetic.ArithmeticWorld.__init__.__defaults__ = (small, False)


class Page:
    """
    The blocks of a page, run one after another.

    Args:
        folder (`Path`):
            Where it works.
        world (`Path`):
            Folder that `make_world` has filled.
        judges (`str`):
            Where the server of the models that judge is.
    """

    def __init__(self, name: str, text: str, folder: Path, world: Path, judges: str):
        self.name, self.text, self.judges = name, text, judges
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.yaml: dict[str, Any] | None = None  # what the fragments that follow belong to
        self.shell = Shell(
            {
                "MODEL": str(world / "Qwen" / "MODEL"),
                "REVIEWS": str(world / "REVIEWS.jsonl"),
                "PAIRS.jsonl.gz": str(world / "PAIRS.jsonl"),
                "DATASET": "trl-lib/ultrafeedback_binarized",
                "DATA": str(world),
            },
            NOT_RUN | MEASURED if name == "results.md" else NOT_RUN,
        )
        folder.mkdir()
        os.chdir(folder)
        # As in a clone
        shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for path in Path("examples").glob("*.yaml"):
            path.write_text(path.read_text().replace(JUDGES, judges))
        Path("trl_spo").mkdir()
        Path("trl_spo", "accelerate_configs").symlink_to(ROOT / "trl_spo" / "accelerate_configs")
        for file in GIVEN.get(self.name, ()):
            path = world / "given" / file
            (shutil.copytree if path.is_dir() else shutil.copy)(path, file)

    def run(self, block: Block) -> list[str]:
        """Runs a block, and says what was not run as it stands."""
        text = block.text.replace(JUDGES, self.judges)
        match block.language:
            case "python":
                return self.run_python(text, block)
            case "bash":
                return self.shell.run(text)
            case "diff":
                return self.run_diff(text, block)
            case "yaml":
                return self.read_yaml(text)
            case "text":
                return self.check_text(text)
            case "bibtex":
                return self.check_citation(text)
        raise ValueError(f"This test does not know what to do with a block of {block.language!r}.")

    def run_python(self, text: str, block: Block) -> list[str]:
        tree = ast.parse(text)
        if all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Dict) for node in tree.body):
            rows = [ast.literal_eval(node.value) for node in tree.body]
            self.train_on(rows)
            return [f"trained on {len(rows)} rows"]
        self.execute(text, block.line, self.namespace)
        return []

    def execute(self, text: str, line: int, namespace: dict[str, Any]) -> None:
        exec(compile("\n" * line + text, self.name, "exec"), namespace)

    def run_diff(self, text: str, block: Block) -> list[str]:
        """What was there runs, and what comes in its place does, on which the page goes on."""
        lines = text.splitlines()
        assert all(line[:1] in ("", " ", "-", "+") for line in lines), "a line of a diff begins with a space, + or -"
        before, after = ("\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in "+-")
        self.execute(before, block.line, dict(self.namespace))
        self.execute(after, block.line, self.namespace)
        return []

    def train_on(self, rows: list[dict]) -> None:
        """Rows of a dataset that the page's trainer takes."""
        from datasets import Dataset

        import trl_spo

        for row in rows:
            method = {"soft_po.md": "SoftPO", "sspo.md": "SSPOKTO" if "label" in row else "SSPO"}[self.name]
            trainer = getattr(trl_spo, f"{method}Trainer")(
                "Qwen/Qwen2.5-0.5B-Instruct",
                args=getattr(trl_spo, f"{method}Config")("rows"),
                train_dataset=Dataset.from_list([row] * 4),
            )
            trainer.train()

    def read_yaml(self, text: str) -> list[str]:
        """A file is written for the commands that come after it; a fragment is read as a part of the file above it."""
        import yaml

        module, _, name = READERS.get(self.name, "").partition(":")
        read = getattr(import_module(module), name).from_yaml if module else None
        named = re.match(r"# (\S+\.yaml)\n", text)
        if named is not None:
            Path(named[1]).write_text(text)
            self.yaml = yaml.safe_load(text)
            if read is not None:
                read(named[1])
            else:
                commands = "".join(block.text for block in blocks_of(self.name, self.text) if block.language == "bash")
                assert f" {named[1]} " in commands.replace("\n", " "), f"no command reads {named[1]}"
            return []
        assert read is not None and self.yaml is not None, "nothing is known to read this"
        Path("fragment.yaml").write_text(
            yaml.safe_dump({**self.yaml, **yaml.safe_load(text), "output_dir": "fragment"})
        )
        config = read("fragment.yaml")
        if getattr(config, "rounds", None) is not None:
            from trl_spo.synthetic import Rounds

            Rounds(config)
        return ["read with the file above, not run"]

    def check_text(self, text: str) -> list[str]:
        """Formulas, and what a program shows."""
        from trl_spo.sandbox.arithmetic import is_right

        for line in text.splitlines():
            assert not re.match(r"(\$|trl-spo|python|pip|from|import|accelerate)\s", line), (
                f"this is to be run: {line}"
            )
        sums = re.findall(r"^(\d+)\+(\d+): +(\S+) +(right|wrong)", text, re.MULTILINE)
        for a, b, answer, verdict in sums:
            assert is_right(f"{a}+{b}:", answer) == (verdict == "right"), answer
        return [f"{len(sums)} sums checked"] if sums else ["nothing to run"]

    def check_citation(self, text: str) -> list[str]:
        """It is that of the trainers' model cards."""
        import trl_spo

        def fields(citation: str) -> set[tuple[str, str]]:
            return set(re.findall(r"(\w+)\s*= \{*(.+?)\}*,?$", citation, re.MULTILINE))

        papers = [getattr(trl_spo, f"{name}Trainer")._paper["citation"] for name in ("SoftPO", "StablePO", "SSPO")]
        assert fields(text) in [fields(paper) for paper in papers], "no trainer has this citation"
        return ["compared"]


def run_page(name: str, text: str, out: Path, world: Path, judges: str) -> None:
    folder, log = out / name.removesuffix(".md"), out / f"{name}.log"
    page = Page(name, text, folder, world, judges)
    with (out / f"{name}.jsonl").open("w") as file:
        for block in blocks_of(name, text):
            began, error, notes, shown = time.perf_counter(), None, [], log.stat().st_size
            try:
                notes = page.run(block)
            except BaseException:  # `SystemExit` of a parser too, whose reason is in what it shows
                sys.stdout.flush()
                error = traceback.format_exc() + log.read_bytes()[shown:].decode()[-2000:]
            seconds = round(time.perf_counter() - began, 2)
            found = {"name": block.name, "error": error, "notes": notes, "seconds": seconds}
            file.write(json.dumps(found) + "\n")
            file.flush()


def main(out: Path, names: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    world = out / "world"
    here = Path(__file__).parent
    servers = []
    try:
        for command in ((str(here / "hub.py"), str(world / "hub")), (str(here / "judges.py"),)):
            servers.append(start(*command))
        (_, hub), (_, judges) = servers
        set_environment(out, hub, judges)

        from world import make_world

        for name in MODULES:
            import_module(name)
        for name, members in NAMES.items():
            for member in members:
                getattr(import_module(name), member)

        make_cheap()
        make_world(world)
        # As in tests/conftest.py: or the training would take less than the metadata of the packages takes to be read, and each process
        # would look for garbage among all that has been imported
        importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
        ssl.create_default_context = functools.cache(ssl.create_default_context)  # nothing here is encrypted
        gc.freeze()
        texts = {name: text for name, text in pages().items() if not names or name in names}
        texts |= {Path(name).name: Path(name).read_text() for name in names if name not in texts}
        for name, text in texts.items():
            child = fork()
            if child == 0:
                log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                try:
                    run_page(name, text, out, world, judges)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(0)
            os.waitpid(child, 0)
            for line in (out / f"{name}.jsonl").read_text().splitlines():
                found = json.loads(line)
                shown = (found["error"] or "").strip().splitlines()[-1:] or found["notes"]
                print(f"{found['seconds']:6.2f} {'failed' if found['error'] else 'ok':6} {found['name']} {shown}")
        with urllib.request.urlopen(f"http://{hub}/log") as answer:
            (out / "hub.json").write_bytes(answer.read())
    finally:
        for server, _ in servers:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
