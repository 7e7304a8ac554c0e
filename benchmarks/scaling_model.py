"""SIMULATED: estimates of memory and time (rlhf/preflight/estimate.py) for many GPUs. Nothing is measured.

The operations of a step are divided by the speed of a GPU, its bytes by the speed of a link, without overlap.
The speeds are those of data sheets, times an assumed share for matrix products; all of them are arguments.

Run: `python -m benchmarks.scaling_model --out FILE`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, cast

from transformers import LlamaConfig

from rlhf.config.load import make_config
from rlhf.data.prompts import PromptDataset
from rlhf.inputs import Inputs
from rlhf.preflight.estimate import GIB, Estimate, estimate
from rlhf.preflight.machine import Machine
from rlhf.types import Prompt

SHAPES = {
    "7.6B": (3584, 18944, 28, 28, 4, 152064),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 8


def save_config(folder: Path, shape: str) -> None:
    """The config.json of a Llama of this shape, without weights."""
    hidden, inner, layers, heads, shared, vocabulary = SHAPES[shape]
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def estimated(folder: Path, mode: str, ranks: int, machine: Machine, **of_model: Any) -> Estimate:
    """GRPO with a reference: 512 prompts x 8 completions of 2048 tokens behind prompts of 256."""
    config = make_config(
        {
            "run_dir": "runs/none",
            "steps": 1,
            "model": {"path": str(folder), "gradient_checkpointing": True} | of_model,
            "data": {"train": "none.jsonl", "max_prompt_tokens": 256},
            "reward": {"functions": [{"path": "none:none"}]},
            "algorithm": {"name": "grpo", "kl": {"coef": 0.001}},
            "rollout": {
                "prompts_per_step": 512,
                "group_size": 8,
                "max_completion_tokens": 2048,
                "kv_cache_gib": 16,
            },
            "learner": {"microbatch_tokens": 32768, "minibatches": 4},
            "distributed": {"mode": mode, "shard_ranks": None if ranks < PER_NODE else PER_NODE},
        }
    )
    prompts = PromptDataset((Prompt("p", tuple(range(256)), "p"),), (), skipped=0, source=Path("none.jsonl"))
    nothing = cast(Any, None)
    inputs = Inputs(nothing, nothing, prompts, None, nothing, config.build_algorithm(), (2,))
    return estimate(config, inputs, world_size=ranks, machine=machine)


def simulate(folder: Path, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    gpu = Machine(
        "GPU", int(options.memory * GIB), options.tflops * 1e12 * options.reached, options.bandwidth * 1e9
    )
    rows: list[dict[str, Any]] = []
    for ranks in RANKS:
        found = estimated(folder, mode, ranks, gpu)
        # models are sharded within a node and replicated over the nodes
        link = options.within if ranks <= PER_NODE else options.between
        seconds = found.seconds.step + found.gathered / (options.within * 1e9) + found.summed / (link * 1e9)
        one = rows[0]["seconds"] if rows else seconds
        rows.append(
            {
                "ranks": ranks,
                "memory_gib": round(found.peak / GIB, 1),
                "fits": found.fits,
                "gathered_gb": round(found.gathered / 1e9, 1),
                "summed_gb": round(found.summed / 1e9, 1),
                "seconds": seconds,
                "efficiency": round(one / seconds / ranks, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulated scaling; no figure of it is measured.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of a GPU")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bfloat16, of the data sheet")
    parser.add_argument("--reached", type=float, default=0.4, help="share of it, an assumption")
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="GB/s of memory")
    parser.add_argument("--within", type=float, default=450.0, help="GB/s a GPU sends within a node")
    parser.add_argument("--between", type=float, default=50.0, help="GB/s a GPU sends to another node")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            save_config(Path(name), shape)
            for mode in ("replicated", "sharded"):
                results[f"{shape} {mode}"] = simulate(Path(name), mode, options)
    assumed = {key: value for key, value in vars(options).items() if key != "out"}
    answer = {"simulated": True, "measured": False, "assumed": assumed, "results": results}
    if options.out:
        options.out.write_text(json.dumps(answer, indent=1) + "\n")
    for name, rows in results.items():
        print(name)  # noqa: T201
        for row in rows:
            print("  " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))  # noqa: T201


if __name__ == "__main__":
    main()
