# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The package around the trainers: what is imported when, what is shipped, and the command line."""

import ast
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import trl_spo


ROOT = Path(__file__).parent.parent
CONFIGS = files("trl_spo").joinpath("accelerate_configs")
CONFIG_NAMES = ["cpu", "fsdp2", "multi_gpu", "single_gpu", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


class TestImport:
    def test_loads_no_framework(self):
        modules = json.loads(run_python("import json, sys, trl_spo; print(json.dumps(list(sys.modules)))"))
        assert not {"torch", "transformers", "trl", "datasets", "accelerate", "numpy"} & set(modules)

    def test_is_quick(self):
        code = "import time; start = time.perf_counter(); import trl_spo; print(time.perf_counter() - start)"
        assert float(run_python(code)) < 1

    def test_public_names(self):
        trainers = [
            f"{name}{kind}" for name in ("SSPO", "SSPOKTO", "SoftPO", "StablePO") for kind in ("Config", "Trainer")
        ]
        assert sorted(trl_spo.__all__) == sorted(["DegreeHeads", *trainers, "__version__"])
        assert set(trl_spo.__all__) <= set(dir(trl_spo))

    def test_public_names_are_trl_classes(self):
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

        for name in ("SoftPO", "StablePO", "SSPO"):
            assert issubclass(getattr(trl_spo, f"{name}Config"), DPOConfig)
            assert issubclass(getattr(trl_spo, f"{name}Trainer"), DPOTrainer)
        assert issubclass(trl_spo.SSPOKTOConfig, KTOConfig) and issubclass(trl_spo.SSPOKTOTrainer, KTOTrainer)

    @pytest.mark.parametrize("name", ["", ".advisor", ".comparison", ".evaluation", ".synthetic"])
    def test_type_checkers_see_every_public_name(self, name):
        # What is imported under TYPE_CHECKING must be what `__getattr__` finds
        package = import_module("trl_spo" + name)
        tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
        imported = {
            alias.name: node.module
            for block in tree.body
            if isinstance(block, ast.If)
            for node in block.body
            for alias in node.names
        }
        assert imported == package._PUBLIC

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="module 'trl_spo' has no attribute 'HardPOTrainer'"):
            trl_spo.HardPOTrainer  # noqa: B018


class TestMetadata:
    def test_version(self, pyproject):
        assert trl_spo.__version__ == pyproject["project"]["version"]

    def test_version_is_in_the_changelog(self):
        assert f"## [{trl_spo.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_version_is_in_the_citation(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        assert citation["version"] == trl_spo.__version__

    def test_trl_window_is_that_of_compat(self, pyproject):
        from packaging.requirements import Requirement
        from packaging.version import Version

        from trl_spo._compat import TRL_BELOW, TRL_MIN

        requirement = next(r for r in map(Requirement, pyproject["project"]["dependencies"]) if r.name == "trl")
        window = {specifier.operator: Version(specifier.version) for specifier in requirement.specifier}
        assert window == {">=": Version(TRL_MIN), "<": Version(TRL_BELOW)}

    def test_constraints_pin_every_direct_dependency(self, pyproject):
        def names(requirements):
            return {re.match(r"[\w.-]+", r).group().lower().replace("_", "-") for r in requirements}

        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
        extras = pyproject["project"]["optional-dependencies"]
        # vLLM has to match the machine's CUDA: it is not pinned
        direct = names(pyproject["project"]["dependencies"]).union(*map(names, extras.values())) | {"deepspeed"}
        assert direct - {"trl-spo"} <= names(pins)

    def test_installed_metadata_is_current(self, pyproject):
        runtime = [requirement for requirement in requires("trl-spo") if "extra ==" not in requirement]
        assert len(runtime) == len(pyproject["project"]["dependencies"])

    def test_ships_type_hints_and_templates(self):
        assert files("trl_spo").joinpath("py.typed").is_file()
        assert files("trl_spo").joinpath("templates/model_card.md").is_file()

    def test_data_files_are_in_the_wheel(self, pyproject):
        """Whatever stands in the package and is no module: an editable installation has it anyway."""
        package = ROOT / "trl_spo"
        patterns = pyproject["tool"]["setuptools"]["package-data"]["trl_spo"]
        shipped = {path for pattern in patterns for path in package.glob(pattern)}
        others = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert others == shipped


