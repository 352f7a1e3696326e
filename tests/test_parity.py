"""Random models of every family and head, with odd shapes, equal those of transformers in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen
import jax
import numpy as np
import pytest

import jaxlm
import jaxlm.families
from jaxlm.hub import safetensors
from jaxlm.nn import transformer
from jaxlm.nn.layers import Dropout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

VOCABULARY, T = 41, 13
# Keys of transformers' configs: three heads, sizes that are not powers of two.
WIDE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
WIDE |= {"intermediate_size": 20, "max_position_embeddings": 16}
DECODER = WIDE | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 3, "head_dim": 10}
SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 24, "max_position_embeddings": 16}
SEQ2SEQ |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
SEQ2SEQ |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "eos_token_id": 2, "pad_token_id": 1}
SEQ2SEQ |= {"decoder_start_token_id": 2, "num_labels": 3}
UNEQUAL = {"unequal": {"decoder_attention_heads": 4, "decoder_ffn_dim": 28}}
UPCAST = {"reorder_and_upcast_attn": True}
SEPARATE = {"separate": {"tie_word_embeddings": False}}
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 5, "num_heads": 3, "d_ff": 20, "num_layers": 2}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
BERT_LIKE = {"": {}, "one": {"num_hidden_layers": 1, "num_attention_heads": 1}, "relu": {"hidden_act": "relu"}}
BERT_LIKE |= {"untied": {"tie_word_embeddings": False}}
GROUPED = {"grouped": {"num_key_value_heads": 1}, "tied": {"tie_word_embeddings": True, "head_dim": 4}}
GROUPED |= {"three": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 30}}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8, "rope_theta": 100.0}
OWN_HEADS = WIDE | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1000.0}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 6}
RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
PHI_LONG = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
PHI_LONG |= {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]}
DISENTANGLED = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
V3 = DISENTANGLED | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 4}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LATENT: dict[str, Any] = {"kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 5, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
LATENT |= {"num_key_value_heads": 3, "n_shared_experts": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT_SCALES = {"mscale": 1.5, "mscale_all_dim": 0.7}
GROUPS = {"n_group": 3, "topk_group": 2}
MIXED = {"decoder_sparse_step": 2, "num_hidden_layers": 5, "intermediate_size": 28}
ENCODER_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
GATED_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "Model")
CAUSAL_HEADS = ("ForCausalLM", "ForSequenceClassification", "Model")
ALL_CAUSAL_HEADS = (*CAUSAL_HEADS, "ForTokenClassification", "ForQuestionAnswering")
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "Bert": (WIDE, (*ENCODER_HEADS, "ForPreTraining", "ForNextSentencePrediction"), BERT_LIKE),
    "Roberta": (
        WIDE,
        ENCODER_HEADS,
        BERT_LIKE | {"padding": {"pad_token_id": 5, "type_vocab_size": 1, "max_position_embeddings": 24}},
    ),
    "XLMRoberta": (WIDE, ENCODER_HEADS, {"": {}}),
    "Longformer": (
        WIDE | {"attention_window": 4, "max_position_embeddings": 40, "sep_token_id": 2},
        ENCODER_HEADS,
        BERT_LIKE | {"windows": {"attention_window": [4, 8, 4]}, "padding": {"pad_token_id": 5, "type_vocab_size": 1}},
    ),
    "Camembert": (WIDE, ENCODER_HEADS, {"": {}}),
    "MPNet": (WIDE, ENCODER_HEADS, BERT_LIKE | {"padding": {"pad_token_id": 5}}),
    "DistilBert": (
        {"vocab_size": VOCABULARY, "dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 20}
        | {"max_position_embeddings": 16},
        ENCODER_HEADS,
        {"": {}, "one": {"n_layers": 1, "n_heads": 1}, "relu": {"activation": "relu"}}
        | {"untied": {"tie_word_embeddings": False}, "sinusoidal": {"sinusoidal_pos_embds": True}},
    ),
    "Electra": (
        WIDE | {"embedding_size": 10},
        (*ENCODER_HEADS, "ForPreTraining"),
        BERT_LIKE | {"wide": {"embedding_size": 24}},
    ),
    "Albert": (
        WIDE | {"embedding_size": 10},
        (*ENCODER_HEADS, "ForPreTraining"),
        BERT_LIKE | {"equal": {"embedding_size": 24}, "groups": {"num_hidden_groups": 2}},
    ),
    "DebertaV2": (
        WIDE,
        ENCODER_HEADS,
        {"": V3, "unshared": DISENTANGLED, "absolute": {"type_vocab_size": 2}, "half": V3 | {"pos_att_type": "c2p"}}
        | {"both": V3 | {"position_biased_input": True, "max_relative_positions": 9}}
        | {
            "other half": V3 | {"pos_att_type": ["p2c"], "pooler_hidden_act": "tanh"},
            "new head": V3 | {"legacy": False},
            "conv": V3 | {"conv_kernel_size": 3, "conv_act": "gelu"},
        },
    ),
    "ModernBert": (
        WIDE | {"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
        GATED_HEADS,
        {
            "": {},
            "mean": {"classifier_pooling": "mean"},
            "pattern": {"num_hidden_layers": 7},
            "one": {"num_hidden_layers": 1},
            "no decoder bias": {"decoder_bias": False},
        }
        | {"biases": {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}},
    ),
    "XLNet": (
        {"vocab_size": VOCABULARY, "d_model": 24, "n_layer": 3, "n_head": 3, "d_inner": 20},
        ("LMHeadModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnsweringSimple", "Model"),
        {"": {}, "one": {"n_layer": 1, "n_head": 1}, "relu": {"ff_activation": "relu"}, "limit": {"clamp_len": 4}}
        | {"untied": {"tie_word_embeddings": False}},
    ),
    "NomicBert": (
        WIDE,
        GATED_HEADS,
        {"": {}, "one": {"num_hidden_layers": 1, "num_attention_heads": 1}, "gelu": {"hidden_act": "gelu"}}
        | {"untied": {"tie_word_embeddings": False}, "wide heads": {"head_dim": 10}}
        | {"linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}},
    ),
    "Gte": (
        WIDE,
        GATED_HEADS,
        {"": {}, "types": {"type_vocab_size": 3, "hidden_act": "relu"}, "no types": {"type_vocab_size": 0}}
        | {"untied": {"tie_word_embeddings": False}}
        | {"linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}},
    ),
    "GPT2": (
        {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 16, "pad_token_id": 0},
        ("LMHeadModel", "ForSequenceClassification", "Model"),
        {"": {}, "inner": {"n_inner": 20, "activation_function": "relu"}, "untied": {"tie_word_embeddings": False}}
        | {"by layer": {"scale_attn_by_inverse_layer_idx": True}}
        | {"unscaled": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False} | UPCAST},
    ),
    "GPTNeoX": (
        WIDE | {"pad_token_id": 0},
        ALL_CAUSAL_HEADS,
        {"": {}, "sequential": {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.6}}
        | {"whole": {"rotary_pct": 1.0, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}}
        | {"linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}},
    ),
    "GPTJ": (
        {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 16, "pad_token_id": 0}
        | {"rotary_dim": 4},
        (*CAUSAL_HEADS, "ForQuestionAnswering"),
        {"": {}, "inner": {"n_inner": 20, "activation_function": "relu", "rotary_dim": 8}}
        | {"tied": {"tie_word_embeddings": True, "rotary_dim": 6}},
    ),
    "GPTNeo": (
        {"vocab_size": VOCABULARY, "hidden_size": 24, "num_layers": 3, "num_heads": 3, "max_position_embeddings": 16}
        | {"window_size": 4, "pad_token_id": 0, "attention_types": [[["global", "local"], 1], [["local"], 1]]},
        ALL_CAUSAL_HEADS,
        {"": {}, "inner": {"intermediate_size": 20, "activation_function": "relu", "tie_word_embeddings": False}}
        | {"cycle": {"num_layers": 4, "attention_types": [[["local", "global"], 2]]}},
    ),
    "OPT": (
        {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"ffn_dim": 20, "max_position_embeddings": 16},
        (*CAUSAL_HEADS, "ForQuestionAnswering"),
        {"": {}, "narrow": {"do_layer_norm_before": False, "word_embed_proj_dim": 10}}
        | {"untied": {"tie_word_embeddings": False, "word_embed_proj_dim": 30, "enable_bias": False}}
        | {"no padding": {"pad_token_id": 5, "activation_function": "gelu"}},
    ),
    "Bloom": (
        {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 3, "n_head": 3, "pad_token_id": 0},
        ALL_CAUSAL_HEADS,
        {"": {}, "power": {"n_head": 4}, "one": {"n_head": 1, "n_layer": 1}, "twelve": {"n_head": 12}}
        | {"untied": {"tie_word_embeddings": False}},
    ),
    "Falcon": (
        {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"ffn_hidden_size": 20, "max_position_embeddings": 16, "pad_token_id": 0},
        ALL_CAUSAL_HEADS,
        {"": {}, "new": NEW_FALCON, "one norm": NEW_FALCON | {"num_ln_in_parallel_attn": 1, "bias": True}}
        | {"alibi": {"alibi": True}, "rw": RW | {"num_attention_heads": 12}, "several": {"multi_query": False}}
        | {"new alibi": NEW_FALCON | {"alibi": True, "num_kv_heads": 6}, "untied": {"tie_word_embeddings": False}}
        | {"linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}},
    ),
    "Llama": (
        DECODER,
        CAUSAL_HEADS,
        GROUPED
        | {"": {}, "biases": {"attention_bias": True, "mlp_bias": True}, "llama3": {"rope_parameters": LLAMA_3}}
        | {"linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}}
        | {
            "yarn": {"rope_parameters": YARN},
            "mscale": {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}},
        }
        | {"untruncated": {"rope_parameters": YARN | {"truncate": False, "beta_fast": 4.0, "attention_factor": 1.3}}},
    ),
    "Mistral": (DECODER, CAUSAL_HEADS, {"": {}, "window": {"sliding_window": 4}, "none": {"sliding_window": None}}),
    "Qwen2": (
        WIDE | {"num_key_value_heads": 1},
        CAUSAL_HEADS,
        {"": {"pad_token_id": 0}}
        | {"window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "pad_token_id": 0}},
    ),
    "Qwen3": (DECODER, CAUSAL_HEADS, GROUPED | {"": {}, "biases": {"attention_bias": True}}),
    "Mixtral": (
        DECODER | {"num_local_experts": 5, "num_experts_per_tok": 2},
        CAUSAL_HEADS,
        {"": {}, "window": {"sliding_window": 4, "num_experts_per_tok": 1}, "three": {"num_experts_per_tok": 3}},
    ),
    "Qwen2Moe": (
        DECODER | EXPERTS | {"shared_expert_intermediate_size": 28},
        CAUSAL_HEADS,
        {"": {}, "normalised": {"norm_topk_prob": True, "qkv_bias": False}, "mixed": {"mlp_only_layers": [1]}}
        | {"window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}},
    ),
    "Qwen3Moe": (
        DECODER | EXPERTS,
        CAUSAL_HEADS,
        {"": {}, "normalised": {"norm_topk_prob": True, "attention_bias": True}}
        | {"mixed": MIXED, "list": MIXED | {"mlp_only_layers": [0, 3], "decoder_sparse_step": 1}}
        | {"dense": {"mlp_only_layers": [0, 1, 2]}}
        | {"window": {"use_sliding_window": True, "sliding_window": 4}},
    ),
    "GptOss": (
        DECODER | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4},
        (*CAUSAL_HEADS, "ForTokenClassification"),
        {"": {}, "three": {"num_attention_heads": 6, "num_key_value_heads": 3, "rope_parameters": YARN}}
        | {"unbiased": {"attention_bias": False, "swiglu_limit": 0.5, "num_experts_per_tok": 3}}
        | {"global": {"layer_types": ["full_attention"] * 3}},
    ),
    "DeepseekV2": (
        WIDE | LATENT,
        CAUSAL_HEADS,
        {"": {"first_k_dense_replace": 1}, "lite": {"q_lora_rank": None, "routed_scaling_factor": 1.7}}
        | {"groups": GROUPS | {"topk_method": "group_limited_greedy", "rope_parameters": YARN | LATENT_SCALES}}
        | {"dense": {"first_k_dense_replace": 3}},
    ),
    "DeepseekV3": (
        WIDE | LATENT | GROUPS,
        (*CAUSAL_HEADS, "ForTokenClassification"),
        {"": {"first_k_dense_replace": 2}, "yarn": {"rope_parameters": YARN | LATENT_SCALES, "q_lora_rank": None}}
        | {"one group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0}},
    ),
    "Phi3": (
        WIDE | {"num_key_value_heads": 1, "pad_token_id": 0, "hidden_size": 36, "original_max_position_embeddings": 16},
        (*CAUSAL_HEADS, "ForTokenClassification"),
        {"": {}, "window": {"sliding_window": 4}, "partial": {"partial_rotary_factor": 0.7}}
        | {"longrope": {"rope_parameters": PHI_LONG, "original_max_position_embeddings": 24}}
        | {"three": {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True}},
    ),
    "Olmo2": (
        OWN_HEADS,
        CAUSAL_HEADS,
        {"": {}, "grouped": {"num_key_value_heads": 1, "attention_bias": True}, "tied": {"tie_word_embeddings": True}},
    ),
    "Granite": (
        DECODER | {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
        ("ForCausalLM", "Model"),
        {"": {"logits_scaling": 7.0}, "biases": {"attention_bias": True, "mlp_bias": True}}
        | {"tied": {"tie_word_embeddings": True, "num_key_value_heads": 1}},
    ),
    "SmolLM3": (
        OWN_HEADS | {"no_rope_layer_interval": 2, "num_hidden_layers": 5},
        ALL_CAUSAL_HEADS,
        {"": {}, "window": {"use_sliding_window": True, "sliding_window": 4, "num_key_value_heads": 1}}
        | {"list": {"no_rope_layers": [0, 1, 1, 0, 1], "mlp_bias": True, "attention_bias": True}}
        | {"untied": {"tie_word_embeddings": False}},
    ),
    "Gemma": (DECODER, CAUSAL_HEADS, GROUPED | {"": {}, "untied": {"tie_word_embeddings": False}}),
    "Gemma2": (DECODER | {"sliding_window": 4, "query_pre_attn_scalar": 12}, CAUSAL_HEADS, GROUPED | {"": {}}),
    "Gemma3Text": (
        DECODER | {"sliding_window": 4, "query_pre_attn_scalar": 12, "num_hidden_layers": 7},
        ("Model", "ForSequenceClassification"),
        GROUPED | {"": {}},
    ),
    "Gemma3": (
        DECODER | {"sliding_window": 4, "num_hidden_layers": 7, "final_logit_softcapping": 3.0},
        ("ForCausalLM",),
        {"": {}, "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "attn_logit_softcapping": 5.0}},
    ),
    "T5": (
        T5,
        ("ForConditionalGeneration", "Model", "EncoderModel"),
        {"": {}, "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1}},
    ),
    "MT5": (
        T5,
        ("ForConditionalGeneration", "Model", "EncoderModel"),
        {"": {}, "plain": {"feed_forward_proj": "relu"}},
    ),
    "Bart": (
        SEQ2SEQ,
        ("ForConditionalGeneration", "ForSequenceClassification", "Model"),
        {"": {}, "scaled": {"scale_embedding": True, "activation_function": "relu"}} | SEPARATE | UNEQUAL,
    ),
    "MBart": (
        SEQ2SEQ,
        ("ForConditionalGeneration", "ForSequenceClassification", "Model"),
        {"": {}} | SEPARATE | UNEQUAL,
    ),
    "Marian": (
        SEQ2SEQ,
        ("MTModel", "Model"),
        {"": {}, "swish": {"activation_function": "swish", "scale_embedding": True}} | SEPARATE | UNEQUAL,
    ),
    "Pegasus": (
        SEQ2SEQ | {"pad_token_id": 0, "decoder_start_token_id": 0},
        ("ForConditionalGeneration", "Model"),
        {"": {}, "relu": {"activation_function": "relu", "scale_embedding": True}} | SEPARATE | UNEQUAL,
    ),
    "M2M100": (
        SEQ2SEQ | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},  # for training
        ("ForConditionalGeneration", "Model"),
        {"": {}, "gelu": {"activation_function": "gelu", "scale_embedding": False}, "padding": {"pad_token_id": 4}}
        | SEPARATE
        | UNEQUAL,
    ),
    "LED": (
        SEQ2SEQ | {"max_encoder_position_embeddings": 20, "max_decoder_position_embeddings": 10, "attention_window": 4},
        ("ForConditionalGeneration", "Model"),
        {"": {}, "windows": {"attention_window": [4, 8], "activation_function": "relu"}} | SEPARATE | UNEQUAL,
    ),
}
SINUSOIDAL = ("Marian", "Pegasus", "M2M100")
MEMBERS = [
    pytest.param(family, head, shape, id=f"{family}{head}-{shape.replace(' ', '_') or 'plain'}")
    for family, (_, heads, shapes) in FAMILIES.items()
    for head in heads
    for shape in shapes
    if head in heads[:2] or shape == next(iter(shapes))  # all shapes for two heads, one shape for the others
]
LOGITS = ("logits", "prediction_logits", "pooler_output")


def implementation(config: Any) -> str:
    """Returns an attention that can return its weights, except for Falcon with ALiBi, which "eager" adds twice."""
    return "sdpa" if getattr(config, "alibi", False) else "eager"


def transformers_model(family: str, head: str, shape: str) -> Any:
    """Returns a random model without weights at a special initial value (0 or 1), which could hide errors."""
    base, _, shapes = FAMILIES[family]
    config = getattr(transformers, f"{'Gemma3Text' if family == 'Gemma3' else family}Config")(**base | shapes[shape])
    config._attn_implementation = implementation(config)
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config).eval()
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        fixed = "inv_freq" in name or (
            family in (*SINUSOIDAL, "GPTJ") and "embed_positions" in name
        )  # sines and cosines
        if parameter.dtype == torch.float32 and parameter.dim() and not fixed:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


def batch(config: Any, left: bool) -> dict[str, np.ndarray]:
    """Returns rows of 13, 7 and 1 tokens, with padding on the right or left. No other token is the padding token."""
    random = np.random.default_rng(0)
    padding = config.pad_token_id if config.pad_token_id is not None else 0
    tokens = random.integers(6, VOCABULARY, (3, T))
    mask = np.arange(T) < np.array([[T], [7], [1]])
    mask = mask[:, ::-1] if left else mask
    if config.is_encoder_decoder:
        last = np.arange(T) == (T - 1 if left else mask.sum(1, keepdims=True) - 1)
        tokens = np.where(last, config.eos_token_id, tokens)
    return {"input_ids": np.where(mask, tokens, padding), "attention_mask": mask.astype(np.int64)}


def assert_same(model: Any, lm: jaxlm.LM, head: str, left: bool) -> None:
    inputs = batch(model.config, left)
    real = inputs["attention_mask"] > 0
    random = np.random.default_rng(1)
    if getattr(model.config, "type_vocab_size", 0) and "Distil" not in type(model).__name__:
        inputs["token_type_ids"] = random.integers(0, model.config.type_vocab_size, (3, T))
    named = {"mask_BT": inputs["attention_mask"], "types_BT": inputs.get("token_type_ids")}
    if type(model).__name__ == "LongformerForQuestionAnswering":  # without it, each row needs three separators
        inputs["global_attention_mask"] = random.integers(0, 2, (3, T))
        named["global_BT"] = inputs["global_attention_mask"]
    target_real = real
    if model.config.is_encoder_decoder and head not in ("EncoderModel", "ForSequenceClassification"):
        target_real = np.arange(9) < np.array([[9], [5], [2]])
        inputs["decoder_input_ids"] = random.integers(6, VOCABULARY, (3, 9))
        inputs["decoder_attention_mask"] = target_real.astype(np.int64)
        named |= {"target_tokens_BT": inputs["decoder_input_ids"], "target_mask_BT": inputs["decoder_attention_mask"]}
    with torch.no_grad():
        theirs = model(
            **{name: torch.tensor(np.ascontiguousarray(x)) for name, x in inputs.items()},
            output_hidden_states=True,
            output_attentions=implementation(model.config) == "eager",
        )
    ours = lm(inputs["input_ids"], **named, states=True, attentions=True)

    def assert_close(found: Any, expected: Any, real: np.ndarray, what: str) -> None:
        found, expected = np.asarray(found), expected.numpy()
        assert found.shape == expected.shape, what
        if found.shape[:2] == real.shape:
            found, expected = found[real], expected[real]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4, err_msg=what)

    if "start_logits" in theirs:
        assert_close(ours.logits[..., 0], theirs.start_logits, target_real, "start")
        assert_close(ours.logits[..., 1], theirs.end_logits, target_real, "end")
    for name in LOGITS:
        if theirs.get(name) is not None and (name != "pooler_output" or lm.config.heads_on_top == ("pooled",)):
            assert_close(ours.logits, theirs[name], target_real, name)
    if "last_hidden_state" in theirs:
        assert_close(ours.hidden_BTD, theirs.last_hidden_state, target_real, "hidden")
    stacks = {"": (ours.encoder or ours.decoder, real)}
    if ours.encoder and ours.decoder:
        stacks = {"encoder_": (ours.encoder, real), "decoder_": (ours.decoder, target_real)}
    for stack, (inside, mask) in stacks.items():
        states, weights = theirs[f"{stack}hidden_states"], theirs.get(f"{stack}attentions")
        assert inside.states_LBTD.shape[0] == len(states)
        for layer, state in enumerate(states):
            if state.shape[-1] == lm.config.width:  # OPT may project the last one
                assert_close(inside.states_LBTD[layer], state, mask, f"{stack}state {layer}")
        if stack != "decoder_" and hasattr(model.config, "attention_window"):  # stored by distance
            weights = None
        for layer, weight in enumerate(weights or ()):
            assert_close(
                np.asarray(inside.attention_LBHTS[layer]).transpose(0, 2, 1, 3),
                weight.transpose(1, 2),
                mask,
                f"{stack}attention {layer}",
            )
    if ours.encoder and ours.decoder:
        for layer, weight in enumerate(theirs.cross_attentions):
            found = np.asarray(ours.decoder.cross_attention_LBHTS[layer]).transpose(0, 2, 1, 3)
            assert_close(found, weight.transpose(1, 2), target_real, f"cross {layer}")


def tensors(folder: Path) -> dict[str, tuple]:
    return {
        name: (tensor.dtype, tensor.shape, np.asarray(tensor).tobytes())
        for name, tensor in safetensors.read(folder).items()
    }


@pytest.mark.parametrize(("family", "head", "shape"), MEMBERS)
def test_models_are_equal_in_both_directions(tmp_path, family, head, shape):
    model = transformers_model(family, head, shape)
    model.save_pretrained(tmp_path / "theirs")
    lm = jaxlm.load(tmp_path / "theirs")
    # Only DeBERTa masks all keys for padding, and with `left` the first token is padding. XLNet's classifier reads the
    # last position, padding or not. Falcon rounds ALiBi, and padding changes the positions of the keys. Longformer's
    # padding attends to nothing, but its classifier and pooler read the first position, padding or not.
    one_side = {"DebertaV2": (False,), "XLNet": (True,)} if head == "ForSequenceClassification" else {}
    one_side |= {"Longformer": (False,)} if head in ("ForSequenceClassification", "Model") else {}
    sides = (False,) if (family, shape) == ("Falcon", "rw") else one_side.get(family, (False, True))
    for left in sides:
        assert_same(model, lm, head, left)
    if head == "ForSequenceClassification":  # without a mask, as a user may call it
        ids = batch(model.config, left=sides[0])["input_ids"]
        with torch.no_grad():
            theirs = model(torch.tensor(ids)).logits
        np.testing.assert_allclose(lm(ids).logits, theirs, atol=1e-4, rtol=1e-4)
    jaxlm.save(lm, tmp_path / "ours")
    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert {name: ours[name] for name in theirs} == theirs

    # Transformers also reads a model that it did not save.
    origin = lm.origin._replace(names={}, dtypes={})
    other = replace(lm, params=jax.tree.map(lambda leaf: leaf * 0.5, lm.params), tokenizer=None, origin=origin)
    jaxlm.save(other, tmp_path / "new")
    named = {"output_loading_info": True, "attn_implementation": implementation(model.config)}
    again, report = type(model).from_pretrained(tmp_path / "new", **named)
    assert not any(report.values()), report
    assert_same(again.eval(), other, head, left=sides[0])


def nomic(**keys: Any) -> dict[str, Any]:
    """Returns a config.json of the original code of Nomic BERT."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 20, "n_positions": 64}
    flags = dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "prenorm", "causal"), False)
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    more = {"model_type": "nomic_bert", "activation_function": "swiglu", "layer_norm_epsilon": 1e-12}
    return sizes | flags | rates | more | {"rotary_emb_fraction": 1.0, "rotary_emb_base": 1000} | keys


