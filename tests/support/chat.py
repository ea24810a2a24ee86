"""Tiny chat models of the families that the recipes and the GGUF files are for: random weights, a
byte-level BPE tokenizer as SmolLM2 and Qwen2 have it, and a chat template."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import save_pretrained

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.2,
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """All bytes, four merges, three special tokens, and how the family cuts texts."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    if family == "llama":  # SmolLM2
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_CUT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = TEMPLATE
    return fast


def write_chat_model(directory: Path, family: str, **changes) -> Path:
    tokenizer = chat_tokenizer(family)
    config = SIZES | {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "vocab_size": len(tokenizer) + 1,  # rows beyond the tokenizer, as Qwen has them
        **({"use_sliding_window": False} if family != "llama" else {}),
        **({"head_dim": 128} if family == "qwen3" else {}),  # which transformers assumes
        **changes,
    }
    decoder = Decoder.random(model_config(config), seed=0)
    for parameter in decoder.parameters():  # biases and norms that tell places apart
        if parameter.dim() == 1:
            parameter.data += 0.1 * parameter.data.new_tensor(range(len(parameter))).sin()
    save_pretrained(decoder, directory, tokenizer=tokenizer)
    return directory