class TestAccelerateConfigs:
    def test_names(self):
        assert sorted(file.name for file in CONFIGS.iterdir()) == [f"{name}.yaml" for name in CONFIG_NAMES]

    @pytest.mark.parametrize("name", CONFIG_NAMES)
    def test_accelerate_reads_it(self, name):
        from accelerate.commands.config.config_args import load_config_from_file

        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises on keys that it does not know
        # -1: left open, so that `--num_processes` decides
        assert config.num_processes == (1 if name in ("cpu", "single_gpu") else -1)
        assert config.mixed_precision == ("no" if name == "cpu" else "bf16")
        if name.startswith("zero"):
            assert config.deepspeed_config["zero_stage"] == int(name[4])
            offload = "cpu" if name.endswith("offload") else "none"
            assert config.deepspeed_config["offload_optimizer_device"] == offload

    @pytest.mark.parametrize("name", CONFIG_NAMES)
    def test_num_processes_can_be_overridden(self, name):
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2", "script.py"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
        assert args.num_processes == 2

    def test_by_name_or_path(self, tmp_path):
        from trl_spo.cli.launch import accelerate_config_path

        assert accelerate_config_path("zero3") == str(CONFIGS / "zero3.yaml")
        own = tmp_path / "own.yaml"
        own.touch()
        assert accelerate_config_path(str(own)) == str(own)
        with pytest.raises(
            ValueError, match="zero4` is neither a file nor a packaged config.*cpu, fsdp2.*zero3_offload"
        ):
            accelerate_config_path("zero4")


class TestCommand:
    def run(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "trl_spo.cli.main", *arguments], capture_output=True, text=True, timeout=300
        )

    def test_help_is_quick_and_lists_the_commands(self):
        start = time.perf_counter()
        result = self.run("--help")
        assert time.perf_counter() - start < 3  # the interpreter's own start included
        assert result.returncode == 0
        for command in ("demo", "soft-po", "stable-po", "sspo", "sspo-kto"):
            assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)

    def test_version(self):
        assert self.run("--version").stdout.strip() == f"trl-spo {trl_spo.__version__}"

    def test_unknown_command(self):
        result = self.run("hard-po")
        assert result.returncode == 2
        assert "invalid choice: 'hard-po'" in result.stderr

    def test_every_command_has_its_file(self):
        from trl_spo.cli.main import TOOLS, TRAINERS

        folder = Path(trl_spo.__file__).parent / "cli"
        assert all((folder / f"{name.replace('-', '_')}.py").is_file() for name in [*TOOLS, *TRAINERS])

    def test_help_of_the_demo(self):
        result = self.run("demo", "--help")
        assert result.returncode == 0, result.stderr
        assert "usage: trl-spo demo" in result.stdout

    # The others in this process, since importing TRL takes seconds

    def run_here(self, capsys, *arguments):
        from trl_spo.cli.main import main

        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        return stop.value.code, capsys.readouterr()

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("soft-po", ["--alpha", "--resample_steps"]),
            ("stable-po", ["--upper_loss", "--sft_dataset_name"]),
            ("sspo", ["--num_degrees", "--stop_words", "--loss_weights"]),
            ("sspo-kto", ["--num_degrees", "--head_learning_rate", "--desirable_weight"]),
        ],
    )
    def test_help_of_a_training(self, capsys, command, options):
        code, captured = self.run_here(capsys, command, "--help")
        assert code == 0
        for option in (*options, "--dataset_name", "--model_name_or_path", "--learning_rate"):
            assert option in captured.out

    def test_misspelled_option_of_a_training(self, capsys):
        code, captured = self.run_here(capsys, "soft-po", "--learning_rates", "1e-5")
        assert code == 2
        assert "--learning_rates is an option neither of the training nor of `accelerate launch`" in captured.err
        assert "did you mean --learning_rate?" in captured.err

    def test_unknown_accelerate_config(self, capsys):
        code, captured = self.run_here(capsys, "soft-po", "--accelerate_config", "zero4")
        assert code == 2
        assert "`--accelerate_config zero4` is neither a file nor a packaged config" in captured.err


