#!/usr/bin/env bash
# transformers 5.23.0: CLIPTokenizer.from_pretrained, and that of most models, finds no file and returns a tokenizer
# of its special tokens alone, without a word: offline and not in the cache, with a name that does not exist, or
# from a folder without tokenizer.json. A text is then a row of "unknown" tokens, or none at all, and a text tower
# trains on that. AutoTokenizer raises OSError for a name, but for a folder that has only a
# config.json it does the same. The check: len(tokenizer), 49408 for OpenAI's CLIP.
#
# Seen 2026-11-30 with tokenizers 0.23.3, Python 3.11, HF_HUB_OFFLINE=1:
#   CLIPTokenizer.from_pretrained("openai/clip-vit-base-patch32"): 2 tokens, "a cat" and "a dog" are the same ids
#   BertTokenizer: 5    RobertaTokenizer: 5    GPT2Tokenizer: 1    AutoTokenizer: OSError; a folder's config.json: 2
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0 numpy==2.4.6
cat > "$folder/tokens.py" <<'PY'
import sys
from pathlib import Path

import transformers


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


for name, model, length in (
    ("CLIPTokenizer", "openai/clip-vit-base-patch32", 2),
    ("BertTokenizer", "google-bert/bert-base-uncased", 5),
    ("RobertaTokenizer", "FacebookAI/roberta-base", 5),
    ("GPT2Tokenizer", "openai-community/gpt2", 1),
    ("CLIPTokenizer", "a-name/of-nothing", 2),
):
    tokenizer = getattr(transformers, name).from_pretrained(model)
    print(f"{name}, {model}: {len(tokenizer)} tokens, a cat: {ids(tokenizer, 'a cat')}")
    assert len(tokenizer) == length
    assert ids(tokenizer, "a cat") == ids(tokenizer, "a dog")

try:
    transformers.AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")
except OSError as error:
    print(f"AutoTokenizer: OSError: {str(error)[:60]}")
else:
    raise AssertionError("AutoTokenizer finds files")

folder = Path(sys.argv[1])
folder.mkdir()
(folder / "config.json").write_text('{"model_type": "clip"}')
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
print(f"AutoTokenizer, a folder with config.json: {len(tokenizer)} tokens")
assert len(tokenizer) == 2
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/tokens.py" "$folder/model"
