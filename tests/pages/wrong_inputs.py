"""The mistakes listed in docs/errors.md: for each the files, the command and a title."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def nothing(_: Path) -> None:
    """Changes no files: only the command is wrong."""


@dataclass(frozen=True)
class Wrong:
    topic: str
    title: str
    command: str
    given: str = ""
    """The contents of the files where they are not the usual ones, as the page describes them."""
    prepare: Callable[[Path], None] = nothing


def check(*overrides: str) -> str:
    return " ".join(["rlhf check mine.yaml", *overrides])


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def lines(*rows: Any) -> Callable[[Path], None]:
    return write("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def model_config(**changes: Any) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return prepare


def remove(*names: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for name in names:
            for file in folder.glob(name):
                file.unlink()

    return prepare


def no_chat_template(folder: Path) -> None:
    remove("model/chat_template.jinja")(folder)
    lines({"prompt": [{"role": "user", "content": "What is 3 + 5?"}]})(folder)


def no_end(folder: Path) -> None:
    model_config(eos_token_id=None)(folder)
    remove("model/generation_config.json")(folder)
    file = folder / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))


def reward(source: str) -> Callable[[Path], None]:
    return write("reward.py", source)


def splits(folder: Path) -> None:
    for name in ("test/x", "train/x"):
        write(f"splits/{name}", "")(folder)
    write("splits/dataset_dict.json", '{"splits": ["train", "test"]}')(folder)


def run_folder(folder: Path) -> None:
    write("runs/mine/metrics.jsonl", '{"step": 1}\n')(folder)


def empty_run(folder: Path) -> None:
    write("runs/mine/config.yaml", "steps: 1\n")(folder)


SETTINGS = (
    ("A misspelt key", ["rollout.group_sise=8"]),
    ("A key in the wrong section", ["group_size=8"]),
    ("A key of another section", ["learner.engine=hf"]),
    ("A name of TRL", ["num_generations=8"]),
    ("A name of verl", ["rollout.n=8"]),
    ("A name that several sections have", ["path=./model"]),
    ("A word where a number belongs", ["steps=many"]),
    ("A value out of range", ["learner.lr=-1"]),
    ("A count of zero", ["rollout.group_size=0"]),
    ("One of a pair out of range", ["learner.betas=[0.9,1.5]"]),
    ("A choice that is none", ["rollout.engine=vlm"]),
    ("A temperature of zero", ["rollout.temperature=0"]),
    ("A value where a section stands", ["rollout=8"]),
    ("A key below a value", ["steps.first=3"]),
    ("An override without a value", ["steps"]),
    ("An override that is no YAML", ["'learner.betas=[0.9'"]),
    ("A task that is none", ["task=reward_modle"]),
    ("A microbatch too small for one sequence", ["learner.microbatch_tokens=32"]),
    ("More minibatches than prompts", ["learner.minibatches=8"]),
    ("A warm-up longer than the run", ["learner.warmup_steps=20"]),
    ("A knapsack that cannot share out", ["budget.rule=knapsack", "budget.low=8"]),
    ("Probes without a prior", ["budget.probes=2"]),
    ("A critic of its own that is not loaded", ["critic.trunk=policy", "critic.path=./model"]),
    ("Evaluations without data", ["eval.every=5"]),
    ("QLoRA", ["model.lora.load_in_4bit=true"]),
    ("Dropout in an adapter", ["model.lora.dropout=0.1"]),
    ("A sink whose package is missing", ["monitor.sinks=[wandb]"]),
    ("A sink that is none", ["monitor.sinks=[wandv]"]),
)
ALGORITHM = (
    ("An algorithm misspelt", ["algorithm.name=grppo"]),
    ("An algorithm without a name", ["'algorithm={clip_low: 0.1}'"]),
    ("A key of another algorithm", ["algorithm.tau_positive=1"]),
    ("A bound below zero", ["algorithm.clip_low=-3"]),
    ("A KL coefficient below zero", ["algorithm.kl.coef=-1"]),
    ("An estimator that has no gradient there", ["'algorithm.kl={coef: 0.1, estimator: k1}'"]),
    ("A KL target without a coefficient", ["'algorithm.kl={coef: 0, target: 0.1}'"]),
    (
        "A KL in a reward that has several objectives",
        ["'algorithm={name: gdpo, kl: {coef: 0.1, estimator: k1, placement: reward}}'"],
    ),
    ("Truncated sampling whose support nothing bounds", ["rollout.top_p=0.9"]),
    ("A file that is not there", ["algorithm.name=mine.py:parabola"]),
    ("A file without a function", ["algorithm.name=mine.py"]),
)
MODEL = (
    Wrong("Model", "A folder that is not there", check("model.path=./modle")),
    Wrong("Model", "A folder without a model", check("model.path=."), "The folder has no `config.json`."),
    Wrong("Model", "A reference that is not there", check("model.reference=./nowhere")),
    Wrong(
        "Model",
        "Weights that are missing",
        check(),
        "`model/` has no `*.safetensors`.",
        remove("model/*.safetensors"),
    ),
    Wrong(
        "Model",
        "A tokenizer that is missing",
        check(),
        "`model/` has no tokenizer.",
        remove("model/tokenizer*", "model/*.jinja"),
    ),
    Wrong(
        "Model",
        "A config.json that is cut off",
        check(),
        prepare=write("model/config.json", '{"model_type": "lla'),
    ),
    Wrong(
        "Model",
        "A kind of model that nobody knows",
        check(),
        '`config.json` has `"model_type": "lama"`.',
        model_config(model_type="lama"),
    ),
    Wrong(
        "Model",
        "A model that writes no text",
        check(),
        '`config.json` has `"model_type": "vit"`.',
        model_config(model_type="vit"),
    ),
    Wrong("Model", "Fewer positions than tokens", check("rollout.max_completion_tokens=500")),
    Wrong(
        "Model",
        "Quantized weights",
        check(),
        "`config.json` has a `quantization_config`.",
        model_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    Wrong(
        "Model",
        "Quantized weights under an adapter",
        check("model.lora.rank=8"),
        "The same.",
        model_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    Wrong("Model", "No end-of-sequence token", check(), "Neither tokenizer nor model has one.", no_end),
    Wrong(
        "Model",
        "Chat messages without a chat template",
        check(),
        "`prompt` is a list of messages.",
        no_chat_template,
    ),
)
USER = {"role": "user", "content": "What is 3 + 5?"}
DATA = (
    ("A path misspelt", ["data.train=trian.jsonl"], "", nothing),
    ("A file of another kind", ["data.train=train.tsv"], "", write("train.tsv", "prompt\nsay 1\n")),
    ("A list in one file", ["data.train=train.json"], "", write("train.json", "[]")),
    ("A name of the hub", ["data.train=openai/gsm8k"], "", nothing),
    ("An empty file", [], "`train.jsonl` is empty.", lines()),
    (
        "A line that is no JSON",
        [],
        'Line 2 is `{"prompt": "say 2:"`.',
        write("train.jsonl", '{"prompt": "say 1:"}\n{"prompt": "say 2:"\n'),
    ),
    ("A line that is no object", [], 'Line 1 is `"say 1:"`.', lines("say 1:")),
    (
        "Text that is not UTF-8",
        [],
        "Line 1 has the byte 0xE9.",
        write("train.jsonl", b'{"prompt": "caf\xe9"}\n'),
    ),
    ("A column misspelt", [], 'Line 1 is `{"promt": "say 1:"}`.', lines({"promt": "say 1:"})),
    ("Another name for the prompt", ["data.prompt_column=question"], "", nothing),
    ("An empty prompt", [], 'Line 2 is `{"prompt": ""}`.', lines({"prompt": "x"}, {"prompt": ""})),
    ("A number for a prompt", [], 'Line 1 is `{"prompt": 8}`.', lines({"prompt": 8})),
    ("A message without content", [], "", lines({"prompt": [{"role": "user"}]})),
    (
        "A message that is text",
        [],
        'Line 1 is `{"prompt": ["What is 3 + 5?"]}`.',
        lines({"prompt": ["What is 3 + 5?"]}),
    ),
    (
        "A chat that the assistant ends",
        [],
        "",
        lines({"prompt": [USER, {"role": "assistant", "content": "8"}]}),
    ),
    (
        "Lines with other columns",
        [],
        "Line 2 has no `answer`.",
        lines({"prompt": "x", "answer": 1}, {"prompt": "y"}),
    ),
    ("Prompts over the limit", ["data.max_prompt_tokens=4"], "", nothing),
    ("Every prompt over the limit", ["data.max_prompt_tokens=4", "data.long_prompts=skip"], "", nothing),
    ("A folder without data", ["data.train=empty"], "", write("empty/notes.txt", "nothing")),
    (
        "A folder of several splits",
        ["data.train=splits"],
        "",
        splits,
    ),
    ("A broken parquet file", ["data.train=train.parquet"], "", write("train.parquet", "PAR1")),
    ("Held-out data that is not there", ["data.eval=held_out.jsonl"], "", nothing),
)
NEEDS = "def short(completions, answer):\n    return [0.0 for _ in completions]\n"
REWARDS = (
    ("A file that is not there", ["'reward.functions=[{path: rewards.py:short}]'"], "", nothing),
    ("A function misspelt", ["'reward.functions=[{path: reward.py:shrot}]'"], "", nothing),
    ("A file without a function", ["'reward.functions=[{path: reward.py}]'"], "", nothing),
    ("A module that is not installed", ["'reward.functions=[{path: my_rewards:short}]'"], "", nothing),
    ("A built-in misspelt", ["'reward.functions=[{path: numeric_mach}]'"], "", nothing),
    ("No function at all", ["reward.functions=[]"], "", nothing),
    ("Something that cannot be called", [], "`reward.py` has `short = 3`.", reward("short = 3\n")),
    ("A class whose objects cannot be called", [], "", reward("class short:\n    pass\n")),
    ("A column that the data lacks", [], "`def short(completions, answer)`", reward(NEEDS)),
    (
        "An argument that nobody gives",
        [],
        "`def short(completion)`",
        reward("def short(completion):\n    return 0.0\n"),
    ),
    (
        "A parameter that it does not take",
        ["'reward.functions=[{path: reward.py:short, params: {limt: 3}}]'"],
        "`def short(completions, limit=5)`",
        reward("def short(completions, limit=5):\n    return []\n"),
    ),
    (
        "A parameter that the trainer gives",
        ["'reward.functions=[{path: reward.py:short, params: {prompts: []}}]'"],
        "",
        nothing,
    ),
    (
        "A syntax error in the file",
        [],
        "Line 2 is `return [`.",
        reward("def short(completions):\n    return [\n"),
    ),
    (
        "A file that fails when it is imported",
        [],
        "Line 1 is `import nowhere_to_be_found`.",
        reward("import nowhere_to_be_found\n"),
    ),
    (
        "A column with a name that is taken",
        [],
        "Lines have a column `completions`.",
        lines({"prompt": "x", "completions": 1}),
    ),
    ("A deadline of zero", ["'reward.functions=[{path: reward.py:short, timeout: 0}]'"], "", nothing),
)
FILES = (
    Wrong("Files and folders", "A config that is not there", "rlhf check mien.yaml"),
    Wrong(
        "Files and folders",
        "A config that is no YAML",
        check(),
        "Line 2 is `steps: [10`.",
        write("mine.yaml", "run_dir: x\nsteps: [10\n"),
    ),
    Wrong(
        "Files and folders",
        "A config with a tab",
        check(),
        prepare=write("mine.yaml", "rollout:\n\tgroup_size: 8\n"),
    ),
    Wrong(
        "Files and folders",
        "A key given twice",
        check(),
        "Lines 1 and 3 are `learner:`.",
        write("mine.yaml", "learner:\n  lr: 1e-6\nlearner:\n  epochs: 2\n"),
    ),
    Wrong(
        "Files and folders", "A config that is a list", check(), prepare=write("mine.yaml", "- steps: 10\n")
    ),
    Wrong(
        "Files and folders",
        "A config without what it needs",
        check(),
        "It is `steps: 10`.",
        write("mine.yaml", "steps: 10\n"),
    ),
    Wrong("Files and folders", "A run folder that has a run", "rlhf train mine.yaml", prepare=run_folder),
    Wrong(
        "Files and folders",
        "A run folder that has something else",
        "rlhf train mine.yaml",
        prepare=write("runs/mine/thesis.tex", "x"),
    ),
    Wrong(
        "Files and folders",
        "A run folder that is a file",
        "rlhf train mine.yaml",
        prepare=write("runs/mine", "x"),
    ),
)
COMMANDS = (
    Wrong("Other commands", "check: no file named", "rlhf check"),
    Wrong("Other commands", "eval: no such folder", "rlhf eval nothing"),
    Wrong("Other commands", "eval: nothing to evaluate on", "rlhf eval ./model"),
    Wrong("Other commands", "eval: nothing says what is right", "rlhf eval ./model --data train.jsonl"),
    Wrong("Other commands", "eval: a run that has no checkpoint", "rlhf eval runs/mine", prepare=empty_run),
    Wrong(
        "Other commands",
        "eval: an adapter alone",
        "rlhf eval adapter",
        prepare=write("adapter/adapter_config.json", "{}"),
    ),
    Wrong(
        "Other commands",
        "eval: more draws than samples",
        "rlhf eval ./model --data train.jsonl --reward reward.py:short --k 16",
    ),
    Wrong(
        "Other commands",
        "eval: a file that would be overwritten",
        "rlhf eval ./model --data train.jsonl --reward reward.py:short --out mine.yaml",
    ),
    Wrong("Other commands", "export: a model that is no run", "rlhf export ./model out"),
    Wrong("Other commands", "export: no such folder", "rlhf export nothing out"),
    Wrong("Other commands", "migrate: a file without settings", "rlhf migrate train.jsonl"),
    Wrong("Other commands", "report: a folder without a run", "rlhf report model"),
    Wrong(
        "Other commands",
        "report: a run against itself",
        "rlhf report runs/mine runs/mine",
        prepare=run_folder,
    ),
    Wrong(
        "Other commands",
        "report: a file that would be overwritten",
        "rlhf report runs/mine runs/other --out mine.yaml",
        prepare=lambda folder: (
            run_folder(folder),
            write("runs/other/metrics.jsonl", '{"step": 1}\n')(folder),
        )[0],
    ),
)
OWN = (
    (
        "A function that is not in the file",
        "algorithm.name=mine.py:parabola",
        "def parabole():\n    return None\n",
    ),
    (
        "An argument without a type",
        "algorithm.name=mine.py:parabola",
        "def parabola(width=0.2):\n    return None\n",
    ),
    (
        "A function that returns no algorithm",
        "algorithm.name=mine.py:parabola",
        "def parabola():\n    return 'grpo'\n",
    ),
    ("A syntax error in an algorithm's file", "algorithm.name=mine.py:parabola", "def parabola(:\n"),
)
WRONG = (
    *FILES,
    *(Wrong("Settings", title, check(*overrides)) for title, overrides in SETTINGS),
    *(
        Wrong("Algorithm", f"Algorithm: {title[0].lower()}{title[1:]}", check(*overrides))
        for title, overrides in ALGORITHM
    ),
    *(
        Wrong(
            "Algorithm",
            title,
            check(override),
            f"`mine.py` is `{' '.join(source.split())}`.",
            write("mine.py", source),
        )
        for title, override, source in OWN
    ),
    *MODEL,
    *(
        Wrong("Data", f"Data: {title[0].lower()}{title[1:]}", check(*overrides), given, prepare)
        for title, overrides, given, prepare in DATA
    ),
    *(
        Wrong("Rewards", f"Reward: {title[0].lower()}{title[1:]}", check(*overrides), given, prepare)
        for title, overrides, given, prepare in REWARDS
    ),
    *COMMANDS,
)
