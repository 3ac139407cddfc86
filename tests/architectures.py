"""Tiny random models of transformers' architectures, each with its inputs: right for the code's
paths, wrong for any claim.

A seed gives the same model again: that is the pretrained one that adapters are loaded onto.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY, HIDDEN, LABELS = 40, 16, 3
Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A model class, its settings, and what to feed and to adapt."""

    model: str
    settings: dict[str, Any]
    inputs: Inputs
    task_type: str | None = None
    target_modules: Any = "all-linear"
    adapter: dict[str, Any] = field(default_factory=dict)  # further settings of the adapter
    lora: bool = True  # whether PEFT's LoRA can hold it
    # Whether rounding to bfloat16 changes little: not where it decides on experts, and some models
    # do not run in it.
    half: bool = True

    def build(self, seed: int) -> PreTrainedModel:
        cls = getattr(transformers, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls(cls.config_class(**self.settings))
            for parameter in model.parameters():
                # Nothing at zero or one, where it would hide what is left out of a file.
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return model.eval()


def outputs_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """All numbers that a model gives for some inputs, beside the loss; without gradients."""
    with torch.no_grad():
        found = model(**{k: v for k, v in inputs.items() if "label" not in k and "_pos" not in k})
    names = ("logits", "start_logits", "end_logits", "logits_per_image", "last_hidden_state")
    parts = [found[name] for name in names if name in found]
    return torch.cat([part.float().flatten() for part in parts])


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).loss


# -- inputs ------------------------------------------------------------------------------------


def tokens(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def for_causal_lm() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def for_classes() -> dict[str, Tensor]:
    ids, mask = tokens(), torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(LABELS, (3,))}


def for_classes_of_bart() -> dict[str, Tensor]:
    ids = tokens()
    ids[:, -1] = 2  # where it reads the text's summary
    return {"input_ids": ids, "labels": torch.randint(LABELS, (3,))}


def for_last_token() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "labels": torch.randint(LABELS, (3,))}


def for_tokens() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": torch.randint(LABELS, (3, 7))}


def for_answers() -> dict[str, Tensor]:
    places = {k: torch.randint(7, (3,)) for k in ("start_positions", "end_positions")}
    return {"input_ids": tokens(), **places}


def for_seq2seq() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(3, 5), "labels": tokens(3, 5)}


def videos() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16), "labels": torch.randint(LABELS, (2,))}


def pictures(size: int = 16) -> Inputs:
    def draw() -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(3, 3, size, size),
            "labels": torch.randint(LABELS, (3,)),
        }

    return draw


def pictures_with_texts() -> dict[str, Any]:
    ids = tokens()
    ids[:, -1] = VOCABULARY - 1  # where CLIP reads the text's summary
    return {"pixel_values": torch.randn(3, 3, 16, 16), "input_ids": ids, "return_loss": True}


def sounds() -> dict[str, Tensor]:
    mask = torch.ones(3, 400, dtype=torch.long)
    mask[0, 250:] = 0
    labels = torch.randint(LABELS, (3,))
    return {"input_values": torch.randn(3, 400), "attention_mask": mask, "labels": labels}


def sounds_with_texts() -> dict[str, Tensor]:
    return {"input_values": torch.randn(3, 400), "labels": tokens(3, 4)}


def spectra() -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(3, 8, 16),
        "decoder_input_ids": tokens(3, 5),
        "labels": tokens(3, 5),
    }


