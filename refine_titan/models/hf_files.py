"""Names of the files of a Hugging Face folder that lie beside its weights."""

TOKENIZER_FILE = "tokenizer.json"
# The files of a tokenizer of GPT-2's kind that was saved without a `tokenizer.json`.
TOKENIZER_PARTS = ("vocab.json", "merges.txt")
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# What is copied from a model to the checkpoints that come of it.
ASSETS = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    *TOKENIZER_PARTS,
    "chat_template.jinja",
    "generation_config.json",
)