def gte(**keys: Any) -> dict[str, Any]:
    """Returns a config.json of the original code of GTE."""
    more = {"model_type": "new", "pack_qkv": True, "position_embedding_type": "rope", "layer_norm_type": "layer_norm"}
    return WIDE | more | {"type_vocab_size": 1, "rope_theta": 500.0, "rope_scaling": None} | keys


NTK = {"rope_type": "linear", "factor": 3 ** (2 / 8), "rope_theta": 1500.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
UNBIASED = ("cls.predictions.transform.dense.bias", "cls.predictions.bias")
ORIGINAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # class, its keys, config.json of the original code
    "nomic": ("NomicBert", {"intermediate_size": 256}, nomic()),
    "nomic dynamic": (
        "NomicBert",
        {"intermediate_size": 256, "max_position_embeddings": 8, "rope_parameters": DYNAMIC},
        nomic(rotary_scaling_factor=2, max_trained_positions=8),
    ),
    "gte": ("Gte", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, gte()),
    "gte ntk": ("Gte", {"rope_parameters": NTK}, gte(rope_scaling={"type": "ntk", "factor": 3.0})),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_files_of_original_code_are_equal(tmp_path, name):
    """Transformers has no class for these files. Its class for the same architecture gets the same weights."""
    family, keys, original = ORIGINAL[name]
    config = getattr(transformers, f"{family}Config")(**WIDE | keys)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.0 if parameter_name in UNBIASED else 0.3)
    model.save_pretrained(tmp_path / "native")
    prefixes = {"NomicBert": ("nomic_bert.", "bert."), "Gte": ("gte.", "new.")}[family]
    stored = {
        (prefixes[1] + name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else name): np.asarray(tensor)
        for name, tensor in safetensors.read(tmp_path / "native").items()
        if name not in UNBIASED
    }
    (tmp_path / "theirs").mkdir()
    safetensors.write(stored, tmp_path / "theirs" / safetensors.WEIGHTS)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(original))
    if name == "gte ntk":  # by the formula of its authors
        frequencies = 1500.0 ** -(np.arange(0, 8, 2) / 8) / 3 ** (2 / 8)
        np.testing.assert_allclose(model.gte.rotary_emb.inv_freq, frequencies, rtol=1e-6)
    lm = jaxlm.load(tmp_path / "theirs")
    for length in (5, 13):
        ids = np.random.default_rng(length).integers(3, VOCABULARY, (2, length))
        with torch.no_grad():
            theirs = model(torch.tensor(ids)).logits
        np.testing.assert_allclose(lm(ids).logits, theirs, atol=1e-4, rtol=1e-4)
    jaxlm.save(lm, tmp_path / "ours")
    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: saved[key] for key in original} == original


LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4]}
LONG |= {"long_factor": [1.0, 1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
BY_LENGTH = {
    "dynamic": ("Llama", DECODER | {"max_position_embeddings": 8}, DYNAMIC),
    "longrope": ("Llama", DECODER, LONG),
    "longrope with factors": ("Llama", DECODER, LONG | {"factor": 3.0, "attention_factor": 1.1}),
    "partial": (
        "Phi3",
        OWN_HEADS | {"original_max_position_embeddings": 8},
        LONG | PHI_LONG | {"partial_rotary_factor": 0.8},
    ),
}


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rotary_positions_that_depend_on_the_length_are_equal(tmp_path, kind, old):
    """Lengths are within and beyond the trained length. With padding, transformers would use the longest length."""
    family, sizes, rope = BY_LENGTH[kind]
    config = getattr(transformers, f"{family}Config")(**sizes, rope_parameters=dict(rope))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    if old:  # as transformers 4 wrote it
        values["rope_theta"] = values["rope_parameters"].pop("rope_theta")
        values["rope_scaling"] = values.pop("rope_parameters")
        path.write_text(json.dumps(values))
    lm = jaxlm.load(tmp_path)
    for length in (5, 8, 9, 14):
        ids = np.random.default_rng(length).integers(3, VOCABULARY, (2, length))
        with torch.no_grad():
            theirs = model(torch.tensor(ids)).logits
        np.testing.assert_allclose(lm(ids).logits, theirs, atol=1e-4, rtol=1e-4, err_msg=str(length))
    jaxlm.save(lm, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == values


RATES = (0.11, 0.13, 0.17, 0.19, 0.23, 0.29, 0.31)
BERT_RATES = dict(zip(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), RATES))
BART_RATES = dict(zip(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"), RATES))
DROPOUT: dict[str, dict[str, Any]] = {
    "Bert": BERT_RATES,
    "Roberta": BERT_RATES,
    "XLMRoberta": BERT_RATES,
    "Camembert": BERT_RATES,
    "MPNet": {name: BERT_RATES[name] for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")},
    "Electra": BERT_RATES,
    "Albert": dict(zip(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"), RATES)),
    "DistilBert": dict(zip(("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"), RATES)),
    "DebertaV2": dict(
        zip(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"), RATES)
    ),
    "ModernBert": dict(zip(("mlp_dropout", "attention_dropout", "embedding_dropout", "classifier_dropout"), RATES)),
    "NomicBert": BERT_RATES,
    "Gte": BERT_RATES,
    "GPT2": dict(zip(("resid_pdrop", "embd_pdrop", "attn_pdrop"), RATES)),
    # Falcon drops the sum of attention and MLP, and ignores attention_dropout without ALiBi.
    "GPTNeoX": dict(zip(("hidden_dropout", "attention_dropout", "classifier_dropout"), RATES)),
    "GPTJ": dict(zip(("resid_pdrop", "embd_pdrop", "attn_pdrop"), RATES)),
    "GPTNeo": dict(zip(("resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout"), RATES))
    | {"attention_types": [[["global"], 1]]},
    "OPT": dict(zip(("dropout", "attention_dropout"), RATES)),
    "Bloom": dict(zip(("hidden_dropout", "attention_dropout"), RATES)),
    "Llama": {"attention_dropout": RATES[0]},
    "Mistral": {"attention_dropout": RATES[0]},
    "Qwen2": {"attention_dropout": RATES[0]},
    "Qwen3": {"attention_dropout": RATES[0]},
    "Phi3": dict(zip(("resid_pdrop", "attention_dropout", "classifier_dropout"), RATES)),
    "Olmo2": {"attention_dropout": RATES[0]},
    "Granite": {"attention_dropout": RATES[0]},
    "SmolLM3": dict(zip(("attention_dropout", "classifier_dropout"), RATES)),
    "Gemma": {"attention_dropout": RATES[0]},
    "Gemma2": {"attention_dropout": RATES[0]},
    "T5": {"dropout_rate": RATES[0]},
    "MT5": {"dropout_rate": RATES[0]},
    "Bart": BART_RATES,
    "MBart": BART_RATES,
    "Marian": BART_RATES,
    "Pegasus": {name: BART_RATES[name] for name in ("dropout", "attention_dropout", "activation_dropout")},
    "M2M100": {name: BART_RATES[name] for name in ("dropout", "attention_dropout", "activation_dropout")},
}
ONE_LAYER = {"num_hidden_layers": 1, "n_layers": 1, "n_layer": 1, "num_layers": 1, "encoder_layers": 1}
ONE_LAYER |= {"decoder_layers": 1, "num_decoder_layers": 1}
SITES = [
    pytest.param(family, head, id=f"{family}{head}")
    for family in DROPOUT
    for head in FAMILIES[family][1]
    if head not in ("Model", "EncoderModel", "ForPreTraining", "ForNextSentencePrediction")
]


@pytest.mark.parametrize(("family", "head"), SITES)
def test_dropout_has_the_sites_of_transformers(monkeypatch, tmp_path, family, head):
    """Rates and sizes of all dropout sites in training are equal. Rates are converted back to keys."""
    base, _, shapes = FAMILIES[family]
    base = base | next(iter(shapes.values())) | {k: n for k, n in ONE_LAYER.items() if k in base or "num_d" in k}
    config = getattr(transformers, f"{family}Config")(**base | DROPOUT[family] | {"pad_token_id": 1})
    config._attn_implementation = "eager"
    model = getattr(transformers, family + head)(config)
    model.save_pretrained(tmp_path)
    ids = np.full((2, 7), 5)
    ids[:, -1] = 2  # BART's classifier reads the end token
    theirs: list[tuple[float, int]] = []

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if training and p:
            theirs.append((p, x.numel()))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    inputs = {"input_ids": torch.tensor(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor(ids)
    if head == "ForSequenceClassification":
        inputs.pop("decoder_input_ids", None)
    model.train()(**inputs)

    lm = jaxlm.load(tmp_path)
    ours: list[tuple[float, int]] = []

    def record_dropout(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Dropout) and context.module.rate and context.module.has_rng("dropout"):
            ours.append((context.module.rate, args[0].size))
        return next_function(*args, **kwargs)

    def forward(params: Any, key: Any) -> Any:
        targets = [None, None, None, ids] if config.is_encoder_decoder else []
        x_BTD = transformer.apply(lm.module, params, ids, *targets, key=key)
        method = lm.config.heads_on_top[0]
        return transformer.apply(
            lm.module, params, x_BTD[:, :1] if method == "classes" else x_BTD, method=method, key=key
        )

    with flax.linen.intercept_methods(record_dropout):
        jax.eval_shape(forward, lm.params, jax.random.key(0))
    assert sorted(ours) == sorted(theirs)
    written = jaxlm.families.FAMILIES[config.model_type].config_to_hf(lm.config)
    assert {name: written[name] for name in DROPOUT[family]} == DROPOUT[family]