class TestSplitArguments:
    @pytest.fixture
    def parser(self):
        from trl_spo.cli.soft_po import make_parser

        return make_parser()

    def test_command_line(self, parser):
        from trl_spo.cli.launch import split_arguments

        arguments = [
            "--alpha",
            "2",
            "--num_processes",
            "2",
            "--use_cpu",
            "--mixed_precision",
            "no",
            "--max_steps",
            "2",
        ]
        launch, training = split_arguments(parser, arguments)
        assert launch == ["--num_processes", "2", "--mixed_precision", "no"]
        assert training == ["--alpha", "2", "--use_cpu", "--max_steps", "2"]

    def test_file_then_command_line(self, parser, tmp_path, monkeypatch):
        from trl_spo.cli.launch import split_arguments

        monkeypatch.setenv("TRL_SPO_TEST", "before")
        file = tmp_path / "config.yaml"
        file.write_text("alpha: 0.3\naccelerate_config: zero2\nmulti_gpu: true\nenv:\n  TRL_SPO_TEST: 1\n")
        launch, training = split_arguments(parser, ["--config", str(file), "--accelerate_config", "zero3"])
        assert launch == ["--accelerate_config", "zero2", "--multi_gpu", "--accelerate_config", "zero3"]
        assert training == ["--config", str(file)]
        assert os.environ["TRL_SPO_TEST"] == "1"


