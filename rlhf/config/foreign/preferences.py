"""Answers for settings of TRL's preference trainers (DPO, KTO, CPO, ORPO, BCO, online DPO) that have no
counterpart of one name here: what to set instead, or why nothing has to be set.

`names.OTHER_NAMES` has the settings that only have another name. docs/preferences.md shows these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from rlhf.algos.table import ALGORITHMS

SORTS = "not here: it sorts the margins of a whole batch"
NOT_YET = "not here yet"
LOSS_TYPES: dict[str, str] = {
    "sigmoid": "algorithm.name=dpo, with algorithm.label_smoothing for conservative DPO",
    "sigmoid_norm": "algorithm.name=dpo with algorithm.per_token=true",
    "robust": "algorithm.name=robust_dpo",
    "hinge": ("algorithm.name=slic with algorithm.use_reference=true, algorithm.nll_coef=0 and TRL's beta"),
    "ipo": "algorithm.name=ipo, where TRL's beta is algorithm.tau",
    "exo_pair": "algorithm.name=exo",
    "nca_pair": "algorithm.name=nca",
    "bco_pair": "algorithm.name=bco",
    "apo_zero": "algorithm.name=apo_zero",
    "apo_zero_unpaired": "algorithm.name=apo_zero",
    "apo_down": "algorithm.name=apo_down",
    "discopop": "algorithm.name=discopop, where TRL's discopop_tau is algorithm.tau",
    "kto": "algorithm.name=kto",
    "bco": "algorithm.name=bco",
    "simpo": "algorithm.name=simpo",
    "cpo": "algorithm.name=cpo",
    "orpo": "algorithm.name=orpo, where TRL's beta is algorithm.lam",
    "sft": "algorithm.name=rpo beside another loss, algorithm.name=sft alone",
    "sppo_hard": "algorithm.name=sppo with iteration.steps",
    "alphapo": NOT_YET,
    "aot": SORTS,
    "aot_unpaired": SORTS,
    "aot_pair": SORTS,
}
"""TRL's `loss_type`, and what to set for it."""

ONLINE = "algorithm.name=dpo with data.mode=online and reward.functions"
METHODS: dict[str, str] = {
    "cdpo": "algorithm.name=dpo with algorithm.label_smoothing",
    "conservative_dpo": "algorithm.name=dpo with algorithm.label_smoothing",
    "rdpo": "algorithm.name=robust_dpo",
    "rso": LOSS_TYPES["hinge"],
    "online_dpo": f"{ONLINE} or reward.preference",
    "oaif": f"{ONLINE} or reward.preference",
    "smaug": "algorithm.name=dpop",
    "apo": "algorithm.name=apo_zero or apo_down",
    "chipo": "algorithm.name=chi_po",
    "nash_md_pg": "algorithm.name=nash_md",
    "iterative_dpo": "algorithm.name=dpo with iteration.reference=iterate",
    "tr_dpo": "algorithm.name=dpo with iteration.reference=iterate and iteration.mix",
    "ipo_md": "algorithm.name=ipo with rollout.samplers of source mixture",
    "rlhf_workflow": "algorithm.name=dpo with rollout.samplers of source iterate",
    "dno_prct": "algorithm.name=dpo with pairs.rule=dno_prct and iteration.reference=iterate",
    "gkd": "algorithm.name=distill with model.reference",
    "wpo": NOT_YET,
    "tdpo": NOT_YET,
}
"""Other names of methods, lower case and with _ for -, and what to set for them."""

