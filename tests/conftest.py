"""Tiny real models, tokenizers and data, made once a session. No network, no mocks."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.scripts import run_yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from wording import WORDING
from zoo import ZOO

from mergekit_slta import Alphas
from mergekit_slta.cli import main as cli
from mergekit_slta.errors import SltaError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.recipe import Recipe

torch.set_num_threads(1)  # tiny products: threads only get in each other's way
transformers.PretrainedConfig.__repr__ = object.__repr__  # every load formats the config for a log that is off
os.fsync = lambda _: None  # waiting for the disk is a good part of a tiny run, and no test cuts the power

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
)
WORDS = [*"the quick brown fox jumps over a lazy dog while".split(), *"12 + 30 = 42 and so on".split()]
CONFIGS = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 8, "head_dim": 8}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that puts <s> before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def make_config(
    family: str, *, tied: bool = False, num_layers: int = 2, **changes: object
) -> transformers.PretrainedConfig:
    """A config of a few thousand parameters."""
    kind, extra = CONFIGS[family]
    settings = {
        "hidden_size": 32, "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 256, "tie_word_embeddings": tied,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    return kind(**{**settings, **extra, **changes})


@dataclass(frozen=True)
class Models:
    """Checkpoints of a base and its experts under one folder, with a dataset per expert."""

    folder: Path
    base: Path
    experts: tuple[Path, ...]
    datasets: tuple[Path, ...]

    def recipe_with_answers(self, **parameters: object) -> dict:
        """A recipe whose rows are a question and its answer."""
        recipe = self.recipe(text="{question} ", **parameters)
        for entry in recipe["models"]:
            entry["parameters"]["completion"] = "{answer}"
        return recipe

    def recipe(self, num_experts: int | None = None, *, text: str | None = None, **parameters: object) -> dict:
        """A recipe over absolute paths, as a mapping."""
        count = num_experts or len(self.experts)
        extra = {} if text is None else {"text": text}
        return {
            "merge_method": "submodule_linear",
            "base_model": str(self.base),
            "models": [
                {"model": str(expert), "parameters": {"dataset": str(dataset), **extra}}
                for expert, dataset in zip(self.experts[:count], self.datasets[:count], strict=True)
            ],
            "parameters": {"num_samples": 6, "max_seq_length": 24, **parameters},
        }


def perturbed(model: torch.nn.Module, seed: int, scale: float = 0.3, same: tuple[str, ...] = ()) -> torch.nn.Module:
    """A copy whose tensors have moved, as after fine-tuning, norms and saved buffers too; except those whose names
    begin with one of `same`."""
    import copy

    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in saved_tensors(expert):
            if not name.startswith(same or "?"):
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                tensor.add_(noise * scale * tensor.float().std(unbiased=False).clamp(min=0.1).to(tensor.dtype))
    return expert


def saved_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, each once, and the buffers that are saved, if they hold numbers that can move."""
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    return [(name, tensor) for name, tensor in (*model.named_parameters(), *buffers) if tensor.is_floating_point()]


