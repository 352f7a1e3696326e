"""Greedy texts and beam searches equal those of transformers, token for token, for random models of each family."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import jaxlm
from jaxlm.inference.generate import stops_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

VOCABULARY = 41
STOP, NEW = 2, 20
WIDE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
WIDE |= {"intermediate_size": 20, "max_position_embeddings": 48, "pad_token_id": 0, "eos_token_id": STOP}
WIDE |= {"bos_token_id": 1}
DECODER = WIDE | {"num_key_value_heads": 1, "head_dim": 8}
SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 24, "max_position_embeddings": 48}
SEQ2SEQ |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
SEQ2SEQ |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "eos_token_id": STOP, "pad_token_id": 1}
SEQ2SEQ |= {"decoder_start_token_id": STOP, "bos_token_id": 0, "forced_eos_token_id": STOP}
SEQ2SEQ |= {"tie_word_embeddings": False}  # models with tied embeddings repeat one token
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 5, "num_heads": 3, "d_ff": 20, "num_layers": 2}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
T5 |= {"eos_token_id": STOP, "pad_token_id": 0, "decoder_start_token_id": 0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 48}
GPT2 |= {"pad_token_id": 0, "eos_token_id": STOP, "bos_token_id": 1}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
NOPE = WIDE | {"no_rope_layer_interval": 2}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 24, "pad_token_id": 0, "eos_token_id": STOP, "bos_token_id": 1}
NEO = SMALL | {"num_layers": 3, "num_heads": 3, "window_size": 4, "max_position_embeddings": 48}
NEO |= {"attention_types": [[["global", "local", "local"], 1]]}
OPT = SMALL | {"num_hidden_layers": 3, "num_attention_heads": 3, "ffn_dim": 20, "max_position_embeddings": 48}
OPT |= {"tie_word_embeddings": False}
FALCON = SMALL | {"num_hidden_layers": 3, "num_attention_heads": 3, "ffn_hidden_size": 20}
LOCAL = {"sliding_window": 4}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 2}
LATENT: dict[str, Any] = {"kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 5, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT |= {"num_key_value_heads": 3, "n_shared_experts": 1, "first_k_dense_replace": 1}
LED = {"max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 32, "attention_window": [4, 8]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", WIDE | {"rotary_pct": 0.5}),
    "gptj": ("GPTJ", "ForCausalLM", GPT2 | {"rotary_dim": 6}),
    "gpt_neo": ("GPTNeo", "ForCausalLM", NEO),
    "opt": ("OPT", "ForCausalLM", OPT),
    "opt narrow": ("OPT", "ForCausalLM", OPT | {"word_embed_proj_dim": 10, "do_layer_norm_before": False}),
    "bloom": ("Bloom", "ForCausalLM", {"n_layer": 3, "n_head": 3} | SMALL),
    "falcon": ("Falcon", "ForCausalLM", FALCON),
    "falcon new": ("Falcon", "ForCausalLM", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon rw": ("Falcon", "ForCausalLM", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "llama": ("Llama", "ForCausalLM", DECODER),
    "mistral": ("Mistral", "ForCausalLM", DECODER | LOCAL),
    "qwen2": ("Qwen2", "ForCausalLM", WIDE | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", "ForCausalLM", DECODER),
    "mixtral": ("Mixtral", "ForCausalLM", DECODER | LOCAL | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", DECODER | MIXED),
    "gpt_oss": ("GptOss", "ForCausalLM", DECODER | LOCAL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", "ForCausalLM", WIDE | LATENT),
    "deepseek_v3": ("DeepseekV3", "ForCausalLM", WIDE | LATENT | {"n_group": 2, "topk_group": 1, "q_lora_rank": 14}),
    "phi3": ("Phi3", "ForCausalLM", WIDE | LOCAL | {"num_key_value_heads": 1, "partial_rotary_factor": 0.75}),
    "olmo2": ("Olmo2", "ForCausalLM", WIDE | {"num_key_value_heads": 1}),
    "granite": ("Granite", "ForCausalLM", DECODER | MULTIPLIERS),
    "smollm3": ("SmolLM3", "ForCausalLM", NOPE | {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "gemma": ("Gemma", "ForCausalLM", DECODER),
    "gemma2": ("Gemma2", "ForCausalLM", DECODER | LOCAL | {"query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3", "ForCausalLM", DECODER | LOCAL | {"num_hidden_layers": 7}),
    "t5": ("T5", "ForConditionalGeneration", T5),
    "t5 v1.1": (
        "T5",
        "ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
    ),
    "bart": ("Bart", "ForConditionalGeneration", SEQ2SEQ),
    "mbart": ("MBart", "ForConditionalGeneration", SEQ2SEQ | {"decoder_start_token_id": 5, "forced_bos_token_id": 7}),
    "marian": ("Marian", "MTModel", SEQ2SEQ | {"decoder_start_token_id": 1, "bad_words_ids": [[1]]}),
    "pegasus": ("Pegasus", "ForConditionalGeneration", SEQ2SEQ | {"decoder_start_token_id": 0, "pad_token_id": 0}),
    "m2m_100": ("M2M100", "ForConditionalGeneration", SEQ2SEQ | {"forced_bos_token_id": 7, "bad_words_ids": [[1]]}),
    "led": ("LED", "ForConditionalGeneration", SEQ2SEQ | LED),
}
SINUSOIDAL = ("Marian", "Pegasus", "M2M100")
GENERATION_KEYS = ("forced_eos_token_id", "forced_bos_token_id", "bad_words_ids")


@lru_cache
def pair(name: str, folder: str) -> tuple[Any, jaxlm.LM]:
    """Returns a random model with well separated logits, in transformers and in jaxlm."""
    family, head, fields = MODELS[name]
    own = {key: value for key, value in fields.items() if key not in GENERATION_KEYS}
    config = getattr(transformers, f"{'Gemma3Text' if family == 'Gemma3' else family}Config")(**own)
    config._attn_implementation = "sdpa" if getattr(config, "alibi", False) else "eager"  # as in test_parity
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config).eval()
    normed = family in ("Bart", "MBart", "LED", *SINUSOIDAL)
    for n, parameter in (*model.named_parameters(), *model.named_buffers()):
        fixed = "inv_freq" in n or (family in (*SINUSOIDAL, "GPTJ") and "embed_positions" in n)
        if parameter.dtype == torch.float32 and parameter.dim() and not fixed:
            # With these standard deviations texts differ, and do not repeat one token from the start.
            small = "bias" in n or (
                not normed and any(part in n for part in ("embed_tokens", "shared", "wte", "word_embeddings"))
            )
            parameter.data = torch.randn_like(parameter) * (0.1 if small else 0.8)
            parameter.data += float(normed and "norm.weight" in n)
    for key in GENERATION_KEYS:
        setattr(model.generation_config, key, fields.get(key))
    model.save_pretrained(folder)
    return model, jaxlm.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@lru_cache
def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(6, VOCABULARY, n).tolist() for n in (9, 3, 1, 14)]


def transformers_tokens(model: Any, rows: list[list[int]], **choices: Any) -> list[list[int]]:
    """Returns the new tokens up to the stop token, for rows in one batch with the padding of transformers."""
    both, width = model.config.is_encoder_decoder, max(map(len, rows))
    left = 0 if both else 1
    padding = model.config.pad_token_id
    ids = [
        [padding] * ((width - len(row)) * left) + row + [padding] * ((width - len(row)) * (1 - left)) for row in rows
    ]
    mask = [[int((i >= width - len(r)) if left else (i < len(r))) for i in range(width)] for r in rows]
    with torch.no_grad():
        found = model.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=NEW, do_sample=False, **choices
        )
    new = found[:, 1 if both else width :].tolist()
    return [row[: row.index(STOP)] if STOP in row else row for row in new]


def log_probability(model: Any, prompt: list[int], row: list[int]) -> float:
    """Returns the log-probability of new tokens, by transformers."""
    new = row + [STOP] * (len(row) < NEW)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            read = [model.config.decoder_start_token_id, *new[:-1]]
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([read])).logits
        else:
            logits = model(torch.tensor([prompt + new[:-1]])).logits[:, len(prompt) - 1 :]
    log_TV = torch.log_softmax(logits[0].double(), -1)
    return log_TV[range(len(new)), new].sum().item()


def assert_same(model: Any, lm: jaxlm.LM, hf: dict[str, Any], padded: bool = True, **ours: Any) -> None:
    n = hf.get("num_return_sequences", 1)
    choices = {"max_new_tokens": NEW, "temperature": 0.0, "return_tokens": True} | ours
    expected = [transformers_tokens(model, [prompt], **hf) for prompt in prompts()]  # alone
    found = jaxlm.generate(lm, prompts(), **choices)
    found = found if n > 1 else [[row] for row in found]
    pairs = [
        (prompt, *texts)
        for prompt, *rows in zip(prompts(), found, expected, strict=True)
        for texts in zip(*rows, strict=True)
    ]
    # Two beams may have the same score up to rounding, and then the better one depends on the processor.
    ties = [pair for pair in pairs if pair[1] != pair[2]]
    assert len(ties) <= (n if hf.get("num_beams", 1) > 1 else 0), ties
    for prompt, *texts in ties:
        ours_score, their_score = (log_probability(model, prompt, text) for text in texts)
        assert len(texts[0]) == len(texts[1]) and abs(ours_score - their_score) < 2e-4, texts
    assert len({tuple(row) for rows in expected for row in rows}) > 2
    if n == 1:
        if padded:
            assert transformers_tokens(model, prompts(), **hf) == [
                row for (row,) in expected
            ]  # transformers' own batch, padded
        assert jaxlm.generate(lm, prompts()[:1], **choices) == found[0]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_search_equals_that_of_transformers(folder, name):
    model, lm = pair(name, str(folder / name))
    assert stops_of(lm) == [STOP]
    assert_same(model, lm, {})


FEW = ("gpt2", "gemma3", "t5", "bart")
BEAMS = [(3, 1.0, 1), (4, 0.3, 2), (2, 2.0, 2)]
# Few models are tested with all settings. The others have the same search but other caches, and one setting.
SEARCHES = [(name, *s) for n, name in enumerate(MODELS) for s in (BEAMS if name in FEW else [BEAMS[n % 3]])]


@pytest.mark.parametrize(("name", "beams", "penalty", "best"), SEARCHES)
def test_beam_search_equals_that_of_transformers(folder, name, beams, penalty, best):
    model, lm = pair(name, str(folder / name))
    hf = {"num_beams": beams, "length_penalty": penalty, "num_return_sequences": best}
    assert_same(model, lm, hf, beams=beams, length_penalty=penalty, n_best=best)


@pytest.mark.parametrize("name", ("gpt2", "bart"))
@pytest.mark.parametrize("early", [True, "never"])
@pytest.mark.parametrize("penalty", [1.5, 0.3, -0.5])
def test_early_stopping_equals_that_of_transformers(folder, name, early, penalty):
    model, lm = pair(name, str(folder / name))
    hf = {"num_beams": 3, "length_penalty": penalty, "num_return_sequences": 2, "early_stopping": early}
    assert_same(model, lm, hf, beams=3, length_penalty=penalty, n_best=2, early_stopping=early)


@pytest.mark.parametrize("name", ("gpt2", "bart"))
@pytest.mark.parametrize(("n", "beams"), [(1, 1), (2, 1), (3, 1), (50, 1), (2, 3)])
def test_no_ngram_is_repeated(folder, name, n, beams):
    model, lm = pair(name, str(folder / name))
    # In a batch, transformers includes padding in the n-grams.
    hf = {"no_repeat_ngram_size": n, "num_beams": beams}
    assert_same(model, lm, hf, padded=False, no_repeat_ngram_size=n, beams=beams, temperature=0.0)


FILES: dict[str, dict[str, Any]] = {
    "greedy": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 9, "max_new_tokens": 12},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "lengths": {"num_beams": 2, "early_stopping": "never", "length_penalty": 1.5, "min_length": 17, "max_length": 22},
    "tokens": {
        "begin_suppress_tokens": [3, 9, 14, 22, 30],
        "suppress_tokens": [7, 8, 31, -1],
        "eos_token_id": [2, 11, 20],
        "bad_words_ids": [[5], [12, 13]],
        "forced_eos_token_id": [11, 20],
        "max_new_tokens": 6,
        "do_sample": False,
    },
    "first": {"forced_bos_token_id": 9, "begin_suppress_tokens": [4, 6, 10, 15, 16, 17, 33], "max_new_tokens": 5},
    "ids": {"max_new_tokens": 4, "temperature": 0.4, "top_k": 3, "top_p": 0.5},  # without do_sample: greedy
}
FILES["beams"] |= {"no_repeat_ngram_size": 3, "max_length": 30}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("file", FILES)
def test_the_settings_of_the_checkpoint_are_the_defaults(folder, name, file):
    """`generate` without settings equals `model.generate()` with the same generation_config.json."""
    model, lm = pair(name, str(folder / name))
    own = {"eos_token_id": STOP, "pad_token_id": model.config.pad_token_id, "decoder_start_token_id": None} | FILES[
        file
    ]
    if model.config.is_encoder_decoder:
        own["decoder_start_token_id"] = model.config.decoder_start_token_id
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(**own)
    stops, n = np.atleast_1d(own["eos_token_id"]).tolist(), own.get("num_return_sequences", 1)
    expected = []
    try:
        for prompt in prompts():
            found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
            new = found[:, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
            cut = [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in new]
            expected.append(cut if n > 1 else cut[0])
    finally:
        model.generation_config = before
    lm = replace(lm, files={**lm.files, "generation_config.json": json.dumps(own).encode()})
    assert jaxlm.generate(lm, prompts(), return_tokens=True) == expected