REPLACED: dict[str, str] = {
    "rpo_alpha": "algorithm.name=rpo with algorithm.nll_coef",
    "cpo_alpha": "algorithm.name=cpo with algorithm.nll_coef",
    "simpo_gamma": "algorithm.name=simpo with algorithm.gamma",
    "discopop_tau": "algorithm.name=discopop with algorithm.tau",
    "loss_weights": "algorithm.nll_coef of algorithm.name=rpo, for sigmoid with sft; no other mixtures",
    "reference_free": "a method without a reference: algorithm.name=simpo, cpo or orpo",
    "f_divergence_type": "algorithm.name=dpo is reverse_kl, chi_po adds chi-squared; no others are here",
    "f_alpha_divergence_coef": NOT_YET,
    "use_weighting": f"{NOT_YET} (WPO); algorithm.name=dpo weighs every pair alike",
    "ld_alpha": f"{NOT_YET} (LD-DPO); algorithm.per_token=true of dpo is another way against length",
    "min_density_ratio": f"{NOT_YET}: bco has no weights of prompts",
    "max_density_ratio": f"{NOT_YET}: bco has no weights of prompts",
    "missing_eos_penalty": "pairs.truncated=lose: what was cut at its limit is worse than what ended",
    "mixture_coef": "rollout.samplers=[{source: policy, n: 1}, {source: mixture, n: 1, mixture: 0.5}]",
    "lmbda": "data.mix=true, completions of the data beside samples of the policy",
    "teacher_model_name_or_path": "model.reference, with algorithm.name=distill",
    "judge": "reward.preference: {path: my_judge.py:MyJudge}; judges of TRL work as they are",
    "reward_model_path": "reward.functions=[{path: reward_model, params: {model: PATH}}]",
    "sync_ref_model": "iteration.reference=iterate with iteration.steps",
    "ref_model_mixup_alpha": "iteration.mix",
    "ref_model_sync_steps": "iteration.steps, with iteration.reference=iterate",
    "force_use_ref_model": "model.reference, the path of the reference; with it LoRA keeps a second model",
    "truncation_mode": "nothing is cut: data.long_prompts=skip leaves longer lines out, and counts them",
    "generate_during_eval": "reward.functions: with them prompts of data.eval are sampled from and scored",
    "warmup_ratio": "learner.warmup_steps, a number of steps",
    "disable_dropout": "nothing to set: dropout is always off",
    "label_pad_token_id": "nothing to set: nothing is padded with labels",
    "padding_value": "nothing to set: sequences are packed",
    "pad_token": "nothing to set: sequences are packed",
    "padding_free": "nothing to set: sequences are packed, as model.packing says",
    "precompute_ref_batch_size": "nothing to set: learner.microbatch_tokens bounds every pass",
    "use_liger_loss": "nothing to set: logits are never held for all tokens",
    "use_liger_kernel": "nothing to set: logits are never held for all tokens",
    "use_logits_to_keep": "nothing to set: the prompt's logits are never computed",
    "dataset_num_proc": "nothing to set",
    "is_encoder_decoder": "nothing to set: models are decoders",
    "remove_unused_columns": "nothing to set: further columns go to the reward functions",
}
"""TRL's setting, and what to set for it, where that is not one setting of the same meaning."""

RENAMED: Mapping[tuple[str, str], str] = {("ipo", "beta"): "tau", ("orpo", "beta"): "lam"}
"""An algorithm and TRL's name of one of its settings -> the name here."""


def answer_for_setting(key: str, value: object) -> str | None:
    """What stands for TRL's setting `key` with this value; None for a key that is in none of the tables.

    Example: `loss_type`, "ipo" gives "algorithm.name=ipo, where TRL's beta is algorithm.tau".
    """
    if key != "loss_type":
        return REPLACED.get(key)
    types = [str(item) for item in (cast(list[object], value) if isinstance(value, list) else [value])]
    if len(types) > 1 and "sft" in types:
        return LOSS_TYPES["sft"]
    return answer_for_method(types[0]) if len(types) == 1 else REPLACED["loss_weights"]


def answer_for_method(name: str) -> str | None:
    """What stands for an unknown name of an algorithm, such as "hinge", "nca_pair", "cDPO" or "DPO"; None for
    a name that is in none of the tables."""
    plain = name.lower().replace("-", "_").strip("_ ")
    known = f"algorithm.name={plain}" if plain in ALGORITHMS else None
    return LOSS_TYPES.get(plain) or METHODS.get(plain) or known
