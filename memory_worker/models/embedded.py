"""The embedded language model: a small one that this project trained, shipped with the code, nothing to download.

It is both memory model and generator of the profile `embedded`. It knows generated chronicles
(`examples/chronicles.py`) and nothing else: of other texts its words are noise. Its config says so (`memorag_knows`),
and so does every answer. How it was trained: docs/training.md.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("embedded_model")
KNOWS = "memorag_knows"  # in a config.json: the one kind of text that the model was taught


def knows_chronicles_only(model: str | Path) -> bool:
    """Whether a checkpoint is marked as knowing generated chronicles alone; a hub's name never is."""
    config = Path(model) / "config.json"
    return config.exists() and json.loads(config.read_text("utf-8")).get(KNOWS) == "chronicles"


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a checkpoint: the embedded model's without what transformers imports to choose one, 4 s."""
    if Path(model) == FOLDER:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