# -- models ------------------------------------------------------------------------------------

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPANS = COMMON | {"num_labels": 2}  # a start and an end
DECODER = {k: v for k, v in COMMON.items() if "dropout" not in k} | {"attention_dropout": 0.0}
MOE = DECODER | {"num_key_value_heads": 2, "moe_intermediate_size": 12, "router_jitter_noise": 0.0}
DEEPSEEK = MOE | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SPEECH = COMMON | {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
VISION = COMMON | {"image_size": 16, "patch_size": 8}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "num_labels": LABELS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "qa_dropout": 0.0,
}
CLIP = {
    "text_config": COMMON
    | {"projection_dim": 8, "eos_token_id": VOCABULARY - 1, "initializer_factor": 3.0},
    "vision_config": VISION | {"projection_dim": 8, "initializer_factor": 3.0},
    "projection_dim": 8,
    "initializer_factor": 3.0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "init_std": 0.3,
    "dropout": 0.0,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.3,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SEQ_CLS, CAUSAL_LM = "SEQ_CLS", "CAUSAL_LM"
WHISPER = BART | {
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
ARCHITECTURES = {
    # encoders; the heads of the first five are modules of several layers
    "roberta": Architecture("RobertaForSequenceClassification", COMMON, for_classes, SEQ_CLS),
    "electra": Architecture(
        "ElectraForSequenceClassification", COMMON | {"embedding_size": 8}, for_classes, SEQ_CLS
    ),
    "esm": Architecture(
        "EsmForSequenceClassification",
        COMMON | {"mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False},
        for_classes,
        SEQ_CLS,
    ),
    "xlm-roberta": Architecture(
        "XLMRobertaForSequenceClassification", COMMON, for_classes, SEQ_CLS
    ),
    "longformer": Architecture(
        "LongformerForSequenceClassification",
        COMMON | {"attention_window": 4},
        for_classes,
        SEQ_CLS,
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification", DISTILBERT, for_classes, SEQ_CLS
    ),
    "bert": Architecture("BertForSequenceClassification", COMMON, for_classes, SEQ_CLS),
    "deberta": Architecture(
        "DebertaForSequenceClassification",
        COMMON | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        for_classes,
        SEQ_CLS,
        half=False,
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        COMMON | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        for_classes,
        SEQ_CLS,
    ),
    "albert": Architecture(
        "AlbertForSequenceClassification", COMMON | {"embedding_size": 8}, for_classes, SEQ_CLS
    ),
    "mpnet": Architecture("MPNetForSequenceClassification", COMMON, for_classes, SEQ_CLS),
    "mobilebert-mlm": Architecture(
        "MobileBertForMaskedLM",
        COMMON | {"embedding_size": 8, "intra_bottleneck_size": 8},
        for_causal_lm,
        # Its head reads the weights of `cls.predictions`.
        target_modules=r".*\.(query|value|dense|decoder)",
        adapter={"exclude_modules": ["cls.predictions.decoder"]},
        lora=False,
    ),
    # heads of tasks that PEFT trains in full
    "distilbert-tokens": Architecture(
        "DistilBertForTokenClassification", DISTILBERT, for_tokens, "TOKEN_CLS"
    ),
    "bert-tokens": Architecture("BertForTokenClassification", COMMON, for_tokens, "TOKEN_CLS"),
    "bert-answers": Architecture("BertForQuestionAnswering", SPANS, for_answers, "QUESTION_ANS"),
    "roberta-answers": Architecture(
        "RobertaForQuestionAnswering",
        SPANS,
        for_answers,
        "QUESTION_ANS",
        ["query", "dense", "qa_outputs"],
    ),
    # embeddings
    "bert-embeddings": Architecture(
        "BertForSequenceClassification",
        COMMON,
        for_classes,
        SEQ_CLS,
        ["word_embeddings", "position_embeddings", "query"],
    ),
    "gpt2-positions": Architecture("GPT2LMHeadModel", GPT2, for_causal_lm, CAUSAL_LM, ["wpe"]),
    "llama-embeddings": Architecture(
        "LlamaForCausalLM",
        DECODER | {"tie_word_embeddings": False},
        for_causal_lm,
        CAUSAL_LM,
        ["embed_tokens", "q_proj"],
    ),
    # decoders
    "gpt2": Architecture("GPT2LMHeadModel", GPT2, for_causal_lm, CAUSAL_LM),
    "gpt2-classes": Architecture(
        "GPT2ForSequenceClassification", GPT2, for_last_token, SEQ_CLS, r".*(c_attn|c_fc|score)"
    ),
    "llama": Architecture("LlamaForCausalLM", DECODER, for_causal_lm, CAUSAL_LM),
    "llama-head": Architecture(
        "LlamaForCausalLM",
        DECODER | {"tie_word_embeddings": False},
        for_causal_lm,
        CAUSAL_LM,
        ["q_proj", "down_proj", "lm_head"],
    ),
    "llama-tied": Architecture(
        "LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}, for_causal_lm, CAUSAL_LM
    ),
    "falcon": Architecture("FalconForCausalLM", DECODER, for_causal_lm, CAUSAL_LM),
    "opt": Architecture(
        "OPTForCausalLM",
        DECODER | {"ffn_dim": 24, "init_std": 0.3, "dropout": 0.0, "word_embed_proj_dim": HIDDEN},
        for_causal_lm,
        CAUSAL_LM,
    ),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", DECODER, for_causal_lm, CAUSAL_LM),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", DECODER | {"num_key_value_heads": 1}, for_causal_lm, CAUSAL_LM
    ),
    "gemma": Architecture(
        "GemmaForCausalLM",
        DECODER | {"num_key_value_heads": 1, "head_dim": 8},
        for_causal_lm,
        CAUSAL_LM,
    ),
    # mixtures of experts
    "mixtral": Architecture(
        "MixtralForCausalLM",
        MOE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        for_causal_lm,
        CAUSAL_LM,
        half=False,
    ),
    "qwen2-moe": Architecture(
        "Qwen2MoeForCausalLM",
        MOE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 12,
            "mlp_only_layers": [0],
        },
        for_causal_lm,
        CAUSAL_LM,
        half=False,
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3ForCausalLM", DEEPSEEK, for_causal_lm, CAUSAL_LM, half=False
    ),
    "deepseek-v3-gate": Architecture(
        "DeepseekV3ForCausalLM",
        DEEPSEEK,
        for_causal_lm,
        CAUSAL_LM,
        ["gate_proj", "o_proj"],
        half=False,
    ),
    # Its routers are linear layers by class, and compute something else.
    "phimoe": Architecture(
        "PhimoeForCausalLM",
        MOE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        for_causal_lm,
        CAUSAL_LM,
        half=False,
    ),
    # encoders with decoders
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "initializer_factor": 1.0,
            "decoder_start_token_id": 0,
        },
        for_seq2seq,
        "SEQ_2_SEQ_LM",
    ),
    "bart": Architecture("BartForConditionalGeneration", BART, for_seq2seq, "SEQ_2_SEQ_LM"),
    "bart-classes": Architecture(
        "BartForSequenceClassification", BART, for_classes_of_bart, SEQ_CLS
    ),
    # vision
    "vit": Architecture(
        "ViTForImageClassification",
        VISION,
        pictures(),
        adapter={"modules_to_save": ["classifier"]},
    ),
    "swin": Architecture(
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "num_labels": LABELS,
            "initializer_range": 0.3,
            "drop_path_rate": 0.0,
        },
        pictures(),
    ),
    "clip": Architecture("CLIPModel", CLIP, pictures_with_texts),
    "vit-patches": Architecture(
        "ViTForImageClassification",
        VISION,
        pictures(),
        target_modules=["projection", "q_proj"],
        adapter={"modules_to_save": ["classifier"]},
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        {
            "hidden_sizes": [8, 12],
            "depths": [1, 1],
            "num_stages": 2,
            "num_labels": LABELS,
            "initializer_range": 0.3,
            "layer_scale_init_value": 0.5,
        },
        pictures(32),
        target_modules=r".*\.(dwconv|pwconv1|pwconv2|patch_embeddings|downsampling_layer\.1)",
        lora=False,  # depthwise convolutions
    ),
    "videomae": Architecture(
        "VideoMAEForVideoClassification",
        VISION | {"num_frames": 4, "tubelet_size": 2},
        videos,
        target_modules=["projection", "value"],
    ),
    # audio
    "wav2vec2": Architecture("Wav2Vec2ForSequenceClassification", SPEECH, sounds),
    "wav2vec2-ctc": Architecture(
        "Wav2Vec2ForCTC", SPEECH | {"vocab_size": VOCABULARY}, sounds_with_texts
    ),
    "wavlm": Architecture("WavLMForSequenceClassification", SPEECH, sounds, lora=False),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        WHISPER,
        spectra,
    ),
    "wav2vec2-convolutions": Architecture(
        "Wav2Vec2ForSequenceClassification",
        SPEECH,
        sounds,
        target_modules=r".*\.(conv_layers\.\d\.conv|q_proj)",
    ),
    # state space
    "mamba": Architecture(
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "state_size": 4,
            "num_hidden_layers": 2,
            "initializer_range": 0.3,
        },
        lambda: {"input_ids": (ids := tokens()), "labels": ids},
        CAUSAL_LM,
        lora=False,
    ),
}
