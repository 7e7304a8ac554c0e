"""`rlhf migrate`: scripts and configs of verl and TRL become a config that loads; what is dropped is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli import main
from rlhf.config.load import load_config
from rlhf.config.run import Config

VERL = """
set -x
MODEL=Qwen/Qwen2.5-7B-Instruct  # the policy
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files="$HOME/data/gsm8k/train.parquet" \\
    data.val_files=$HOME/data/gsm8k/test.parquet \\
    data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024 \\
    data.filter_overlong_prompts=True \\
    actor_rollout_ref.model.path=$MODEL \\
    actor_rollout_ref.actor.optim.lr=3e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40 \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.002 \\
    actor_rollout_ref.actor.fsdp_config.param_offload=False \\
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=5 \\
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \\
    trainer.logger='["console","wandb"]' trainer.n_gpus_per_node=8 trainer.nnodes=2 \\
    trainer.save_freq=20 trainer.total_training_steps=105 trainer.no_such_thing=7 $@
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: openai/gsm8k
dataset_config: main
learning_rate: 1.0e-5
num_generations: 8
per_device_train_batch_size: 16
steps_per_generation: 4
max_steps: 400
scale_rewards: none
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]
warmup_ratio: 0.1
"""
PYTHON = """
import os
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

data = load_dataset("openai/gsm8k", "main", split="train")

def short(completions, **kwargs):
    return [-len(c) for c in completions]

args = GRPOConfig(
    output_dir="out", loss_type="grpo", num_generations=4, learning_rate=float(os.environ["LR"]), beta=0.04
)
GRPOTrainer(model="org/model", reward_funcs=[short], args=args, train_dataset=data).train()
"""


@pytest.fixture
def migrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def migrated(name: str, text: str) -> tuple[Config, str]:
        (tmp_path / name).write_text(text)
        assert main(["migrate", str(tmp_path / name)]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        (tmp_path / "mine.yaml").write_text(said)
        return load_config(tmp_path / "mine.yaml"), said

    return migrated


def test_a_script_of_verl(migrated) -> None:
    config, said = migrated("run.sh", VERL)
    assert config.model.path == "Qwen/Qwen2.5-7B-Instruct" and config.model.gradient_checkpointing
    assert config.data.train == "~/data/gsm8k/train.parquet" and config.data.long_prompts == "skip"
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_completion_tokens) == (1024, 5, 1024)
    assert rollout.engine == "vllm" and rollout.vllm.args == {"gpu_memory_utilization": 0.6}
    assert (config.learner.lr, config.learner.minibatches, config.steps) == (3e-6, 4, 105)
    # verl's mean is over tokens, and its second clip is on by default
    assert config.algorithm["name"] == "dapo" and config.algorithm["refill"] == 0
    assert config.algorithm["clip_dual"] == 3.0 and config.algorithm["overlong_cache"] == 0
    assert config.algorithm["kl"].coef == 0.002 and config.algorithm["kl"].placement == "loss"
    assert config.distributed.mode == "sharded" and config.monitor.sinks == ("wandb",)
    assert "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8" in said
    assert "trainer.no_such_thing=7: nothing here stands for it" in said
    assert "ppo_micro_batch_size_per_gpu=40: learner.microbatch_tokens bounds" in said
    assert "verl takes a function by data_source" in said


def test_a_yaml_file_of_verl_with_a_critic(migrated) -> None:
    tree: dict[str, Any] = {
        "actor_rollout_ref": {"model": {"path": "a/b"}, "rollout": {"n": 1, "name": "vllm"}},
        "critic": {"optim": {"lr": 2e-5}, "model": {"path": "a/c"}},
        "algorithm": {"adv_estimator": "gae", "lam": 0.95, "use_kl_in_reward": True},
        "custom_reward_function": {"path": "r.py", "name": "score"},
    }
    config, _ = migrated("ppo.yaml", yaml.safe_dump(tree))
    assert config.algorithm["name"] == "ppo" and config.algorithm["critic"].lam == 0.95
    assert config.algorithm["kl"].placement == "reward" and config.critic.path == "a/c"
    assert config.critic.lr == 2e-5 and config.reward.functions[0].path == "r.py:score"


def test_a_yaml_file_of_trl(migrated) -> None:
    config, said = migrated("grpo.yaml", TRL)
    assert config.data.train == "openai/gsm8k/main:train" and config.algorithm["name"] == "dr_grpo"
    # 16 x 4 completions a generation, of which an update takes 16
    assert (config.rollout.prompts_per_step, config.learner.minibatches) == (8, 4)
    assert config.steps == 100 and "max_steps=400: it counts updates, of which a step makes 4 here" in said
    assert config.model.lora is not None and config.model.lora.targets == ("q_proj", "v_proj")
    assert config.learner.schedule == "linear" and "warmup_ratio=0.1: learner.warmup_steps" in said


def test_python_with_a_config_of_trl(migrated, tmp_path: Path) -> None:
    config, said = migrated("train.py", PYTHON)
    assert config.reward.functions[0].path == f"{tmp_path / 'train.py'}:short"
    assert config.model.path == "org/model" and config.rollout.group_size == 4
    assert config.algorithm["name"] == "grpo" and config.algorithm["kl"].coef == 0.04
    assert "learning_rate: computed by the code `float(os.environ['LR'])`" in said
    assert "put the functions into a file of their own" in said


def test_options_of_trls_command(migrated) -> None:
    text = "trl dpo --model_name_or_path a/b --dataset_name c/d --beta 0.3 --max_steps 50 --loss_type ipo"
    config, said = migrated("dpo.sh", text)
    assert config.algorithm["name"] == "dpo" and config.algorithm["beta"] == 0.3 and config.steps == 50
    assert config.data.mode == "offline" and "loss_type=ipo: algorithm.name=ipo" in said


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("notes.txt", "nothing at all", "has no settings of verl"),
        ("code.py", "print(", "was never closed in line 1"),
        ("broken.yaml", "a: [", "is not YAML"),
        (
            "mini.sh",
            "x data.train_batch_size=100 actor_rollout_ref.actor.ppo_mini_batch_size=64",
            "is no multiple",
        ),
        (
            "batch.sh",
            "x actor_rollout_ref.rollout.n=many",
            "must be a whole number of at least 1, got 'many'",
        ),
    ],
)
def test_a_file_that_cannot_be_turned_is_refused(
    name: str, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["migrate", str(tmp_path / name)]) == 2
    assert expected in capsys.readouterr().err


def test_an_existing_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.sh").write_text(VERL)
    out = tmp_path / "mine.yaml"
    assert main(["migrate", str(tmp_path / "run.sh"), "--out", str(out)]) == 0
    before = out.read_text()
    assert main(["migrate", str(tmp_path / "run.sh"), "--out", str(out)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err and out.read_text() == before
    assert main(["migrate", str(tmp_path / "nothing.sh")]) == 2