class TestDocs:
    """What the documentation says in a second place."""

    def options_of(self, name):
        """The section on options of a trainer's page."""
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        return page.split("\n## Options\n")[1].split("\n## ")[0]

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("soft_po", "SoftPOConfig"),
            ("stable_po", "StablePOConfig"),
            ("sspo", "SSPOConfig"),
            ("sspo", "SSPOKTOConfig"),
        ],
    )
    def test_every_option_stands_on_the_page_with_its_default(self, name, config):
        from dataclasses import MISSING, fields

        config = getattr(trl_spo, config)
        cells = {}
        for names, default in re.findall(r"^\| (.+?) \| (.+?) \|", self.options_of(name), re.MULTILINE):
            cells |= dict.fromkeys(re.findall(r"`(\w+\*?)`", names), default)
        # What two configs share stands in a base of theirs
        ours = [base for base in config.__mro__ if base.__module__.startswith("trl_spo.")]
        own = [field for field in fields(config) if any(field.name in base.__annotations__ for base in ours)]
        words = {"none": None, "true": True, "false": False}
        for field in own:
            if field.name.startswith("vllm_"):
                assert "vllm_*" in cells
            elif cells[field.name] not in ("neutral", "as many"):
                cell = cells[field.name]
                default = field.default if field.default is not MISSING else field.default_factory()
                assert (words[cell] if cell in words else ast.literal_eval(cell.strip("`"))) == default, field.name
        assert set(cells) - {"vllm_*"} <= {field.name for field in own}

    def test_synthetic_preferences_without_their_extra(self):
        """In another process, where the packages seem to be missing."""
        script = (
            "import sys\nsys.modules['krippendorff'] = None\nimport trl_spo.synthetic\n"
            "try:\n    trl_spo.synthetic.Synthesis\nexcept ImportError as error:\n    print(error)"
        )
        shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
        assert "needs the package 'krippendorff'. Run `pip install \"trl-spo[synthetic]\"`." in shown

    def test_evaluation_and_comparison_need_their_own_extra_only(self):
        """In another process, where what only `synthetic` brings seems to be missing, and then what `eval` brings."""
        script = (
            "import sys\nsys.modules |= dict.fromkeys(('datasketch', 'krippendorff', 'openai', 'aiohttp'))\n"
            "import trl_spo.evaluation as one, trl_spo.comparison as other\n"
            "print([getattr(m, name) is not None for m in (one, other) for name in m.__all__].count(True))\n"
            "for name in [name for name in sys.modules if name.startswith(('trl_spo.evaluation', 'sacrebleu'))]:\n"
            "    del sys.modules[name]\n"
            "sys.modules['sacrebleu'] = None\nimport trl_spo.evaluation\n"
            "try:\n    trl_spo.evaluation.Evaluation\nexcept ImportError as error:\n    print(error)"
        )
        shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        import trl_spo.comparison
        import trl_spo.evaluation

        number = len(trl_spo.evaluation.__all__) + len(trl_spo.comparison.__all__)
        message = "`trl_spo.evaluation.Evaluation` needs the package 'sacrebleu'. Run `pip install \"trl-spo[eval]\"`."
        assert shown.stdout.splitlines() == [str(number), message], shown.stderr

    @pytest.mark.parametrize(
        "name",
        [
            "synthesis_config:PromptsConfig",
            "synthesis_config:CandidatesConfig",
            "synthesis_config:JudgeConfig",
            "synthesis_config:CheckConfig",
            "synthesis_config:RewardModelConfig",
            "synthesis_config:RoundsConfig",
            "training:TrainingConfig",
            "filters:FilterConfig",
            "endpoint:Endpoint",
        ],
    )
    def test_every_option_of_synthetic_preferences_stands_on_the_page(self, name):
        from dataclasses import MISSING, fields
        from importlib import import_module

        module, _, config = name.partition(":")
        config = getattr(import_module(f"trl_spo.synthetic.{module}"), config)
        page = (ROOT / "docs" / "synthetic.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (`.+?) \| (.+?) \|", page, re.MULTILINE)
        for field in fields(config):
            of_field = [(names, default) for names, default in rows if f"`{field.name}`" in names]
            assert of_field, field.name
            default = field.default if field.default is not MISSING else None
            if isinstance(default, int | float | str) and not isinstance(default, bool):
                found = []
                for names, cell in of_field:
                    names, cells = re.findall(r"`(\w+)`", names), [part.strip('`" ') for part in cell.split(", ")]
                    found.append(cells[names.index(field.name)] if len(cells) == len(names) else cells[0])
                assert str(default) in found, (field.name, found)

    def test_every_extractor_and_language_stands_on_the_page(self):
        from trl_spo.sspo.key_content import EXTRACTORS, languages

        page = (ROOT / "docs" / "sspo.md").read_text(encoding="utf-8")
        assert [name for name in EXTRACTORS if f'| `"{name}"` |' not in page] == []
        listed = re.search(r"there are those of ([\w\s,]+)\.", page).group(1).replace(" and ", ", ")
        assert re.split(r",\s+", listed) == list(languages())

    def test_every_refused_option_stands_on_the_page(self):
        from trl_spo.soft_po.soft_po_config import _DPO_ONLY_OPTIONS

        section = self.options_of("soft_po")
        assert [name for name in _DPO_ONLY_OPTIONS if f"`{name}`" not in section] == []

    @pytest.mark.parametrize(
        ("recipe", "launch"),
        [
            ("soft_po", []),
            ("stable_po", []),
            ("stable_po_lora", []),
            ("stable_po_zero3", ["--accelerate_config", "zero3", "--num_processes", "8"]),
            ("sspo", []),
            ("sspo_lora", []),
            ("sspo_zero3", ["--accelerate_config", "zero3", "--num_processes", "8"]),
            ("sspo_kto", []),
        ],
    )
    def test_recipe_has_only_known_options(self, recipe, launch):
        from importlib import import_module

        from trl_spo.cli.launch import split_arguments

        command = import_module(f"trl_spo.cli.{re.sub('_(lora|zero3)$', '', recipe)}")
        arguments = ["--config", str(ROOT / "examples" / f"{recipe}.yaml")]
        assert split_arguments(command.make_parser(), arguments)[0] == launch

    @pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
    def test_links_of_the_readme(self, page):
        # Those of docs/ are checked by the strict build
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), target


