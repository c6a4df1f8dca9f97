# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every code block of README.md and docs/, as it is printed: `tests/docs/run_pages.py` runs them, in one process and its forks. And what
the pages say that no block has: messages, and the memory of a training.

To see what came of a page, with the seconds of each block and a log: `python tests/docs/run_pages.py OUT quickstart.md`.
"""

import ast
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

import trl_spo

from .docs.blocks import Block, blocks_of, pages


SCRIPTS = Path(__file__).parent / "docs"
BROKEN = SCRIPTS / "broken.md"
BLOCKS = [block for name, text in pages().items() for block in blocks_of(name, text)]
BROKEN_BLOCKS = blocks_of(BROKEN.name, BROKEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with what came of all pages."""
    out = tmp_path_factory.mktemp("docs") / "out"
    command = [sys.executable, str(SCRIPTS / "run_pages.py"), str(out), *pages(), str(BROKEN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def came_of(ran: Path, block: Block) -> dict:
    for line in (ran / f"{block.page}.jsonl").read_text().splitlines():
        found = json.loads(line)
        if found["name"] == block.name:
            return found
    raise AssertionError(f"{block.name} was not run: {(ran / f'{block.page}.log').read_text()[-3000:]}")


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(ran, block):
    error = came_of(ran, block)["error"]
    assert error is None, f"{block.text}\n{error}"


@pytest.mark.slow
@pytest.mark.parametrize("block", BROKEN_BLOCKS, ids=lambda block: block.name)
def test_broken_block(ran, block):
    lines = BROKEN.read_text(encoding="utf-8").splitlines()
    expected = re.fullmatch(r"<!-- (.*) -->", lines[block.line - 3])[1]
    error = came_of(ran, block)["error"]
    assert error is not None, block.text
    assert re.search(expected, error), error


@pytest.mark.slow
def test_the_model_was_pushed(ran):
    """By the block of the README, to the Hub on loopback."""
    assert "POST /api/models/somebody/aligned/commit/main" in json.loads((ran / "hub.json").read_text())["log"]


def test_every_fence_is_of_a_block():
    for name, text in pages().items():
        fences = sum(line.lstrip().startswith(("```", "~~~")) for line in text.splitlines())
        assert fences == 2 * len(blocks_of(name, text)), name


def test_blocks():
    text = "A\n\n```python\nx = 1\n```\n\n!!! note\n    ````diff\n    -```\n    +b\n    ````\n~~~\n```\n~~~\n"
    assert blocks_of("page", text) == [
        Block("page", 3, "python", "x = 1\n"),
        Block("page", 8, "diff", "-```\n+b\n"),
        Block("page", 12, "", "```\n"),
    ]
    with pytest.raises(ValueError, match="The block in line 2 of page does not end"):
        blocks_of("page", "A\n```bash\nmake demo\n")


# -- troubleshooting.md

# Messages of others: a part of each, and the module that has it
FOREIGN = {
    "AcceleratorState._reset_state()": "accelerate.state",
    "CUDA_HOME": "deepspeed.ops.op_builder.builder",
    "Repo id must use": "huggingface_hub.utils._validators",
    "We couldn't connect": "transformers.utils.hub",
    "assign use_cpu": "transformers.training_args",
}
MESSAGES = [block for block in BLOCKS if block.page == "troubleshooting.md" and block.language == "text"]


def strings_of(source: str) -> list[str]:
    """The strings of a program, with … for what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.fixture(scope="module")
def our_strings() -> list[str]:
    files = Path(trl_spo.__file__).parent.rglob("*.py")
    return [string for file in files for string in strings_of(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("block", MESSAGES, ids=lambda block: block.name)
def test_a_message_is_what_the_code_says(our_strings, block):
    message = " ".join(block.text.split())
    parts = [part.strip() for part in message.split("…") if len(part.strip()) > 3]
    strings = our_strings
    for known, module in FOREIGN.items():
        if known in message:
            strings = strings_of(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    pattern = ".*".join(map(re.escape, parts))
    assert any(re.search(pattern, string, re.DOTALL) for string in strings), message


# -- distributed.md

PARAMETERS = {
    "0.5B": 0.494,
    "1.5B": 1.54,
    "3B": 3.09,
    "8B": 8.03,
    "14B": 14.8,
    "32B": 32.8,
    "70B": 70.6,
}  # in billions


def tables_under(title: str) -> list[list[list[str]]]:
    """The cells of the tables of a section of distributed.md."""
    section = pages()["distributed.md"].split(f"\n### {title}\n")[1].split("\n##")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()] for table in tables
    ]


def formula(text: str, p: float, n: int) -> float:
    """The value of such as `6 P + 14 P/N + 1`."""
    if found := re.fullmatch(r"the larger one of (.*) and (.*)", text):
        return max(formula(part, p, n) for part in found.groups())
    code = re.sub(r"(\d) (P|min)", r"\1 * \2", text)
    return eval(code, {"P": p, "N": n, "min": min})


class TestMemory:
    FORMULAS = {name.strip("`"): text.split(", and")[0] for name, text in tables_under("Bytes per parameter")[1][2:]}

    def options(self, kind: str, p: float, n: int) -> list[tuple[str, float]]:
        """The configs in the order in which the page tries them, and the GB that each takes."""
        plain, sharded = "single_gpu" if n == 1 else "multi_gpu", [] if n == 1 else ["zero2", "zero3"]
        if kind == "full":
            return [(f"`{name}`", formula(self.FORMULAS[name], p, n)) for name in (plain, *sharded, "zero3_offload")]
        zero3 = [] if n == 1 else [("`zero3`", 2 * p / n + 1 + 2 * min(p, 1))]
        return [(f"`{plain}`", 4 * p), (f"`{plain}` bf16", 2 * p), *zero3, (f"`{plain}` 4-bit", 0.7 * p)]

    @pytest.mark.parametrize(("title", "limit"), [("80 GB", 68), ("24 GB", 20)])
    def test_tables(self, title, limit):
        for kind, table in zip(("full", "LoRA"), tables_under(title), strict=True):
            for size, *cells in table[2:]:
                for n, cell in zip((1, 2, 4, 8), cells, strict=False):
                    fits = [f"{name} ~{gb:.0f}" for name, gb in self.options(kind, PARAMETERS[size], n) if gb <= limit]
                    assert cell == (fits or ["–"])[0], (kind, size, n)

    def test_from_how_many_gpus_zero3_is_enough(self):
        for size, *cells in tables_under("80 GB")[0][2:]:
            if cells[-1]:
                fits = [n for n in (2, 4, 8, 16, 24) if formula(self.FORMULAS["zero3"], PARAMETERS[size], n) <= 68]
                assert cells[-1] == f"{fits[0]} GPUs"

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, (4, 4, 8, 4)),
            ({"model_init_kwargs": {"dtype": "bfloat16"}}, (2, 2, 4, 2)),
            ({"peft_config": LoraConfig(r=2)}, (4, 0, 0, 0)),
        ],
        ids=["full", "bfloat16", "lora"],
    )
    def test_bytes_per_parameter(self, make_trainer, options, expected):
        """In one process, in mixed precision, counted before the optimizer's second step: weights, gradients, moments, reference."""
        found = []

        def bytes_of(tensors) -> int:
            return sum(tensor.nbytes for tensor in tensors if tensor is not None)

        class Count(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
                reference = [] if trainer.ref_model is None else trainer.ref_model.parameters()
                moments = [
                    value for values in optimizer.state.values() for name, value in values.items() if name != "step"
                ]
                gradients = [parameter.grad for parameter in model.parameters()]
                found.append([bytes_of(tensors) for tensors in (model.parameters(), gradients, moments, reference)])

        adapter = {name: options[name] for name in options if name == "peft_config"}
        options = {name: options[name] for name in options if name != "peft_config"}
        trainer = make_trainer({"callbacks": [Count()], **adapter}, bf16=True, optim="adamw_torch", **options)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) if adapter else 0
        parameters = sum(p.numel() for p in trainer.model.parameters()) - trainable
        trainer.train()
        adapters = [bytes_each * trainable for bytes_each in (4, 4, 8, 0)]
        assert [(n - of_adapter) / parameters for n, of_adapter in zip(found[1], adapters, strict=True)] == list(
            expected
        )
