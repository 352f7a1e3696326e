"""Adapters of PEFT give the same outputs here, and those written here give the same outputs in PEFT."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import jaxlm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"vocab_size": 50, "max_position_embeddings": 32}
BERT = transformers.BertConfig(**SIZES, num_labels=3)
T5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=50)
T5.decoder_start_token_id = 0
GPT2 = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=32)
MODELS = {  # class, config, target modules, task type
    "bert": (transformers.BertForSequenceClassification, BERT, ["query", "attention.output.dense"], "SEQ_CLS"),
    "sentence encoder": (transformers.BertModel, BERT, ["value", "output.dense"], "FEATURE_EXTRACTION"),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
        ["q_proj", "o_proj", "down_proj"],
        "CAUSAL_LM",
    ),
    "t5": (transformers.T5ForConditionalGeneration, T5, ["q", "wo"], "SEQ_2_SEQ_LM"),
    "gpt2": (transformers.GPT2LMHeadModel, GPT2, ["c_attn", "mlp.c_proj"], "CAUSAL_LM"),
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig(**SIZES, pad_token_id=0),
        ["Wqkv", "Wi"],
        None,
    ),
}
SMALL = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 50}
SMALL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32, "d_model": 32}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50, "max_position_embeddings": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "type_vocab_size": 0}
MT5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 50}
PHI = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPTJ = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 32, "rotary_dim": 4}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
OTHERS = {  # names of the class and of its config, values, target modules, task type
    "roberta": ("RobertaForSequenceClassification", SIZES | {"num_labels": 3}, ["query", "value"], "SEQ_CLS"),
    "distilbert": ("DistilBertForSequenceClassification", DISTILBERT | {"num_labels": 3}, ["q_lin"], "SEQ_CLS"),
    "electra": ("ElectraForTokenClassification", SIZES | {"embedding_size": 32}, ["query", "dense"], "TOKEN_CLS"),
    "albert": ("AlbertForSequenceClassification", SIZES | {"embedding_size": 16}, ["query", "ffn"], "SEQ_CLS"),
    "deberta": ("DebertaV2ForSequenceClassification", SIZES | DEBERTA, ["query_proj", "value_proj"], "SEQ_CLS"),
    "bart": ("BartForConditionalGeneration", SMALL, ["q_proj", "fc2"], "SEQ_2_SEQ_LM"),
    "qwen2": ("Qwen2ForCausalLM", SIZES | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "phi3": ("Phi3ForCausalLM", SIZES | PHI, ["qkv_proj", "gate_up_proj"], "CAUSAL_LM"),
    "gpt_neox": ("GPTNeoXForTokenClassification", SIZES, ["query_key_value", "dense_4h_to_h"], "TOKEN_CLS"),
    "gptj": ("GPTJForCausalLM", GPTJ, ["q_proj", "k_proj", "fc_in"], "CAUSAL_LM"),
    "opt": ("OPTForCausalLM", SIZES | {"word_embed_proj_dim": 16, "ffn_dim": 64}, ["q_proj", "fc1"], "CAUSAL_LM"),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50},
        "all-linear",
        "CAUSAL_LM",
    ),
    "falcon": ("FalconForCausalLM", SIZES | FALCON, ["query_key_value", "dense"], "CAUSAL_LM"),
    "gemma2": ("Gemma2ForCausalLM", SIZES | {"num_key_value_heads": 2, "head_dim": 8}, "all-linear", "CAUSAL_LM"),
    "llama classifier": ("LlamaForSequenceClassification", SIZES | {"pad_token_id": 0}, ["q_proj"], "SEQ_CLS"),
    "bert spans": ("BertForQuestionAnswering", SIZES, ["query"], "QUESTION_ANS"),
    "mt5": ("MT5ForConditionalGeneration", MT5 | {"decoder_start_token_id": 0}, ["q", "wi_0"], "SEQ_2_SEQ_LM"),
}
for name, (kind, values, targets, task) in OTHERS.items():
    kind = getattr(transformers, kind)
    MODELS[name] = kind, kind.config_class(**values), targets, task
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "some layers": {"rank_pattern": {".*1.*": 3}, "layers_to_transform": [0, 1]},
}
TOKENS_BT = np.random.default_rng(0).integers(3, 50, (2, 10))


def theirs(model) -> np.ndarray:
    tokens_BT = torch.tensor(TOKENS_BT)
    more = {"decoder_input_ids": tokens_BT} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(input_ids=tokens_BT, **more)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).numpy()


def ours(lm) -> np.ndarray:
    more = {"target_tokens_BT": TOKENS_BT} if lm.config.structure == "encoder_decoder" else {}
    output = lm(TOKENS_BT, **more)
    return np.asarray(output.hidden_BTD if lm.config.heads_on_top in ((), ("pooled",)) else output.logits)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (name, variant)
        for name in MODELS
        for variant in (VARIANTS if name not in OTHERS else ["lora"])
        if (name, variant) != ("t5", "some layers")
    ],
)
def test_adapters_are_equal_in_both_directions(name, variant, tmp_path):
    kind, config, targets, task = MODELS[name]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    base = lambda: kind.from_pretrained(tmp_path / "base").eval()
    settings = {"target_modules": targets, "task_type": task, "fan_in_fan_out": name == "gpt2"}
    settings |= {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    adapted = peft.get_peft_model(base(), peft.LoraConfig(**settings, **VARIANTS[variant])).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    expected = theirs(adapted)
    assert np.abs(expected - theirs(base())).max() > 1e-2
    close = partial(np.testing.assert_allclose, atol=1e-5 * max(1, np.abs(expected).max()))  # mT5's logits reach 20
    lm = jaxlm.load(tmp_path / "theirs", log=lambda message: None)
    close(ours(lm), expected)
    jaxlm.save(lm, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    close(theirs(back), expected)