class TestLoadDataset:
    ROWS = [{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "d", "chosen": " e", "rejected": " f"}]

    def load(self, name, **options):
        from trl import ScriptArguments

        from trl_spo.cli.training import load_dataset

        return load_dataset(ScriptArguments(dataset_name=str(name), **options))

    @pytest.fixture
    def dataset(self):
        from datasets import Dataset

        return Dataset.from_list(self.ROWS)

    def test_saved_to_disk(self, dataset, tmp_path):
        dataset.save_to_disk(tmp_path / "one")
        assert self.load(tmp_path / "one")["train"].to_list() == self.ROWS

    def test_splits_saved_to_disk(self, dataset, tmp_path):
        from datasets import DatasetDict

        DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
        loaded = self.load(tmp_path / "two")
        assert {split: len(rows) for split, rows in loaded.items()} == {"train": 2, "test": 1}

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".csv"])
    def test_file(self, dataset, tmp_path, suffix):
        path = tmp_path / f"pairs{suffix}"
        if suffix == ".parquet":
            dataset.to_parquet(path)
        elif suffix == ".csv":
            dataset.to_csv(path)
        else:
            dataset.to_json(path, compression="gzip" if suffix.endswith("gz") else None)
        assert self.load(path)["train"].to_list() == self.ROWS
        assert list(self.load(path, dataset_streaming=True)["train"]) == self.ROWS

    def test_folder_of_files(self, dataset, tmp_path):
        dataset.to_json(tmp_path / "train.jsonl")
        dataset.to_json(tmp_path / "test.jsonl")
        assert set(self.load(tmp_path)) == {"train", "test"}

    def test_unknown_file(self, tmp_path):
        path = tmp_path / "pairs.txt"
        path.touch()
        with pytest.raises(ValueError, match=r"pairs.txt, which is none of .json, .jsonl, .parquet, .csv"):
            self.load(path)

    def test_no_name(self):
        from trl import ScriptArguments

        from trl_spo.cli.training import load_dataset

        with pytest.raises(ValueError, match="pass `--dataset_name`"):
            load_dataset(ScriptArguments())

    def test_missing_split(self, dataset):
        from types import SimpleNamespace

        from datasets import DatasetDict
        from trl import ScriptArguments

        from trl_spo.cli.training import get_splits

        splits = DatasetDict({"train": dataset})
        train_dataset, eval_dataset = get_splits(splits, ScriptArguments(), SimpleNamespace(eval_strategy="no"))
        assert train_dataset is splits["train"] and eval_dataset is None
        with pytest.raises(ValueError, match="`dataset_test_split` is 'test', but the dataset has only: train"):
            get_splits(splits, ScriptArguments(), SimpleNamespace(eval_strategy="steps"))


class TestCheckpoint:
    def test_last(self, tmp_path):
        from types import SimpleNamespace

        from trl_spo.cli.training import get_checkpoint

        def find(value, folder=tmp_path):
            return get_checkpoint(SimpleNamespace(resume_from_checkpoint=value, output_dir=str(folder)))

        assert find(None) is None
        assert find("somewhere/checkpoint-5") == "somewhere/checkpoint-5"
        assert find("last", tmp_path / "not there") is None
        assert find("last") is None
        for step in (8, 16):
            (tmp_path / f"checkpoint-{step}").mkdir()
        assert find("last") == str(tmp_path / "checkpoint-16")