def write_rows(path: Path, seed: int, count: int = 12) -> None:
    """Rows of unequal length with a few columns."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words = rng.choices(WORDS, k=rng.randint(3, 30))
            row = {
                "text": " ".join(words), "question": f"what is {number}?", "answer": " ".join(words[:3]),
                "number": number, "tags": words[:2],
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def pytest_collection_finish() -> None:
    """What has been imported stays: no garbage collection needs to go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Models]:
    """Checkpoints of any configuration, made once for each set of arguments."""
    made: dict[str, Models] = {}

    def make(
        family: str = "llama",
        *,
        num_experts: int = 2,
        dtype: torch.dtype = torch.float32,
        shard: str = "60KB",
        scale: float = 0.3,
        **config: object,
    ) -> Models:
        key = repr((family, num_experts, dtype, shard, scale, sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                base = transformers.AutoModelForCausalLM.from_config(make_config(family, **config))
            with torch.no_grad():
                for (
                    parameter
                ) in base.parameters():  # norms and biases away from 1 and 0, weights large enough to matter
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
                    else:
                        parameter.mul_(5.0)
            tokenizer = make_tokenizer()
            paths, datasets = [], []
            for number in range(num_experts + 1):
                model = base if number == 0 else perturbed(base, number, scale)
                path = folder / ("base" if number == 0 else f"expert{number}")
                model.to(dtype).save_pretrained(path, max_shard_size=shard)
                base.to(torch.float32)
                tokenizer.save_pretrained(path)
                paths.append(path)
                if number:
                    datasets.append(folder / f"task{number}.jsonl")
                    write_rows(datasets[-1], number)
            made[key] = Models(folder, paths[0], tuple(paths[1:]), tuple(datasets))
        return made[key]

    return make


@pytest.fixture(scope="session")
def with_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Models]:
    """The same checkpoints with `count` rows per task: 15 or more are enough to hold some out."""
    made: dict[object, Models] = {}

    def make(models: Models, count: int = 20) -> Models:
        if (models, count) not in made:
            folder = tmp_path_factory.mktemp("rows")
            datasets = tuple(folder / f"task{number}.jsonl" for number in range(len(models.experts)))
            for number, path in enumerate(datasets):
                write_rows(path, 100 + number, count)
            made[models, count] = replace(models, datasets=datasets)
        return made[models, count]

    return make


@pytest.fixture(scope="session")
def tiny(make_models: Callable[..., Models]) -> Models:
    """An untied Llama with three experts."""
    return make_models("llama", num_experts=3)


@pytest.fixture(scope="session")
def plenty(tiny: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The same base and two of its experts, with 30 rows each: 6 can be held out."""
    folder = tmp_path_factory.mktemp("plenty")
    datasets = tuple(folder / f"task{number}.jsonl" for number in (1, 2))
    for number, path in enumerate(datasets, start=1):
        write_rows(path, number, count=30)
    return Models(folder, tiny.base, tiny.experts[:2], datasets)


PLAIN_JOINT = {"objective": "joint", "direction": "none", "compute_dtype": "float32"}
"""`objective: joint` over the experts alone, in float32 on every CPU."""
FORMATS = {"own": "Question: {question}\nAnswer: ", "other": "{number} ??? "}
"""Prompts of `trained`, before a row's answer."""


@pytest.fixture(scope="session")
def trained(
    make_models: Callable[..., Models], with_rows: Callable[..., Models], tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """A base that has learnt rows in one format, and an expert that has learnt the same rows in another one since."""
    models = with_rows(make_models("llama"))
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = make_tokenizer()
    rows = [json.loads(line) for line in models.datasets[0].read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(models.base)
    paths = []
    for name in ("other", "own"):
        texts = [FORMATS[name].format(**row) + row["answer"] for row in rows]
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(12):
            for text in texts:
                ids = tokenizer(text, return_tensors="pt").input_ids
                model(ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        paths.append(folder / name)
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return Models(folder, paths[0], (paths[1],), models.datasets[:1])


PREPROCESSOR = {"do_resize": True, "note": "read by nobody here"}
"""What `preprocessor_config.json` of a model with a vision tower holds."""


def save_models(folder: Path, models: Sequence[torch.nn.Module]) -> Models:
    """Checkpoints of a base and its experts, with a tokenizer, and a dataset for each expert."""
    tokenizer = make_tokenizer()
    paths, datasets = [], []
    for number, model in enumerate(models):
        paths.append(folder / f"model{number}")
        model.save_pretrained(paths[-1], max_shard_size="60KB")
        tokenizer.save_pretrained(paths[-1])
        if number:
            datasets.append(folder / f"task{number}.jsonl")
            write_rows(datasets[-1], number)
    return Models(folder, paths[0], tuple(paths[1:]), tuple(datasets))


def with_varied_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights that are large enough to matter; norms and biases away from 1 and 0."""
    with torch.no_grad():
        for _, tensor in saved_tensors(model):
            noise = torch.randn_like(tensor) * 0.1
            tensor.copy_(tensor + noise if tensor.dim() == 1 else noise)
    return model


@pytest.fixture(scope="session")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Models]:
    """Checkpoints of a species of the zoo: a base and two experts, every tensor moved that text runs through."""

    @functools.cache
    def make(name: str, **changes: int) -> Models:
        species = ZOO[name]
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = species.kind(**{**species.settings, **changes})
            base = with_varied_weights(getattr(transformers, species.model)._from_config(config, dtype=torch.float32))
        made = save_models(folder, [base, *(perturbed(base, number, same=species.carried) for number in (1, 2))])
        for path in (made.base, *made.experts) if species.carried else ():
            (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        return made

    return make


def own_class(path: Path) -> type[transformers.PreTrainedModel]:
    """The class that a checkpoint's config names."""
    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


@pytest.fixture
def options() -> MergeOptions:
    """Quiet options, as mergekit's commands make them."""
    return MergeOptions(quiet=True)


def read(recipe: dict) -> Recipe:
    """A recipe that is given as a mapping."""
    return read_recipe(MergeConfiguration.model_validate(recipe))


@pytest.fixture
def job(tiny: Models, options: MergeOptions):
    """A calibration of three experts, prepared."""
    return prepare(read(tiny.recipe()), options, for_merge=False)


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict], Path]:
    """Write a recipe into the test's folder."""

    def write(recipe: dict, name: str = "recipe.yml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def assert_applied(models: Models, out: Path) -> Alphas:
    """OUT is the base plus every expert's changes times the weights of its alphas file, which is returned."""
    alphas = Alphas.load(out / "slta_alphas.json")
    base, *experts = [tensors(path) for path in (models.base, *models.experts)]
    merged = tensors(out)
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    for entry in alphas.submodules:
        for name in entry.tensors:
            changes = [alpha * (other[name] - base[name]) for alpha, other in zip(entry.alpha, experts, strict=True)]
            torch.testing.assert_close(merged[name], base[name] + sum(changes), rtol=1e-5, atol=1e-6)
    return alphas


NO_CARD = "--no-write-model-card"
"""Drawing the card's figures takes longer than a tiny merge: only tests of the card have one."""


def mergekit_yaml(*arguments: object, card: bool = False) -> Result:
    """The stock command, in this process, where the plugin is registered; without a model card unless asked."""
    return CliRunner().invoke(run_yaml.main, [*map(str, arguments), *([] if card else [NO_CARD])])


STOCK_PROCESS = """
import json, sys, traceback
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main

for line in sys.stdin:
    result = CliRunner().invoke(main, json.loads(line))
    told = result.output + "".join(traceback.format_exception(*result.exc_info)) * (result.exit_code != 0)
    print(json.dumps([result.exit_code, told, [name for name in sys.modules if name.startswith("mergekit_slta.")]]))
    sys.stdout.flush()
"""


@pytest.fixture(scope="session")
def stock_merge() -> Iterator[Callable[[Path, Path], tuple[int, str]]]:
    """(recipe, OUT) -> (exit code, output) of the stock command, in a process that knows no plugin."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOCK_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MERGEKIT_SLTA_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def merge(recipe: Path, out: Path) -> tuple[int, str]:
        process.stdin.write(json.dumps([str(recipe), str(out), "--quiet"]) + "\n")
        process.stdin.flush()
        code, output, ours = json.loads(process.stdout.readline())
        assert ours in ([], ["mergekit_slta._autoload"])
        return code, output

    yield merge
    process.communicate(timeout=30)


def slta(*arguments: object, card: bool = False) -> Result:
    """The project's own command, in this process; a merge without a model card unless asked."""
    plain = arguments[:1] == ("merge",) and not card
    return CliRunner().invoke(cli.main, [*map(str, arguments), *([NO_CARD] if plain else [])])


def check_message(message: str, code: str, *values: object) -> None:
    """One printable line that says what the code stands for, and names each of the values."""
    assert message.isprintable(), message
    assert code in WORDING, f"{code}: {message}"
    assert re.search(WORDING[code], message), f"{code}: {message}"
    for value in values:
        assert str(value) in message, f"{value} is not in: {message}"


@contextmanager
def refused(error: type[SltaError], code: str, *values: object) -> Iterator[pytest.ExceptionInfo[SltaError]]:
    """Expect an error of this class and code, whose message names each of the values."""
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    assert caught.value.code == code, caught.value.message
    check_message(caught.value.message, code, *values)


def assert_refused(result: Result | subprocess.CompletedProcess, code: str, *values: object, exit_code: int = 2) -> str:
    """A command ended with one line that says what the code stands for and names each of the values, and with no
    traceback. Returns the line."""
    if isinstance(result, Result):
        ended, output = result.exit_code, result.output
    else:
        ended, output = result.returncode, result.stderr
    assert ended == exit_code, output
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    check_message(line, code, *values)
    return line


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


# What processes that are forked find imported.
IMPORTED = [
    "conftest",
    "mergekit_slta.host.merge",
    "mergekit_slta.cli.mergekit_commands",
    "datasets",
    "transformers.models.llama.modeling_llama",
]


def _begin(function: Callable, arguments: tuple, output: str, cwd: str, environment: dict[str, str]) -> None:
    """In the new process: what is printed goes to files, as through a pipe."""
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    function(*arguments)


@dataclass(frozen=True)
class Forked:
    """A process that runs (its methods are multiprocessing's), and where its output goes."""

    process: multiprocessing.process.BaseProcess
    output: tempfile.TemporaryDirectory

    def ended(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Wait for its end; its exit code (less than 0: the signal) and what it printed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it hangs"
        told = [Path(self.output.name, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([], self.process.exitcode, *told)


def own_command(*arguments: str) -> None:
    """The project's own command, for `fork`."""
    cli.main(arguments)


def stock_command(*arguments: str) -> None:
    """The stock command, for `fork`."""
    run_yaml.main(arguments)


def fork(function: Callable, *arguments: object, cwd: Path, **environment: str) -> Forked:
    """Start a function (of a module's top level) in a process of its own. These share their imports: they are forks of
    a server that has made them once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    output = tempfile.TemporaryDirectory()
    begun = (function, arguments, output.name, str(cwd), environment)
    process = context.Process(target=_begin, args=begun, daemon=True)
    process.start()
    return Forked(process, output)


def script(name: str) -> Path:
    """An installed command of this environment."""
    return Path(sys.executable).parent / name
