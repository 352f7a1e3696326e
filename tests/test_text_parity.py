"""Ids, texts and likelihoods equal those of transformers, for the tokenizer class of each family and a tiny model.

For each family that generates, the tests compare the ids of a prompt, its greedy continuation and likelihoods.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tokenizer import byte_pairs, checkpoint, m2m_100, marian, nllb, train_tokenizer

import jaxlm
from jaxlm.families import FAMILIES
from jaxlm.inference.likelihood import fill, log_likelihoods, perplexity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Recommended"),  # the recommendation of sacremoses, which has no effect on ids
]

NEW = 12
END = "<|endoftext|>"
DECODER: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
DECODER |= {"intermediate_size": 20, "max_position_embeddings": 96, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 96}
SEQ2SEQ: dict[str, Any] = {"d_model": 24, "max_position_embeddings": 96, "encoder_layers": 2, "decoder_layers": 2}
SEQ2SEQ |= {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
SEQ2SEQ |= {"tie_word_embeddings": False}
T5 = {"d_model": 24, "d_kv": 5, "num_heads": 3, "d_ff": 20, "num_layers": 2, "decoder_start_token_id": 0}
PLAIN: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
PLAIN |= {"intermediate_size": 20, "max_position_embeddings": 96}
NEO: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "max_position_embeddings": 96}
NEO |= {"window_size": 4, "attention_types": [[["global", "local"], 1]]}
OPT_TOKENS = {"add_bos_token": True, "pad_token": "<pad>", **dict.fromkeys(("bos_token", "eos_token"), "</s>")}
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def write_json(folder: Path, bos: bool, digits: bool = False, **config: Any) -> Path:
    """Writes a byte-level tokenizer.json like those of Llama 3 and SmolLM, with or without BOS in its template."""
    from tokenizers import Tokenizer, pre_tokenizers, processors

    backend = Tokenizer.from_str(train_tokenizer("byte_bpe").backend.to_str())
    if digits:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    begin = ("<s> ", "<s>:1 ") if bos else ("", "")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{begin[0]}$A", pair=f"{begin[0]}$A {begin[1]}$B:1", special_tokens=[("<s>", 2)]
            ),
        ]
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = PLAIN | {"num_key_value_heads": 3, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT |= {"kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
LATENT |= {"moe_intermediate_size": 20, "first_k_dense_replace": 1}
HYBRID = DECODER | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_hidden_layers": 2}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5}
# name -> function that writes the tokenizer's files, class of the model, sizes of the model
Case = tuple[Callable[[Path], Path], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "gpt2": (lambda f: byte_pairs(f, END, tokenizer_class="GPT2Tokenizer"), "GPT2LMHeadModel", GPT2),
    "gpt2 with bos": (
        lambda f: byte_pairs(f, END, tokenizer_class="GPT2Tokenizer", add_bos_token=True),
        "GPT2LMHeadModel",
        GPT2,
    ),
    "llama": (lambda f: checkpoint("llama", f, add_bos_token=True), "LlamaForCausalLM", DECODER),
    "llama without bos": (lambda f: checkpoint("llama", f, add_bos_token=False), "LlamaForCausalLM", DECODER),
    "llama 3": (
        lambda f: write_json(f, True, tokenizer_class="PreTrainedTokenizerFast"),
        "LlamaForCausalLM",
        DECODER,
    ),
    "llama 3 by class": (lambda f: write_json(f, True, tokenizer_class="LlamaTokenizer"), "LlamaForCausalLM", DECODER),
    "smollm": (
        lambda f: write_json(f, False, tokenizer_class="GPT2Tokenizer", add_bos_token=False),
        "LlamaForCausalLM",
        DECODER,
    ),
    "json that contradicts config": (
        lambda f: write_json(f, False, tokenizer_class="PreTrainedTokenizerFast", add_bos_token=True),
        "LlamaForCausalLM",
        DECODER,
    ),
    "mistral": (
        lambda f: checkpoint("llama", f, add_bos_token=True),
        "MistralForCausalLM",
        DECODER | {"sliding_window": 8},
    ),
    "qwen2": (lambda f: byte_pairs(f, END, tokenizer_class="Qwen2Tokenizer"), "Qwen2ForCausalLM", DECODER),
    "qwen3": (lambda f: byte_pairs(f, END, tokenizer_class="Qwen2Tokenizer"), "Qwen3ForCausalLM", DECODER),
    "mixtral": (lambda f: checkpoint("llama", f, add_bos_token=True), "MixtralForCausalLM", DECODER),
    "qwen2_moe": (
        lambda f: byte_pairs(f, END, tokenizer_class="Qwen2Tokenizer"),
        "Qwen2MoeForCausalLM",
        DECODER | EXPERTS | {"shared_expert_intermediate_size": 20},
    ),
    "qwen3_moe": (
        lambda f: byte_pairs(f, END, tokenizer_class="Qwen2Tokenizer"),
        "Qwen3MoeForCausalLM",
        DECODER | EXPERTS,
    ),
    "qwen3_next": (
        lambda f: byte_pairs(f, END, tokenizer_class="Qwen2Tokenizer"),
        "Qwen3NextForCausalLM",
        HYBRID | EXPERTS | {"shared_expert_intermediate_size": 20},
    ),
    "qwen3_5": (lambda f: byte_pairs(f, END, tokenizer_class="Qwen2Tokenizer"), "Qwen3_5ForCausalLM", HYBRID),
    "qwen3_5_moe": (
        lambda f: write_json(f, False, tokenizer_class="PreTrainedTokenizerFast"),
        "Qwen3_5MoeForCausalLM",
        HYBRID | EXPERTS | {"shared_expert_intermediate_size": 20},
    ),
    "deepseek_v2": (
        lambda f: write_json(f, True, tokenizer_class="PreTrainedTokenizerFast"),
        "DeepseekV2ForCausalLM",
        LATENT,
    ),
    "deepseek_v3": (
        lambda f: write_json(f, True, tokenizer_class="PreTrainedTokenizerFast"),
        "DeepseekV3ForCausalLM",
        LATENT | {"n_group": 2, "topk_group": 2},
    ),
    "gpt_oss": (
        lambda f: write_json(f, False, tokenizer_class="PreTrainedTokenizerFast"),
        "GptOssForCausalLM",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phi3": (lambda f: checkpoint("llama", f, add_bos_token=True), "Phi3ForCausalLM", PLAIN),
    "olmo2": (lambda f: write_json(f, False, tokenizer_class="GPT2Tokenizer"), "Olmo2ForCausalLM", PLAIN),
    "granite": (lambda f: write_json(f, False, tokenizer_class="GPT2Tokenizer"), "GraniteForCausalLM", PLAIN),
    "smollm3": (
        lambda f: write_json(f, False, tokenizer_class="PreTrainedTokenizerFast"),
        "SmolLM3ForCausalLM",
        PLAIN | {"num_key_value_heads": 1},
    ),
    "gpt_neox": (
        lambda f: write_json(f, False, tokenizer_class="GPTNeoXTokenizer"),
        "GPTNeoXForCausalLM",
        PLAIN | {"rotary_pct": 0.5},
    ),
    "gptj": (
        lambda f: byte_pairs(f, END, tokenizer_class="GPT2Tokenizer"),
        "GPTJForCausalLM",
        GPT2 | {"rotary_dim": 4},
    ),
    "gpt_neo": (lambda f: byte_pairs(f, END, tokenizer_class="GPT2Tokenizer"), "GPTNeoForCausalLM", NEO),
    "opt": (
        lambda f: byte_pairs(f, *ROBERTA, tokenizer_class="GPT2Tokenizer", **OPT_TOKENS),
        "OPTForCausalLM",
        PLAIN | {"ffn_dim": 20},
    ),
    "bloom": (
        lambda f: write_json(f, False, tokenizer_class="PreTrainedTokenizerFast"),
        "BloomForCausalLM",
        {"hidden_size": 24, "n_layer": 2, "n_head": 3},
    ),
    "falcon": (
        lambda f: write_json(f, False, tokenizer_class="PreTrainedTokenizerFast"),
        "FalconForCausalLM",
        PLAIN,
    ),
    "gemma": (lambda f: checkpoint("gemma", f, add_bos_token=True), "GemmaForCausalLM", DECODER),
    "gemma2": (
        lambda f: checkpoint("gemma", f, add_bos_token=True),
        "Gemma2ForCausalLM",
        DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "gemma3": (
        lambda f: checkpoint("gemma", f, add_bos_token=False),
        "Gemma3ForCausalLM",
        DECODER | {"sliding_window": 8},
    ),
    "t5": (lambda f: checkpoint("t5", f), "T5ForConditionalGeneration", T5),
    "t5 v1.1": (
        lambda f: checkpoint("t5", f, extra_ids=10),
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": (lambda f: checkpoint("t5", f, extra_ids=0), "MT5ForConditionalGeneration", T5),
    "bart": (
        lambda f: byte_pairs(f, *ROBERTA, tokenizer_class="BartTokenizer"),
        "BartForConditionalGeneration",
        SEQ2SEQ,
    ),
    "led": (
        lambda f: byte_pairs(f, *ROBERTA, tokenizer_class="LEDTokenizer"),
        "LEDForConditionalGeneration",
        SEQ2SEQ | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
    ),
    "mbart": (
        lambda f: checkpoint("mbart", f, src_lang="de_DE", tgt_lang="ro_RO"),
        "MBartForConditionalGeneration",
        SEQ2SEQ,
    ),
    "mbart50": (
        lambda f: checkpoint("mbart50", f, src_lang="de_DE", tgt_lang="ro_RO"),
        "MBartForConditionalGeneration",
        SEQ2SEQ,
    ),
    "marian": (marian, "MarianMTModel", SEQ2SEQ),
    "pegasus": (lambda f: checkpoint("pegasus", f), "PegasusForConditionalGeneration", SEQ2SEQ),
    "nllb": (
        lambda f: nllb(f, src_lang="deu_Latn", tgt_lang="ron_Latn"),
        "M2M100ForConditionalGeneration",
        SEQ2SEQ,
    ),
    "m2m_100": (lambda f: m2m_100(f, src_lang="de", tgt_lang="ro"), "M2M100ForConditionalGeneration", SEQ2SEQ),
}
TEXTS = ["import the module", "The name of the file 12", "return None", "of this"]


@lru_cache
def case(name: str, folder: Path) -> tuple[Any, Any, jaxlm.LM]:
    """Returns the tokenizer and model of transformers, and the LM that jaxlm loads from the same folder."""
    write, kind, sizes = CASES[name]
    write(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model_class = getattr(transformers, kind)
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    special = {f"{role}_token_id": i for role, i in ids.items()}
    if kind.startswith(("Bart", "MBart", "LED")):
        language = tokenizer.convert_tokens_to_ids("ro_RO") if kind.startswith("MBart") else None
        special |= {"decoder_start_token_id": ids["eos"], "forced_bos_token_id": language, "forced_eos_token_id": None}
    if kind.startswith("M2M100"):
        language = tokenizer.convert_tokens_to_ids("ron_Latn" if name == "nllb" else "__ro__")
        special |= {"decoder_start_token_id": ids["eos"], "forced_bos_token_id": language}
        special |= {"bad_words_ids": [[ids["pad"]]]}  # would have the position of padding
    if kind.startswith(("Marian", "Pegasus")):
        special |= {"decoder_start_token_id": ids["pad"], "forced_eos_token_id": None}
    config = model_class.config_class(**sizes, vocab_size=len(tokenizer), **special)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = model_class(config).eval()
    for n, parameter in model.named_parameters():
        if parameter.dim() and not (kind.startswith(("Marian", "Pegasus")) and "embed_positions" in n):
            parameter.data = torch.randn_like(parameter) * (0.1 if "bias" in n else 0.6)
            parameter.data += float("norm.weight" in n and not kind.startswith("Gemma"))
    model.save_pretrained(folder)
    if name in ("mbart50", "nllb", "m2m_100"):  # jaxlm begins with the `tgt_lang` of the tokenizer
        model.generation_config.forced_bos_token_id = language
    return transformers.AutoTokenizer.from_pretrained(folder), model, jaxlm.load(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def special_text(tokenizer: Any) -> str:
    """Returns a text with special tokens between words and next to spaces."""
    names = [token for token in (tokenizer.eos_token, tokenizer.mask_token, tokenizer.bos_token) if token]
    return " the ".join(["import", *names, "module"]) + "".join(names)


@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_transformers(name, folders):
    """Compares the ids of prompts, the text that `generate` returns for each, and the text of random ids."""
    tokenizer, model, lm = case(name, folders / name)
    # In these classes a space before a special token is a piece. sentencepiece and jaxlm drop it.
    drops = name not in ("mbart50", "nllb", "pegasus")
    special = [special_text(tokenizer), f"a {tokenizer.eos_token} b"] if drops else []
    texts = [*TEXTS, *special, f"a{tokenizer.eos_token}b"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert lm.tokens(text)[0].tolist() == ids, text
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist()
        if model.config.is_encoder_decoder:
            expected = tokenizer.decode(out, skip_special_tokens=True)
        else:  # as the pipeline text-generation removes the prompt
            before = tokenizer.decode(ids, skip_special_tokens=True)
            expected = tokenizer.decode(out, skip_special_tokens=True)[len(before) :]
        (found,) = jaxlm.generate(lm, [text], max_new_tokens=NEW, temperature=0)
        assert found == expected, text
    random = np.random.default_rng(0)
    for n in range(1, 9):
        ids = random.integers(0, len(tokenizer), n).tolist()
        decode = lm.tokenizer.target.decode
        assert decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", CASES)
def test_likelihoods_of_texts_are_those_of_transformers(name, folders):
    tokenizer, model, lm = case(name, folders / name)
    pairs = [("import the", " module of"), ("The name", " of the file"), ("a b", " return None")]
    for (context, continuation), found in zip(pairs, log_likelihoods(lm, pairs), strict=True):
        if model.config.is_encoder_decoder:
            source = tokenizer(context, return_tensors="pt")["input_ids"]
            after = tokenizer(text_target=continuation, add_special_tokens=False)["input_ids"]
            with_special = tokenizer(text_target=continuation)["input_ids"]
            begin = [model.config.decoder_start_token_id, *with_special[: with_special.index(after[0])]]
            decoder_ids = torch.tensor([[*begin, *after[:-1]]])
            with torch.no_grad():
                log = model(source, decoder_input_ids=decoder_ids).logits[0, len(begin) - 1 :].log_softmax(-1)
        else:
            whole, before = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
            after = whole[len(before) :]
            with torch.no_grad():
                log = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        total = log[torch.arange(len(after)), torch.tensor(after)].sum().item()
        assert found.tokens == len(after)
        assert found.log_probability == pytest.approx(total, rel=1e-4, abs=1e-3)
    if not model.config.is_encoder_decoder:
        ids = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        assert perplexity(lm, TEXTS[1])["loss"] == pytest.approx(loss, rel=1e-4)


# name -> kind of tokenizer, class of the model
ENCODERS = {
    "bert": ("bert", "BertForMaskedLM"),
    "roberta": ("roberta", "RobertaForMaskedLM"),
    "roberta without flags": ("roberta", "RobertaForMaskedLM"),
    "longformer": ("roberta", "LongformerForMaskedLM"),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForMaskedLM"),
    "camembert": ("camembert", "CamembertForMaskedLM"),
    "mpnet": ("mpnet", "MPNetForMaskedLM"),
    "nomic_bert": ("bert", "NomicBertForMaskedLM"),
    "gte": ("xlm-roberta", "GteForMaskedLM"),
    "distilbert": ("bert", "DistilBertForMaskedLM"),
    "electra": ("bert", "ElectraForMaskedLM"),
    "albert": ("albert", "AlbertForMaskedLM"),
    "deberta-v2": ("deberta-v2", "DebertaV2ForMaskedLM"),
    "modernbert": ("bert", "ModernBertForMaskedLM"),
}


def test_the_texts_of_every_family_are_compared():
    """For a family that does not generate, its filled blanks are compared. XLNet does neither."""
    classes = [kind for _, kind, _ in CASES.values()] + [kind for _, kind in ENCODERS.values()]
    compared = {getattr(transformers, kind).config_class.model_type for kind in classes} | {"xlnet"}
    # The original code of GTE is not part of transformers.
    families = {kind.removesuffix("_text") for kind in FAMILIES} - {"new"}
    assert {kind.removesuffix("_text") for kind in compared} == families


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("text", ["the <mask> of", "the<mask> of", "<mask> <mask>the <mask>"])
def test_blanks_are_filled_as_in_transformers(name, text, tmp_path):
    """The mask of one tokenizer includes the space before it."""
    from test_tokenizer import change_mask, write_tokenizer_json

    kind_of_tokenizer, kind = ENCODERS[name]
    (write_tokenizer_json if kind_of_tokenizer in ("bert", "mpnet", "roberta") else checkpoint)(
        kind_of_tokenizer, tmp_path
    )
    if name == "roberta":
        change_mask(lstrip=True)(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model_class = getattr(transformers, kind)
    if name == "distilbert":
        sizes = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 20}
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    roles = [f"{role}_token_id" for role in ("pad", "bos", "eos", "cls", "sep")]
    special = {role: getattr(tokenizer, role) for role in roles}
    config = model_class.config_class(**sizes, vocab_size=len(tokenizer), **special)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    model.save_pretrained(tmp_path)
    text = text.replace("<mask>", tokenizer.mask_token)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        p_TV = model(ids).logits[0].softmax(-1)
    expected = [p_TV[n].topk(5) for n, i in enumerate(ids[0]) if i == tokenizer.mask_token_id]
    found = fill(jaxlm.load(tmp_path), text, blank=tokenizer.mask_token)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        spaced = lambda pieces: [piece.replace("\u2581", " ") for piece in pieces]
        pieces = tokenizer.convert_ids_to_tokens(theirs.indices.tolist())
        assert spaced(piece for piece, _ in ours) == spaced(pieces)
        np.testing.assert_allclose([p for _, p in ours], theirs.values, rtol=1e-3)
