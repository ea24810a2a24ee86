"""A tiny model that talks: a byte-level tokenizer, in which an emoji is four tokens, and a chat
template."""

from pathlib import Path

from tests.support.tiny import CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import save_pretrained

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for every byte, and <|end|>, which ends a turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=[]
    )
    fast.chat_template = template
    return fast


def write_talker(
    directory: Path, *, seed: int = 0, positions: int = 512, template: str | None = TEMPLATE
) -> Path:
    """Write the model with random weights, and its tokenizer."""
    tokenizer = byte_tokenizer(template)
    config = CONFIG | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": positions,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    save_pretrained(Decoder.random(model_config(config), seed=seed), directory, tokenizer=tokenizer)
    return directory
